"""Runs the tests of `interpreted/` with Triton's interpreter in place of a GPU, in two processes.

By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/interpreted
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
RELEASE = metadata.version("triton") if importlib.util.find_spec("triton") else "none"


@pytest.mark.slow
@pytest.mark.timeout(900)  # minutes on a busy machine
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: pip install triton")
@pytest.mark.skipif(not RELEASE.startswith("3.9."), reason=f"the interpreter is repaired in Triton 3.9, not {RELEASE}")
@pytest.mark.parametrize("chosen", ["not gates", pytest.param("gates", marks=pytest.mark.gates)])
def test_kernels_agree_with_plain_torch(chosen: str) -> None:
    """With `gates`: mutants of the kernels do not."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    options = ["-q", "-x", "-p", "no:cacheprovider", "-n", "2", "--dist", "worksteal", "-m", chosen]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(FOLDER)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
