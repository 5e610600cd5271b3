"""A worker group is one copy of the model: its sequences, slots, blocks, steps in flight and step times."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from octavo.common.v1 import common_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.config import BLOCK_SIZE
from octavo.services.scheduler.groups.block_allocator import BlockAllocator, max_tokens
from octavo.services.scheduler.groups.group_adapters import GroupAdapters
from octavo.services.scheduler.groups.step_times import StepSize, StepTimes
from octavo.services.scheduler.kv_cache.cache_events import CacheEvents
from octavo.services.scheduler.kv_cache.free_blocks import Block
from octavo.services.scheduler.requests.sequence import Sequence, SequenceState
from octavo.worker.v1 import worker_pb2


@dataclass(frozen=True)
class ModelInfo:
    """What a model makes of a sequence.

    vector_size      elements of a vector; 0 if it makes tokens
    whole_sequences  all tokens of a sequence see each other: it is computed in one step, and has no blocks
    vocab_size       token ids are below this; 0 if it is not known
    of_last_token    a vector is made of the last token alone: what comes before it may be in the cache
    """

    task: common_pb2.ModelTask = common_pb2.MODEL_TASK_GENERATE
    vector_size: int = 0
    whole_sequences: bool = False
    vocab_size: int = 0
    of_last_token: bool = False

    @property
    def makes_vectors(self) -> bool:
        """Whether it makes vectors (or scores, which are short ones), and no tokens."""
        return self.vector_size > 0

    @classmethod
    def of(cls, ready: worker_pb2.WorkerReady) -> ModelInfo:
        """Return what a worker says of its model."""
        task = ready.task or common_pb2.MODEL_TASK_GENERATE
        return cls(task, ready.vector_size, ready.whole_sequences, ready.vocab_size, ready.vectors_of_last_token)


GENERATOR = ModelInfo()
"""A model that makes tokens."""


MAX_STEPS_IN_FLIGHT = 2  # one runs, one waits beside the worker
PLAN_AHEAD_S = 0.06  # before a step is expected to end, the next is planned: time is looked at every 25 ms


@dataclass(frozen=True, eq=False)
class ScoredRow:
    """A row whose answer has log probabilities of the prompt's tokens from `start` to before `end`."""

    seq: Sequence
    start: int
    end: int


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


@dataclass(frozen=True)
class GroupLimits:
    """What a worker group has room for, and what its workers can do.

    num_blocks              KV blocks, the null block included
    max_model_len           most tokens of a sequence
    max_num_seqs            most sequences at once
    max_num_batched_tokens  most tokens in a step
    takes_grammars          its workers can keep to a request's constraint
    scores_prompts          they give log probabilities of prompts
    max_row_tokens          most tokens that one of their steps makes of a sequence
    max_adapters            most adapters that they hold; 0: none
    adapter_memory          bytes that these may take together
    kv_windows              the window of each of their KV groups; 0: it has none
    """

    num_blocks: int
    max_model_len: int
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    takes_grammars: bool = False
    scores_prompts: bool = False
    max_row_tokens: int = 1
    max_adapters: int = 0
    adapter_memory: int = 0
    kv_windows: tuple[int, ...] = (0,)


