"""What of this machine a process may use: its processors and its memory, within the limits of its control groups."""

from __future__ import annotations

import math
import os
from pathlib import Path

_ROOT = Path("/")
_MOST_NODES = 64  # that the kernels can be told


def available_cores(root: Path = _ROOT) -> int:
    """Return how many threads can compute at once: one a core of the affinity mask, within the quota of processor time.

    Two processors of one core share its vector units and its cache: a second thread there makes no product faster, and
    is one more to wait for.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    processors = os.sched_getaffinity(0)
    cores = len({_siblings(processor, root) for processor in processors})
    # Rounded up: 2 threads that are stopped for a quarter of the time do more than one that never is.
    return max(1, math.ceil(min([cores, *(_quota(group) for group in _groups("cpu", root))])))


def memory_nodes(root: Path = _ROOT) -> list[int]:
    """Return the nodes of memory that this process's processors are near to; none where that is only one."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    processors = (root / f"sys/devices/system/cpu/cpu{processor}" for processor in os.sched_getaffinity(0))
    names = {path.name.removeprefix("node") for processor in processors for path in processor.glob("node[0-9]*")}
    nodes = sorted(map(int, names))
    return nodes if len(nodes) > 1 and nodes[-1] < _MOST_NODES else []


def memory_room(root: Path = _ROOT) -> float:
    """Return the bytes that limits leave, pages of files that can be dropped included; infinity without a limit."""
    return min((_room(group) for group in _groups("memory", root)), default=math.inf)


def _siblings(processor: int, root: Path) -> str:
    """Return a name of the core that a processor is of."""
    try:
        return (root / f"sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(processor)


def _groups(controller: str, root: Path) -> list[Path]:
    """Return the folders of the control groups whose limits hold here: this process's own and those around it.

    Of version 2 and of version 1, as both can be there. In a container what is outside of it cannot be seen, and
    nothing of it is returned.
    """
    folders: list[Path] = []
    try:
        own = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
        mounts = [line.split(" - ") for line in (root / "proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return folders
    for place, system in mounts:
        kind, _, options = system.split(" ", 2)
        if kind != "cgroup2" and not (kind == "cgroup" and controller in options.split(",")):
            continue
        mounted, mount_point = (Path(path) for path in place.split()[3:5])
        for _, controllers, path in own:
            if controller in controllers.split(",") if kind == "cgroup" else not controllers:
                is_below = Path(path).is_relative_to(mounted) and ".." not in Path(path).parts
                inner = Path(path).relative_to(mounted) if is_below else Path()
                top = root / mount_point.relative_to("/")
                folders += [top / inner, *(top / parent for parent in inner.parents)]
    return folders


def _quota(group: Path) -> float:
    """Return how many processors a group may keep busy; infinity without a limit."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / name).read_text() for name in files).split()
            return math.inf if quota in ("max", "-1") else int(quota) / int(period)
        except (OSError, ValueError):  # of another version, or the outermost group, which has none
            continue
    return math.inf


def _room(group: Path) -> float:
    """Return what the limit of a group leaves; infinity without a limit."""
    for limit, current, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        try:
            left = int((group / limit).read_text()) - int((group / current).read_text())
            kinds = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            files = int(kinds[f"{prefix}inactive_file"]) + int(kinds[f"{prefix}active_file"])
            return max(left + files, 0)
        except (OSError, ValueError, KeyError):  # of another version, or "max"
            continue
    return math.inf
