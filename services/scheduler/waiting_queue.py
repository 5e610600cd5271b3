"""The sequences that wait: in which order they are served, and how much work they are."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from octavo.services.scheduler.fair_share import FairShare
from octavo.services.scheduler.sequence import Sequence
from octavo.services.scheduler.work import Work

if TYPE_CHECKING:
    from octavo.services.scheduler.policy import QueuePolicy, Rank

    Entry = tuple[Rank, Sequence]


@dataclass(eq=False, slots=True)
class _Backlog:
    """Some of the sequences that wait, as work: all of it, and by priority."""

    work: Work = field(default_factory=Work)
    by_priority: dict[int, Work] = field(default_factory=dict)

    def add(self, priority: int, work: Work) -> None:
        self.work.add(work)
        self.by_priority.setdefault(priority, Work()).add(work)

    def remove(self, priority: int, work: Work) -> None:
        self.work.remove(work)
        of_priority = self.by_priority[priority]
        of_priority.remove(work)
        if not of_priority.tokens:
            del self.by_priority[priority]

    def before(self, priority: int | None) -> Work:
        """Return what is served before a new sequence of this priority; None: all."""
        total = Work()
        if priority is None:
            total.add(self.work)
            return total
        for other, work in self.by_priority.items():
            if other >= priority:
                total.add(work)
        return total


@dataclass(eq=False, slots=True)
class _TenantQueue:
    """A tenant's sequences in the policy's order. A list: ten thousand entries are moved in two microseconds."""

    entries: list[Entry] = field(default_factory=list)
    backlog: _Backlog = field(default_factory=_Backlog)


class WaitingQueue:
    """The sequences that wait, by tenant."""

    def __init__(self, fair_share: FairShare, policy: QueuePolicy) -> None:
        self.policy = policy
        self._fair_share = fair_share
        self._by_tenant: dict[str, _TenantQueue] = {}  # none of them empty
        self._filed: dict[Sequence, tuple[Rank, Work]] = {}  # each under what it was when it came
        self._backlog = _Backlog()

    def __len__(self) -> int:
        return len(self._filed)

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._filed

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._filed)

    @property
    def num_tokens(self) -> int:
        """Tokens of all that waits, expected output apart."""
        return self._backlog.work.prompt

    def tenants(self) -> Collection[str]:
        """Return the tenants whose sequences wait."""
        return self._by_tenant.keys()

    def num_waiting(self, tenant: str) -> int:
        """Return how many sequences of a tenant wait."""
        queue = self._by_tenant.get(tenant)
        return len(queue.entries) if queue is not None else 0

    def work(self, tenant: str | None = None, priority: int | None = None) -> Work:
        """Return the work of all that waits.

        tenant    of this one only
        priority  of what is served before a new sequence of this priority only
        """
        backlog = self._backlog
        if tenant is not None:
            queue = self._by_tenant.get(tenant)
            if queue is None:
                return Work()
            backlog = queue.backlog
        return backlog.before(priority)

    def add(self, seq: Sequence) -> None:
        """File a sequence under its rank."""
        submit = seq.request.submit
        queue = self._by_tenant.get(submit.tenant)
        if queue is None:
            queue = self._by_tenant[submit.tenant] = _TenantQueue()
            self._fair_share.join(submit.tenant)
        assert seq not in self._filed, seq
        rank, work = self._filed[seq] = self.policy.rank(seq), Work.of(seq)
        entry = rank, seq
        queue.entries.insert(bisect_left(queue.entries, entry), entry)
        queue.backlog.add(submit.priority, work)
        self._backlog.add(submit.priority, work)

    def remove(self, seq: Sequence) -> None:
        """Remove a sequence that is in the queue."""
        submit = seq.request.submit
        queue = self._by_tenant[submit.tenant]
        rank, work = self._filed.pop(seq)
        at = bisect_left(queue.entries, (rank, seq))
        assert queue.entries[at][1] is seq, seq
        del queue.entries[at]
        queue.backlog.remove(submit.priority, work)
        self._backlog.remove(submit.priority, work)
        if not queue.entries:
            del self._by_tenant[submit.tenant]
            self._fair_share.leave(submit.tenant)

    def serve(self, seq: Sequence) -> None:
        """Remove a sequence that runs from now on."""
        self._fair_share.opened(seq.request.submit.tenant, seq.num_behind)
        self.remove(seq)

    def file_again(self, seq: Sequence) -> None:
        """Put a sequence that is in the queue where it belongs: what its rank comes from has changed."""
        rank, work = self._filed[seq]
        entries = self._by_tenant[seq.request.submit.tenant].entries
        del entries[bisect_left(entries, (rank, seq))]
        entry = self.policy.rank(seq), seq
        entries.insert(bisect_left(entries, entry), entry)
        self._filed[seq] = entry[0], work

    def in_order(self, can_run: Callable[[Sequence], bool]) -> Generator[Sequence]:
        """Yield the sequences that `can_run`, the one to serve next first.

        Between tenants the virtual counters decide, as if each sequence yielded before had been
        scheduled whole. The caller may remove what was yielded, and nothing else. One walk at a time:
        its tenants are out of turn until it ends or is closed.
        """
        fair_share = self._fair_share
        walk: list[tuple[float, int, str, int]] = []  # heap: of the tenants looked at, turn and place of the next
        seen: list[str] = []
        try:
            while True:
                turn = fair_share.next_turn()
                if turn is not None and (not walk or turn < walk[0][:3]):
                    fair_share.take_turn()
                    seen.append(turn[2])
                    heapq.heappush(walk, (*turn, 0))
                if not walk:
                    return
                counter, joined, tenant, at = walk[0]
                entries = self._by_tenant[tenant].entries
                while at < len(entries) and not can_run(entries[at][1]):
                    at += 1
                if at == len(entries):
                    heapq.heappop(walk)
                    continue
                entry = entries[at]
                yield entry[1]
                if at < len(entries) and entries[at] is entry:
                    at += 1
                if at < len(entries):
                    counter += fair_share.cost(tenant, len(entry[1].tokens))
                    heapq.heapreplace(walk, (counter, joined, tenant, at))
                else:
                    heapq.heappop(walk)
        finally:
            for tenant in seen:
                fair_share.put_back(tenant)

    def position(self, seq: Sequence) -> int:
        """Return about how many sequences are served before one that waits.

        Of its own tenant's, exactly; of the others', as many as their shares let through meanwhile.
        """
        tenant, fair_share = seq.request.submit.tenant, self._fair_share
        queue = self._by_tenant[tenant]
        num_own = bisect_left(queue.entries, (self._filed[seq][0], seq))
        num_others = len(self) - len(queue.entries)
        if not num_others:
            return num_own
        own_tokens = num_own * queue.backlog.work.prompt / len(queue.entries)
        lead = max(fair_share.counter(tenant) - fair_share.virtual_time, 0.0) + fair_share.cost(tenant, own_tokens)
        tokens = lead * (fair_share.total_weight - fair_share.weight(tenant))
        tokens_each = (self.num_tokens - queue.backlog.work.prompt) / num_others
        return num_own + min(num_others, int(tokens / tokens_each))

    def check_invariants(self) -> None:
        """Assert that each sequence is filed once and in order, and that the sums are right."""
        total = Work()
        for tenant, queue in self._by_tenant.items():
            assert queue.entries, f"{tenant} waits for nothing"
            assert queue.entries == sorted(queue.entries), f"the queue of {tenant} is out of order"
            of_tenant = Work()
            for rank, seq in queue.entries:
                assert self._filed[seq][0] == rank, seq
                assert self._filed[seq][1] == Work.of(seq), seq
                of_tenant.add(Work.of(seq))
            assert queue.backlog.work == of_tenant, (tenant, queue.backlog, of_tenant)
            total.add(of_tenant)
        assert self._backlog.work == total, (self._backlog, total)
        assert sum(len(queue.entries) for queue in self._by_tenant.values()) == len(self._filed)
        self._fair_share.check_invariants(self._by_tenant.keys())
