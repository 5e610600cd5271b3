"""How much memory there is and this process takes, as far as the system tells."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def free_memory_bytes(cgroup: Path = _CGROUP) -> int:
    """Return the memory that can be had without swapping, within the limit of a container; 0 if unknown."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(min(int(line.split()[1]) * 1024, _room_in(cgroup)))
    except OSError:
        pass
    return 0


def resident_bytes() -> int:
    """Return the memory that this process takes; 0 if unknown."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _room_in(cgroup: Path) -> float:
    """Return what a limit leaves, pages of files that can be dropped included; infinity if there is none."""
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        kinds = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return max(limit - used + int(kinds["inactive_file"]) + int(kinds["active_file"]), 0)
    except (OSError, ValueError, KeyError):  # no cgroup v2, or "max"
        return math.inf
