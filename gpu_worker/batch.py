"""Turns StepPlans into StepInputs: keeps each slot's block table and last token, checks every field.

All work is on whole columns. A plan is checked before anything is computed; a plan that breaks the
contract raises PlanError and leaves the slots in an unknown state, so the worker must join again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from octavo.gpu_worker.errors import PlanError
from octavo.gpu_worker.ops import Int32Array, StepInput
from octavo.gpu_worker.protocol import BLOCK_SIZE, NOT_FINITE_TOKEN
from octavo.gpu_worker.sampling_settings import SamplingSettings, column, read_sampling_update
from octavo.worker.v1 import worker_pb2

UInt32Array = npt.NDArray[np.uint32]
Int64Array = npt.NDArray[np.int64]

_SAMPLES, _LAST_TOKEN_IN_SLOT = 1, 2
_NO_TOKEN = -1


@dataclass(frozen=True)
class Limits:
    """What plans must stay within. `num_blocks` counts block 0."""

    max_running: int
    max_batch_tokens: int
    max_blocks_per_sequence: int
    num_blocks: int
    vocab_size: int


@dataclass(frozen=True)
class Step:
    """A checked plan.

    freed_slots       slots to forget in the sampler, before `opened`
    opened            (slot, settings) to open in the sampler
    copy_pairs        [N, 2] blocks to copy before the step, (from, to)
    input             the batch; None if the plan has no rows
    sampled_slots     [R] slots that a token is drawn for
    sampled_positions [R] absolute position of that token
    """

    freed_slots: UInt32Array
    opened: list[tuple[int, SamplingSettings]]
    copy_pairs: Int32Array
    input: StepInput | None
    sampled_slots: Int32Array
    sampled_positions: Int32Array


class Slots:
    """The state that plans refer to. All of it comes from plans and results of the present epoch."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._open = np.zeros(limits.max_running, np.bool_)
        self._num_blocks = np.zeros(limits.max_running, np.int64)
        self._block_tables = np.zeros((limits.max_running, limits.max_blocks_per_sequence), np.int32)
        self._last_token_ids = np.full(limits.max_running, _NO_TOKEN, np.int64)

    def apply(self, plan: worker_pb2.StepPlan) -> Step:
        """Take a plan's changes and return its step. Raises PlanError."""
        freed = self._slots(plan.freed_slots, "freed_slots")
        opened = self._open_slots(plan, freed)
        self._append_blocks(plan)
        copy_pairs = self._blocks(plan.copy_pairs, "copy_pairs")
        if len(copy_pairs) % 2:
            raise PlanError(f"copy_pairs: {len(copy_pairs)} blocks are no pairs")
        rows = self._rows(plan)
        samples = (rows.flags & _SAMPLES) != 0
        return Step(
            freed_slots=freed,
            opened=opened,
            copy_pairs=copy_pairs.astype(np.int32).reshape(-1, 2),
            input=self._input(plan, rows, samples) if len(rows.slots) else None,
            sampled_slots=rows.slots[samples].astype(np.int32),
            sampled_positions=(rows.contexts + rows.lengths)[samples].astype(np.int32),
        )

    def record(self, slots: Int32Array, token_ids: UInt32Array) -> None:
        """Remember the tokens drawn for `slots`.

        A sequence whose logits were not finite ends, but the next plan may already hold it: it
        goes on with token 0 until the scheduler knows.
        """
        self._last_token_ids[slots] = np.where(token_ids == NOT_FINITE_TOKEN, 0, token_ids)

    def _open_slots(self, plan: worker_pb2.StepPlan, freed: UInt32Array) -> list[tuple[int, SamplingSettings]]:
        opened = [
            (update.slot, read_sampling_update(update, self._limits.vocab_size)) for update in plan.sampling_updates
        ]
        slots = np.array([slot for slot, _ in opened], np.int64)
        _check_below(slots, self._limits.max_running, "sampling_updates: slot")
        _check_distinct(slots, "sampling_updates: slot")
        for cleared in (freed, slots):
            self._num_blocks[cleared] = 0
            self._block_tables[cleared] = 0
            self._last_token_ids[cleared] = _NO_TOKEN
        self._open[freed] = False
        self._open[slots] = True
        return opened

    def _append_blocks(self, plan: worker_pb2.StepPlan) -> None:
        slots = self._slots(plan.block_table_rows, "block_table_rows")
        counts = column(plan.block_table_counts, np.uint32, "block_table_counts").astype(np.int64)
        blocks = self._blocks(plan.block_ids, "block_ids")
        if len(counts) != len(slots) or counts.sum() != len(blocks):
            raise PlanError(
                f"block_table_counts: {len(counts)} counts of {counts.sum()} blocks, but there are "
                f"{len(slots)} block_table_rows and {len(blocks)} block_ids"
            )
        self._check_open(slots, "block_table_rows")
        _check_distinct(slots, "block_table_rows")
        first = self._num_blocks[slots]
        if len(slots) and (first + counts).max() > self._limits.max_blocks_per_sequence:
            raise PlanError(
                f"block_ids: a slot gets {(first + counts).max()} blocks, "
                f"a sequence holds at most {self._limits.max_blocks_per_sequence}"
            )
        starts = np.cumsum(counts) - counts
        columns = np.arange(len(blocks)) + np.repeat(first - starts, counts)
        self._block_tables[np.repeat(slots, counts), columns] = blocks
        self._num_blocks[slots] += counts

    def _rows(self, plan: worker_pb2.StepPlan) -> _Rows:
        rows = _Rows(
            slots=self._slots(plan.slot_indexes, "slot_indexes").astype(np.int64),
            lengths=column(plan.query_lengths, np.uint32, "query_lengths").astype(np.int64),
            contexts=column(plan.context_lengths, np.uint32, "context_lengths").astype(np.int64),
            flags=np.frombuffer(plan.row_flags, np.uint8),
        )
        for name, values in (
            ("slot_indexes", rows.slots),
            ("query_lengths", rows.lengths),
            ("context_lengths", rows.contexts),
            ("row_flags", rows.flags),
        ):
            if len(values) != plan.num_sequences:
                raise PlanError(f"{name}: {len(values)} rows, but num_sequences is {plan.num_sequences}")
        self._check_open(rows.slots, "slot_indexes")
        _check_distinct(rows.slots, "slot_indexes")
        if len(rows.lengths) and rows.lengths.min() < 1:
            raise PlanError("query_lengths: a row has no token")
        if rows.lengths.sum() != plan.num_tokens or plan.num_tokens > self._limits.max_batch_tokens:
            raise PlanError(
                f"num_tokens: is {plan.num_tokens}, query_lengths add up to {rows.lengths.sum()}, "
                f"a step holds at most {self._limits.max_batch_tokens}"
            )
        short = rows.contexts + rows.lengths > self._num_blocks[rows.slots] * BLOCK_SIZE
        if short.any():
            slot = rows.slots[short][0]
            raise PlanError(f"query_lengths: slot {slot} has {self._num_blocks[slot]} blocks, too few for its tokens")
        if (rows.flags & ~np.uint8(_SAMPLES | _LAST_TOKEN_IN_SLOT)).any():
            raise PlanError("row_flags: an unknown bit is set")
        return rows

    def _input(self, plan: worker_pb2.StepPlan, rows: _Rows, samples: npt.NDArray[np.bool_]) -> StepInput:
        ends = np.cumsum(rows.lengths)
        starts = ends - rows.lengths
        positions = np.arange(plan.num_tokens) + np.repeat(rows.contexts - starts, rows.lengths)
        slot_of_token = np.repeat(rows.slots, rows.lengths)
        blocks = self._block_tables[slot_of_token, positions // BLOCK_SIZE].astype(np.int64)
        query_start_loc = np.zeros(len(rows.slots) + 1, np.int32)
        query_start_loc[1:] = ends
        return StepInput(
            token_ids=self._token_ids(plan, rows, ends),
            positions=positions.astype(np.int32),
            slot_mapping=(blocks * BLOCK_SIZE + positions % BLOCK_SIZE).astype(np.int32),
            query_start_loc=query_start_loc,
            seq_lens=(rows.contexts + rows.lengths).astype(np.int32),
            block_tables=self._block_tables[rows.slots],
            logits_rows=(ends[samples] - 1).astype(np.int32),
        )

    def _token_ids(self, plan: worker_pb2.StepPlan, rows: _Rows, ends: Int64Array) -> Int32Array:
        """Merge the plan's tokens with those that only the worker knows."""
        from_slot = (rows.flags & _LAST_TOKEN_IN_SLOT) != 0
        last = self._last_token_ids[rows.slots[from_slot]]
        if (last == _NO_TOKEN).any():
            raise PlanError("row_flags: a row's last token is its slot's, but none was sampled for the slot yet")
        sent = column(plan.token_ids, np.uint32, "token_ids")
        if len(sent) != plan.num_tokens - len(last):
            raise PlanError(f"token_ids: {len(sent)} tokens, expected {plan.num_tokens - len(last)}")
        _check_below(sent, self._limits.vocab_size, "token_ids")
        token_ids = np.empty(plan.num_tokens, np.int32)
        is_sent = np.ones(plan.num_tokens, np.bool_)
        is_sent[ends[from_slot] - 1] = False
        token_ids[is_sent] = sent
        token_ids[~is_sent] = last
        return token_ids

    def _slots(self, data: bytes, name: str) -> UInt32Array:
        slots: UInt32Array = column(data, np.uint32, name)
        _check_below(slots, self._limits.max_running, name)
        return slots

    def _blocks(self, data: bytes, name: str) -> UInt32Array:
        blocks: UInt32Array = column(data, np.uint32, name)
        _check_below(blocks, self._limits.num_blocks, name)
        if len(blocks) and blocks.min() == 0:
            raise PlanError(f"{name}: block 0 is never used")
        return blocks

    def _check_open(self, slots: npt.NDArray[np.integer], name: str) -> None:
        if not self._open[slots].all():
            raise PlanError(f"{name}: slot {slots[~self._open[slots]][0]} is not open")


@dataclass(frozen=True)
class _Rows:
    """The columns of a plan that have an element for each row."""

    slots: Int64Array
    lengths: Int64Array
    contexts: Int64Array
    flags: npt.NDArray[np.uint8]


def _check_below(values: npt.NDArray[np.integer], limit: int, name: str) -> None:
    if len(values) and values.max() >= limit:
        raise PlanError(f"{name}: holds {values.max()}, must be below {limit}")


def _check_distinct(values: npt.NDArray[np.integer], name: str) -> None:
    if len(np.unique(values)) != len(values):
        raise PlanError(f"{name}: names a slot twice")
