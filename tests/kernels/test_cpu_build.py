from __future__ import annotations

import fcntl
import logging
import os
import platform
import shutil
import stat
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from octavo.kernels.cpu import build, library

ARM_COMPILER = "aarch64-linux-gnu-g++"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a compiler that writes down its calls instead of compiling."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "READY_FOLDER", tmp_path / "ready")
    use_compiler(monkeypatch, tmp_path, 'echo "$@" >> "$0.calls"; while [ "$1" != -o ]; do shift; done; echo > "$2"')
    return tmp_path / "cache" / "octavo"


def use_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> Path:
    path = folder / "fake-c++"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit\n{script}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(path))
    return path


def num_compiles(tmp_path: Path) -> int:
    """How often a library was linked."""
    calls = tmp_path / "fake-c++.calls"
    return sum("-shared" in line for line in calls.read_text().splitlines()) if calls.exists() else 0


def files_in(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.suffix != ".lock"]


def test_a_library_is_compiled_once_and_then_found_in_the_cache(cache: Path, tmp_path: Path) -> None:
    first = build.library_path("portable")
    second = build.library_path("portable")

    assert first == second
    assert first.parent == cache
    assert num_compiles(tmp_path) == 1
    assert files_in(cache) == [first]  # nothing is left behind


def test_other_sources_or_flags_make_another_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = build.library_path("portable")
    sources = tmp_path / "sources"
    shutil.copytree(build.SOURCE_FOLDER, sources, ignore=shutil.ignore_patterns("__pycache__"))
    (sources / "simd.h").write_text((sources / "simd.h").read_text() + "\n// changed\n")
    monkeypatch.setattr(build, "SOURCE_FOLDER", sources)
    second = build.library_path("portable")
    monkeypatch.setattr(build, "COMMON_FLAGS", (*build.COMMON_FLAGS, "-g"))
    third = build.library_path("portable")

    assert len({first, second, third}) == 3


def test_a_ready_library_is_used_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ready = build.build_into(tmp_path)
    monkeypatch.setattr(build, "_loads", ready.__contains__)
    monkeypatch.setenv("CXX", "/does/not/exist")

    assert sorted(build.library_path(variant) for variant in build.variants()) == sorted(ready)


def test_a_ready_library_that_does_not_load_is_compiled_here(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ready = build.build_into(tmp_path)  # what the stand-in writes is no library

    assert build.library_path("portable").parent == cache
    assert "do not suit this system" in caplog.text

    monkeypatch.setenv("CXX", "/does/not/exist")
    shutil.rmtree(cache)
    with pytest.raises(build.BuildError, match="CXX"):
        build.library_path("portable")
    assert all(path.exists() for path in ready)


def test_a_machine_without_a_compiler_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", "")

    with pytest.raises(build.BuildError, match=r"apt install g\+\+"):
        build.library_path("portable")


def test_a_failing_compiler_is_quoted_and_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_compiler(monkeypatch, tmp_path, "echo 'simd.h:1: no such instruction' >&2; exit 1")

    with pytest.raises(build.BuildError, match="no such instruction"):
        build.library_path("portable")

    assert files_in(cache) == []


def test_a_lock_that_is_never_released_ends_in_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True)
    monkeypatch.setattr(build, "LOCK_TIMEOUT_S", 0)
    target = cache / "x.lock"
    with target.open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)

        with pytest.raises(build.BuildError, match="another process"), build._lock(target):
            pass


@pytest.mark.parametrize("kept", [0, 1, 5])
def test_a_library_that_a_power_cut_left_cut_off_is_compiled_again(kept: int, tmp_path: Path) -> None:
    library = build.library_path("portable")
    whole = library.read_bytes()
    library.write_bytes(whole[:kept])

    assert build.library_path("portable").read_bytes() == whole
    assert num_compiles(tmp_path) == 2


def test_a_library_that_others_may_change_is_compiled_again(tmp_path: Path) -> None:
    library = build.library_path("portable")
    library.chmod(0o777)

    assert stat.S_IMODE(build.library_path("portable").stat().st_mode) == 0o755
    assert num_compiles(tmp_path) == 2


