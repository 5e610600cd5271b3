"""Drives a device with sequences that lie on shuffled blocks, as a scheduler would."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from octavo.gpu_worker.ops import Device, StepInput

MAX_BLOCKS = 32


@dataclass(eq=False)
class Sequence:
    """Tokens, and the blocks that hold their keys and values."""

    token_ids: list[int]
    blocks: list[int]
    num_computed: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)


class Paged:
    """A device with its pool of blocks."""

    def __init__(self, device: Device, num_blocks: int = 200, seed: int = 0) -> None:
        self.device = device
        device.allocate_kv(num_blocks)
        self._free = (1 + np.random.default_rng(seed).permutation(num_blocks - 1)).tolist()

    def new(self, token_ids: list[int], spare_blocks: int = 1) -> Sequence:
        """Return a sequence with blocks for all its tokens and some more."""
        count = -(-len(token_ids) // 16) + spare_blocks
        blocks, self._free = self._free[:count], self._free[count:]
        return Sequence(list(token_ids), blocks)

    def step(self, rows: list[tuple[Sequence, int]]) -> None:
        """Compute the next `count` tokens of each sequence; keep the logits of each of them."""
        token_ids: list[int] = []
        positions: list[int] = []
        slot_mapping: list[int] = []
        query_start_loc = [0]
        block_tables = np.zeros((len(rows), MAX_BLOCKS), np.int32)
        for index, (sequence, count) in enumerate(rows):
            block_tables[index, : len(sequence.blocks)] = sequence.blocks
            for position in range(sequence.num_computed, sequence.num_computed + count):
                token_ids.append(sequence.token_ids[position])
                positions.append(position)
                slot_mapping.append(sequence.blocks[position // 16] * 16 + position % 16)
            sequence.num_computed += count
            query_start_loc.append(len(token_ids))
        computed = self.device.forward(
            StepInput(
                token_ids=np.array(token_ids, np.int32),
                positions=np.array(positions, np.int32),
                slot_mapping=np.array(slot_mapping, np.int32),
                query_start_loc=np.array(query_start_loc, np.int32),
                seq_lens=np.array([sequence.num_computed for sequence, _ in rows], np.int32),
                block_tables=block_tables,
                logits_rows=np.arange(len(token_ids), dtype=np.int32),
            )
        )
        logits = torch.from_numpy(computed.copy())
        for index, (sequence, _) in enumerate(rows):
            sequence.logits.extend(logits[query_start_loc[index] : query_start_loc[index + 1]])

    def compute(self, sequence: Sequence, chunk: int) -> torch.Tensor:
        """Compute all of a sequence alone, in chunks; return the logits [tokens, vocab_size]."""
        while sequence.num_computed < len(sequence.token_ids):
            self.step([(sequence, min(chunk, len(sequence.token_ids) - sequence.num_computed))])
        return torch.stack(sequence.logits)
