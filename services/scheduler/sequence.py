"""Requests and sequences: what the scheduler knows of the work it was given."""

from __future__ import annotations

import enum
import math
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.config import BLOCK_SIZE

if TYPE_CHECKING:
    from octavo.services.scheduler.free_blocks import Block
    from octavo.services.scheduler.outputs import LogprobRow, Outbox
    from octavo.services.scheduler.worker_group import WorkerGroup


class SequenceState(enum.Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"  # holds nothing; may have output from before a preemption
    RUNNING = "running"  # has a slot and blocks on a worker group
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """A submitted request: one sequence for each candidate. Times are seconds on the caller's clock.

    gateway_id, handle   whose it is and the owner's name for it; "" and its arrival while nobody's
    is_spoiled           what it computed must not be used by others
    num_blames           how often in a row a worker died while it was the only suspect
    """

    submit: scheduler_pb2.Submit
    gateway_id: str
    handle: int
    arrival: int  # grows by one with each request: the oldest has the smallest
    admitted_at: float
    deadline: float
    soft_deadline: float  # inf: none
    sequences: list[Sequence] = field(default_factory=list)
    num_unfinished: int = 0
    is_spoiled: bool = False
    num_blames: int = 0
    resume_until: float = math.inf  # when it ends if nobody takes it over

    def __repr__(self) -> str:
        return f"<{self.submit.request_id} of {self.gateway_id!r} {self.sequences}>"

    @property
    def needs_time(self) -> bool:
        """Whether all of its output has to be there by a deadline: what is made until a soft limit is enough else."""
        return self.submit.remaining_ms > 0 and self.soft_deadline >= self.deadline

    @property
    def key(self) -> tuple[str, int]:
        """What the scheduler files it under."""
        return self.gateway_id, self.handle


class Sequence:
    """One candidate of a request. Only the Scheduler writes its fields, blocks through the allocator.

    tokens          prompt, then output: every token whose value is known here
    num_computed    tokens whose keys and values are in the cache, or will be after the plans sent
    num_pending     tokens that plans in flight will sample: they exist, their values do not yet
    max_len         prompt and output together never get longer
    max_tokens      nor longer than this while it runs where it does: its group may have less room
    blocks          its blocks, in order; block_hashes names the full ones, as far as hashed
    expected_tokens prompt and output together are expected to get about so long
    slot_scores     its slot was opened with the wish for log probabilities of the prompt
    num_accepted    output tokens that took no step of their own: they were guessed, and the guess was right
    num_scored      prompt tokens whose log probabilities are known or not wanted: all, unless they are wanted
    kept_logprobs   of its newest tokens, if its request can be resumed and wants them
    predicted_wait_s  how long it would wait for a slot, as predicted when it was admitted; 0: not predicted
    ending          how it ended, if its client was told
    """

    __slots__ = (
        "admitted_at", "block_hashes", "blocks", "candidate_index", "ending", "expected_tokens",
        "first_scheduled_at", "first_token_at", "group", "handle", "kept_logprobs", "last_token_at", "max_len",
        "max_tokens", "min_stop_tokens", "num_accepted", "num_cached_tokens", "num_computed", "num_hashed_blocks",
        "num_logprobs", "num_pending", "num_preemptions", "num_prompt", "num_recoveries", "num_scored", "outbox",
        "predicted_wait_s", "request", "slot", "slot_scores", "state", "stop_ids", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        candidate_index: int,
        tokens: array[int],
        max_len: int,
        expected_tokens: int,
        outbox: Outbox,
    ) -> None:
        """`tokens` are the prompt and the output that is there already; they become the sequence's."""
        submit = request.submit
        self.request = request
        self.handle = submit.handle
        self.candidate_index = candidate_index
        self.outbox = outbox
        self.admitted_at = request.admitted_at
        self.state = SequenceState.WAITING
        self.tokens = tokens
        self.num_prompt = len(tokens) - len(submit.continue_token_ids)
        self.max_len = self.max_tokens = max_len
        self.expected_tokens = expected_tokens
        self.stop_ids = frozenset(submit.end_of_sequence_ids) | frozenset(submit.stop.stop_token_ids)
        wants_prompt = submit.prompt_logprobs > 0 and candidate_index == submit.first_candidate_index
        self.num_scored = 1 if wants_prompt else self.num_prompt
        self.min_stop_tokens = self.num_prompt + submit.stop.min_new_tokens
        wants_logprobs = submit.logprobs > 0 or submit.chosen_logprob
        self.num_logprobs = submit.logprobs if wants_logprobs else -1  # -1: not even the chosen token's
        self.group: WorkerGroup | None = None
        self.slot = -1
        self.slot_scores = False
        self.blocks: list[Block] = []
        self.block_hashes: list[bytes] = []
        self.num_hashed_blocks = 0
        self.num_computed = 0
        self.num_pending = 0
        self.num_accepted = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.num_recoveries = 0
        self.predicted_wait_s = 0.0
        self.first_scheduled_at = 0.0
        self.first_token_at = 0.0
        self.last_token_at = 0.0
        self.kept_logprobs: list[LogprobRow] = []
        self.ending: scheduler_pb2.Finished | None = None

    def __repr__(self) -> str:
        return (
            f"<{self.request.submit.request_id}/{self.candidate_index} {self.state.value} "
            f"{len(self.tokens)}+{self.num_pending} tokens, {self.num_computed} computed, {len(self.blocks)} blocks>"
        )

    @property
    def num_output(self) -> int:
        """Output tokens known, those it was submitted with included."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_behind(self) -> int:
        """Tokens still to compute: a new prompt has many, a decoding sequence one."""
        return len(self.tokens) + self.num_pending - self.num_computed

    @property
    def num_expected_left(self) -> int:
        """Output tokens that are still expected: one at least."""
        return max(self.expected_tokens - len(self.tokens), 1)

    @property
    def num_blocks_needed(self) -> int:
        """Blocks that all its tokens take."""
        return (len(self.tokens) + self.num_pending + BLOCK_SIZE - 1) // BLOCK_SIZE
