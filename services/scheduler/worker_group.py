"""What the scheduler knows of one worker group: its sequences, slots, blocks and steps in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.block_allocator import BlockAllocator
from octavo.services.scheduler.cache_feed import CacheFeed
from octavo.services.scheduler.config import BLOCK_SIZE
from octavo.services.scheduler.free_blocks import Block
from octavo.services.scheduler.model_facts import ModelFacts
from octavo.services.scheduler.plan_builder import ScoredRow
from octavo.services.scheduler.sequence import Sequence, SequenceState
from octavo.services.scheduler.step_clock import NUM_WARM_UP_STEPS, StepClock, StepSize
from octavo.services.scheduler.step_cost import StepCost

MAX_STEPS_IN_FLIGHT = 2  # one runs, one waits beside the worker
RUNNING_STEPS = 64  # after so many, a step counts for a third in the mean of what runs
PLAN_AHEAD_S = 0.06  # before a step is expected to end, the next is planned: time is looked at every 25 ms


@dataclass(frozen=True, eq=False)
class StepInFlight:
    """A plan that was sent: which sequences it samples, in the plan's order, and which it only computes.

    first_tokens  those that it samples whose prompt, or what was computed again, it ends
    size          how much there is to compute
    scored        rows that have log probabilities of prompt tokens, in the plan's order
    """

    step_id: int
    sampled: list[Sequence]
    unsampled: list[Sequence]
    first_tokens: list[Sequence]
    size: StepSize
    sent_at: float
    scored: list[ScoredRow] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens that it computes."""
        return self.size.num_tokens


