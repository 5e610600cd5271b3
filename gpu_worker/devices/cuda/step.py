"""What the host sends of a step: one piece of words, copied at once, and where everything lies in it.

The place of each part follows from the step's sizes alone. So a graph that was captured for some sizes finds
its parts where they were, and a step is one copy from the host to the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from octavo.gpu_worker.devices.cuda.accelerator import Accelerator, Event
from octavo.gpu_worker.steps.batch import Step
from octavo.kernels.attention_plan import AttentionPlan, cut_plan, pad_plan, plan_attention
from octavo.kernels.configs import AttentionConfig

Int32Array = npt.NDArray[np.int32]

_ALIGNMENT = 4  # words: Triton compiles a kernel anew for pointers that are not a multiple of 16 bytes
_RING = 4  # two steps in flight, one being filled, one for changes that come in more than one piece


@dataclass(frozen=True)
class Sizes:
    """Sizes of a step: S rows, T tokens, R rows that are sampled, work and combines of each launch of attention.

    attention  for each window size, (rows of the work list, rows of `combines`) of each launch
    """

    num_rows: int
    num_tokens: int
    num_samples: int
    attention: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]


@dataclass(frozen=True)
class Columns:
    """A step's columns, padded to its sizes, on the host. Names as in `StepTensors` and `kernels/step_inputs.py`."""

    sizes: Sizes
    slots: Int32Array
    query_start_loc: Int32Array
    seq_lens: Int32Array
    sent: Int32Array
    logits_rows: Int32Array
    sampled_slots: Int32Array
    sampled_positions: Int32Array
    attention: tuple[tuple[AttentionPlan, ...], ...]

    def parts(self) -> list[Int32Array]:
        """Return the columns in the order of `Layout`."""
        plans = [array for plans in self.attention for plan in plans for array in (plan.work, plan.combines)]
        return [
            self.slots, self.query_start_loc, self.seq_lens, self.sent, self.logits_rows, self.sampled_slots,
            self.sampled_positions, *plans,
        ]  # fmt: skip


@dataclass(frozen=True)
class Hidden:
    """Hidden states [T, hidden_size] of a step that was launched, and its rows; all on the device.

    slots, seq_lens  [S];  query_start_loc [S + 1], all int32
    """

    states: torch.Tensor
    slots: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor


class Layout:
    """Where the columns of a step of some sizes begin, in words, and where they end."""

    def __init__(self, sizes: Sizes) -> None:
        rows, samples = sizes.num_rows, sizes.num_samples
        shapes: list[tuple[int, ...]] = [(rows,), (rows + 1,), (rows,), (sizes.num_tokens,)]
        shapes += [(samples,)] * 3
        for _, launches in sizes.attention:
            for num_work, num_combines in launches:
                shapes += [(num_work, 5), (num_combines, 4)]
        self.starts: list[int] = []
        self.end = 0
        self._shapes = shapes
        for shape in shapes:
            self.starts.append(self.end)
            self.end = aligned(self.end + int(np.prod(shape)))

    def views(self, words: torch.Tensor) -> list[torch.Tensor]:
        """Return the columns in words on the device, in the order of `Columns.parts`."""
        return [
            words[start : start + int(np.prod(shape))].view(shape)
            for start, shape in zip(self.starts, self._shapes, strict=True)
        ]

    def fill(self, words: Int32Array, columns: Columns) -> None:
        """Write the columns to words on the host."""
        for start, part in zip(self.starts, columns.parts(), strict=True):
            words[start : start + part.size] = part.reshape(-1)


