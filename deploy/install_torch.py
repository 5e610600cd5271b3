"""Installs the torch that fits this machine: with CUDA where there is an NVIDIA GPU, else the smaller one without.

    python deploy/install_torch.py [--torch REQUIREMENT]

A torch that is there stays, but for one without CUDA on a machine with an NVIDIA GPU. With `--torch` whatever is
there stays, and what is installed is what it says. Used by the Makefile, with the Python of the environment.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

RELEASE = "2.13.0"
_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_DRIVER_FILES = ("/proc/driver/nvidia/version", "/dev/nvidia0", "/dev/nvidiactl")
_ASK = "import torch; print(torch.__version__, torch.version.cuda or torch.version.hip or '')"


def has_nvidia_gpu() -> bool:
    """Tell whether there is a driver, or a tool of it that finds a GPU (as under WSL)."""
    if any(Path(name).exists() for name in _DRIVER_FILES):
        return True
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    done = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return done.returncode == 0 and "GPU" in done.stdout


def attempts(has_gpu: bool, system: str) -> list[list[str]]:
    """Return what pip is asked for, one after the other until it has it. `system` is sys.platform."""
    if not system.startswith("linux"):
        return [[f"torch=={RELEASE}"]]  # one build for all
    if has_gpu:  # the registry's build has CUDA; one without may lie beside it, under a version that pip prefers
        return [[f"torch=={RELEASE},!={RELEASE}+cpu"]]
    without = f"torch=={RELEASE}+cpu"
    quick = ["--retries", "1", "--timeout", "15"]  # where the index cannot be reached the last one serves as well
    return [[without], [without, "--extra-index-url", _CPU_INDEX, *quick], [f"torch=={RELEASE}"]]


def ensure(
    wanted: str,
    has_gpu: bool,
    installed: Callable[[], tuple[str, str] | None],
    pip: Callable[[list[str]], bool],
    system: str = sys.platform,
) -> str:
    """Return a line that says which torch there is now. Raises SystemExit if none could be installed.

    wanted     a requirement, or "" for what fits the machine
    installed  returns the version and the version of CUDA or ROCm, "" without; None if torch is not there
    pip        installs; tells whether it did
    """
    found = installed()
    fits = found is not None and (bool(wanted) or bool(found[1]) or not has_gpu)
    if not fits:
        ways = [[wanted]] if wanted else attempts(has_gpu, system)
        if not any(pip(way) for way in ways):
            raise SystemExit(
                f"{ways[-1][0]} could not be installed: let pip reach an index that has it, or say what to install "
                f"instead, for example TORCH='torch=={RELEASE}+cpu' to compute on the CPU"
            )
        found = installed()
    if found is None:
        raise SystemExit("torch was installed, but cannot be imported")
    version, runtime = found
    machine = "there is an NVIDIA GPU" if has_gpu else "there is no NVIDIA GPU"
    return f"torch {version} ({f'CUDA or ROCm {runtime}' if runtime else 'for the CPU alone'}); {machine} here"


def _installed() -> tuple[str, str] | None:
    done = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    version, _, runtime = done.stdout.strip().partition(" ")
    return version, runtime


def _pip(arguments: list[str]) -> bool:
    command = [sys.executable, "-m", "pip", "install", "--quiet", *arguments]
    return subprocess.run(command, check=False).returncode == 0


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="", help="what to install, in pip's words")
    print(ensure(parser.parse_args().torch, has_nvidia_gpu(), _installed, _pip))


if __name__ == "__main__":
    main()
