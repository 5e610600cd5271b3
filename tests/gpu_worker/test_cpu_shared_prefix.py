"""Decoding on the native CPU device with a prefix in the same KV blocks: it is read once, with the same bits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from octavo.gpu_worker.devices.cpu.device import CpuDevice
from octavo.gpu_worker.ops import Heads

from .test_cpu_device import (
    BLOCK_TOKENS,
    MAX_BLOCKS,
    MAX_SEQUENCES,
    MAX_TOKENS,
    VARIANTS,
    Sequence,
    Shape,
    TinyModel,
    make_sequence,
    make_step,
    run,
)

NUM_BLOCKS = 1600
PIECE = 256  # keys that are summed up, or shared, at once
SHAPES = {
    "groups of 3, head_dim 64": Shape(heads=Heads(9, 3, 64), rotary_dim=64),
    "groups of 4, head_dim 128": Shape(heads=Heads(8, 2, 128), rotary_dim=128),
    "a group that fills most of a tile, or several": Shape(heads=Heads(14, 2, 32), rotary_dim=32),
    "one head of 48, window across pieces": Shape(heads=Heads(1, 1, 48), rotary_dim=48, window=1100),
    "window within the second piece": Shape(heads=Heads(9, 3, 64), rotary_dim=64, window=700),
}


class Pool:
    """A device whose blocks are full of random keys and values, and which of them are in use."""

    def __init__(self, shape: Shape, variant: str = "", num_threads: int = 2) -> None:
        model = TinyModel(shape)
        self.device = CpuDevice(model, MAX_TOKENS, MAX_SEQUENCES, MAX_BLOCKS, num_threads=num_threads, variant=variant)
        self.device.allocate_kv(NUM_BLOCKS)
        generator = torch.Generator().manual_seed(1)
        content = torch.randn(self.device._blocks.shape, generator=generator).to(torch.bfloat16)
        self.device._blocks[:] = content.view(torch.uint16).numpy()
        self._free = (1 + np.random.default_rng(0).permutation(NUM_BLOCKS - 1)).tolist()

    def blocks(self, num_tokens: int) -> list[int]:
        count = -(-num_tokens // BLOCK_TOKENS)
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def sequence(self, prefix: list[int], length: int, num_new: int = 1) -> Sequence:
        """Return a sequence of `length` tokens whose cache begins with the blocks of `prefix`."""
        sequence = make_sequence(length, length, prefix + self.blocks(length - len(prefix) * BLOCK_TOKENS))
        sequence.computed = length - num_new
        return sequence

    def unshared(self, sequence: Sequence) -> Sequence:
        """Return the same sequence with a copy of its cache in blocks of its own."""
        copies = self.blocks(len(sequence.blocks) * BLOCK_TOKENS)
        self.device.copy_blocks(np.array([sequence.blocks, copies], np.int32).T)
        return replace(sequence, blocks=copies)


def decode(device: CpuDevice, sequences: list[Sequence], num_new: list[int]) -> list[torch.Tensor]:
    """Compute the last tokens of all sequences in one step; return their logits."""
    return run(device, [(replace(s), count) for s, count in zip(sequences, num_new, strict=True)])


def reads_at_once(pool: Pool, sequences: list[Sequence] | None = None) -> bool:
    """Whether a step reads pages for several sequences at once: all keys are written before, in phases of their own.

    sequences  to decode with; None: the step has been since the profile was switched on
    """
    if sequences is not None:
        pool.device.profile(True)
        decode(pool.device, sequences, [1] * len(sequences))
    return "rotary_write_kv" in pool.device.profile(False)


@dataclass
class Batch:
    """Two prefixes among their users, who are no neighbours, and sequences that share nothing or less."""

    sequences: list[Sequence]
    num_new: list[int]


def make_batch(pool: Pool) -> Batch:
    one, two = pool.blocks(2 * PIECE), pool.blocks(PIECE)
    # 1,024: the context ends with the piece. 1,023: the second piece is not whole.
    users = [pool.sequence(one, 2 * PIECE + own) for own in (1, 130, 16, 17, 5, 40)]
    users.append(pool.sequence(one, 2 * PIECE))
    decode(pool.device, users[-1:], [1])  # what it writes is in the prefix
    users.append(pool.sequence(one[:-1], 2 * PIECE - 1))
    users.append(pool.sequence(one[:-1], 2 * PIECE + 9))  # of the second piece all blocks but the last
    others = [pool.sequence(two, PIECE + own) for own in (3, 520, 90)]
    others.append(pool.sequence(one[: len(one) // 2], PIECE + 600))  # the first half of the first prefix
    others.append(pool.sequence([], 20))
    others.append(pool.sequence([], 700))
    sequences = [s for pair in zip(users, others, strict=False) for s in pair] + users[len(others) :]
    num_new = [1] * len(sequences)
    sequences.append(pool.sequence(one, 2 * PIECE + 50, num_new=2))
    return Batch(sequences, [*num_new, 2])


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SHAPES)
def test_bits_do_not_depend_on_which_sequences_have_a_prefix_in_the_same_blocks(
    name: str, variant: str, num_threads: int
) -> None:
    pool = Pool(SHAPES[name], variant, num_threads)
    batch = make_batch(pool)
    apart = [pool.unshared(sequence) for sequence in batch.sequences]
    alone = [decode(pool.device, [s], [count])[0] for s, count in zip(apart, batch.num_new, strict=True)]

    together = decode(pool.device, apart, batch.num_new)
    pool.device.profile(True)
    shared = decode(pool.device, batch.sequences, batch.num_new)

    assert reads_at_once(pool)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_a_long_context_among_many_short_ones_is_dealt_out_to_the_threads_with_the_same_bits(name: str) -> None:
    pool = Pool(SHAPES[name], num_threads=5)
    sequences = [pool.sequence([], 3 + 2 * index) for index in range(MAX_SEQUENCES - 1)]
    assert not reads_at_once(pool, sequences)
    sequences.insert(7, pool.sequence([], MAX_BLOCKS * BLOCK_TOKENS))
    alone = [decode(pool.device, [sequence], [1])[0] for sequence in sequences]

    pool.device.profile(True)
    together = decode(pool.device, sequences, [1] * len(sequences))

    assert reads_at_once(pool)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize("num_sequences", [2, 7, MAX_SEQUENCES])
def test_bits_are_the_same_for_any_number_of_sequences(num_sequences: int) -> None:
    pool = Pool(SHAPES["groups of 3, head_dim 64"])
    prefix = pool.blocks(PIECE)
    sequences = [pool.sequence(prefix, PIECE + 1 + index) for index in range(num_sequences)]
    alone = [decode(pool.device, [sequence], [1])[0] for sequence in sequences]

    shared = decode(pool.device, sequences, [1] * num_sequences)

    assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))


@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, "") for name in SHAPES] + [("groups of 3, head_dim 64", variant) for variant in VARIANTS],
)
def test_bits_are_the_same_where_the_same_sequences_share_several_pieces(name: str, variant: str) -> None:
    pool = Pool(SHAPES[name], variant)
    longer, shorter = pool.blocks(3 * PIECE), pool.blocks(2 * PIECE)
    sequences = [pool.sequence(longer, 3 * PIECE + 1 + 5 * index) for index in range(24)]
    sequences += [pool.sequence(shorter, 2 * PIECE + 3 + 20 * index) for index in range(15)]
    sequences.append(pool.sequence(longer, 3 * PIECE + 20, num_new=2))
    num_new = [1] * 39 + [2]
    alone = [decode(pool.device, [s], [count])[0] for s, count in zip(sequences, num_new, strict=True)]

    shared = decode(pool.device, sequences, num_new)

    assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))


def test_bits_are_the_same_beside_a_prompt() -> None:
    pool = Pool(SHAPES["groups of 3, head_dim 64"])
    prefix = pool.blocks(PIECE)
    sequences = [pool.sequence(prefix, PIECE + 1 + index) for index in range(8)]
    sequences.insert(4, pool.sequence(prefix, PIECE + 100, num_new=60))
    num_new = [60 if index == 4 else 1 for index in range(9)]
    alone = [decode(pool.device, [s], [count])[0] for s, count in zip(sequences, num_new, strict=True)]

    shared = decode(pool.device, sequences, num_new)

    assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))


def test_a_shared_prefix_is_read_once() -> None:
    pool = Pool(SHAPES["groups of 3, head_dim 64"], num_threads=1)  # which cuts nothing for the threads' sake
    prefix = pool.blocks(2 * PIECE)
    sequences = [pool.sequence(prefix, 2 * PIECE + 30) for _ in range(8)]

    assert reads_at_once(pool, sequences)
    assert not reads_at_once(pool, [pool.unshared(sequence) for sequence in sequences])
    assert not reads_at_once(pool, sequences[:1])


def test_a_prefix_of_few_sequences_is_not_worth_it() -> None:
    pool = Pool(SHAPES["groups of 3, head_dim 64"], num_threads=1)
    prefix = pool.blocks(PIECE)
    users = [pool.sequence(prefix, PIECE + 30) for _ in range(2)]
    others = [pool.sequence([], PIECE + 30) for _ in range(6)]

    assert reads_at_once(pool, users)
    assert not reads_at_once(pool, [*users, *others])


def test_a_context_that_ends_with_a_piece_sees_all_of_it() -> None:
    pool = Pool(SHAPES["groups of 3, head_dim 64"], num_threads=1)
    prefix = pool.blocks(PIECE)
    longer = pool.sequence(prefix, PIECE + 1)

    assert reads_at_once(pool, [pool.sequence(prefix, PIECE), longer])
    assert not reads_at_once(pool, [pool.sequence(prefix[:-1], PIECE - 1), longer])


def test_blocks_that_are_no_whole_piece_are_not_looked_at() -> None:
    pool = Pool(SHAPES["groups of 3, head_dim 64"], num_threads=1)
    prefix = pool.blocks(PIECE - BLOCK_TOKENS)

    assert not reads_at_once(pool, [pool.sequence(prefix, PIECE + 30) for _ in range(8)])


def test_a_piece_that_a_window_cuts_is_not_shared() -> None:
    pool = Pool(SHAPES["window within the second piece"], num_threads=1)
    prefix = pool.blocks(PIECE)

    assert reads_at_once(pool, [pool.sequence(prefix, PIECE + 30) for _ in range(8)])
    assert not reads_at_once(pool, [pool.sequence(prefix, 700 + 30) for _ in range(8)])


def test_a_broken_sequence_does_not_spoil_those_that_share_its_prefix() -> None:
    shape = SHAPES["groups of 3, head_dim 64"]
    pool = Pool(shape)
    prefix = pool.blocks(PIECE)
    sequences = [pool.sequence(prefix, PIECE + 1 + index) for index in range(8)]
    expected = decode(pool.device, sequences, [1] * 8)
    pool.device._blocks[sequences[3].blocks[-1]] = 0x7FC0  # not a number

    step = make_step([(replace(sequence), 1) for sequence in sequences])
    logits = torch.from_numpy(pool.device.forward(step).copy())

    assert logits[3].isnan().all()
    assert all(torch.equal(logits[i : i + 1], expected[i]) for i in range(8) if i != 3)
