"""Compile the native CPU kernels.

A wheel built with a compiler at hand carries ready libraries (`build_into`, called by the package
build). Otherwise the first use compiles the variant that this CPU needs into the user's cache
folder, once: some 60 s of processor time, which the cores share.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

SOURCE_FOLDER = Path(__file__).parent
READY_FOLDER = SOURCE_FOLDER / "ready"
COMMON_FLAGS: tuple[str, ...] = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread")
LINK_FLAGS = ("-shared", "-pthread")
# A process may have loaded an older libstdc++ than the compiler's: what needs the newer one could not be loaded then.
STATIC_FLAGS: tuple[str, ...] = (
    ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL") if sys.platform == "linux" else ()
)
COMPILE_TIMEOUT_S = 900  # a machine may have much else to do
LOCK_TIMEOUT_S = 960
VERSION_TIMEOUT_S = 60
MAX_COMPILERS = 8  # at once: each takes some hundred MiB

_BUILD_PREFIX = "build-"
_POLL_S = 0.02
_DIGEST_BYTES = 32
_WRITABLE_BY_OTHERS = 0o022

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
    if ready.exists() and _loads(ready):
        return ready
    compiler = _find_compiler()
    name = _file_name(variant, _compiler_identity(compiler))
    try:
        cached = cache_folder() / name
        _take_folder(cached.parent)
        if not _is_whole(cached):
            with _lock(cached.with_suffix(".lock")):
                if not _is_whole(cached):  # another process may have made it while this one waited
                    _compile_into_cache(compiler, variant, cached)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        raise BuildError(
            f"the compiled CPU kernels cannot be kept: {error}; "
            "set XDG_CACHE_HOME to a folder that this user can write to"
        ) from error
    return cached


def _loads(ready: Path) -> bool:
    """Whether a ready library suits this system, which may have an older C or C++ library than where it was made."""
    try:
        ctypes.CDLL(str(ready))
    except OSError as error:
        log.warning("the ready CPU kernels do not suit this system and are compiled here: %s", error)
        return False
    return True


def build_into(folder: Path) -> list[Path]:
    """Compile every variant into `folder`/ready, for the package build; return the files.

    `folder` is where the package's `kernels/cpu` lies in the build tree. Raises BuildError without
    a compiler: such a package then compiles at first use.
    """
    compiler = _find_compiler()
    paths = [folder / "ready" / _file_name(variant, "") for variant in variants()]
    for variant, path in zip(variants(), paths, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=_BUILD_PREFIX) as work:
            _compile(compiler, variant, Path(work)).replace(path)
    return paths


def _sources() -> list[Path]:
    return sorted(SOURCE_FOLDER.glob("*.cpp"))


def _file_name(variant: str, compiler_identity: str) -> str:
    """Name a library after all that it is made from, so that a stale one is never loaded."""
    digest = hashlib.sha256()
    for path in [*_sources(), *sorted(SOURCE_FOLDER.glob("*.h"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(
        repr(
            (COMMON_FLAGS, LINK_FLAGS, STATIC_FLAGS, variants()[variant], platform.machine(), compiler_identity)
        ).encode()
    )
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
    try:
        result = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the compiler does not say its version, set CXX to another one: {error}") from error
    return " ".join(compiler) + "\n" + result.stdout


def cache_folder() -> Path:
    """Return the folder for what was made here and can be made again: $XDG_CACHE_HOME/octavo, or ~/.cache/octavo."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "octavo"


def _take_folder(folder: Path) -> None:
    """Make the folder that libraries are loaded from, or see that nobody else can put one there. Raises BuildError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid not in _trusted_users():
        raise BuildError(
            f"{folder} belongs to user {status.st_uid}, who could put other code there: "
            "set XDG_CACHE_HOME to a folder of your own"
        )
    if status.st_mode & _WRITABLE_BY_OTHERS:
        folder.chmod(status.st_mode & ~_WRITABLE_BY_OTHERS & 0o7777)


def _trusted_users() -> tuple[int, int]:
    return 0, os.geteuid()


def _is_whole(library: Path) -> bool:
    """Whether there is a library that this user or root made, with all of its bytes: a power cut can leave less."""
    try:
        with library.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read()
    except FileNotFoundError:
        return False
    if status.st_uid not in _trusted_users() or status.st_mode & _WRITABLE_BY_OTHERS:
        return False
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def _compile_into_cache(compiler: list[str], variant: str, target: Path) -> None:
    """Compile `target`, whose last bytes are the digest of those before them: a loader reads past neither."""
    _remove_abandoned(target.parent)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=_BUILD_PREFIX) as folder:
        library = _compile(compiler, variant, Path(folder))
        digest = hashlib.sha256(library.read_bytes()).digest()
        library.chmod(0o755)
        with library.open("ab") as file:
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())
        library.replace(target)  # so nobody ever sees half a library
        sync_folder(target.parent)
    log.info("compiled the %s kernels in %.1f s: %s", variant, time.monotonic() - started, target)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` outlive a power failure."""
    file = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _remove_abandoned(folder: Path) -> None:
    """Remove what processes left that were killed while they compiled: nobody compiles for so long."""
    for path in folder.glob(f"{_BUILD_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > 2 * COMPILE_TIMEOUT_S:
                shutil.rmtree(path, ignore_errors=True)


def _compile(compiler: list[str], variant: str, folder: Path) -> Path:
    """Compile the sources side by side, with all that is written in `folder`; return the library there."""
    deadline = time.monotonic() + COMPILE_TIMEOUT_S
    flags = [*COMMON_FLAGS, *variants()[variant]]
    objects = {folder / f"{source.stem}.o": source for source in _sources()}
    # The longest first: no core is left with one of them when the others are through.
    largest_first = sorted(objects.items(), key=lambda item: item[1].stat().st_size, reverse=True)
    _run_all([[*compiler, *flags, "-c", "-o", str(o), str(source)] for o, source in largest_first], folder, deadline)
    library = folder / f"{variant}.so"
    link = [*compiler, *flags, *LINK_FLAGS, "-o", str(library), *map(str, objects)]
    try:
        _run_all([[*link, *STATIC_FLAGS]], folder, deadline)
    except BuildError:  # not every system has the static libraries
        _run_all([link], folder, deadline)
    return library


def _run_all(commands: Sequence[list[str]], folder: Path, deadline: float) -> None:
    """Run commands, some at a time, and end all of their processes if one fails or time is up. Raises BuildError."""
    waiting = list(enumerate(commands))
    running: dict[int, subprocess.Popen[bytes]] = {}
    environment = {**os.environ, "TMPDIR": str(folder)}
    try:
        while waiting or running:
            while waiting and len(running) < min(_num_processors(), MAX_COMPILERS):
                index, command = waiting.pop(0)
                with (folder / f"errors-{index}").open("wb") as errors:
                    running[index] = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env=environment,
                        start_new_session=True,
                    )  # fmt: skip
            for index, process in list(running.items()):
                if process.poll() is None:
                    continue
                if process.returncode != 0:
                    said = (folder / f"errors-{index}").read_text(errors="replace")
                    raise BuildError(
                        "compiling the CPU kernels failed; a compiler with C++17 is needed (GCC 11, Clang 12 or "
                        f"newer), or set CXX to another one:\n{said[-4000:]}"
                    )
                del running[index]
            if time.monotonic() > deadline:
                raise BuildError(f"compiling the CPU kernels took over {COMPILE_TIMEOUT_S} s")
            time.sleep(_POLL_S)
    finally:
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a compiler is several processes
            process.wait()


def _num_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
