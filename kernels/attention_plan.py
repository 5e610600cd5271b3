"""The work list of paged attention: which query tile attends to which keys, as plain numpy.

The attention kernel decides nothing. It runs one program for each row of this list and key head,
so how long sequences are split, how work is balanced and how a batch is padded to the fixed size
of a captured CUDA graph are all data, made here once for a step and used by every layer.

Queries of one sequence are cut into tiles of `tile_queries`, and the keys that a tile sees at
multiples of `split_keys`. These cuts, and the tiles of `key_tile` keys inside a piece, lie at
multiples in the sequence, whatever else is in the step and however the prompt is chunked. So the
order in which the products of a query are added depends on its own position only. That is why
the size of a split is fixed, and not the number of splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]

PADDING = -1
"""The sequence of a row that is not work."""


@dataclass(frozen=True)
class AttentionPlan:
    """Work of one step for layers with one window size.

    work       [num_work, 5] int32, longest first: sequence, first query (index into the step's
               tokens), kv begin, kv end, partial slot. The result of a row goes to its partial
               slot, or with -1 straight to the output. Sequence -1 is padding.
    combines   [num_combines, 4] int32: sequence, first query, first partial slot, number of
               partial slots. One row for each query tile that was split.
    num_slots  partial slots in use
    """

    work: Int32Array
    combines: Int32Array
    num_slots: int


def plan_attention(
    query_start_loc: npt.NDArray[Any],
    seq_lens: npt.NDArray[Any],
    *,
    tile_queries: int,
    key_tile: int,
    split_keys: int,
    window: int = 0,
) -> AttentionPlan:
    """Plan a step of S sequences; `query_start_loc` [S + 1] and `seq_lens` [S] as in `paged_attention`.

    tile_queries  queries in a tile; times the queries that share a key head, at most the kernel's BLOCK_M
    key_tile      keys that the kernel takes at once (BLOCK_N)
    split_keys    most keys in one row of work, a multiple of `key_tile`
    window        as in `paged_attention`; 0 is none
    """
    assert tile_queries > 0, tile_queries
    assert key_tile > 0, key_tile
    assert split_keys > 0, split_keys
    assert split_keys % key_tile == 0, f"split_keys {split_keys} is no multiple of key_tile {key_tile}"
    starts = np.asarray(query_start_loc, dtype=np.int64)
    lengths = np.asarray(seq_lens, dtype=np.int64)
    assert len(starts) == len(lengths) + 1, "query_start_loc must have one entry more than seq_lens"
    num_queries = np.diff(starts)
    assert bool((num_queries >= 0).all()), "query_start_loc must not fall"
    assert bool((num_queries <= lengths).all()), "a sequence has more queries than tokens"

    tiles_of = -(-num_queries // tile_queries)
    seq = np.repeat(np.arange(len(lengths)), tiles_of)
    first = starts[seq] + tile_queries * _count_up(tiles_of)
    last = np.minimum(first + tile_queries, starts[seq + 1]) - 1
    ends = lengths[seq] - (starts[seq + 1] - 1 - last)  # one past the last query's own key
    begins = np.zeros_like(ends)
    if window > 0:
        lowest = lengths[seq] - (starts[seq + 1] - first) - window + 1
        begins = np.maximum(lowest, 0) // key_tile * key_tile

    pieces_of = -(-ends // split_keys) - begins // split_keys
    tile = np.repeat(np.arange(len(seq)), pieces_of)
    piece = begins[tile] // split_keys + _count_up(pieces_of)
    kv_begin = np.maximum(piece * split_keys, begins[tile])
    kv_end = np.minimum((piece + 1) * split_keys, ends[tile])

    is_split = pieces_of > 1
    slots_of = np.where(is_split, pieces_of, 0)
    first_slots = np.cumsum(slots_of) - slots_of
    slot = np.where(is_split[tile], first_slots[tile] + _count_up(pieces_of), -1)

    work = np.stack([seq[tile], first[tile], kv_begin, kv_end, slot], axis=1)
    # Blocks are started in order: with the longest first, the last ones to end are short.
    work = work[np.argsort(kv_begin - kv_end, kind="stable")]
    combines = np.stack([seq, first, first_slots, slots_of], axis=1)[is_split]
    return AttentionPlan(work.astype(np.int32), combines.astype(np.int32), int(slots_of.sum()))


def pad_plan(plan: AttentionPlan, num_work: int, num_combines: int) -> AttentionPlan:
    """Add padding rows until the lists have the sizes that a captured graph was made with."""
    return AttentionPlan(_pad(plan.work, num_work), _pad(plan.combines, num_combines), plan.num_slots)


def cut_plan(plan: AttentionPlan, max_slots: int) -> list[AttentionPlan]:
    """Cut a plan into plans of at most `max_slots` partial slots each, to be run one after the other.

    A tile's pieces stay together, so no sum changes its order. The partial results of a long prompt may
    need more memory than there is; those of one tile must have room.
    """
    if plan.num_slots <= max_slots:
        return [plan]
    counts = plan.combines[:, 3].astype(np.int64)
    assert counts.max() <= max_slots, f"a tile is split into {counts.max()} pieces, there is room for {max_slots}"
    part_of_combine = np.zeros(len(counts), np.int64)
    part = filled = 0
    for index, count in enumerate(counts.tolist()):
        if filled + count > max_slots:
            part, filled = part + 1, 0
        part_of_combine[index] = part
        filled += count
    part_of_slot = np.repeat(part_of_combine, counts)
    first_slots = np.searchsorted(part_of_slot, np.arange(part + 2))
    slots = plan.work[:, 4]
    part_of_work = np.where(slots < 0, 0, part_of_slot[slots])
    parts = []
    for index in range(part + 1):
        work, combines = plan.work[part_of_work == index], plan.combines[part_of_combine == index]
        first, end = first_slots[index], first_slots[index + 1]
        work[:, 4] = np.where(work[:, 4] < 0, -1, work[:, 4] - first)
        combines[:, 2] -= np.int32(first)
        parts.append(AttentionPlan(work, combines, int(end - first)))
    return parts


def _pad(rows: Int32Array, size: int) -> Int32Array:
    assert len(rows) <= size, f"{len(rows)} rows do not fit in {size}"
    padded = np.full((size, rows.shape[1]), PADDING, dtype=np.int32)
    padded[: len(rows)] = rows
    return padded


def _count_up(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return 0 .. counts[i] - 1 for each i, one after the other."""
    total = int(counts.sum())
    return np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
