"""Runs `tests/ray_cluster` where Ray is: in an environment of its own, which is made at the first time.

By hand, with Ray installed: python -m pytest tests/ray_cluster
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import ray_environment

FOLDER = Path(__file__).resolve().parent.parent / "ray_cluster"


@pytest.mark.slow
@pytest.mark.timeout(900)  # minutes on a busy machine, and the first time installs Ray
def test_on_a_local_cluster() -> None:
    python, problem = ray_environment.find_python()
    if not python:
        pytest.skip(problem)
    options = ["-q", "-x", "-p", "no:cacheprovider", "--durations=5", "-W", "ignore"]
    done = subprocess.run(
        [python, "-m", "pytest", *options, str(FOLDER)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_ray_the_package_says_what_to_install() -> None:
    code = "import sys; sys.modules['ray'] = None; import octavo.ray"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == ('ModuleNotFoundError: octavo.ray needs Ray: pip install "octavo[ray]"')
