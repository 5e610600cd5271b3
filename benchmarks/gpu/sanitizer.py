"""The kernels' check again under NVIDIA's compute-sanitizer, if it is installed: memory errors and races."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from lab import Lab
from report import Row

_TOOLS = ("memcheck", "racecheck")
_SECONDS = 100


def check_sanitizer(lab: Lab) -> Iterator[Row]:
    """Run the small problems of `sanitized.py` under each tool."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if lab.interpreted or program is None:
        yield Row("sanitizer", "compute-sanitizer", note="not here: skipped")
        return
    script = Path(__file__).parent / "sanitized.py"
    for tool in _TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, str(script)]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                timeout=_SECONDS,
                env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
        except subprocess.TimeoutExpired:
            yield Row("sanitizer", tool, note=f"did not end within {_SECONDS} s: nothing is known")
            continue
        lines = [line for line in done.stdout.splitlines() if line.startswith("=========")]
        yield Row(
            "sanitizer",
            tool,
            passed=done.returncode == 0,
            note=lines[-1] if lines else f"exit status {done.returncode}",
        )
