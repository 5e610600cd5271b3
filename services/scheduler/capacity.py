"""How long sequences can get: on the workers there are, and on those that may be back soon."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from octavo.services.scheduler.sequence import Sequence
from octavo.services.scheduler.worker_group import WorkerGroup


class Capacity:
    """The limits of all worker groups together, which may be of different size.

    A sequence can go on while one of the groups has room for another token of it. One that none of them
    can run waits for a group to come back, as long as requests do when no worker is left.
    """

    def __init__(self, groups: Mapping[str, WorkerGroup], grace_s: float) -> None:
        """`grace_s`: how long a sequence waits for a group that could run it."""
        self._groups = groups
        self._grace_s = grace_s
        self._max_model_len = 0
        self._largest = 0  # of all groups there ever were
        self._lost = (0, 0.0)  # the largest one that went lately, and until when it counts
        self._stranded: dict[Sequence, float] = {}  # since when each was seen to have nobody that can run it

    def joined(self) -> None:
        """Learn that a group came."""
        self._max_model_len = max(group.max_model_len for group in self._groups.values())
        self._largest = max(self._largest, self._max_model_len)

    def lost(self, group: WorkerGroup, now: float) -> None:
        """Learn that a group went."""
        if self._groups:
            self._max_model_len = max(other.max_model_len for other in self._groups.values())
        if group.max_model_len > self._max_model_len:
            size, until = self._lost
            self._lost = max(group.max_model_len, size if now < until else 0), now + self._grace_s

    def max_model_len(self, now: float) -> int:
        """Return the longest context of the workers there are, or were a moment ago; 0 if none is known yet."""
        size, until = self._lost
        return max(self._max_model_len, size if now < until else 0)

    def is_exhausted(self, seq: Sequence) -> bool:
        """Return whether a sequence is as long as any worker that was ever here could hold."""
        return len(seq.tokens) >= self._largest

    def give_up(self, waiting: Iterable[Sequence], now: float) -> list[Sequence]:
        """Return those that have waited in vain for a group that can run them. Call it about once a second."""
        if not self._groups:
            return []
        groups = list(self._groups.values())
        stranded = [seq for seq in waiting if not any(group.can_run(seq) for group in groups)]
        self._stranded = {seq: self._stranded.get(seq, now) for seq in stranded}
        return [seq for seq, since in self._stranded.items() if now - since >= self._grace_s]
