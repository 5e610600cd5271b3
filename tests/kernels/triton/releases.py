"""The releases of Triton that kernels are compiled with: those that users get with their torch."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST = "3.6.0"
"""Of torch 2.11. The newest one is the one of development."""

IMAGE = "3.7.1"
"""Of torch 2.13: the one in the image of the worker with CUDA."""

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "octavo" / "tools"


@functools.cache
def find_triton(release: str) -> tuple[Path | None, str]:
    """Return a folder that has a release of Triton alone, to be the first of PYTHONPATH; or None and why there is none.

    It is installed into the user's cache folder (some 700 MB), once.
    """
    folder = CACHE / f"triton-{release}-py{sys.version_info.major}{sys.version_info.minor}"
    if folder.exists():
        return folder, ""
    part = folder.with_name(f"{folder.name}.{os.getpid()}")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
    try:
        done = subprocess.run(
            [*install, "--target", str(part), f"triton=={release}"],
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        if done.returncode:
            raise OSError(done.stderr.strip().splitlines()[-1:])
        part.replace(folder)
    except (subprocess.TimeoutExpired, OSError) as error:
        return None, (
            f"triton=={release} cannot be had from the package registry ({error}): "
            f"let pip reach one that has it, or unpack its wheel into {folder}"
        )
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder, ""


if __name__ == "__main__":
    for wanted in sys.argv[1:] or (OLDEST,):
        found, problem = find_triton(wanted)
        print(found or problem)
