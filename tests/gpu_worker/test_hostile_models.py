"""A worker that is given a damaged, hostile or odd model says so in one line and ends, or serves it rightly."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .hostile_models import CASES

# What a start takes besides the model's own files: the arena's first huge pages, tables, an imported module.
_ROOM_BYTES = 64 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("hostile")
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, dict[str, Any]]:
    """What came of each case, all in one process: its peak of memory is counted for each."""
    command = [sys.executable, "-m", "tests.gpu_worker.hostile_models", str(folder), "plain", *CASES]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=480, check=False)
        lines, rest = done.stdout.splitlines(), done.stderr
    except subprocess.TimeoutExpired as error:
        lines, rest = (error.stdout or b"").decode().splitlines(), "it hangs with the next one"
    results = [json.loads(line) for line in lines]
    assert len(results) == len(CASES) + 1, (results[-1:], rest[-2000:])
    return {result["name"]: result for result in results}  # the first "plain" was for the imports


@pytest.mark.parametrize("name", CASES)
def test_one_line_says_what_is_wrong_or_the_model_is_served(name: str, found: dict[str, dict[str, Any]]) -> None:
    result = found[name]
    if not CASES[name].says:
        assert result["status"] == 0, result["errors"]
        assert result["errors"] == []
        assert result["logits"] == found[like if (like := name.split(",")[0]) in found else "plain"]["logits"]
    else:
        assert result["status"] == 1
        (line,) = result["errors"]
        assert re.search(CASES[name].says, line), line
        assert re.search(r"/model\d+\b|device cpu", line), line  # what is to be changed
        assert "\n" not in line
        assert len(line) < 1200
        assert line.isprintable()
        assert not result["logits"]


@pytest.mark.parametrize("name", [name for name in CASES if name != "theta 10^-300"])  # seen in tables alone
def test_what_is_said_before_a_model_is_loaded_is_what_a_start_says(
    name: str, found: dict[str, dict[str, Any]]
) -> None:
    assert bool(found[name]["inspected"]) == bool(CASES[name].says), found[name]["inspected"]


@pytest.mark.parametrize("name", CASES)
def test_no_case_takes_much_more_memory_than_its_files(name: str, found: dict[str, dict[str, Any]]) -> None:
    assert found[name]["bytes"] < _ROOM_BYTES + 1.5 * found[name]["size"]


def test_nothing_is_left_half_written(folder: Path, found: dict[str, dict[str, Any]]) -> None:
    assert found
    assert {path.suffix for path in (folder / "cache").iterdir()} == {".packed"}
