"""A policy decides which sequence is served next, which one gives its blocks back, and which group one runs on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from octavo.services.scheduler.config import BLOCK_SIZE
from octavo.services.scheduler.groups.worker_group import WorkerGroup
from octavo.services.scheduler.requests.sequence import Sequence

Rank = tuple[float, ...]
"""Sorts sequences, the one to serve next first. No two sequences have the same."""


class Policy(Protocol):
    """Decides the order of a tenant's sequences. Between tenants the virtual counters decide.

    A rank must not depend on the time it is asked for: the queue asks once, when a sequence enters.
    """

    def rank(self, seq: Sequence) -> Rank:
        """Return the place of a sequence that waits."""

    def prompt_rank(self, seq: Sequence) -> Rank:
        """Return the place of a prompt among those that are being computed, or could be, of all tenants."""

    def choose_victim(self, group: WorkerGroup) -> Sequence | None:
        """Return the running sequence that has to give its blocks back, or None if only the oldest runs.

        The oldest request is never chosen, so that some request always advances.
        """

    def choose_group(
        self, seq: Sequence, groups: Iterable[WorkerGroup], tokens_ahead: Mapping[WorkerGroup, float]
    ) -> WorkerGroup | None:
        """Return the group that a sequence should run on, of those that can run it; None: not now.

        `tokens_ahead` is the load of each: tokens that are computed before those of the sequence.
        """


class ShortestFirst:
    """Shortest remaining work less age, so that long prompts wait but do not starve.

    Age grows alike for all: `work - rate * (now - admitted_at)` sorts as `work + rate * admitted_at`
    does, whatever the time is.
    """

    def __init__(self, ageing_tokens_per_s: float) -> None:
        self._ageing_tokens_per_s = ageing_tokens_per_s

    def rank(self, seq: Sequence) -> Rank:
        """Order by who lost its blocks, priority, and then as prompts are.

        Before all: whoever has to run alone, because empty groups wait for it.
        """
        request = seq.request
        is_new = seq.num_preemptions == 0 and seq.num_recoveries == 0
        stage = -request.num_blames or is_new
        return stage, -request.submit.priority, *self.prompt_rank(seq)

    def prompt_rank(self, seq: Sequence) -> Rank:
        """Order by remaining work less age, arrival and candidate."""
        work = seq.num_uncomputed_tokens + self._ageing_tokens_per_s * seq.admitted_at
        return work, seq.request.arrival, seq.candidate_index

    def choose_victim(self, group: WorkerGroup) -> Sequence | None:
        """Choose by lowest priority, then by the least work that the prefix cache does not cover, then the newest."""
        running = list(group.running())
        oldest = min(running, key=_age, default=None)
        return min(
            (seq for seq in running if seq is not oldest),
            key=lambda seq: (
                seq.request.submit.priority,
                group.allocator.num_exclusive_tokens(seq),
                -seq.request.arrival,
                -seq.candidate_index,
            ),
            default=None,
        )

    def choose_group(
        self, seq: Sequence, groups: Iterable[WorkerGroup], tokens_ahead: Mapping[WorkerGroup, float]
    ) -> WorkerGroup | None:
        """Choose the group that would be through with the prompt first: cached tokens against load.

        Only groups with a free slot count, and those without blocks for it only if none has them.
        """

        def work(group: WorkerGroup) -> tuple[bool, float, str]:
            hits = group.allocator.get_computed_blocks(seq)
            rest = len(seq.token_ids) - BLOCK_SIZE * len(hits[0])
            return not group.has_room(seq, hits), tokens_ahead[group] + rest, group.group_id

        return min((group for group in groups if group.free_slots), key=work, default=None)


def _age(seq: Sequence) -> tuple[int, int]:
    """Sort key: the oldest sequence first."""
    return seq.request.arrival, seq.candidate_index
