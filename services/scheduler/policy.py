"""Who is next, and who has to yield: the rules of the queue, apart from the mechanics of a step."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator

from octavo.services.scheduler.config import BLOCK_SIZE
from octavo.services.scheduler.sequence import Sequence
from octavo.services.scheduler.work import Work
from octavo.services.scheduler.worker_group import WorkerGroup


class FairShare:
    """Virtual token counters: each tenant's tokens, divided by its weight (Sheng et al., OSDI 2024).

    The tenant that has had least is served next. A tenant that was idle does not save up: when it
    comes back, its counter is raised to the smallest of those who waited.
    """

    def __init__(self, weights: dict[str, float]) -> None:
        self._weights = weights
        self._counters: dict[str, float] = {}

    def counter(self, tenant: str) -> float:
        """Return what `tenant` has had so far."""
        return self._counters.get(tenant, 0.0)

    def weight(self, tenant: str) -> float:
        """Return the weight of `tenant`."""
        return self._weights.get(tenant, 1.0)

    def cost(self, tenant: str, tokens: int) -> float:
        """Return by how much `tokens` raise the counter of `tenant`."""
        return tokens / self.weight(tenant)

    def charge(self, tenant: str, tokens: int) -> None:
        """Count tokens that were scheduled for `tenant`."""
        self._counters[tenant] = self.counter(tenant) + self.cost(tenant, tokens)

    def activate(self, tenant: str, active: Iterable[str]) -> None:
        """Raise the counter of a tenant that has work again, where `active` others had it all along."""
        self._counters[tenant] = max(self.counter(tenant), self.lowest(active))

    def lowest(self, active: Iterable[str]) -> float:
        """Return what the counter of a tenant is raised to, if it is below, when it joins `active` ones."""
        return min(map(self.counter, active), default=0.0)

    def forget_idle(self, active: Iterable[str], limit: int = 10_000) -> None:
        """Keep the table bounded: drop the counters of idle tenants once there are too many."""
        if len(self._counters) > limit:
            kept = set(active)
            self._counters = {tenant: count for tenant, count in self._counters.items() if tenant in kept}


class WaitingQueue:
    """The sequences that wait, by tenant."""

    def __init__(self, fair_share: FairShare, ageing_tokens_per_s: float) -> None:
        self._fair_share = fair_share
        self._ageing_tokens_per_s = ageing_tokens_per_s
        self._by_tenant: dict[str, dict[Sequence, None]] = {}  # dicts keep the order of arrival
        self._work: dict[str, dict[int, Work]] = {}  # of each tenant, by priority
        self.num_tokens = 0

    def __len__(self) -> int:
        return sum(map(len, self._by_tenant.values()))

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._by_tenant.get(seq.request.submit.tenant, ())

    def __iter__(self) -> Iterator[Sequence]:
        for sequences in self._by_tenant.values():
            yield from sequences

    def tenants(self) -> Iterable[str]:
        """Return the tenants whose sequences wait."""
        return self._by_tenant.keys()

    def num_waiting(self, tenant: str) -> int:
        """Return how many sequences of a tenant wait."""
        return len(self._by_tenant.get(tenant, ()))

    def work(self, tenant: str | None = None, priority: int | None = None) -> Work:
        """Return the work of all that waits.

        tenant    of this one only
        priority  of what is served before a new sequence of this priority only
        """
        total = Work()
        for by_priority in self._work.values() if tenant is None else (self._work.get(tenant, {}),):
            for other, work in by_priority.items():
                if priority is None or other >= priority:
                    total.add(work)
        return total

    def add(self, seq: Sequence) -> None:
        """Append a sequence."""
        tenant = seq.request.submit.tenant
        if tenant not in self._by_tenant:
            self._fair_share.activate(tenant, self._by_tenant)
            self._by_tenant[tenant] = {}
            self._work[tenant] = {}
        self._by_tenant[tenant][seq] = None
        self._work[tenant].setdefault(seq.request.submit.priority, Work()).add(Work.of(seq))
        self.num_tokens += len(seq.tokens)

    def remove(self, seq: Sequence) -> None:
        """Remove a sequence that is in the queue; before tokens are added to it."""
        tenant = seq.request.submit.tenant
        del self._by_tenant[tenant][seq]
        work = self._work[tenant][seq.request.submit.priority]
        work.remove(Work.of(seq))
        if not work.tokens:
            del self._work[tenant][seq.request.submit.priority]
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant], self._work[tenant]
        self.num_tokens -= len(seq.tokens)

    def in_order(self, now: float, limit: int, can_run: Callable[[Sequence], bool] | None = None) -> Iterator[Sequence]:
        """Yield up to `limit` sequences of each tenant, the one to serve next first; only those that `can_run`.

        Between tenants the virtual counters decide, as if each sequence yielded before had been
        scheduled whole. Within a tenant, `rank` does.
        """
        queues = []
        for index, (tenant, sequences) in enumerate(self._by_tenant.items()):
            able = sequences if can_run is None else filter(can_run, sequences)
            best = iter(heapq.nsmallest(limit, able, key=lambda seq: self.rank(seq, now)))
            queues.append((self._fair_share.counter(tenant), index, tenant, best))
        heapq.heapify(queues)
        while queues:
            counter, index, tenant, best = queues[0]
            seq = next(best, None)
            if seq is None:
                heapq.heappop(queues)
                continue
            counter += self._fair_share.cost(tenant, len(seq.tokens))
            heapq.heapreplace(queues, (counter, index, tenant, best))
            yield seq

    def rank(self, seq: Sequence, now: float) -> tuple[int, int, float, int]:
        """Order within a tenant: who lost its blocks, priority, shortest remaining work less age, arrival.

        Before all: whoever has to run alone, because empty groups wait for it.
        """
        is_new = seq.num_preemptions == 0 and seq.num_recoveries == 0
        stage = -seq.request.num_blames or is_new
        age = self._ageing_tokens_per_s * (now - seq.admitted_at)
        return stage, -seq.request.submit.priority, seq.num_behind - age, seq.request.arrival


def choose_victim(group: WorkerGroup) -> Sequence | None:
    """Return the running sequence that has to give its blocks back, or None if only the oldest runs.

    Lowest priority first, then the least work that the prefix cache does not cover, then the
    newest. The oldest request is never chosen, so that some request always advances.
    """
    running = list(group.running())
    oldest = min(running, key=_age, default=None)
    candidates = [seq for seq in running if seq is not oldest]
    return min(
        candidates,
        key=lambda seq: (
            seq.request.submit.priority,
            group.allocator.num_exclusive_tokens(seq),
            -seq.request.arrival,
            -seq.candidate_index,
        ),
        default=None,
    )


def choose_group(seq: Sequence, groups: Iterable[WorkerGroup]) -> WorkerGroup | None:
    """Return the group that would be through with the prompt of `seq` first: cached tokens against load.

    Only groups with a free slot count; None if there is none.
    """

    def work(group: WorkerGroup) -> tuple[int, str]:
        cached = BLOCK_SIZE * len(group.allocator.cached_blocks(seq))
        return group.num_behind() + len(seq.tokens) - cached, group.group_id

    return min((group for group in groups if group.free_slots), key=work, default=None)


def _age(seq: Sequence) -> tuple[int, int]:
    """Sort key: the oldest sequence first."""
    return seq.request.arrival, seq.candidate_index
