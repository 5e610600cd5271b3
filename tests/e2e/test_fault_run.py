"""A short run of benchmarks/faults.py: each fault once, nothing lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "faults.py"
COUNTS = ("worker-kills", "worker-hangs", "scheduler-kills", "scheduler-hangs", "gateway-kills", "rolling-restarts")


@pytest.mark.timeout(400)
def test_each_fault_costs_no_stream_a_token(smollm2: Path) -> None:
    del smollm2  # it is fetched by now
    command = [sys.executable, str(SCRIPT), "--only", *(f"--{name}=1" for name in COUNTS)]
    command += ["--vanishing-clients=100", "--streams=5", "--tokens=32", "--show-logs"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok") == len(COUNTS) + 1, done.stdout
