"""The queue keeps the sequences that wait, in the order in which they are served, and counts their tokens."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from octavo.services.scheduler.queueing.fair_share import FairShare
from octavo.services.scheduler.requests.sequence import Sequence, SequenceState

if TYPE_CHECKING:
    from octavo.services.scheduler.queueing.policy import Policy, Rank

    Entry = tuple[Rank, Sequence]


@dataclass(slots=True)
class TokenCounts:
    """Counts what waits: tokens of prompts, tokens of outputs as far as they are expected, and sequences."""

    prompt: int = 0
    output: int = 0
    sequences: int = 0

    @classmethod
    def of(cls, seq: Sequence) -> TokenCounts:
        """Count a sequence that waits."""
        return cls(len(seq.token_ids), seq.num_expected_left, 1)

    @property
    def tokens(self) -> int:
        """Both kinds together: what tenants are charged for."""
        return self.prompt + self.output

    def add(self, other: TokenCounts) -> None:
        """Add the work of others."""
        self.prompt += other.prompt
        self.output += other.output
        self.sequences += other.sequences

    def remove(self, other: TokenCounts) -> None:
        """Take away what was added."""
        self.prompt -= other.prompt
        self.output -= other.output
        self.sequences -= other.sequences


@dataclass(eq=False, slots=True)
class _Backlog:
    """Some of the sequences that wait, as work: all of it, and by priority."""

    work: TokenCounts = field(default_factory=TokenCounts)
    by_priority: dict[int, TokenCounts] = field(default_factory=dict)

    def add(self, priority: int, work: TokenCounts) -> None:
        self.work.add(work)
        self.by_priority.setdefault(priority, TokenCounts()).add(work)

    def remove(self, priority: int, work: TokenCounts) -> None:
        self.work.remove(work)
        of_priority = self.by_priority[priority]
        of_priority.remove(work)
        if not of_priority.tokens:
            del self.by_priority[priority]

    def before(self, priority: int | None) -> TokenCounts:
        """Return what is served before a new sequence of this priority; None: all."""
        total = TokenCounts()
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
    """The sequences that wait, by tenant.

    awaiting_output  those that lost their blocks while a step was in flight: they queue when its tokens are known
    """

    def __init__(self, fair_share: FairShare, policy: Policy) -> None:
        self.policy = policy
        self._fair_share = fair_share
        self._by_tenant: dict[str, _TenantQueue] = {}  # none of them empty
        self._filed: dict[Sequence, tuple[Rank, TokenCounts]] = {}  # each under what it was when it came
        self._backlog = _Backlog()
        self._added: list[Sequence] = []
        self.awaiting_output: dict[Sequence, None] = {}
        self.adapters: dict[str, int] = {}  # that those with one need: how many of them

    def __len__(self) -> int:
        return len(self._filed)

    def __contains__(self, seq: Sequence) -> bool:
        return seq in self._filed

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._filed)

    @property
    def num_sequences(self) -> int:
        """Sequences that hold nothing: in the queue, or before it until their output is known."""
        return len(self._filed) + len(self.awaiting_output)

    def everything(self) -> list[Sequence]:
        """Return the sequences that hold nothing."""
        return [*self._filed, *self.awaiting_output]

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

    def work(self, tenant: str | None = None, priority: int | None = None) -> TokenCounts:
        """Return the work of all that waits.

        tenant    of this one only
        priority  of what is served before a new sequence of this priority only
        """
        backlog = self._backlog
        if tenant is not None:
            queue = self._by_tenant.get(tenant)
            if queue is None:
                return TokenCounts()
            backlog = queue.backlog
        return backlog.before(priority)

    def await_output(self, seq: Sequence) -> None:
        """Keep a sequence out of the queue until the steps in flight are answered; `add` files it then."""
        self.awaiting_output[seq] = None

    def discard(self, seq: Sequence) -> None:
        """Remove a sequence, if it is here."""
        self.awaiting_output.pop(seq, None)
        if seq in self._filed:
            self.remove(seq)

    def add(self, seq: Sequence) -> None:
        """File a sequence under its rank."""
        self.awaiting_output.pop(seq, None)
        submit = seq.request.submit
        queue = self._by_tenant.get(submit.tenant)
        if queue is None:
            queue = self._by_tenant[submit.tenant] = _TenantQueue()
            self._fair_share.join(submit.tenant)
        assert seq not in self._filed, seq
        self._added.append(seq)
        rank, work = self._filed[seq] = self.policy.rank(seq), TokenCounts.of(seq)
        entry = rank, seq
        queue.entries.insert(bisect_left(queue.entries, entry), entry)
        queue.backlog.add(submit.priority, work)
        self._backlog.add(submit.priority, work)
        if adapter := seq.request.adapter:
            self.adapters[adapter] = self.adapters.get(adapter, 0) + 1

    def take_added(self) -> list[Sequence]:
        """Return what was added since the last call; some of it may wait no longer."""
        added, self._added = self._added, []
        return added

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
        if adapter := seq.request.adapter:
            self.adapters[adapter] -= 1
            if not self.adapters[adapter]:
                del self.adapters[adapter]
        if not queue.entries:
            del self._by_tenant[submit.tenant]
            self._fair_share.leave(submit.tenant)

    def serve(self, seq: Sequence) -> None:
        """Remove a sequence that runs from now on."""
        self._fair_share.opened(seq.request.submit.tenant, seq.num_uncomputed_tokens)
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
                    counter += fair_share.cost(tenant, len(entry[1].token_ids))
                    heapq.heapreplace(walk, (counter, joined, tenant, at))
                else:
                    heapq.heappop(walk)
        finally:
            for tenant in seen:
                fair_share.put_back(tenant)

    def position(self, seq: Sequence) -> int:
        """Return about how many sequences are served before one; 0 if it is not in the queue.

        Of its own tenant's, exactly; of the others', as many as their shares let through meanwhile.
        """
        if seq not in self._filed:
            return 0
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
        """Assert that each sequence is filed once and in order, holds nothing, and that the sums are right."""
        for seq in self.everything():
            assert seq.state is SequenceState.WAITING, seq
            assert not seq.block_table, seq
            assert seq.slot == -1, seq
            assert seq.max_len_here == seq.max_len, seq
        assert self.adapters == Counter(seq.request.adapter for seq in self if seq.request.adapter), self.adapters
        assert all(seq.num_output_placeholders for seq in self.awaiting_output)
        assert not self.awaiting_output.keys() & self._filed.keys()
        total = TokenCounts()
        for tenant, queue in self._by_tenant.items():
            assert queue.entries, f"{tenant} waits for nothing"
            assert queue.entries == sorted(queue.entries), f"the queue of {tenant} is out of order"
            of_tenant = TokenCounts()
            for rank, seq in queue.entries:
                assert self._filed[seq][0] == rank, seq
                assert self._filed[seq][1] == TokenCounts.of(seq), seq
                of_tenant.add(TokenCounts.of(seq))
            assert queue.backlog.work == of_tenant, (tenant, queue.backlog, of_tenant)
            total.add(of_tenant)
        assert self._backlog.work == total, (self._backlog, total)
        assert sum(len(queue.entries) for queue in self._by_tenant.values()) == len(self._filed)
        self._fair_share.check_invariants(self._by_tenant.keys())
