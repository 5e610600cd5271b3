"""What is made from the code and the values is current, and what the chart renders is what was reviewed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .chart import CHART, rendered_text

GOLDEN = Path(__file__).parent / "golden"
REVIEWED = ["default", "cpu", "gpu", "gpu-tensor-parallel", "cpu-production", "ranks-over-nodes", "least"]


def test_the_schema_and_the_readme_are_current() -> None:
    done = subprocess.run(
        [sys.executable, str(CHART.parent / "generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", REVIEWED)
def test_manifests_are_as_reviewed(name: str, request: pytest.FixtureRequest) -> None:
    """After a change that is meant: pytest tests/helm/test_generated.py --write-golden, then read the difference."""
    text = re.sub(r"(resume\.key: ).*", r"\1RANDOM", rendered_text(name))
    golden = GOLDEN / f"{name}.yaml"
    if request.config.getoption("--write-golden", default=False):
        GOLDEN.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()
