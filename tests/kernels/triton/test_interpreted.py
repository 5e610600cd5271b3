"""Runs the tests of `interpreted/`, one process a file, with Triton's interpreter in place of a GPU.

By hand: cd tests/kernels/triton/interpreted && TRITON_INTERPRET=1 python -m pytest
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
SLOW = {"test_sampling.py"}
FILES = [
    pytest.param(path.name, marks=pytest.mark.slow) if path.name in SLOW else path.name
    for path in sorted(FOLDER.glob("test_*.py"))
]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("name", FILES)
def test_kernels_agree_with_plain_torch(name: str) -> None:
    path = os.pathsep.join(filter(None, (str(FOLDER), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(FOLDER / name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
