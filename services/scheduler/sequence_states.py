"""Where sequences are that have not ended: they wait, they run, or they wait for a step in flight to be answered."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from octavo.services.scheduler.sequence import Request, Sequence, SequenceState
from octavo.services.scheduler.tally import Tally
from octavo.services.scheduler.waiting_queue import WaitingQueue
from octavo.services.scheduler.worker_group import WorkerGroup


class SequenceStates:
    """Owner of the queue and of every change of a sequence's state; of blocks and slots when they are given back."""

    def __init__(self, waiting: WaitingQueue, tally: Tally) -> None:
        self._tally = tally
        self.waiting = waiting
        # Lost their blocks while a step was in flight; they queue again when its tokens are known.
        self._settling: dict[Sequence, None] = {}
        self._running: dict[str, dict[Sequence, None]] = {}  # by tenant, none of them empty

    @property
    def num_waiting(self) -> int:
        """Sequences that hold nothing."""
        return len(self.waiting) + len(self._settling)

    def without_slot(self) -> Iterator[Sequence]:
        """Iterate over the sequences that hold nothing."""
        yield from self.waiting
        yield from self._settling

    def settling(self) -> list[Sequence]:
        """Return the sequences that wait for a step in flight."""
        return list(self._settling)

    def running_of(self, tenant: str) -> Collection[Sequence]:
        """Return the sequences of a tenant that hold a slot."""
        return self._running.get(tenant, {}).keys()

    def run(self, seq: Sequence, group: WorkerGroup) -> None:
        """Move a sequence that waits to a slot of a group; it has its blocks."""
        self.waiting.serve(seq)
        seq.group, seq.slot, seq.state = group, group.free_slots.pop(), SequenceState.RUNNING
        seq.max_tokens = min(seq.max_len, group.max_model_len + group.model.makes_vectors)
        group.prefilling.append(seq)
        self._running.setdefault(seq.request.submit.tenant, {})[seq] = None

    def file_again(self, request: Request) -> None:
        """Put what waits of a request where it belongs in the queue: it lost its worker, or is blamed for that."""
        for seq in request.sequences:
            if seq in self.waiting:
                self.waiting.file_again(seq)

    def preempt(self, seq: Sequence) -> None:
        """Take everything back from a running sequence and queue it again, to be computed anew."""
        seq.num_preemptions += 1
        self._tally.preempted()
        self.requeue(seq)

    def requeue(self, seq: Sequence) -> None:
        """Move a running sequence back to the queue, or to those that wait for a step in flight."""
        self._release(seq)
        seq.state = SequenceState.WAITING
        self._settling[seq] = None
        if seq.num_pending == 0:
            self.settle(seq)

    def compute_again(self, seq: Sequence) -> None:
        """Let a sequence, of which a row got no token, go on from its newest known token.

        If it runs, it keeps slot and blocks. Rows that were planned meanwhile are of no use: they are
        waited for.
        """
        if seq.state is SequenceState.WAITING:
            if seq.num_pending == 0:
                self.settle(seq)
            return
        group = seq.group
        assert group is not None, seq
        if seq not in group.late:
            group.remove(seq)
            group.late.append(seq)
            seq.num_computed = len(seq.tokens) - 1
        if seq.num_pending == 0:
            group.late.remove(seq)
            group.prefilling.append(seq)

    def settle(self, seq: Sequence) -> None:
        """Queue a sequence of which everything sampled is now known."""
        del self._settling[seq]
        self.waiting.add(seq)

    def finish(self, seq: Sequence) -> None:
        """End a sequence that has not ended."""
        assert seq.state is not SequenceState.FINISHED, seq
        if seq.state is SequenceState.RUNNING:
            self._release(seq)
        elif seq in self._settling:
            del self._settling[seq]
        elif seq in self.waiting:
            self.waiting.remove(seq)
        seq.state = SequenceState.FINISHED

    def _release(self, seq: Sequence) -> None:
        """Take slot and blocks of a running sequence back: the only place that frees blocks."""
        group = seq.group
        assert group is not None
        group.remove(seq)
        group.allocator.free(seq)
        group.free_slots.append(seq.slot)
        group.freed_slots.append(seq.slot)
        seq.slot = -1
        tenant = seq.request.submit.tenant
        del self._running[tenant][seq]
        if not self._running[tenant]:
            del self._running[tenant]
        seq.max_tokens = seq.max_len

    def check_invariants(self) -> None:
        """Assert that who waits holds nothing, and that the queue has counted right."""
        self.waiting.check_invariants()
        assert all(self._running.values())
        assert all(seq.state is SequenceState.RUNNING for seqs in self._running.values() for seq in seqs)
        for seq in self.without_slot():
            assert seq.state is SequenceState.WAITING, seq
            assert not seq.blocks, seq
            assert seq.slot == -1, seq
            assert seq.max_tokens == seq.max_len, seq
        assert all(seq.num_pending for seq in self._settling)
