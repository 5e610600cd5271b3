"""Cuts a step's attention into products of one shape: 16 queries of a sequence with 64 of its keys."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from octavo.gpu_worker.ops import StepInput
from octavo.gpu_worker.protocol import BLOCK_SIZE

TILE_ROWS = 16
TILE_KEYS = 64
_BLOCKS_PER_TILE = TILE_KEYS // BLOCK_SIZE
# Products that are held in memory at once.
_MAX_PAIRS = 128

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class AttentionGroup:
    """Query tiles with all their products (pairs of a query tile and a key tile), in memory together.

    tile_rows     [tiles, 16] rows of the step; a tile that is not full repeats its last row
    row_is_real   [tiles, 16] False for such a repetition
    tile_of_pair  [pairs] which query tile; pairs at the end are padding
    blocks        [pairs, 4] blocks that hold the keys, 0 beyond the sequence's end
    masked        [pairs, 16, 64] True where a query must not see a key
    ended_pairs   [N] pairs with keys beyond the sequence's end
    ended_keys    [N, 64] True for these keys
    pairs_by_rank (pairs, their query tiles): first each tile's first pair, then the second, ...
    """

    tile_rows: torch.Tensor
    row_is_real: torch.Tensor
    tile_of_pair: torch.Tensor
    blocks: torch.Tensor
    masked: torch.Tensor
    ended_pairs: torch.Tensor
    ended_keys: torch.Tensor
    pairs_by_rank: list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class _Tiles:
    """The query tiles of a step, and the key tiles first .. last that each of them sees."""

    sequence: Int64Array
    rows: Int64Array
    is_real: npt.NDArray[np.bool_]
    positions: Int64Array
    first_key_tile: Int64Array
    num_key_tiles: Int64Array


def plan_attention(step: StepInput, window: int, multiple: int) -> list[AttentionGroup]:
    """Return groups that cover the step. Each has a multiple of `multiple` pairs."""
    tiles = _query_tiles(step, window)
    groups = []
    start = 0
    while start < len(tiles.rows):
        pairs = np.cumsum(tiles.num_key_tiles[start:])
        count = max(1, int(np.searchsorted(pairs, _MAX_PAIRS, side="right")))
        groups.append(_group(step, tiles, slice(start, start + count), window, multiple))
        start += count
    return groups


def _query_tiles(step: StepInput, window: int) -> _Tiles:
    starts = step.query_start_loc[:-1].astype(np.int64)
    ends = step.query_start_loc[1:].astype(np.int64)
    per_sequence = -(-(ends - starts) // TILE_ROWS)
    sequence = np.repeat(np.arange(len(starts)), per_sequence)
    index = np.arange(len(sequence)) - np.repeat(np.cumsum(per_sequence) - per_sequence, per_sequence)
    rows = (starts[sequence] + index * TILE_ROWS)[:, None] + np.arange(TILE_ROWS)
    is_real = rows < ends[sequence, None]
    rows = np.minimum(rows, ends[sequence, None] - 1)
    positions = step.positions[rows].astype(np.int64)
    first = np.maximum(positions[:, 0] - window + 1, 0) // TILE_KEYS if window else np.zeros_like(sequence)
    return _Tiles(sequence, rows, is_real, positions, first, positions[:, -1] // TILE_KEYS - first + 1)


def _group(step: StepInput, tiles: _Tiles, part: slice, window: int, multiple: int) -> AttentionGroup:
    counts = tiles.num_key_tiles[part]
    tile_of_pair = np.repeat(np.arange(len(counts)), counts)
    rank = np.arange(len(tile_of_pair)) - np.repeat(np.cumsum(counts) - counts, counts)
    key_tile = tiles.first_key_tile[part][tile_of_pair] + rank
    sequence = tiles.sequence[part][tile_of_pair]
    seq_len = step.seq_lens[sequence].astype(np.int64)[:, None]

    columns = key_tile[:, None] * _BLOCKS_PER_TILE + np.arange(_BLOCKS_PER_TILE)
    known = step.block_tables[sequence[:, None], np.minimum(columns, step.block_tables.shape[1] - 1)]
    blocks = np.where(columns * BLOCK_SIZE < seq_len, known, 0).astype(np.int64)
    keys = key_tile[:, None] * TILE_KEYS + np.arange(TILE_KEYS)
    queries = tiles.positions[part][tile_of_pair][:, :, None]
    masked = keys[:, None, :] > queries
    if window:
        masked |= keys[:, None, :] <= queries - window
    ended = keys >= seq_len
    ended_pairs = np.flatnonzero(ended[:, -1])

    padding = -len(tile_of_pair) % multiple
    ranks = [np.flatnonzero(rank == r) for r in range(int(counts.max()))]
    return AttentionGroup(
        tile_rows=torch.from_numpy(tiles.rows[part]),
        row_is_real=torch.from_numpy(tiles.is_real[part]),
        tile_of_pair=torch.from_numpy(np.pad(tile_of_pair, (0, padding))),
        blocks=torch.from_numpy(np.pad(blocks, ((0, padding), (0, 0)))),
        masked=torch.from_numpy(np.pad(masked, ((0, padding), (0, 0), (0, 0)), constant_values=True)),
        ended_pairs=torch.from_numpy(ended_pairs),
        ended_keys=torch.from_numpy(ended[ended_pairs]),
        pairs_by_rank=[(torch.from_numpy(pairs), torch.from_numpy(tile_of_pair[pairs])) for pairs in ranks],
    )
