"""Turns StepPlans into Steps: checks every field against what each slot holds.

All work is on whole columns. A plan is checked before anything is computed; a plan that breaks the
contract raises PlanError and leaves the slots in an unknown state, so the worker must join again.
What is wrong with one sequence alone (its settings, its token ids) costs that one: something harmless
is computed in its place, because other sequences, and plans that are on their way, rely on the rest.
The contents of block tables and the tokens sampled are the runner's (`runner.py`): they may live on
a device. Here is only what the checks need, so a step can be checked while others still run.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from octavo.gpu_worker.errors import PlanError
from octavo.gpu_worker.ops import Int32Array
from octavo.gpu_worker.protocol import BLOCK_SIZE
from octavo.gpu_worker.sampling.settings import SamplingSettings, column, harmless, read_sampling_update
from octavo.gpu_worker.steps.pooler import Pooling, PoolingSettings
from octavo.gpu_worker.steps.rows import Int64Array, Rows
from octavo.worker.v1 import worker_pb2

UInt32Array = npt.NDArray[np.uint32]

LAST_TOKEN: Final = -1
"""In `Step.token_ids`: the token that was sampled last for the row's slot."""

_SAMPLES, _LAST_TOKEN_IN_SLOT = 1, 2

# Most steps change nothing but their rows. These are never written.
_NONE: Final[UInt32Array] = np.empty(0, np.uint32)
_NO_INDEXES: Final[Int64Array] = np.empty(0, np.int64)
_NO_PAIRS: Final[Int32Array] = np.empty((0, 2), np.int32)


@dataclass(frozen=True)
class Limits:
    """What plans must stay within. `num_blocks` counts block 0.

    pooling    how vectors are made; None if tokens are
    has_cache  whether rows need blocks; else each is a whole sequence
    kv_windows  the window of each KV group
    """

    max_running: int
    max_batch_tokens: int
    max_blocks_per_sequence: int
    num_blocks: int
    vocab_size: int
    pooling: Pooling | None = None
    has_cache: bool = True
    kv_windows: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Step:
    """A checked plan: S rows, T tokens. Things happen in this order.

    freed_slots      slots to forget
    opened           (slot, settings) to open; the slot's block table is empty then
    opened_for_vectors  the same of slots of which a vector is wanted
    block_slots      [N] block tables that grow, each once: slot * KV groups + group
    first_blocks     [N] how many blocks each of them has before
    block_counts     [N] how many it gets
    block_ids        the blocks, slot after slot
    copy_pairs       [P, 2] blocks to copy before the step, (from, to)
    rows             the S rows; the same object as in the step before if they are the same
    context_lengths  [S] tokens whose keys and values are in the cache
    token_ids        [T] tokens to compute, row after row, or LAST_TOKEN
    refused          (slot, why) where a sequence's own part of the plan cannot be computed: its rows mean nothing
    """

    freed_slots: UInt32Array
    opened: list[tuple[int, SamplingSettings]]
    block_slots: Int64Array
    first_blocks: Int64Array
    block_counts: Int64Array
    block_ids: UInt32Array
    copy_pairs: Int32Array
    rows: Rows
    context_lengths: Int64Array
    token_ids: Int32Array
    opened_for_vectors: tuple[tuple[int, PoolingSettings], ...] = ()
    refused: tuple[tuple[int, str], ...] = ()

    @cached_property
    def opened_slots(self) -> list[int]:
        """The slots that are opened, for either."""
        return [slot for slot, _ in (*self.opened, *self.opened_for_vectors)]

    @cached_property
    def sampled_positions(self) -> Int32Array:
        """The absolute position of each token that is drawn, [R]."""
        rows = self.rows
        if rows.num_drafts is None:
            return (self.context_lengths + rows.query_lengths)[rows.samples].astype(np.int32)
        positions = self.context_lengths[rows.row_of_token] + rows.offset_of_token
        return (positions[rows.drawn_tokens] + 1).astype(np.int32)

    @cached_property
    def guesses(self) -> Int32Array | None:
        """The draft token that comes after each that a token is drawn after, [R]; -1: none. None: there are none."""
        rows = self.rows
        if rows.num_drafts is None:
            return None
        drawn = rows.drawn_tokens
        is_last = drawn == rows.query_ends[rows.row_of_token[drawn]] - 1
        return np.where(is_last, -1, self.token_ids[np.where(is_last, 0, drawn + 1)]).astype(np.int32)


