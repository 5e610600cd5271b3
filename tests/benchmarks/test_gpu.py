"""The script for the day a GPU is at hand runs from end to end, in the interpreter, and notices what goes wrong."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "gpu"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: pip install triton")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("gpu_script", FOLDER / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_script", module)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script as its users do, from a plain checkout."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)  # minutes on a busy machine
@pytest.mark.parametrize("command", ["check", "bench"])
def test_every_section_runs_to_its_end_in_the_interpreter(command: str, script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    done = run(command, "--interpret", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(file.read_text())
    assert {"card", "torch", "triton"} <= results["machine"].keys()
    assert all(row["passed"] is not False for row in results["rows"])
    sections = {row["section"] for row in results["rows"]}
    assert (
        sections
        == {
            "check": {"kernels", "tokens", "ranks", "sanitizer"},
            "bench": {"ceilings", "attention", "rows", "linear", "experts", "steps", "throughput", "stack", "start"},
        }[command]
    )


def test_without_a_gpu_it_says_so_and_fails(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "has_gpu", lambda: False)
    assert script.main(["check"]) == 2
    assert "no GPU is here" in capsys.readouterr().err


def in_child(script: ModuleType, section: str, seconds: float) -> list[object]:
    parsed = argparse.Namespace(command="bench", model=None, interpret=True)
    return list(script.run_in_child(script.Section(section, "", "", seconds), parsed, script.ASSUMED))


def test_a_section_that_fails_is_a_failed_row(script: ModuleType) -> None:
    (row,) = in_child(script, "no such section", 60)
    assert row.verdict is False
    assert "ended with status 1" in row.note


def test_a_section_that_hangs_is_a_failed_row(script: ModuleType) -> None:
    (row,) = in_child(script, "ceilings", 0.01)
    assert row.verdict is False
    assert "did not end within" in row.note


def test_the_time_limits_of_a_command_are_less_than_ten_minutes(script: ModuleType) -> None:
    for sections in script.SECTIONS.values():
        assert sum(section.seconds for section in sections) < 600


def test_a_package_that_is_missing_or_too_old_is_named_at_once(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("gencode 7.35.1 runtime 6.33.0")

    from google.protobuf import runtime_version

    monkeypatch.setattr(runtime_version, "ValidateProtobufRuntimeVersion", refuse)
    monkeypatch.delitem(sys.modules, "octavo.worker.v1.worker_pb2", raising=False)
    monkeypatch.setattr(script, "NEEDED", ("no_such_package", *script.NEEDED))

    assert script.main(["check"]) == 2

    message = capsys.readouterr().err
    assert "No module named 'no_such_package'" in message
    assert "runtime 6.33.0" in message
    assert "requirements.txt" in message


def test_what_is_listed_for_the_gpu_is_what_the_project_needs(script: ModuleType) -> None:
    """Under the same bounds, so that the list does not fall behind."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    bounds = {(wanted.name, wanted.specifier) for wanted in map(Requirement, texts)}
    listed = [Requirement(line) for line in script.REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert {"protobuf", "grpcio", "pyzmq", "llguidance"} <= {wanted.name for wanted in listed}
    assert [wanted for wanted in listed if (wanted.name, wanted.specifier) not in bounds] == []


def test_a_row_is_judged_by_its_target(script: ModuleType) -> None:
    report = sys.modules["report"]
    met = report.Row("a", "b", 80.0, "%", at_least=80.0)
    missed = report.Row("a", "b", 1.4, "x", at_most=1.35)
    assert (met.verdict, missed.verdict, report.Row("a", "b", 3.0).verdict) == (True, False, None)
    assert report.failures([met, missed], judged=True) == 1
    assert report.failures([met, missed], judged=False) == 0
    assert report.failures([report.Row("a", "b", passed=False)], judged=False) == 1
    assert "FAIL" in report.table([missed], judged=True)
    assert "FAIL" not in report.table([missed], judged=False)
    assert report.from_json(missed.to_json()) == missed


def test_what_is_measured_replaces_what_is_assumed(script: ModuleType) -> None:
    row = sys.modules["report"].Row
    ceilings = script._ceilings([row("ceilings", "copy", 3000.0), row("ceilings", "bf16 product", 700.0)])
    assert (ceilings["copy"], ceilings["bf16"], ceilings["fp8"]) == (3000.0, 700.0, script.ASSUMED["fp8"])


def test_the_floor_of_a_step_is_the_table_of_the_documentation(script: ModuleType) -> None:
    models = importlib.import_module("models")
    h100 = {"copy": 3350.0, "bf16": 800.0}
    assert models.SMOLLM2.floor_us(1, 1024, h100) == pytest.approx(87, rel=0.02)
    assert models.LLAMA_8B.floor_us(256, 1024, h100) == pytest.approx(14700, rel=0.02)


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and a torch that finds it: make gpu-check")
def test_the_gpu_of_this_machine_computes_what_the_reference_does() -> None:
    done = run("check")
    assert done.returncode == 0, done.stdout + done.stderr
