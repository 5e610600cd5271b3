"""The builder of a step's plan gathers its rows as columns, and then makes the message."""

from __future__ import annotations

import sys
from array import array
from itertools import chain
from operator import mul
from typing import Any

from octavo.common.sampling import HISTORY_LISTS, SAMPLING_FIELDS
from octavo.common.v1 import common_pb2
from octavo.services.scheduler.groups.worker_group import ScoredRow
from octavo.services.scheduler.kv_cache.free_blocks import Block
from octavo.services.scheduler.requests.sequence import Sequence
from octavo.services.telemetry.tracing import is_sampled
from octavo.worker.v1 import worker_pb2

assert sys.byteorder == "little", "columns are little-endian; this machine would have to swap them"

SAMPLE = 1  # row flag: a token is sampled from the row's last position
LAST_SAMPLED = 2  # row flag: the row's last token is the slot's last sampled one

_UPDATE = worker_pb2.SamplingUpdate.DESCRIPTOR.fields_by_name
_NUMBERS = [field for name, field in SAMPLING_FIELDS.items() if name in _UPDATE]
_NEEDS_HISTORY = [field for field in SAMPLING_FIELDS.values() if field.needs_history]
SAMPLING_UPDATE_FORMS = frozenset({"logit_bias", "allowed_token_ids"})
"""Parameters that are columns in a SamplingUpdate."""
_FURTHER = [
    field
    for field in common_pb2.SamplingParams.DESCRIPTOR.fields
    if field.name not in {*_UPDATE, *SAMPLING_UPDATE_FORMS}
]


class PlanBuilder:
    """The columns of a StepPlan while rows are added, and the sequences that it samples."""

    __slots__ = (
        "blocks", "context_lengths", "num_tokens", "pooling_updates", "query_lengths", "row_flags", "sampled",
        "sampling_updates", "scored", "slots", "token_ids", "unsampled",
    )  # fmt: skip

    def __init__(self) -> None:
        self.slots = array("I")
        self.query_lengths = array("I")
        self.context_lengths = array("I")
        self.row_flags = bytearray()
        self.token_ids = array("I")
        self.blocks: dict[int, list[int]] = {}  # that are appended, by block table
        self.sampling_updates: list[worker_pb2.SamplingUpdate] = []
        self.pooling_updates: list[worker_pb2.PoolingUpdate] = []
        self.sampled: list[Sequence] = []
        self.unsampled: list[Sequence] = []  # rows that do not reach their sequence's end
        self.scored: list[ScoredRow] = []
        self.num_tokens = 0

    def add_tokens(self, seq: Sequence, num_scheduled_tokens: int, now: float) -> None:
        """Add a row, the next tokens of `seq`, and advance the sequence.

        The row samples if it reaches the sequence's end. A pending token, always the last one, is
        known to the worker alone.
        """
        start = seq.num_computed_tokens
        end = start + num_scheduled_tokens
        is_pending = end > len(seq.token_ids)
        samples = seq.schedule(num_scheduled_tokens, now)
        self.slots.append(seq.slot)
        self.query_lengths.append(num_scheduled_tokens)
        self.context_lengths.append(start)
        self.row_flags.append((SAMPLE if samples else 0) | (LAST_SAMPLED if is_pending else 0))
        self.token_ids.extend(seq.token_ids[start:end])
        self.num_tokens += num_scheduled_tokens
        if seq.slot_scores and start + 1 < seq.num_prompt_tokens:
            self.scored.append(ScoredRow(seq, start + 1, min(end + 1, seq.num_prompt_tokens)))
        (self.sampled if samples else self.unsampled).append(seq)

    def add_blocks(self, seq: Sequence, tables: list[list[Block]]) -> None:
        """Append blocks to the block tables of a sequence, one for each KV group."""
        row = seq.slot * len(tables)
        for group, blocks in enumerate(tables):
            self.blocks.setdefault(row + group, []).extend([block.id for block in blocks])

    def grow(self, seq: Sequence, blocks: list[Block]) -> None:
        """Append one block to each block table of a sequence that gets no others in this step."""
        for row, block in enumerate(blocks, seq.slot * len(blocks)):
            self.blocks[row] = [block.id]

    def open_slot(self, seq: Sequence) -> None:
        """Give the slot of `seq` its settings, for tokens or for a vector, and its blocks."""
        if seq.request.submit.HasField("pooling"):
            self.pooling_updates.append(_pooling_update(seq))
        else:
            self.sampling_updates.append(_sampling_update(seq))
        self.add_blocks(seq, seq.block_tables or [[]])

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
            block_table_rows=array("I", self.blocks).tobytes(),
            block_table_counts=array("I", map(len, self.blocks.values())).tobytes(),
            block_ids=array("I", chain.from_iterable(self.blocks.values())).tobytes(),
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
        or any(field.value(sampling) != field.neutral for field in _NEEDS_HISTORY)
        or any(getattr(sampling, name) for name in HISTORY_LISTS)
    )
    return worker_pb2.SamplingUpdate(
        slot=seq.slot,
        traceparent=submit.traceparent if is_sampled(submit.traceparent) else "",
        **sampling_values(sampling),
        logprobs=submit.logprobs,
        candidate_index=seq.candidate_index,
        chosen_logprob=seq.num_logprobs >= 0,
        bias_token_ids=array("I", sampling.logit_bias.keys()).tobytes(),
        bias_values=array("f", sampling.logit_bias.values()).tobytes(),
        allowed_token_ids=array("I", sampling.allowed_token_ids).tobytes(),
        banned_until_min_token_ids=array("I", sorted(seq.stop_ids)).tobytes() if min_new_tokens else b"",
        min_new_tokens=min_new_tokens,
        prompt_length=seq.num_prompt_tokens,
        history_token_ids=seq.token_ids.tobytes() if needs_history else b"",
        grammar=submit.constraint.grammar,
        end_of_sequence_ids=array("I", submit.end_of_sequence_ids).tobytes() if submit.HasField("constraint") else b"",
        prompt_logprobs=submit.prompt_logprobs if seq.slot_scores else 0,
        adapter_id=seq.adapter_id,
    )


def sampling_values(sampling: common_pb2.SamplingParams) -> dict[str, Any]:
    """Return the fields of a SamplingUpdate that repeat what SamplingParams declares."""
    further = common_pb2.SamplingParams()
    for field in _FURTHER:
        if field.is_repeated:
            getattr(further, field.name).MergeFrom(getattr(sampling, field.name))
        elif sampling.HasField(field.name):
            setattr(further, field.name, getattr(sampling, field.name))
    values: dict[str, Any] = {field.name: field.value(sampling) for field in _NUMBERS}
    return {**values, "sampling": further} if further.ByteSize() else values
