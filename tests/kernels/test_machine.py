"""How many cores and how much memory a process may use, on systems whose files are written here."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from octavo.kernels.cpu.runtime import Runtime
from octavo.kernels.machine import available_cores, memory_nodes, memory_room

EIGHT = set(range(8))


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: EIGHT)


def put(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text + "\n")


def version_2(root: Path, own: str = "/", mounted: str = "/") -> None:
    put(root, "proc/self/cgroup", f"0::{own}")
    put(root, "proc/self/mountinfo", f"30 23 0:26 {mounted} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw")


def version_1(root: Path, own: str = "/", mounted: str = "/") -> None:
    put(root, "proc/self/cgroup", f"5:memory:{own}\n4:cpu,cpuacct:{own}\n1:name=systemd:/other\n0::/")
    lines = [
        f"31 25 0:27 {mounted} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct",
        f"32 25 0:28 {mounted} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
        "33 25 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
    ]
    put(root, "proc/self/mountinfo", "\n".join(lines))


def test_a_container_of_version_2_has_its_quota(tmp_path: Path) -> None:
    version_2(tmp_path)
    put(tmp_path, "sys/fs/cgroup/cpu.max", "300000 100000")
    assert available_cores(tmp_path) == 3
    put(tmp_path, "sys/fs/cgroup/cpu.max", "max 100000")
    assert available_cores(tmp_path) == 8


def test_a_container_of_version_1_has_its_quota(tmp_path: Path) -> None:
    version_1(tmp_path, own="/docker/abc", mounted="/docker/abc")  # the host's path, of which only this is mounted
    put(tmp_path, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "400000")
    put(tmp_path, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000")
    assert available_cores(tmp_path) == 4
    put(tmp_path, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1")
    assert available_cores(tmp_path) == 8


@pytest.mark.parametrize("limited", ["octavo.slice", "octavo.slice/worker.service"])
def test_the_quota_of_a_unit_and_of_its_slice_hold(limited: str, tmp_path: Path) -> None:
    version_2(tmp_path, own="/octavo.slice/worker.service")
    put(tmp_path, "sys/fs/cgroup/octavo.slice/cpu.max", "max 100000")
    put(tmp_path, "sys/fs/cgroup/octavo.slice/worker.service/cpu.max", "max 100000")
    put(tmp_path, "sys/fs/cgroup/other.slice/cpu.max", "100000 100000")
    put(tmp_path, f"sys/fs/cgroup/{limited}/cpu.max", "200000 100000")

    assert available_cores(tmp_path) == 2


def test_a_group_that_is_seen_from_another_namespace_counts_as_the_one_mounted(tmp_path: Path) -> None:
    version_2(tmp_path, own="/../../elsewhere")
    put(tmp_path, "sys/fs/cgroup/cpu.max", "200000 100000")

    assert available_cores(tmp_path) == 2


def test_a_part_of_a_core_is_a_thread(tmp_path: Path) -> None:
    version_2(tmp_path)
    put(tmp_path, "sys/fs/cgroup/cpu.max", "50000 100000")
    assert available_cores(tmp_path) == 1
    put(tmp_path, "sys/fs/cgroup/cpu.max", "250000 100000")
    assert available_cores(tmp_path) == 3


def test_two_processors_of_a_core_are_one(tmp_path: Path) -> None:
    for processor in EIGHT:
        siblings = f"{processor % 4},{processor % 4 + 4}"
        put(tmp_path, f"sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list", siblings)

    assert available_cores(tmp_path) == 4


def test_without_files_of_the_system_there_are_no_limits(tmp_path: Path) -> None:
    assert available_cores(tmp_path) == 8
    assert memory_room(tmp_path) == math.inf


def test_memory_is_what_the_limit_leaves_and_files_need_not_stay(tmp_path: Path) -> None:
    version_2(tmp_path)
    put(tmp_path, "sys/fs/cgroup/memory.current", "70000")
    put(tmp_path, "sys/fs/cgroup/memory.stat", "anon 30000\nactive_file 9000\ninactive_file 21000")

    put(tmp_path, "sys/fs/cgroup/memory.max", "100000")
    assert memory_room(tmp_path) == 60_000
    put(tmp_path, "sys/fs/cgroup/memory.max", "30000")
    assert memory_room(tmp_path) == 0
    put(tmp_path, "sys/fs/cgroup/memory.max", "max")
    assert memory_room(tmp_path) == math.inf


def test_memory_is_limited_by_groups_of_version_1_and_those_around_them(tmp_path: Path) -> None:
    version_1(tmp_path, own="/pod/worker")
    for group, limit in (("pod/worker", 2**63 - 4096), ("pod", 90_000), ("", 2**63 - 4096)):
        folder = f"sys/fs/cgroup/memory/{group}"
        put(tmp_path, f"{folder}/memory.limit_in_bytes", str(limit))
        put(tmp_path, f"{folder}/memory.usage_in_bytes", "70000")
        put(tmp_path, f"{folder}/memory.stat", "cache 9\ntotal_active_file 1000\ntotal_inactive_file 2000")

    assert memory_room(tmp_path) == 23_000


def test_memory_lies_on_all_nodes_that_the_processors_are_near_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for processor in range(8):
        put(tmp_path, f"sys/devices/system/cpu/cpu{processor}/node{processor // 4}/cpulist", "")
    assert memory_nodes(tmp_path) == [0, 1]

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5})  # as a worker that is bound to a socket

    assert memory_nodes(tmp_path) == []
    assert memory_nodes(tmp_path / "without") == []


@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="needs a kernel with nodes of memory")
@pytest.mark.parametrize(("nodes", "policy"), [(1, "interleave:0"), (0, "default"), (1 << 63, "default")])
def test_the_system_is_told_where_weights_lie_and_may_refuse(nodes: int, policy: str) -> None:
    library = Runtime(num_threads=1).library
    arena = library.octavo_arena_create(nodes)
    address = library.octavo_arena_allocate(arena, 1 << 20)

    areas = [line.split() for line in Path("/proc/self/numa_maps").read_text().splitlines()]
    before = [area for area in areas if int(area[0], 16) <= address]

    assert before[-1][1] == policy
    library.octavo_arena_destroy(arena)