class WorkerGroup:
    """One copy of the model, in one worker or in ranks that one worker leads. Only the Scheduler writes it."""

    def __init__(
        self,
        group_id: str,
        epoch: int,
        num_blocks: int,
        max_running: int,
        max_model_len: int,
        feed: CacheFeed,
        clock: StepClock,
        weights: Mapping[str, float],
        model: ModelFacts,
    ) -> None:
        self.group_id = group_id
        self.epoch = epoch
        self.model = model
        self.max_model_len = max_model_len
        if not model.whole_sequences:  # else there is no cache
            self.max_model_len = min(max_model_len, (num_blocks - 1) * BLOCK_SIZE)
        self.allocator = BlockAllocator(num_blocks, feed, weights)
        self.pool = self.allocator.pool
        self.decoding: list[Sequence] = []  # in the order they got here: one token a step
        self.prefilling: list[Sequence] = []  # more than one token behind
        self.late: list[Sequence] = []  # got no token yet, and are computed again when no step in flight has them
        self.in_flight: deque[StepInFlight] = deque()
        self.num_steps = 0
        self.free_slots = list(range(max_running - 1, -1, -1))
        self.max_batch_tokens = 0  # set when it joins
        self.freed_slots: list[int] = []  # since the last plan: the worker must hear of them
        self.is_lost = False  # its worker is gone, and what its sequences still refer to is history
        self.tokens_per_s = 0.0  # moving average over steps; 0 until measured
        self.cost = StepCost()
        self.cost_is_guess = False  # from a step that warmed the worker up
        self._clock = clock
        self.last_result_at = self._back_at = 0.0
        self._num_measured = 0
        self.mean_running = 0.0  # over the latest steps
        self.takes_grammars = False  # set when it joins; so are these:
        self.scores_prompts = False
        self.max_row_tokens = 1
        self.row_tokens = 1.0  # that a step makes of a sequence: moving average

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self.decoding) + len(self.prefilling) + len(self.late)

    def running(self) -> Iterator[Sequence]:
        """Iterate over the sequences that hold a slot."""
        yield from self.decoding
        yield from self.prefilling
        yield from self.late

    def can_run(self, seq: Sequence) -> bool:
        """Return whether its workers can do what a sequence asks for, and have room for one more token of it."""
        if len(seq.tokens) >= self.max_model_len + self.model.makes_vectors:  # a vector takes no room
            return False
        submit = seq.request.submit
        return (self.takes_grammars or not submit.HasField("constraint")) and (
            self.scores_prompts or not submit.prompt_logprobs
        )

    def has_room(self, seq: Sequence, hits: list[Block]) -> bool:
        """Return whether there are blocks for a sequence that waits, of which `hits` are cached here."""
        if self.model.whole_sequences:  # which are computed in one step and need none
            return True
        # Of those that decode, one in sixteen starts a block in the next step: leave room for it.
        reserve = len(self.decoding) // BLOCK_SIZE + 1 if self.num_running else 0
        return self.allocator.fits(seq, hits, reserve)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence that no longer runs here."""
        next(place for place in (self.decoding, self.prefilling, self.late) if seq in place).remove(seq)

    def num_behind(self) -> int:
        """Tokens that its sequences still have to compute: its load."""
        return len(self.decoding) + len(self.late) + sum(seq.num_behind for seq in self.prefilling)

    def measure(self, step: StepInFlight, now: float) -> float:
        """Learn the rate of the group from a step that was answered; return how long it took."""
        elapsed = now - self._started_at(step)
        self.last_result_at = now
        self._clock.record(step.size, elapsed)
        self._num_measured += 1
        self.mean_running += (self.num_running - self.mean_running) / RUNNING_STEPS
        is_warm_up = self._num_measured <= NUM_WARM_UP_STEPS
        if self.cost_is_guess and self.cost.is_refuted_by(step.num_tokens, elapsed):
            self.cost = StepCost()
        if not self.cost.is_known or not is_warm_up:
            self.cost_is_guess = is_warm_up
            self.cost.record(step.num_tokens, elapsed)
        if elapsed > 0:
            rate = step.num_tokens / elapsed
            self.tokens_per_s += 0.1 * (rate - self.tokens_per_s) if self.tokens_per_s else rate
        return elapsed

    def made(self, num_tokens: int, num_rows: int) -> None:
        """Learn how many tokens a step made of so many sequences."""
        if num_rows and self.max_row_tokens > 1:
            self.row_tokens += 0.02 * (max(num_tokens / num_rows, 1.0) - self.row_tokens)

    def load(self) -> scheduler_pb2.WorkerLoad:
        """Describe the state of the group."""
        return scheduler_pb2.WorkerLoad(
            worker_id=self.group_id,
            running=self.num_running,
            kv_blocks_free=self.pool.num_free,
            kv_blocks_total=self.pool.num_blocks - 1,
            tokens_per_s=self.tokens_per_s,
        )

    def overdue_s(self, now: float) -> float:
        """Return for how long the oldest step in flight has taken if that is too long, else 0."""
        if not self.in_flight:
            return 0.0
        step = self.in_flight[0]
        age_s = now - self._started_at(step)
        return age_s if age_s > self._clock.patience_s(step.size) else 0.0

    def can_wait(self, now: float) -> bool:
        """Whether the next step need not be planned yet: the one that runs takes long, and others may come."""
        if not self.in_flight:
            return False
        step = self.in_flight[0]
        return self._started_at(step) + self.cost.seconds(step.num_tokens) - now > PLAN_AHEAD_S

    def _started_at(self, step: StepInFlight) -> float:
        """With two steps in flight a step starts when the one before is answered."""
        return max(step.sent_at, self.last_result_at, self._back_at)

    def was_away(self, now: float) -> None:
        """Let the step that runs begin now: how long it took until now is not known."""
        self._back_at = now

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
        assert all(seq.num_pending for seq in self.late), self.late
        slots = [seq.slot for seq in running] + self.free_slots
        assert len(set(slots)) == len(slots), "a slot is used twice"
        assert len(self.in_flight) <= MAX_STEPS_IN_FLIGHT
        self.allocator.check_invariants([] if self.model.whole_sequences else running, int(self.max_row_tokens > 1))