def test_no_other_user_can_put_a_library_where_this_one_loads_it_from(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    build.library_path("portable")
    assert stat.S_IMODE(cache.stat().st_mode) == 0o755

    monkeypatch.setattr(build, "_trusted_users", lambda: (cache.stat().st_uid + 1,))
    with pytest.raises(build.BuildError, match="XDG_CACHE_HOME"):
        build.library_path("portable")


def test_a_folder_that_nobody_can_write_to_is_named_with_the_remedy(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.write_text("a file")
    with pytest.raises(build.BuildError, match="XDG_CACHE_HOME"):
        build.library_path("portable")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(build.BuildError, match="XDG_CACHE_HOME"):
        build.library_path("portable")


def test_a_compiler_that_takes_too_long_is_ended_with_all_that_it_started(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started = tmp_path / "fake-c++.children"
    use_compiler(monkeypatch, tmp_path, 'sleep 600 & echo $! >> "$0.children"; wait')

    def monotonic() -> float:  # time is up once a compiler has started another process
        return float("inf") if started.exists() and started.read_text() else 0.0

    monkeypatch.setattr(build, "time", SimpleNamespace(monotonic=monotonic, sleep=time.sleep, time=time.time))

    with pytest.raises(build.BuildError, match="took over"):
        build.library_path("portable")

    children = started.read_text().split()
    assert children
    while not all(has_ended(int(child)) for child in children):  # they are killed; the kernel takes a moment
        time.sleep(0.01)
    assert files_in(cache) == []


def has_ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_what_a_killed_compile_left_is_removed_by_the_next_one(cache: Path) -> None:
    abandoned, in_use = cache / "build-abandoned", cache / "build-in-use"
    for folder in (abandoned, in_use):
        folder.mkdir(parents=True)
        (folder / "some.o").touch()
    os.utime(abandoned, (0, 0))

    library = build.library_path("portable")

    assert sorted(files_in(cache)) == [in_use, library]


def test_a_system_without_static_libraries_gets_a_library_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = 'case "$*" in *-static*) exit 1;; esac; while [ "$1" != -o ]; do shift; done; echo > "$2"'
    use_compiler(monkeypatch, tmp_path, script)

    assert build.library_path("portable").exists()


def test_a_library_that_cannot_be_loaded_is_an_error_of_the_build() -> None:
    with pytest.raises(build.BuildError, match="cannot be loaded"):
        library.load.__wrapped__("portable")


def test_compiling_is_logged_and_prints_nothing(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        build.library_path("portable")

    assert "compiled the portable kernels" in caplog.text
    assert capfd.readouterr() == ("", "")


def test_a_variant_that_the_cpu_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_cpu", lambda: library.Cpu("", {"sse2"}))

    assert library.runnable_variants() == ["portable"]
    with pytest.raises(ValueError, match="this machine can run portable"):
        library.load.__wrapped__("avx2")


ALL_FLAGS = set[str]().union(*library.NEEDED_FLAGS.values())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86 processor")
@pytest.mark.parametrize(("vendor", "best"), [("AuthenticAMD", "avx512_bf16"), ("GenuineIntel", "avx512_vnni")])
def test_products_are_of_bf16_where_that_is_faster(vendor: str, best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_cpu", lambda: library.Cpu(vendor, ALL_FLAGS - {"amx_tile"}))

    assert library.runnable_variants()[0] == best
    assert sorted(library.runnable_variants()) == sorted(build.X86_VARIANTS.keys() - {"amx"} | {"portable"})


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86 processor")
@pytest.mark.parametrize("is_permitted", [True, False])
def test_tile_registers_are_used_where_the_system_permits_it(
    is_permitted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_cpu", lambda: library.Cpu("GenuineIntel", ALL_FLAGS))
    monkeypatch.setattr(library, "_permits_amx", lambda: is_permitted)

    assert library.runnable_variants()[0] == ("amx" if is_permitted else "avx512_vnni")
    assert ("amx" in library.runnable_variants()) == is_permitted


@pytest.mark.skipif(shutil.which(ARM_COMPILER) is None, reason="apt-get install g++-aarch64-linux-gnu")
def test_the_variants_for_arm_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", ARM_COMPILER)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(build, "COMMON_FLAGS", (*build.COMMON_FLAGS, "-Wall", "-Wextra", "-Werror"))

    ready = build.build_into(tmp_path)

    assert len(ready) == len(build.ARM_VARIANTS)
    assert all(path.read_bytes().startswith(b"\x7fELF") for path in ready)