class Slots:
    """The state that plans are checked against. All of it comes from plans of the present epoch."""

    def __init__(self, limits: Limits, adapter_ids: Container[int] = ()) -> None:
        """adapter_ids: the adapters that are loaded; who loads them goes on changing it."""
        self._limits = limits
        self._adapter_ids = adapter_ids
        self._open = np.zeros(limits.max_running, np.bool_)
        self._num_blocks = np.zeros((limits.max_running, len(limits.kv_windows)), np.int64)
        self._has_token = np.zeros(limits.max_running, np.bool_)
        # Most steps have the rows of the step before. These are kept until a slot is opened or freed.
        self._rows: Rows | None = None
        self._row_columns: tuple[bytes | int, ...] = ()  # what they were read from
        self._max_contexts: Int64Array | None = None  # [S] what their blocks have room for before this step
        self._refused: dict[int, str] = {}  # of the plan that is applied: why, by slot

    def apply(self, plan: worker_pb2.StepPlan) -> Step:
        """Take a plan's changes and return its step. Raises PlanError."""
        self._refused = {}
        freed = self._slots(plan.freed_slots, "freed_slots")
        opened, opened_for_vectors = self._open_slots(plan, freed)
        block_slots, first_blocks, block_counts, block_ids = self._append_blocks(plan)
        copy_pairs = self._copy_pairs(plan.copy_pairs)
        rows = self._rows_of(plan)
        token_ids = self._token_ids(plan, rows)
        return Step(
            freed_slots=freed,
            opened=opened,
            block_slots=block_slots,
            first_blocks=first_blocks,
            block_counts=block_counts,
            block_ids=block_ids,
            copy_pairs=copy_pairs,
            rows=rows,
            context_lengths=self._context_lengths(plan, rows),
            token_ids=token_ids,
            opened_for_vectors=opened_for_vectors,
            refused=tuple(self._refused.items()),
        )

    def _open_slots(
        self, plan: worker_pb2.StepPlan, freed: UInt32Array
    ) -> tuple[list[tuple[int, SamplingSettings]], tuple[tuple[int, PoolingSettings], ...]]:
        """Return the slots that are opened for tokens, and for vectors."""
        pooling = self._limits.pooling
        if not (len(freed) or plan.sampling_updates or plan.pooling_updates):
            return [], ()
        self._rows = None
        if plan.pooling_updates if pooling is None else plan.sampling_updates:
            raise PlanError(f"the model makes {'tokens' if pooling is None else 'vectors'}, and the plan wants others")
        opened = [(update.slot, self._sampling_settings(update)) for update in plan.sampling_updates]
        for_vectors = tuple((update.slot, self._pooling_settings(update)) for update in plan.pooling_updates)
        slots = np.array([slot for slot, _ in (*opened, *for_vectors)], np.int64)
        _check_below(slots, self._limits.max_running, "sampling_updates: slot")
        _check_distinct(slots, "sampling_updates: slot")
        for cleared in (freed, slots):
            self._num_blocks[cleared] = 0
            self._has_token[cleared] = False
        self._open[freed] = False
        self._open[slots] = True
        return opened, for_vectors

    def _sampling_settings(self, update: worker_pb2.SamplingUpdate) -> SamplingSettings:
        try:
            if update.adapter_id and update.adapter_id not in self._adapter_ids:
                raise PlanError(f"sampling_updates: adapter_id is {update.adapter_id}, which is not loaded")
            return read_sampling_update(update, self._limits.vocab_size)
        except PlanError as error:
            self._refused[update.slot] = str(error)
            return read_sampling_update(harmless(update), self._limits.vocab_size)

    def _pooling_settings(self, update: worker_pb2.PoolingUpdate) -> PoolingSettings:
        pooling = self._limits.pooling
        assert pooling is not None, "checked by the caller"
        try:
            return pooling.settings(update)
        except PlanError as error:
            self._refused[update.slot] = str(error)
            return pooling.settings(worker_pb2.PoolingUpdate(slot=update.slot))

    def _append_blocks(self, plan: worker_pb2.StepPlan) -> tuple[Int64Array, Int64Array, Int64Array, UInt32Array]:
        """Return slots, their blocks before, how many they get, and the blocks."""
        if not (plan.block_table_rows or plan.block_table_counts or plan.block_ids):
            return _NO_INDEXES, _NO_INDEXES, _NO_INDEXES, _NONE
        self._max_contexts = None
        windows, num_blocks = np.array(self._limits.kv_windows), self._num_blocks.reshape(-1)
        slots = _integers(plan.block_table_rows, "block_table_rows")
        _check_below(slots, len(num_blocks), "block_table_rows")
        counts = _integers(plan.block_table_counts, "block_table_counts")
        blocks = self._blocks(plan.block_ids, "block_ids", may_be_null=bool(windows.any()))
        if len(counts) != len(slots) or counts.sum() != len(blocks):
            raise PlanError(
                f"block_table_counts: {len(counts)} counts of {counts.sum()} blocks, but there are "
                f"{len(slots)} block_table_rows and {len(blocks)} block_ids"
            )
        self._check_open(slots // len(windows), "block_table_rows")
        _check_distinct(slots, "block_table_rows")
        of_null = np.repeat(slots, counts)[blocks == 0]
        if len(of_null) and not windows[of_null % len(windows)].all():
            raise PlanError("block_ids: block 0 is never used in a KV group without a window")
        first = num_blocks[slots]
        if len(slots) and (first + counts).max() > self._limits.max_blocks_per_sequence:
            raise PlanError(
                f"block_ids: a slot gets {(first + counts).max()} blocks, "
                f"a sequence holds at most {self._limits.max_blocks_per_sequence}"
            )
        num_blocks[slots] += counts
        return slots, first, counts, blocks

    def _rows_of(self, plan: worker_pb2.StepPlan) -> Rows:
        columns = (plan.slot_indexes, plan.query_lengths, plan.row_flags, plan.num_sequences, plan.num_tokens)
        if self._rows is None or columns != self._row_columns:
            self._rows, self._row_columns = self._new_rows(plan), columns
            self._max_contexts = None
        return self._rows

    def _new_rows(self, plan: worker_pb2.StepPlan) -> Rows:
        """Check and return rows; from now on there is a token in the slots that they sample for."""
        slots = self._slots(plan.slot_indexes, "slot_indexes").astype(np.int64)
        lengths = _integers(plan.query_lengths, "query_lengths")
        flags = np.frombuffer(plan.row_flags, np.uint8)
        for name, values in (("slot_indexes", slots), ("query_lengths", lengths), ("row_flags", flags)):
            _check_count(values, plan.num_sequences, name)
        self._check_open(slots, "slot_indexes")
        _check_distinct(slots, "slot_indexes")
        if len(lengths) and lengths.min() < 1:
            raise PlanError("query_lengths: a row has no token")
        if lengths.sum() != plan.num_tokens or plan.num_tokens > self._limits.max_batch_tokens:
            raise PlanError(
                f"num_tokens: is {plan.num_tokens}, query_lengths add up to {lengths.sum()}, "
                f"a step holds at most {self._limits.max_batch_tokens}"
            )
        if (flags & ~np.uint8(_SAMPLES | _LAST_TOKEN_IN_SLOT)).any():
            raise PlanError("row_flags: an unknown bit is set")
        samples, follows = (flags & _SAMPLES) != 0, (flags & _LAST_TOKEN_IN_SLOT) != 0
        if follows.any() and self._limits.pooling is not None:
            raise PlanError("row_flags: a row's last token is its slot's, but the model makes no tokens")
        if not self._has_token[slots[follows]].all():
            raise PlanError("row_flags: a row's last token is its slot's, but none was sampled for the slot yet")
        self._has_token[slots[samples]] = True
        return Rows(slots, lengths, samples, follows)

    def _context_lengths(self, plan: worker_pb2.StepPlan, rows: Rows) -> Int64Array:
        contexts = _integers(plan.context_lengths, "context_lengths")
        _check_count(contexts, plan.num_sequences, "context_lengths")
        if not self._limits.has_cache:
            if contexts.any():
                raise PlanError("context_lengths: the model keeps no cache, so each row is a whole sequence")
            return contexts
        if self._max_contexts is None:
            self._max_contexts = self._num_blocks[rows.slots].min(axis=1) * BLOCK_SIZE - rows.query_lengths
        short = contexts > self._max_contexts
        if short.any():
            slot = rows.slots[short][0]
            raise PlanError(
                f"query_lengths: slot {slot} has {self._num_blocks[slot].min()} blocks, too few for its tokens"
            )
        return contexts

    def _token_ids(self, plan: worker_pb2.StepPlan, rows: Rows) -> Int32Array:
        """Return the plan's tokens, with LAST_TOKEN where only the runner knows."""
        token_ids = np.full(plan.num_tokens, LAST_TOKEN, np.int32)
        if not (plan.token_ids or rows.num_sent):
            return token_ids
        sent = column(plan.token_ids, np.uint32, "token_ids")
        if len(sent) != rows.num_sent:
            raise PlanError(f"token_ids: {len(sent)} tokens, expected {rows.num_sent}")
        is_sent = np.ones(plan.num_tokens, np.bool_)
        is_sent[rows.query_ends[rows.follows] - 1] = False
        vocab_size = self._limits.vocab_size
        if len(sent) and sent.max() >= vocab_size:
            is_wrong = sent >= vocab_size
            for slot in dict.fromkeys(rows.slots[rows.row_of_token[is_sent][is_wrong]].tolist()):
                self._refused[slot] = f"token_ids: a token id is not below {vocab_size}, the size of the vocabulary"
            sent = np.where(is_wrong, 0, sent)
        token_ids[is_sent] = sent
        return token_ids

    def _copy_pairs(self, data: bytes) -> Int32Array:
        if not data:
            return _NO_PAIRS
        blocks = self._blocks(data, "copy_pairs")
        if len(blocks) % 2:
            raise PlanError(f"copy_pairs: {len(blocks)} blocks are no pairs")
        return blocks.astype(np.int32).reshape(-1, 2)

    def _slots(self, data: bytes, name: str) -> UInt32Array:
        if not data:
            return _NONE
        slots: UInt32Array = column(data, np.uint32, name)
        _check_below(slots, self._limits.max_running, name)
        return slots

    def _blocks(self, data: bytes, name: str, may_be_null: bool = False) -> UInt32Array:
        if not data:
            return _NONE
        blocks: UInt32Array = column(data, np.uint32, name)
        _check_below(blocks, self._limits.num_blocks, name)
        if blocks.min() == 0 and not may_be_null:
            raise PlanError(f"{name}: block 0 is never used")
        return blocks

    def _check_open(self, slots: npt.NDArray[np.integer], name: str) -> None:
        if not self._open[slots].all():
            raise PlanError(f"{name}: slot {slots[~self._open[slots]][0]} is not open")


def _integers(data: bytes, name: str) -> Int64Array:
    """Return a column of uint32 in numbers that may be subtracted."""
    return column(data, np.uint32, name).astype(np.int64)


def _check_count(values: npt.NDArray[np.integer], num_rows: int, name: str) -> None:
    if len(values) != num_rows:
        raise PlanError(f"{name}: {len(values)} rows, but num_sequences is {num_rows}")


def _check_below(values: npt.NDArray[np.integer], limit: int, name: str) -> None:
    if len(values) and values.max() >= limit:
        raise PlanError(f"{name}: holds {values.max()}, must be below {limit}")


def _check_distinct(values: npt.NDArray[np.integer], name: str) -> None:
    if len(set(values.tolist())) != len(values):
        raise PlanError(f"{name}: names a slot twice")
