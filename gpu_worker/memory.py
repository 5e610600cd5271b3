"""How much memory there is and this process takes, as far as the system tells."""

from __future__ import annotations

import os
from pathlib import Path


def free_memory_bytes() -> int:
    """Return the memory that can be had without swapping; 0 if unknown."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
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
