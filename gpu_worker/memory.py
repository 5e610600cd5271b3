"""How much memory there is and this process takes, as far as the system tells."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from octavo.kernels.machine import memory_room

_DONT_NEED = 4  # MADV_DONTNEED


def free_memory_bytes() -> int:
    """Return the memory that can be had without swapping, within the limit of a container; 0 if unknown."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(min(int(line.split()[1]) * 1024, memory_room()))
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


class FilePages:
    """The pages of a file that is mapped into this process, as far as the system tells where."""

    def __init__(self, path: Path) -> None:
        """Look where the file is mapped by now."""
        self._ranges: list[tuple[int, int]] = []
        try:
            inode = str(path.stat().st_ino)
            for line in Path("/proc/self/maps").read_text().splitlines():
                fields = line.split(maxsplit=5)
                if fields[4] == inode and fields[-1] == str(path.resolve()):
                    start, _, end = fields[0].partition("-")
                    self._ranges.append((int(start, 16), int(end, 16)))
        except (OSError, IndexError, ValueError):
            self._ranges.clear()

    def drop(self, address: int, num_bytes: int) -> None:
        """Give whole pages in a piece of memory back, if they are this file's. Who reads them again gets them again."""
        page = os.sysconf("SC_PAGE_SIZE")
        start, end = -(-address // page) * page, (address + num_bytes) // page * page
        if start < end and any(first <= start and end <= last for first, last in self._ranges):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONT_NEED)
