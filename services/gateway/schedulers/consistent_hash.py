"""Where a session belongs: the same scheduler for every gateway, and little moves when one comes or goes."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort

_POINTS = 64  # for each scheduler: shares differ by an eighth or so


class SessionRing:
    """A consistent-hash ring: a look-up does not get slower with the number of schedulers."""

    def __init__(self) -> None:
        self._points: list[tuple[int, int]] = []

    def add(self, bit: int, scheduler_id: str) -> None:
        """Put a scheduler in."""
        for point in _points(scheduler_id):
            insort(self._points, (point, bit))

    def remove(self, bit: int, scheduler_id: str) -> None:
        """Take it out."""
        for point in _points(scheduler_id):
            at = bisect_left(self._points, (point, bit))
            assert self._points[at] == (point, bit), (bit, scheduler_id)
            del self._points[at]

    def home(self, session_id: str) -> int | None:
        """Return the bit of the scheduler that a session belongs to; None if there is none."""
        if not self._points:
            return None
        at = bisect_left(self._points, (_hash(session_id), -1))
        return self._points[at % len(self._points)][1]


def _points(scheduler_id: str) -> list[int]:
    return [_hash(f"{scheduler_id}\0{number}") for number in range(_POINTS)]


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