class Planner:
    """Makes the columns of steps."""

    def __init__(
        self, config: AttentionConfig, tile_queries: int, windows: list[int], max_blocks: int, max_slots: int
    ) -> None:
        """max_slots: partial results of attention that there is memory for."""
        self._config = config
        self._tile_queries = tile_queries
        self._windows = windows
        self._max_slots = max_slots
        self._max_pieces = -(-max_blocks * 16 // config.split_keys)

    def columns(self, step: Step) -> Columns:
        """Return the columns of a step as it is."""
        ends = step.rows.query_ends
        query_start_loc = np.zeros(len(ends) + 1, np.int32)
        query_start_loc[1:] = ends
        seq_lens = (step.context_lengths + step.rows.query_lengths).astype(np.int32)
        attention = tuple(tuple(self._plan(query_start_loc, seq_lens, window)) for window in self._windows)
        sampled_slots = step.rows.sampled_slots
        launches = tuple(tuple((len(plan.work), len(plan.combines)) for plan in plans) for plans in attention)
        return Columns(
            sizes=Sizes(
                len(ends),
                len(step.token_ids),
                len(sampled_slots),
                tuple(zip(self._windows, launches, strict=True)),
            ),
            slots=step.rows.slots.astype(np.int32),
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            sent=step.token_ids,
            logits_rows=(ends[step.rows.samples] - 1).astype(np.int32),
            sampled_slots=sampled_slots,
            sampled_positions=step.sampled_positions,
            attention=attention,
        )

    def graph_sizes(self, size: int) -> Sizes:
        """Return the sizes of a captured decode step of `size` rows."""
        num_work = min(size * self._max_pieces, size + self._max_slots)
        return Sizes(size, size, size, tuple((window, ((num_work, size),)) for window in self._windows))

    def fits(self, columns: Columns, size: int) -> bool:
        """Tell whether a step is a decode that a captured step of `size` rows can run."""
        sizes = columns.sizes
        if not sizes.num_rows == sizes.num_tokens == sizes.num_samples <= size:
            return False
        graph = self.graph_sizes(size)
        return all(
            len(launches) == 1 and launches[0][0] <= room[0][0]
            for (_, launches), (_, room) in zip(sizes.attention, graph.attention, strict=True)
        )

    def pad(self, columns: Columns, size: int) -> Columns:
        """Pad a step that `fits`: padding rows have slot -1, one token and no work."""
        count = size - columns.sizes.num_rows
        sizes = self.graph_sizes(size)

        def pad(column: Int32Array, value: int) -> Int32Array:
            return np.concatenate([column, np.full(count, value, np.int32)])

        return Columns(
            sizes=sizes,
            slots=pad(columns.slots, -1),
            query_start_loc=np.arange(size + 1, dtype=np.int32),
            seq_lens=pad(columns.seq_lens, 1),
            sent=pad(columns.sent, 0),
            logits_rows=np.arange(size, dtype=np.int32),
            sampled_slots=pad(columns.sampled_slots, -1),
            sampled_positions=pad(columns.sampled_positions, 0),
            attention=tuple(
                (pad_plan(plans[0], *room[0]),)
                for plans, (_, room) in zip(columns.attention, sizes.attention, strict=True)
            ),
        )

    def padding(self, size: int) -> Columns:
        """Return the columns of a captured step in which every row is padding."""
        none = np.zeros(0, np.int32)
        plans = tuple((AttentionPlan(none.reshape(0, 5), none.reshape(0, 4), 0),) for _ in self._windows)
        sizes = Sizes(0, 0, 0, tuple((window, ((0, 0),)) for window in self._windows))
        return self.pad(Columns(sizes, none, none, none, none, none, none, none, plans), size)

    def max_words(self, max_batch_tokens: int, max_running: int) -> int:
        """Return how many words the columns of any step have at most."""
        tiles = -(-max_batch_tokens // self._tile_queries) + max_running
        per_window = tiles * self._max_pieces * 5 + tiles * 4
        # Each launch of attention is a part of its own, and there is one for each tile at most.
        num_parts = 7 + len(self._windows) * 2 * (tiles + 1)
        columns = 6 * (max_running + 1) + max_batch_tokens + len(self._windows) * per_window
        padded = sum(2 * room[0][0] * 5 for _, room in self.graph_sizes(max_running).attention)
        return aligned(columns + padded + num_parts * _ALIGNMENT)

    def _plan(self, query_start_loc: Int32Array, seq_lens: Int32Array, window: int) -> list[AttentionPlan]:
        plan = plan_attention(
            query_start_loc,
            seq_lens,
            tile_queries=self._tile_queries,
            key_tile=self._config.block_n,
            split_keys=self._config.split_keys,
            window=window,
        )
        return cut_plan(plan, self._max_slots)


class Staging:
    """A ring of pinned pieces on the host, and the piece on the device that they are copied to, one at a time."""

    def __init__(self, accelerator: Accelerator, num_words: int) -> None:
        self._accelerator = accelerator
        self.words = torch.zeros(num_words, dtype=torch.int32, device=accelerator.device)
        self._ring = [accelerator.pinned(num_words) for _ in range(_RING)]
        self._views: list[Int32Array] = [piece.numpy() for piece in self._ring]
        self._sent: list[Event | None] = [None] * _RING
        self._next = 0

    def begin(self) -> Int32Array:
        """Return words to fill. Waits for the device only where more than a ring is under way."""
        event = self._sent[self._next]
        if event is not None:
            event.wait()
        return self._views[self._next]

    def send(self, num_words: int) -> None:
        """Copy the first words; kernels launched from now on see them."""
        piece = self._ring[self._next][:num_words]
        self.words[:num_words].copy_(piece, non_blocking=True)
        self._sent[self._next] = self._accelerator.event()
        self._next = (self._next + 1) % _RING


def aligned(num_words: int) -> int:
    """Round up to where a part may begin."""
    return -(-num_words // _ALIGNMENT) * _ALIGNMENT
