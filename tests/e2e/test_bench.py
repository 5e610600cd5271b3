"""`octavo bench` on a real deployment: what it prints is what happened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .stack import Stack

BENCH = [sys.executable, "-m", "octavo.services.cli", "bench"]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*BENCH, *arguments], capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("over_http", [False, True])
def test_every_case_is_measured_and_every_token_counted(stack: Stack, tmp_path: Path, over_http: bool) -> None:
    where = ["--url", stack.http_url, "--served-model", "smollm2-135m-instruct"] if over_http else []
    cases = "c2,r50,prefix" if over_http else "c1,offline,prefill"
    done = bench(
        "--address", stack.address, *where, "--case", cases, "--requests", "3", "--max-tokens", "5", "--repeats", "1",
        "--output", str(tmp_path / "out.json"), "--api-key", "k-secret",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    written = (tmp_path / "out.json").read_text()
    assert "k-secret" not in written
    runs = json.loads(written)["runs"]
    assert list(runs) == cases.split(",")
    for case, (run,) in runs.items():
        each = {"prefill": 1, "prefix": 32}.get(case, 5)
        assert run["output_tokens"] == each * run["requests"]
        assert run["failed"] == 0
        assert f"| {case} " in done.stdout
    if not over_http:
        assert 1500 < runs["prefill"][0]["prompt_tokens"] / 3 < 2800  # about 2,048 each


def test_it_starts_a_server_of_its_own_and_measures_it(smollm2: Path, tmp_path: Path) -> None:
    done = bench(
        str(smollm2), "--serve-flag=--device=cpu", "--case", "c1", "--requests", "2", "--max-tokens", "4",
        "--repeats", "1", "--output", str(tmp_path / "out.json"),
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "out.json").read_text())
    assert measured["ready_s"] > 0
    assert measured["peak_memory_bytes"] > 100 << 20  # the weights at least
    assert measured["runs"]["c1"][0]["cpu_s"] > 0


def test_a_server_that_is_not_there_is_a_failure_and_not_a_figure() -> None:
    done = bench("--address", "127.0.0.1:1", "--case", "c1", "--requests", "1", "--repeats", "1")

    assert (done.returncode, done.stdout) == (1, "")
    assert "no server at 127.0.0.1:1" in done.stderr


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = bench(str(tmp_path / "nothing"), "--case", "c1")

    assert done.returncode == 1
    assert "octavo bench: " in done.stderr
