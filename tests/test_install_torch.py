"""`make` installs the torch that fits the machine, and says which."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
CPU, CUDA = ("2.13.0+cpu", ""), ("2.13.0+cu130", "13.0")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_torch", ROOT / "deploy" / "install_torch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Machine:
    """What is installed, and what pip can have."""

    def __init__(self, there: tuple[str, str] | None, available: dict[str, tuple[str, str]]) -> None:
        self.there = there
        self.asked: list[str] = []
        self._available = available

    def pip(self, arguments: list[str]) -> bool:
        self.asked.append(" ".join(arguments))
        found = self._available.get(arguments[0])
        self.there = found or self.there
        return found is not None

    def installed(self) -> tuple[str, str] | None:
        return self.there


def ensure(script: ModuleType, machine: Machine, *, gpu: bool, wanted: str = "") -> str:
    line: str = script.ensure(wanted, gpu, machine.installed, machine.pip, "linux")
    return line


def test_a_machine_with_a_gpu_gets_the_build_with_cuda_also_in_place_of_one_without(script: ModuleType) -> None:
    for there in (None, CPU):
        machine = Machine(there, {"torch==2.13.0,!=2.13.0+cpu": CUDA})
        assert "2.13.0+cu130 (CUDA or ROCm 13.0)" in ensure(script, machine, gpu=True)
    admitted = Requirement(machine.asked[0]).specifier
    assert admitted.contains("2.13.0")
    assert not admitted.contains("2.13.0+cpu")


def test_a_machine_without_a_gpu_gets_the_small_build_or_else_whatever_there_is(script: ModuleType) -> None:
    machine = Machine(None, {"torch==2.13.0+cpu": CPU})
    assert "for the CPU alone" in ensure(script, machine, gpu=False)
    assert len(machine.asked) == 1

    machine = Machine(None, {"torch==2.13.0": CUDA})
    ensure(script, machine, gpu=False)
    assert machine.asked[-1] == "torch==2.13.0"
    assert any("download.pytorch.org/whl/cpu" in asked for asked in machine.asked)


@pytest.mark.parametrize(("there", "gpu", "wanted"), [(CUDA, True, ""), (CPU, False, ""), (CPU, True, "torch")])
def test_a_torch_that_fits_or_was_chosen_stays(
    script: ModuleType, there: tuple[str, str], gpu: bool, wanted: str
) -> None:
    machine = Machine(there, {})
    ensure(script, machine, gpu=gpu, wanted=wanted)
    assert machine.asked == []


def test_what_the_user_says_is_installed_and_nothing_else(script: ModuleType) -> None:
    machine = Machine(None, {"torch==2.9": CUDA})
    ensure(script, machine, gpu=False, wanted="torch==2.9")
    assert machine.asked == ["torch==2.9"]


def test_where_no_torch_can_be_had_the_message_says_what_to_do(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"TORCH='torch==2.13.0\+cpu'"):
        ensure(script, Machine(CPU, {}), gpu=True)


def test_a_driver_or_its_tool_tells_of_a_gpu(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "_DRIVER_FILES", (str(tmp_path / "nvidia0"),))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not script.has_nvidia_gpu()
    tool = tmp_path / "nvidia-smi"
    for answer, is_there in (("echo No devices were found; exit 6", False), ("echo 'GPU 0: H100'", True)):
        tool.write_text(f"#!/bin/sh\n{answer}\n")
        tool.chmod(0o755)
        assert script.has_nvidia_gpu() == is_there
    tool.unlink()
    (tmp_path / "nvidia0").touch()
    assert script.has_nvidia_gpu()


def test_the_images_have_the_same_release(script: ModuleType) -> None:
    pinned = re.findall(r"^ARG TORCH=(\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert set(pinned) == {f"torch=={script.RELEASE}"}


@pytest.mark.parametrize(("flags", "asked"), [([], "--torch ''"), (["TORCH=torch==2.9"], "--torch 'torch==2.9'")])
def test_make_passes_on_what_the_user_says(flags: list[str], asked: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", "setup", "VENV=build/none", *flags], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"deploy/install_torch.py {asked}" in done.stdout
