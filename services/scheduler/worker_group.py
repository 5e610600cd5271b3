"""What the scheduler knows of one worker group: its sequences, slots, blocks and steps in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from octavo.services.scheduler.block_allocator import BlockAllocator
from octavo.services.scheduler.config import BLOCK_SIZE
from octavo.services.scheduler.sequence import Sequence, SequenceState

MAX_STEPS_IN_FLIGHT = 2  # one runs, one waits beside the worker


@dataclass(frozen=True, eq=False)
class StepInFlight:
    """A plan that was sent: which sequences it samples, in the plan's order."""

    step_id: int
    sampled: list[Sequence]
    num_tokens: int
    sent_at: float


class WorkerGroup:
    """One copy of the model: the ranks that execute every plan together. Only the Scheduler writes it."""

    def __init__(self, group_id: str, epoch: int, num_blocks: int, max_running: int, max_model_len: int) -> None:
        self.group_id = group_id
        self.epoch = epoch
        self.max_model_len = min(max_model_len, (num_blocks - 1) * BLOCK_SIZE)
        self.allocator = BlockAllocator(num_blocks)
        self.pool = self.allocator.pool
        self.decoding: list[Sequence] = []  # in the order they got here: one token a step
        self.prefilling: list[Sequence] = []  # more than one token behind
        self.in_flight: deque[StepInFlight] = deque()
        self.num_steps = 0
        self.free_slots = list(range(max_running - 1, -1, -1))
        self.freed_slots: list[int] = []  # since the last plan: the worker must hear of them
        self.tokens_per_s = 0.0  # moving average over steps; 0 until measured
        self._last_result_at = 0.0

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self.decoding) + len(self.prefilling)

    def running(self) -> Iterator[Sequence]:
        """Iterate over the sequences that hold a slot."""
        yield from self.decoding
        yield from self.prefilling

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence that no longer runs here."""
        (self.decoding if seq in self.decoding else self.prefilling).remove(seq)

    def num_behind(self) -> int:
        """Tokens that its sequences still have to compute: its load."""
        return len(self.decoding) + sum(seq.num_behind for seq in self.prefilling)

    def measure(self, step: StepInFlight, now: float) -> None:
        """Learn the rate of the group from a step that was answered."""
        # With two steps in flight a step starts when the one before is answered.
        elapsed = now - max(step.sent_at, self._last_result_at)
        self._last_result_at = now
        if elapsed > 0:
            rate = step.num_tokens / elapsed
            self.tokens_per_s += 0.1 * (rate - self.tokens_per_s) if self.tokens_per_s else rate

    def check_invariants(self) -> None:
        """Assert that slots, blocks and sequences agree."""
        running = list(self.running())
        for seq in running:
            assert seq.state is SequenceState.RUNNING, seq
            assert seq.group is self, seq
            assert 0 <= seq.num_pending <= len(self.in_flight), seq
            assert seq.num_computed < len(seq.tokens) + max(seq.num_pending, 1), seq
        for seq in self.decoding:
            assert seq.num_behind == 1, seq
        slots = [seq.slot for seq in running] + self.free_slots
        assert len(set(slots)) == len(slots), "a slot is used twice"
        assert len(self.in_flight) <= MAX_STEPS_IN_FLIGHT
        self.allocator.check_invariants(running)
