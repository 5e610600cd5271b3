"""What a process tells the operating system and its supervisor about itself, and is told."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def set_name(name: str, argv: Sequence[str] = ()) -> None:
    """Make `ps` show this process as `name` (its first 15 bytes in `comm`) with the command line `name argv...`.

    Does nothing where the system has no way to: it is for people only.
    """
    if sys.platform != "linux":
        return
    _prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()[:15]))
    try:
        _overwrite_command_line([*name.split(), *argv])
    except (OSError, ValueError, IndexError):
        return  # /proc is not mounted, or hidden


def die_with_parent(parent_pid: int) -> None:
    """Arrange that this process is killed when its parent, the process `parent_pid`, dies; exit if it already has.

    Only on Linux; elsewhere the caller's own stop is the only one.
    """
    if sys.platform != "linux":
        return
    _prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent_pid:  # it died before the line above could take effect
        os._exit(1)


def _prctl(option: int, argument: ctypes.c_char_p | ctypes.c_ulong) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(ctypes.c_int(option), argument, *[ctypes.c_ulong(0)] * 3)


def _overwrite_command_line(words: list[str]) -> None:
    """Write `words` over the memory that /proc/self/cmdline shows, cut to the room there is.

    The memory is found in /proc/self/stat and reached through /proc/self/mem, so that a wrong
    address is an error and not a crash.
    """
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rsplit(b")", 1)[1].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end: fields 48 and 49 of proc(5)
    with open("/proc/self/cmdline", "rb") as file:
        current = file.read()
    room = end - start
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(start)
        if len(current) != room or memory.read(room) != current:
            return
        text = b"".join(word.encode() + b"\0" for word in words)[: room - 1]
        memory.seek(start)
        memory.write(text.ljust(room, b"\0"))  # the last byte stays 0, or the kernel reads on into the environment


def memory_limit(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Return how many bytes the container may take that this process is in; infinity without a limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            return int((root / name).read_text())
        except (OSError, ValueError):  # of the other version, or "max"
            continue
    return math.inf


class Reports:
    """Writes JSON lines to a descriptor, the way workers report their progress; -1 for nowhere."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        if descriptor >= 0:
            os.set_blocking(descriptor, False)  # a supervisor that does not read loses lines, and holds nothing up

    def ready(self) -> None:
        """The process is up: from now on it works."""
        self._write({"phase": "ready"})

    def draining(self, num_requests: int, seconds: float) -> None:
        """The process ends, and waits so long for the end of so many requests."""
        self._write({"phase": "draining", "requests": num_requests, "seconds": seconds})

    def fenced(self, worker_id: str, reason: str) -> None:
        """A worker was given up. If it does not say hello soon, its process hangs and should be killed."""
        self._write({"phase": "fenced", "worker_id": worker_id, "reason": reason})

    def _write(self, event: dict[str, object]) -> None:
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.write(self._descriptor, json.dumps(event).encode() + b"\n")
