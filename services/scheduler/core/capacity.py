"""Capacity tells how long sequences can get on the workers there are, and on those that may be back soon."""

from __future__ import annotations

from collections.abc import Mapping

from octavo.services.scheduler.groups.worker_group import WorkerGroup
from octavo.services.scheduler.queueing.waiting_queue import WaitingQueue
from octavo.services.scheduler.requests.sequence import Sequence


class Capacity:
    """The limits of all worker groups together, which may be of different size.

    A sequence can go on while one of the groups has room for another token of it. One that none of them
    can run waits for a group to come back, as long as requests do when no worker is left.
    """

    def __init__(self, groups: Mapping[str, WorkerGroup], grace_s: float, started_at: float) -> None:
        """`grace_s`: how long a sequence waits for a group that could run it. `started_at`: the scheduler."""
        self._groups = groups
        self._grace_s = grace_s
        self._started_at = started_at
        self._max_model_len = 0
        self._largest = 0  # of all groups there ever were
        self._lost = (0, 0.0)  # the largest one that went lately, and until when it counts
        self._stranded: dict[Sequence, float] = {}  # since when each was seen to have nobody that can run it
        self._have_changed = False  # the groups, since it was looked for those

    def joined(self) -> None:
        """Learn that a group came."""
        self._have_changed = True
        self._max_model_len = max(group.max_model_len for group in self._groups.values())
        self._largest = max(self._largest, self._max_model_len)

    def lost(self, group: WorkerGroup, now: float) -> None:
        """Learn that a group went."""
        self._have_changed = True
        if self._groups:
            self._max_model_len = max(other.max_model_len for other in self._groups.values())
        if group.max_model_len > self._max_model_len:
            size, until = self._lost
            self._lost = max(group.max_model_len, size if now < until else 0), now + self._grace_s

    def max_model_len(self, now: float) -> int:
        """Return the longest context of the workers there are, or were a moment ago; 0 if none is known yet."""
        size, until = self._lost
        return max(self._max_model_len, size if now < until else 0)

    def may_grow(self, now: float) -> bool:
        """Return whether a larger group than all so far may be on its way to a scheduler that just started."""
        return now - self._started_at < self._grace_s

    def is_exhausted(self, seq: Sequence) -> bool:
        """Return whether a sequence is as long as any worker that was ever here could hold."""
        return len(seq.token_ids) >= self._largest

    def give_up(self, waiting: WaitingQueue, now: float) -> list[Sequence]:
        """Return those that have waited in vain for a group that can run them. Call it about once a second.

        While the groups are the same, only who came to the queue since the last call is new among those.
        """
        added = waiting.take_added()
        if not self._groups:
            return []
        groups = list(self._groups.values())
        looked_at = waiting if self._have_changed else [seq for seq in (*self._stranded, *added) if seq in waiting]
        self._have_changed = False
        stranded = [seq for seq in looked_at if not any(group.can_run(seq) for group in groups)]
        self._stranded = {seq: self._stranded.get(seq, now) for seq in stranded}
        return [seq for seq, since in self._stranded.items() if now - since >= self._grace_s]
