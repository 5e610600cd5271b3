"""Builds the StepPlan of one step, column by column."""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass
from operator import mul

from octavo.services.scheduler.free_blocks import Block
from octavo.services.scheduler.sequence import Sequence
from octavo.services.telemetry.tracing import is_sampled
from octavo.worker.v1 import worker_pb2

assert sys.byteorder == "little", "columns are little-endian; this machine would have to swap them"

SAMPLE = 1  # row flag: a token is sampled from the row's last position
LAST_SAMPLED = 2  # row flag: the row's last token is the slot's last sampled one


@dataclass(frozen=True, eq=False)
class ScoredRow:
    """A row whose answer has log probabilities of the prompt's tokens from `start` to before `end`."""

    seq: Sequence
    start: int
    end: int


class PlanBuilder:
    """The columns of a StepPlan while rows are added, and the sequences that it samples."""

    __slots__ = (
        "block_ids", "block_table_counts", "block_table_rows", "context_lengths", "num_tokens",
        "pooling_updates", "query_lengths", "row_flags", "sampled", "sampling_updates", "scored", "slots",
        "token_ids", "unsampled",
    )  # fmt: skip

    def __init__(self) -> None:
        self.slots = array("I")
        self.query_lengths = array("I")
        self.context_lengths = array("I")
        self.row_flags = bytearray()
        self.token_ids = array("I")
        self.block_table_rows = array("I")
        self.block_table_counts = array("I")
        self.block_ids = array("I")
        self.sampling_updates: list[worker_pb2.SamplingUpdate] = []
        self.pooling_updates: list[worker_pb2.PoolingUpdate] = []
        self.sampled: list[Sequence] = []
        self.unsampled: list[Sequence] = []  # rows that do not reach their sequence's end
        self.scored: list[ScoredRow] = []
        self.num_tokens = 0

    def add_tokens(self, seq: Sequence, count: int) -> None:
        """Add a row, the next `count` tokens of `seq`, and advance the sequence.

        The row samples if it reaches the sequence's end. A pending token, always the last one, is
        known to the worker alone.
        """
        start = seq.num_computed
        end = start + count
        reaches_end = end == len(seq.tokens) + seq.num_pending
        is_pending = end > len(seq.tokens)
        self.slots.append(seq.slot)
        self.query_lengths.append(count)
        self.context_lengths.append(start)
        self.row_flags.append((SAMPLE if reaches_end else 0) | (LAST_SAMPLED if is_pending else 0))
        self.token_ids.extend(seq.tokens[start:end])
        self.num_tokens += count
        if seq.slot_scores and start + 1 < seq.num_prompt:
            self.scored.append(ScoredRow(seq, start + 1, min(end + 1, seq.num_prompt)))
        seq.num_computed = end
        if reaches_end:
            seq.num_pending += 1
            self.sampled.append(seq)
        else:
            self.unsampled.append(seq)

    def add_blocks(self, slot: int, blocks: list[Block]) -> None:
        """Append blocks to the block table of a slot."""
        self.block_table_rows.append(slot)
        self.block_table_counts.append(len(blocks))
        self.block_ids.extend([block.id for block in blocks])

    def open_slot(self, seq: Sequence) -> None:
        """Give the slot of `seq` its settings, for tokens or for a vector."""
        seq.slot_scores = seq.num_scored < seq.num_prompt
        if seq.request.submit.HasField("pooling"):
            self.pooling_updates.append(_pooling_update(seq))
        else:
            self.sampling_updates.append(_sampling_update(seq))

    def attention(self) -> tuple[int, int]:
        """Return how many cached tokens its rows read, and how many pairs of a query and a key they are."""
        num_context = sum(self.context_lengths)
        return num_context, sum(map(mul, self.query_lengths, self.context_lengths))

    def build(self, step_id: int, freed_slots: list[int]) -> worker_pb2.StepPlan:
        """Return the plan."""
        return worker_pb2.StepPlan(
            step_id=step_id,
            num_sequences=len(self.slots),
            num_tokens=self.num_tokens,
            slot_indexes=self.slots.tobytes(),
            query_lengths=self.query_lengths.tobytes(),
            context_lengths=self.context_lengths.tobytes(),
            token_ids=self.token_ids.tobytes(),
            block_table_rows=self.block_table_rows.tobytes(),
            block_table_counts=self.block_table_counts.tobytes(),
            block_ids=self.block_ids.tobytes(),
            freed_slots=array("I", freed_slots).tobytes(),
            sampling_updates=self.sampling_updates,
            pooling_updates=self.pooling_updates,
            row_flags=bytes(self.row_flags),
        )


def _pooling_update(seq: Sequence) -> worker_pb2.PoolingUpdate:
    """Return what the worker must know of `seq` to make its vector."""
    pooling = seq.request.submit.pooling
    starts = pooling.second_segment_starts
    return worker_pb2.PoolingUpdate(
        slot=seq.slot,
        dimensions=pooling.dimensions,
        normalize=pooling.normalize if pooling.HasField("normalize") else None,
        second_segment_start=starts[seq.candidate_index - seq.request.submit.first_candidate_index] if starts else 0,
    )


def _sampling_update(seq: Sequence) -> worker_pb2.SamplingUpdate:
    """Return what the worker must know of `seq` to sample for it."""
    submit = seq.request.submit
    sampling, min_new_tokens = submit.sampling, submit.stop.min_new_tokens
    needs_history = (
        submit.HasField("constraint")
        or seq.slot_scores
        or sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
        or sampling.repetition_penalty not in (0, 1)  # 0 is unset
    )
    return worker_pb2.SamplingUpdate(
        slot=seq.slot,
        traceparent=submit.traceparent if is_sampled(submit.traceparent) else "",
        temperature=sampling.temperature,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed,
        logprobs=submit.logprobs,
        candidate_index=seq.candidate_index,
        chosen_logprob=seq.num_logprobs >= 0,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty or 1.0,
        bias_token_ids=array("I", sampling.logit_bias.keys()).tobytes(),
        bias_values=array("f", sampling.logit_bias.values()).tobytes(),
        allowed_token_ids=array("I", sampling.allowed_token_ids).tobytes(),
        banned_until_min_token_ids=array("I", sorted(seq.stop_ids)).tobytes() if min_new_tokens else b"",
        min_new_tokens=min_new_tokens,
        prompt_length=seq.num_prompt,
        history_token_ids=seq.tokens.tobytes() if needs_history else b"",
        grammar=submit.constraint.grammar,
        end_of_sequence_ids=array("I", submit.end_of_sequence_ids).tobytes() if submit.HasField("constraint") else b"",
        prompt_logprobs=submit.prompt_logprobs if seq.slot_scores else 0,
    )
