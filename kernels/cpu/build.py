"""Compile the native CPU kernels.

A wheel built with a compiler at hand carries ready libraries (`build_into`, called by the package
build). Otherwise the first use compiles the variant that this CPU needs into the user's cache
folder, which takes some ten seconds once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

SOURCE_FOLDER = Path(__file__).parent
READY_FOLDER = SOURCE_FOLDER / "ready"
COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-pthread")
COMPILE_TIMEOUT_S = 300
LOCK_TIMEOUT_S = 360

# Flags of each variant, best first. Fused multiply-add happens only where the source says so:
# -ffp-contract=off keeps the sampler's noise equal in all of them.
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq")
_AVX512_BF16 = (*_AVX512, "-mavx512vnni", "-mavx512bf16")
X86_VARIANTS: dict[str, tuple[str, ...]] = {
    "amx": (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"),
    "avx512_bf16": _AVX512_BF16,
    "avx512_vnni": (*_AVX512, "-mavx512vnni"),
    "avx512": _AVX512,
    "avx2_vnni": (*_AVX2, "-mavxvnni"),
    "avx2": _AVX2,
}
ARM_VARIANTS: dict[str, tuple[str, ...]] = {"neon_bf16": ("-march=armv8.2-a+fp16+bf16+dotprod",), "neon": ()}


class BuildError(Exception):
    """The kernels could not be compiled; the message says what to install or what the compiler said."""


def variants() -> dict[str, tuple[str, ...]]:
    """Return the variants that can be compiled for this kind of machine: name to compiler flags."""
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):  # where NEON is always there, and portable code uses it
        return ARM_VARIANTS
    return {**(X86_VARIANTS if machine in ("x86_64", "amd64") else {}), "portable": ()}


def library_path(variant: str) -> Path:
    """Return the compiled library of `variant`, compiling it now if need be. Raises BuildError."""
    ready = READY_FOLDER / _file_name(variant, "")
    if ready.exists():
        return ready
    compiler = _find_compiler()
    cached = cache_folder() / _file_name(variant, _compiler_identity(compiler))
    if cached.exists():
        return cached
    cached.parent.mkdir(parents=True, exist_ok=True)
    with _lock(cached.with_suffix(".lock")):
        if not cached.exists():  # another process may have made it while this one waited
            _compile(compiler, variant, cached)
    return cached


def build_into(folder: Path) -> list[Path]:
    """Compile every variant into `folder`/ready, for the package build; return the files.

    `folder` is where the package's `kernels/cpu` lies in the build tree. Raises BuildError without
    a compiler: such a package then compiles at first use.
    """
    compiler = _find_compiler()
    paths = [folder / "ready" / _file_name(variant, "") for variant in variants()]
    for variant, path in zip(variants(), paths, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        _compile(compiler, variant, path)
    return paths


def _sources() -> list[Path]:
    return sorted(SOURCE_FOLDER.glob("*.cpp"))


def _file_name(variant: str, compiler_identity: str) -> str:
    """Name a library after all that it is made from, so that a stale one is never loaded."""
    digest = hashlib.sha256()
    for path in [*_sources(), *sorted(SOURCE_FOLDER.glob("*.h"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(repr((COMMON_FLAGS, variants()[variant], platform.machine(), compiler_identity)).encode())
    return f"octavo_cpu_{variant}_{digest.hexdigest()[:16]}.so"


def _find_compiler() -> list[str]:
    """Return the C++ compiler's command: $CXX if set, else the first of the usual names."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise BuildError(
        f"the CPU kernels need a C++17 compiler and {' '.join(chosen) or 'none of c++, g++, clang++'} was found; "
        "install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install) "
        "or set CXX"
    )


def _compiler_identity(compiler: list[str]) -> str:
    """Return the compiler's command and version."""
    result = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=False)
    return " ".join(compiler) + "\n" + result.stdout


def cache_folder() -> Path:
    """Return the folder for what was made here and can be made again: $XDG_CACHE_HOME/octavo, or ~/.cache/octavo."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "octavo"


def _compile(compiler: list[str], variant: str, target: Path) -> None:
    """Compile into a temporary name and rename, so that nobody ever sees half a library."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
        output = Path(folder) / target.name
        flags = [*COMMON_FLAGS, *variants()[variant]]
        command = [*compiler, *flags, "-o", str(output), *map(str, _sources())]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise BuildError(f"compiling the {variant} kernels took over {COMPILE_TIMEOUT_S} s") from None
        if result.returncode != 0:
            raise BuildError(
                f"compiling the {variant} kernels failed; a compiler with C++17 is needed (GCC 11, Clang 12 or "
                f"newer), or set CXX to another one:\n{result.stderr[-4000:]}"
            )
        output.replace(target)
    log.info("compiled the %s kernels in %.1f s: %s", variant, time.monotonic() - started, target)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a file lock; raises BuildError when another process keeps it too long."""
    with path.open("w") as file:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildError(f"another process has held {path} for {LOCK_TIMEOUT_S} s") from None
                time.sleep(0.1)
        yield
