"""How much of the time that passed a process could have used: the rest of it others had the processors."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_STOPPED = "TtZXx"  # by a signal, by a debugger, or dead: it wants no processor and gets none
_LEAST_SHARE = 0.1  # of the time that passed is counted in any case
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class UsableTime:
    """Counts seconds in which a process ran, or wanted no processor. Where there is no /proc, all seconds.

    A busy machine lets a process wait for a processor, and what it then does not do says nothing about it. At
    least a tenth of the time counts: nobody is waited for longer than ten times.
    """

    def __init__(self, pid: int) -> None:
        self._folder = _PROC / str(pid)
        self._seconds = 0.0
        self._last = self._look()

    def seconds(self) -> float:
        """Return what there was since the start; to be called several times a second."""
        last, now = self._last, self._look()
        passed = now.at - last.at
        if now.state in _STOPPED:
            usable = passed
        elif now.state == "R":  # what it waits for in this moment is counted only when it runs again
            usable = now.processor_s - last.processor_s
        else:
            usable = passed - (now.waited_s - last.waited_s)
        self._seconds += min(passed, max(usable, _LEAST_SHARE * passed))
        self._last = now
        return self._seconds

    def _look(self) -> _Look:
        at = time.monotonic()
        try:
            # After the name, which is in brackets and may hold anything: proc_pid_stat(5), from field 3 on.
            fields = (self._folder / "stat").read_text().rpartition(")")[2].split()
            waited_s = int((self._folder / "schedstat").read_text().split()[1]) / 1e9
        except (OSError, IndexError, ValueError):
            return _Look(at, "T", 0.0, 0.0)
        return _Look(at, fields[0], (int(fields[11]) + int(fields[12])) / _TICKS_PER_S, waited_s)


@dataclass(frozen=True)
class _Look:
    """What the system said: the state of the first thread, processor time of all, how long the first one waited."""

    at: float
    state: str
    processor_s: float
    waited_s: float
