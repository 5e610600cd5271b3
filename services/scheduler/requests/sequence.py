"""Requests and their sequences are the work that the scheduler was given, with each sequence's transitions."""

from __future__ import annotations

import enum
import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest

from octavo.common.v1 import common_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.config import BLOCK_SIZE
from octavo.services.scheduler.kv_cache.free_blocks import Block
from octavo.services.scheduler.requests.outbox import LogprobRow, Outbox

NOBODY = ""  # the gateway of requests whose stream broke: nothing is sent to it


class SequenceState(enum.Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"  # holds nothing; may have output from before a preemption
    RUNNING = "running"  # has a slot and blocks on a worker group
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """A submitted request: one sequence for each candidate. Times are seconds on the caller's clock.

    gateway_id, handle   whose it is and the owner's name for it; "" and its arrival while nobody's
    is_invalid           what it computed must not be used by others
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
    is_invalid: bool = False
    num_blames: int = 0
    resume_until: float = math.inf  # when it ends if nobody reattaches to it
    adapter: str = field(init=False)  # Submit.adapter, which is asked for often

    def __post_init__(self) -> None:
        self.adapter = self.submit.adapter

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

    @property
    def num_output_tokens(self) -> int:
        """Output tokens of all candidates."""
        return sum(seq.num_output_tokens for seq in self.sequences)

    @property
    def was_scheduled(self) -> bool:
        """Whether any of it was ever computed."""
        return any(seq.first_scheduled_at for seq in self.sequences)

    def attach(self, gateway_id: str, handle: int, outbox: Outbox) -> None:
        """Make the request another gateway's, or nobody's."""
        self.gateway_id, self.handle, self.resume_until = gateway_id, handle, math.inf
        for seq in self.sequences:
            seq.attach(handle, outbox)


class Sequence:
    """One candidate of a request. Its fields are written here only; who calls its transitions is in brackets.

    token_ids       prompt, then output: every token whose value is known here
    num_computed_tokens      tokens whose keys and values are in the cache, or will be after the plans sent
    num_output_placeholders  tokens that plans in flight will sample: they exist, their values do not yet
    max_len         prompt and output together never get longer
    max_len_here    nor longer than this while it runs where it does: its group may have less room
    group_id        where it runs, or ran last; "" before it did
    block_tables    its blocks, in order, of each KV group; block_hashes names the full ones, as far as hashed
    block_table     that of the first group
    num_freed       of each group, how many of its first blocks are behind the window: the null block is in their place
    expected_tokens prompt and output together are expected to get about so long
    slot_scores     its slot was opened with the wish for log probabilities of the prompt
    num_accepted_tokens  output tokens that took no step of their own: they were guessed, and the guess was right
    num_scored_tokens    prompt tokens whose log probabilities are known or not wanted: all, unless they are wanted
    kept_logprobs   of its newest tokens, if its request can be resumed and wants them
    predicted_wait_s  how long it would wait for a slot, as predicted when it was admitted; 0: not predicted
    finished        the message that told its client how it ended
    """

    __slots__ = (
        "adapter_id", "admitted_at", "block_hashes", "block_table", "block_tables", "candidate_index",
        "expected_tokens", "finished", "first_scheduled_at", "first_token_at", "group_id", "handle", "kept_logprobs",
        "last_token_at", "max_len", "max_len_here", "min_stop_tokens", "num_accepted_tokens", "num_cached_tokens",
        "num_computed_tokens", "num_freed", "num_hashed_blocks", "num_logprobs", "num_output_placeholders",
        "num_preemptions", "num_prompt_tokens", "num_recoveries", "num_scored_tokens", "outbox", "predicted_wait_s",
        "request", "slot", "slot_scores", "state", "stop_ids", "token_ids",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        candidate_index: int,
        token_ids: array[int],
        max_len: int,
        expected_tokens: int,
        outbox: Outbox,
    ) -> None:
        """`token_ids` are the prompt and the output that is there already; they become the sequence's."""
        submit = request.submit
        self.request = request
        self.handle = submit.handle
        self.candidate_index = candidate_index
        self.outbox = outbox
        self.admitted_at = request.admitted_at
        self.state = SequenceState.WAITING
        self.token_ids = token_ids
        self.num_prompt_tokens = len(token_ids) - len(submit.continue_token_ids)
        self.max_len = self.max_len_here = max_len
        self.expected_tokens = expected_tokens
        self.stop_ids = frozenset(submit.end_of_sequence_ids) | frozenset(submit.stop.stop_token_ids)
        wants_prompt = submit.prompt_logprobs > 0 and candidate_index == submit.first_candidate_index
        self.num_scored_tokens = 1 if wants_prompt else self.num_prompt_tokens
        self.min_stop_tokens = self.num_prompt_tokens + submit.stop.min_new_tokens
        wants_logprobs = submit.logprobs > 0 or submit.chosen_logprob
        self.num_logprobs = submit.logprobs if wants_logprobs else -1  # -1: not even the chosen token's
        self.group_id = ""
        self.adapter_id = 0  # at its group, while it runs
        self.slot = -1
        self.slot_scores = False
        self.block_table: list[Block] = []
        self.block_tables: list[list[Block]] = []
        self.num_freed: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_hashed_blocks = 0
        self.num_computed_tokens = 0
        self.num_output_placeholders = 0
        self.num_accepted_tokens = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.num_recoveries = 0
        self.predicted_wait_s = 0.0
        self.first_scheduled_at = 0.0
        self.first_token_at = 0.0
        self.last_token_at = 0.0
        self.kept_logprobs: list[LogprobRow] = []
        self.finished: scheduler_pb2.Finished | None = None

    def __repr__(self) -> str:
        return (
            f"<{self.request.submit.request_id}/{self.candidate_index} {self.state.value} "
            f"{len(self.token_ids)}+{self.num_output_placeholders} tokens, {self.num_computed_tokens} computed, "
            f"{self.num_held_blocks} blocks>"
        )

    @property
    def num_output_tokens(self) -> int:
        """Output tokens known, those it was submitted with included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens still to compute: a new prompt has many, a decoding sequence one."""
        return len(self.token_ids) + self.num_output_placeholders - self.num_computed_tokens

    @property
    def num_expected_left(self) -> int:
        """Output tokens that are still expected: one at least."""
        return max(self.expected_tokens - len(self.token_ids), 1)

    @property
    def num_blocks_needed(self) -> int:
        """Blocks that all its tokens take, of a KV group."""
        return (len(self.token_ids) + self.num_output_placeholders + BLOCK_SIZE - 1) // BLOCK_SIZE

    @property
    def num_held_blocks(self) -> int:
        """Blocks that it has, of all groups."""
        return sum(map(len, self.block_tables)) - sum(self.num_freed)

    # -- where it is [the lifecycle] -----------------------------------------------------------------

    def run(self, group_id: str, slot: int, max_len_here: int) -> None:
        """Begin to run in a slot of a group, with the blocks that it has."""
        assert self.state is SequenceState.WAITING, self
        self.state, self.group_id, self.slot = SequenceState.RUNNING, group_id, slot
        self.max_len_here = min(self.max_len, max_len_here)
        self.slot_scores = self.num_scored_tokens < self.num_prompt_tokens
        if not self.first_scheduled_at:
            self.num_cached_tokens = min(self.num_computed_tokens, self.num_prompt_tokens)

    def use_adapter(self, adapter_id: int) -> None:
        """Note the number that its adapter has at its group."""
        self.adapter_id = adapter_id

    def leave(self) -> None:
        """Give the slot up, and wait."""
        assert self.state is SequenceState.RUNNING, self
        self.state, self.slot, self.max_len_here = SequenceState.WAITING, -1, self.max_len

    def preempt(self) -> None:
        """Count that others needed its blocks."""
        self.num_preemptions += 1

    def recover(self) -> None:
        """Count the loss of its worker, and with it of what plans in flight would have sampled."""
        self.num_recoveries += 1
        self.num_output_placeholders = 0

    def stop(self) -> None:
        """End, once the slot is given up."""
        assert self.slot == -1, self
        self.state = SequenceState.FINISHED

    def finish(self, reason: common_pb2.FinishReason, stop_token_id: int, now: float) -> None:
        """Say to the gateway how it ended."""
        self.finished = scheduler_pb2.Finished(
            handle=self.handle,
            candidate_index=self.candidate_index,
            reason=reason,
            stop_token_id=stop_token_id,
            usage=self.usage(),
            timing=self._timing(now),
        )
        self.outbox.finished.append(self.finished)

    def attach(self, handle: int, outbox: Outbox) -> None:
        """Send what comes from now on to another gateway, which knows the request by this handle."""
        self.handle, self.outbox = handle, outbox

    def expect_wait(self, seconds: float) -> None:
        """Note how long it would wait for a slot, as predicted [the forecast]."""
        self.predicted_wait_s = seconds

    # -- its tokens [the planner, and who takes answers] -----------------------------------------------

    def schedule(self, num_scheduled_tokens: int, now: float) -> bool:
        """Count tokens that a plan computes; return whether it samples the next one."""
        self.first_scheduled_at = self.first_scheduled_at or now
        self.num_computed_tokens += num_scheduled_tokens
        if self.num_computed_tokens < len(self.token_ids) + self.num_output_placeholders:
            return False
        self.num_output_placeholders += 1
        return True

    def append_token(self, token_id: int, now: float) -> int:
        """Take the value of the oldest token that plans in flight were to sample; return how many tokens there are."""
        self.num_output_placeholders -= 1
        self.last_token_at = now
        if not self.first_token_at:
            self.first_token_at = now
        token_ids = self.token_ids
        token_ids.append(token_id)
        return len(token_ids)

    def lose_token(self) -> None:
        """Learn that a plan in flight sampled nothing for it, or nothing that is wanted."""
        self.num_output_placeholders -= 1

    def correct_num_sampled(self, num_sampled: int) -> None:
        """Count how many tokens a plan sampled that was thought to sample one."""
        self.num_output_placeholders += num_sampled - 1
        if self.state is SequenceState.RUNNING:
            self.num_computed_tokens += num_sampled - 1

    def compute_newest_again(self) -> None:
        """Go on from the newest token that is known: rows that were planned after it are of no use."""
        self.num_computed_tokens = len(self.token_ids) - 1

    def accept_token(self) -> None:
        """Count a token that was guessed, and the guess was right."""
        self.num_accepted_tokens += 1

    def keep_logprobs(self, row: LogprobRow) -> None:
        """Keep the newest token's log probabilities, for who resumes the request."""
        self.kept_logprobs.append(row)

    def score_prompt(self, num_scored_tokens: int) -> None:
        """Count the prompt's tokens whose log probabilities are known."""
        self.num_scored_tokens = num_scored_tokens

    # -- its blocks [the allocator] --------------------------------------------------------------------

    def hold_blocks(self, block_tables: list[list[Block]], num_cached_blocks: int, num_freed: list[int]) -> None:
        """Take blocks of each group, of which the first ones are cached."""
        assert not self.block_tables, self
        self.block_tables, self.num_freed = block_tables, num_freed
        self.block_table = block_tables[0]
        self.num_computed_tokens = num_cached_blocks * BLOCK_SIZE
        self.num_hashed_blocks = num_cached_blocks

    def append_block_of_each(self, blocks: list[Block]) -> None:
        """Take one more block of each group."""
        for table, block in zip(self.block_tables, blocks, strict=True):
            table.append(block)

    def append_blocks(self, kv_group: int, blocks: list[Block]) -> None:
        """Take more blocks of a group."""
        self.block_tables[kv_group].extend(blocks)

    def free_blocks(self, kv_group: int, num_freed: int, null_block: Block) -> list[Block]:
        """Give up those of a group's first `num_freed` blocks that it still has; return them."""
        table, first = self.block_tables[kv_group], self.num_freed[kv_group]
        freed = table[first:num_freed]
        table[first:num_freed] = [null_block] * len(freed)
        self.num_freed[kv_group] = num_freed
        return freed

    def cache_blocks(self, num_hashed_blocks: int) -> None:
        """Note how many of its blocks are in the prefix cache, or equal ones."""
        self.num_hashed_blocks = num_hashed_blocks

    def drop_blocks(self) -> list[Block]:
        """Give all blocks up, to be computed anew; return them, those of the same tokens together."""
        held = [table[first:] for table, first in zip(self.block_tables, self.num_freed, strict=True)]
        if len(held) > 1:
            columns = zip_longest(*([None] * first + table for table, first in zip(held, self.num_freed, strict=True)))
            held = [[block for column in columns for block in column if block is not None]]
        self.block_table, self.block_tables, self.num_freed = [], [], []
        self.num_computed_tokens = self.num_hashed_blocks = 0
        return held[0] if held else []

    def drop_hashes(self) -> None:
        """Forget the names of its blocks: it will compute nothing more."""
        self.block_hashes = []

    # -- what is said of it ------------------------------------------------------------------------------

    def stop_reason(self, token_id: int) -> common_pb2.FinishReason:
        """Return why this token ends it."""
        if token_id in self.request.submit.end_of_sequence_ids:
            return common_pb2.FINISH_REASON_END_OF_SEQUENCE
        return common_pb2.FINISH_REASON_STOP_TOKEN

    def length_reason(self) -> common_pb2.FinishReason:
        """Return why it ends at its greatest length."""
        limit = self.request.submit.stop.max_new_tokens
        if limit and self.num_output_tokens >= limit:
            return common_pb2.FINISH_REASON_MAX_TOKENS
        return common_pb2.FINISH_REASON_CONTEXT_LIMIT

    def phase(self) -> int:
        """Return where it is: a number of octavo.inference.v1.Progress.Phase."""
        if self.state is SequenceState.WAITING:
            return 4 if self.num_preemptions or self.num_recoveries else 1
        return 2 if self.num_uncomputed_tokens > 1 else 3

    def usage(self) -> common_pb2.Usage:
        """Return what it has used."""
        return common_pb2.Usage(
            prompt_tokens=self.num_prompt_tokens,
            cached_prompt_tokens=self.num_cached_tokens,
            output_tokens=self.num_output_tokens,
            speculative_accepted_tokens=self.num_accepted_tokens,
        )

    def _timing(self, now: float) -> common_pb2.Timing:
        """Return where its time went. A phase that never began took no time."""
        scheduled = self.first_scheduled_at or now
        first = self.first_token_at or now
        return common_pb2.Timing(
            queue_us=int(1e6 * (scheduled - self.admitted_at)),
            prefill_us=int(1e6 * (first - scheduled)),
            decode_us=int(1e6 * ((self.last_token_at or now) - first)),
            preemptions=self.num_preemptions,
        )


def schedule_decodes(sequences: Iterable[Sequence]) -> None:
    """Count the next token of each as computed, and one more that is sampled. This is done for every token."""
    for seq in sequences:
        seq.num_computed_tokens += 1
        seq.num_output_placeholders += 1


def prompts_of(submit: scheduler_pb2.Submit) -> list[array[int]]:
    """Return what each sequence of a request starts with: its input, or what all candidates share."""
    token_ids = array("I", submit.prompt_token_ids)
    if not submit.HasField("pooling"):
        token_ids.extend(submit.continue_token_ids)
        return [token_ids[:] for _ in range(max(submit.candidate_count, 1))]
    prompts, start = [], 0
    for length in submit.pooling.input_lengths:
        prompts.append(token_ids[start : start + length])
        start += length
    return prompts