class WorkerGroup:
    """Owner of a group's slots, steps in flight and lists of sequences; blocks are its allocator's."""

    def __init__(
        self,
        group_id: str,
        epoch: int,
        limits: GroupLimits,
        step_timeout_s: float,
        events: CacheEvents,
        weights: Mapping[str, float],
        model: ModelInfo,
    ) -> None:
        """`weights` are the tenants' in the prefix cache, whose changes are reported to `events`."""
        self.group_id = group_id
        self.epoch = epoch
        self.model = model
        self.limits = limits
        self.max_model_len = limits.max_model_len
        if model.whole_sequences:
            self.max_model_len = min(self.max_model_len, limits.max_num_batched_tokens)
        else:  # else there is no cache
            self.max_model_len = int(min(self.max_model_len, max_tokens(limits.kv_windows, limits.num_blocks - 1)))
        self.allocator = BlockAllocator(limits.num_blocks, events, weights, limits.kv_windows)
        self.pool = self.allocator.pool
        self.decoding: list[Sequence] = []  # in the order they got here: one token a step
        self.prefilling: list[Sequence] = []  # more than one token behind
        self.late: list[Sequence] = []  # got no token yet, and are computed again when no step in flight has them
        self.in_flight: deque[StepInFlight] = deque()
        self.num_steps = 0
        self.free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._freed_slots: list[int] = []  # since the last plan: the worker must hear of them
        self.adapters = GroupAdapters(limits.max_adapters, limits.adapter_memory)
        self.times = StepTimes(step_timeout_s)
        self.last_result_at = self._back_at = 0.0

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
        if len(seq.token_ids) >= self.max_model_len + self.model.makes_vectors:  # a vector takes no room
            return False
        submit, limits = seq.request.submit, self.limits
        return (
            (limits.takes_grammars or not submit.HasField("constraint"))
            and (limits.scores_prompts or not submit.prompt_logprobs)
            and (limits.max_adapters > 0 or not seq.request.adapter)
        )

    def can_open(self, seq: Sequence) -> bool:
        """Return whether a sequence that its workers can run need not wait for its adapter."""
        adapter = seq.request.adapter
        return (not adapter or self.adapters.can_open(adapter)) and self.can_run(seq)

    def has_room(self, seq: Sequence, hits: list[list[Block]]) -> bool:
        """Return whether there are blocks for a sequence that waits, of which `hits` are cached here."""
        if self.model.whole_sequences:  # which are computed in one step and need none
            return True
        # Of those that decode, one in sixteen starts a block in the next step: leave room for it.
        reserve = len(self.decoding) // BLOCK_SIZE + 1 if self.num_running else 0
        return self.allocator.fits(seq, hits, reserve * self.allocator.num_groups + self.num_promised())

    def num_promised(self) -> int:
        """Return how many blocks must stay free for open prompts to go on: groups with a window get theirs late."""
        if not self.allocator.has_windows:
            return 0
        return sum(self.allocator.num_missing(seq) for seq in self.prefilling)

    # -- its sequences -------------------------------------------------------------------------------

    def run(self, seq: Sequence, hits: list[list[Block]]) -> None:
        """Give a waiting sequence a slot, and blocks, `hits` first: it has room for them."""
        if not self.model.whole_sequences:
            self.allocator.open(seq, hits)
        seq.run(self.group_id, self.free_slots.pop(), self.max_model_len + self.model.makes_vectors)
        if seq.request.adapter:
            seq.use_adapter(self.adapters.acquire(seq.request.adapter))
        self.prefilling.append(seq)

    def end_prompts(self) -> list[Sequence]:
        """Let those decode whose prompt is computed by the plans made so far; return them."""
        through = [seq for seq in self.prefilling if seq.num_output_placeholders]
        if through:
            self.decoding += through
            self.prefilling = [seq for seq in self.prefilling if not seq.num_output_placeholders]
        return through

    def compute_again(self, seq: Sequence) -> None:
        """Let a sequence, of which a row got no token, go on from its newest known token, with its slot and blocks.

        Rows that were planned meanwhile are of no use: they are waited for.
        """
        if seq not in self.late:
            self._remove(seq)
            self.late.append(seq)
            seq.compute_newest_again()
        if seq.num_output_placeholders == 0:
            self.late.remove(seq)
            self.prefilling.append(seq)

    def release(self, seq: Sequence) -> None:
        """Take slot and blocks of a running sequence back: the only place that frees blocks."""
        self._remove(seq)
        self.allocator.free(seq)
        self.free_slots.append(seq.slot)
        self._freed_slots.append(seq.slot)
        if seq.request.adapter:
            self.adapters.release(seq.request.adapter)
        seq.leave()

    def _remove(self, seq: Sequence) -> None:
        next(place for place in (self.decoding, self.prefilling, self.late) if seq in place).remove(seq)

    def num_uncomputed_tokens(self) -> int:
        """Tokens that its sequences still have to compute: its load."""
        return len(self.decoding) + len(self.late) + sum(seq.num_uncomputed_tokens for seq in self.prefilling)

    # -- its steps -----------------------------------------------------------------------------------

    def begin_step(self, step: StepInFlight) -> list[int]:
        """Note a plan that is sent; return the slots that were freed since the one before."""
        assert step.step_id == self.num_steps + 1, step
        self.num_steps += 1
        self.in_flight.append(step)
        freed, self._freed_slots = self._freed_slots, []
        return freed

    def end_step(self, now: float) -> float:
        """Note that the oldest step in flight is answered, and learn from it; return how long it took."""
        step = self.in_flight.popleft()
        elapsed = now - self._started_at(step)
        self.last_result_at = now
        self.times.record(step.size, elapsed, self.num_running)
        return elapsed

    def tokens_ahead(self, now: float) -> float:
        """Return how many tokens are computed here before those of a new sequence.

        A step that takes longer than expected counts for as many more as could have been computed meanwhile.
        """
        if not self.in_flight:
            return self.num_uncomputed_tokens()
        step = self.in_flight[0]
        late_s = now - self._started_at(step) - self.times.seconds(step.size)
        num_in_flight = sum(step.num_tokens for step in self.in_flight)
        return self.num_uncomputed_tokens() + num_in_flight + max(late_s, 0.0) * self.times.tokens_per_s

    def load(self) -> scheduler_pb2.WorkerLoad:
        """Describe the state of the group."""
        return scheduler_pb2.WorkerLoad(
            worker_id=self.group_id,
            running=self.num_running,
            kv_blocks_free=self.pool.num_free,
            kv_blocks_total=self.pool.num_blocks - 1,
            tokens_per_s=self.times.tokens_per_s,
        )

    def overdue_s(self, now: float) -> float:
        """Return for how long the oldest step in flight has taken if that is too long, else 0."""
        if not self.in_flight:
            return 0.0
        step = self.in_flight[0]
        age_s = now - self._started_at(step)
        return age_s if age_s > self.times.patience_s(step.size) else 0.0

    def can_wait(self, now: float) -> bool:
        """Whether the next step need not be planned yet: the one that runs takes long, and others may come."""
        if not self.in_flight:
            return False
        step = self.in_flight[0]
        return self._started_at(step) + self.times.seconds(step.size) - now > PLAN_AHEAD_S

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
            assert seq.group_id == self.group_id, seq
            assert 0 <= seq.num_output_placeholders <= len(self.in_flight), seq
            assert seq.num_computed_tokens < len(seq.token_ids) + max(seq.num_output_placeholders, 1), seq
        for seq in self.decoding:
            assert seq.num_uncomputed_tokens == 1, seq
        assert all(seq.num_output_placeholders for seq in self.late), self.late
        slots = [seq.slot for seq in running] + self.free_slots
        assert len(set(slots)) == len(slots), "a slot is used twice"
        assert len(self.in_flight) <= MAX_STEPS_IN_FLIGHT
        self.adapters.check_invariants(Counter(seq.request.adapter for seq in running if seq.request.adapter))
        may_guess = self.limits.max_row_tokens > 1
        self.allocator.check_invariants([] if self.model.whole_sequences else running, int(may_guess))
