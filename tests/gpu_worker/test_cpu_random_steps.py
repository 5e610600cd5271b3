"""Steps of any shape on the cpu device, of which some have one index broken: refused, or computed, and never more.

`make sanitize` runs more of them, with kernels that notice who reads or writes beside what is theirs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from octavo.gpu_worker.devices.cpu.device import CpuDevice
from octavo.gpu_worker.formats.tensor_kinds import mxfp4_codes
from octavo.gpu_worker.models.latent import LatentAttention
from octavo.gpu_worker.ops import Draw, HeadLinear, Heads, LatentOps, Rotary, StepInput, Value
from octavo.gpu_worker.quantization import Quantization
from octavo.kernels.cpu.coded_rows import Coded, CodedRows

from .test_cpu_device import BLOCK_TOKENS, SHAPES, VARIANTS, Shape, TinyModel
from .test_cpu_experts import MIXTURES, ExpertsModel

NUM_SEEDS = int(os.environ.get("OCTAVO_RANDOM_STEP_SEEDS", "2"))
STEPS_OF_A_DEVICE = 25
MAX_TOKENS, MAX_SEQUENCES, MAX_BLOCKS, NUM_BLOCKS = 96, 12, 40, 200
SHARED_BLOCKS = 16
SOME_SHAPES = {
    **SHAPES,
    "one head of 16": Shape(hidden=48, intermediate=33, vocab=33, heads=Heads(1, 1, 16), rotary_dim=16),
    "five tokens": Shape(hidden=80, intermediate=50, vocab=5, heads=Heads(3, 1, 112), rotary_dim=112, window=300),
}


class LatentModel(TinyModel):
    """A model of latent attention, whose heads become others before and after they attend."""

    def __init__(self, heads: Heads, layers: int) -> None:
        super().__init__(Shape(hidden=96, heads=heads, layers=layers))
        rope_dim, nope_dim, value_dim, query_rank = heads.head_dim - heads.latent_dim, 32, 48, 80
        angles = torch.outer(torch.arange(MAX_BLOCKS * BLOCK_TOKENS), 0.7 ** torch.arange(rope_dim // 2))
        self.rotary = Rotary(angles.cos(), angles.sin(), rope_dim)
        self.attentions = [
            LatentAttention(
                self._linear(query_rank, 96),
                self._norm(query_rank),
                self._linear(heads.num_heads * (nope_dim + rope_dim), query_rank),
                self._linear(heads.head_dim, 96),
                self._norm(heads.latent_dim),
                HeadLinear(self._random(heads.num_heads, heads.latent_dim, nope_dim)),
                HeadLinear(self._random(heads.num_heads, value_dim, heads.latent_dim)),
            )
            for _ in range(layers)
        ]
        self.outputs = [self._linear(96, heads.num_heads * value_dim) for _ in range(layers)]

    def forward(self, ops: LatentOps) -> Value:  # type: ignore[override]
        x = ops.embed(self.embedding)
        for index, (layer, attention, output) in enumerate(
            zip(self.layers, self.attentions, self.outputs, strict=True)
        ):
            attended = attention.attend(ops, ops.norm(x, layer["norm"]), index, self.heads, self.rotary, 0.2)
            x = ops.add(x, ops.linear(attended, output))
        return ops.logits(ops.norm(x, self.norm), self.head)


class CodedExpertsModel(ExpertsModel):
    """A model of experts in numbers of four bits, with biases and a clamped gate."""

    def __init__(self, layers: int) -> None:
        super().__init__(replace(MIXTURES["biases, a clamped gate"], hidden=96, inner=64), layers)
        rng = np.random.default_rng(0)

        def coded(matrix: torch.Tensor) -> torch.Tensor:
            rows, columns = matrix.shape
            codes = mxfp4_codes(
                rng.integers(256, size=(rows, columns // 2), dtype=np.uint8),
                rng.integers(120, 125, size=(rows, columns // 32), dtype=np.uint8),
            )
            return CodedRows([Coded(rows, codes.shape, codes.rows)], columns)

        for index, experts in enumerate(self.mixtures):
            gate, up, down = (tuple(map(coded, parts)) for parts in (experts.gate, experts.up, experts.down))
            self.mixtures[index] = replace(experts, gate=gate, up=up, down=down)


# Of each kind a seed has one.
KINDS: list[dict[str, Callable[[int], TinyModel]]] = [
    {name: lambda layers, shape=shape: TinyModel(replace(shape, layers=layers)) for name, shape in SOME_SHAPES.items()},
    {"with sinks": lambda layers: TinyModel(replace(SHAPES["sinks, a clamped gate, window"], layers=layers))},
    {
        "latent, as published": lambda layers: LatentModel(Heads(20, 1, 576, 512), layers),
        "latent, small": lambda layers: LatentModel(Heads(3, 1, 112, 96), layers),
    },
    {
        "experts in four bits": CodedExpertsModel,
        **{name: lambda layers, mixture=mixture: ExpertsModel(mixture, layers) for name, mixture in MIXTURES.items()},
    },
]


def random_step(rng: np.random.Generator, vocab: int) -> dict[str, Any]:
    """Return the columns of a step: prompts, single tokens, sequences without a token, prefixes that are shared."""
    blocks = [int(block) for block in rng.permutation(NUM_BLOCKS - 1) + 1]
    shared = [blocks.pop() for _ in range(SHARED_BLOCKS)]
    num_sequences = int(rng.integers(0, MAX_SEQUENCES + 1))
    block_tables = np.zeros((num_sequences, MAX_BLOCKS), np.int32)
    positions: list[int] = []
    slots: list[int] = []
    seq_lens: list[int] = []
    starts = [0]
    for row in range(num_sequences):
        count = int(min(MAX_TOKENS - starts[-1], rng.choice([0, 1, 1, 1, 2, 5, 17, 40])))
        past = int(rng.choice([0, 0, 1, 15, 16, 31, 100, 256, 300, 511])) if count else 0
        end = min(past + count, MAX_BLOCKS * BLOCK_TOKENS)
        num_blocks = -(-end // BLOCK_TOKENS)
        num_shared = min(SHARED_BLOCKS, (end - count) // BLOCK_TOKENS) if rng.random() < 0.5 else 0
        if len(blocks) < num_blocks:
            count = end = num_blocks = num_shared = 0
        own = shared[:num_shared] + [blocks.pop() for _ in range(num_blocks - num_shared)]
        block_tables[row, :num_blocks] = own
        new = range(end - count, end)
        positions += new
        slots += [own[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS for p in new]
        starts.append(len(positions))
        seq_lens.append(end)
    total = len(positions)
    num_rows = int(rng.integers(0, total + 1))
    columns = {
        "token_ids": rng.integers(0, vocab, total),
        "positions": positions,
        "slot_mapping": slots,
        "query_start_loc": starts,
        "seq_lens": seq_lens,
        "block_tables": block_tables,
        "logits_rows": np.sort(rng.choice(total, num_rows, replace=False)) if total else [],
    }
    return {name: np.ascontiguousarray(column, dtype=np.int32) for name, column in columns.items()}


def break_one_index(rng: np.random.Generator, columns: dict[str, Any], vocab: int) -> bool:
    """Give a number of one column another value; return whether there was one."""
    column = columns[str(rng.choice(list(columns)))]
    if column.size == 0:
        return False
    index = int(rng.integers(column.size))
    value = int(column.flat[index])
    values = [-1, -(2**31), 2**31 - 1, value + 1, value - 1, value * 16, vocab, NUM_BLOCKS, NUM_BLOCKS * BLOCK_TOKENS]
    column.flat[index] = int(rng.choice(values))
    return True


def random_draw(rng: np.random.Generator) -> Draw:
    return Draw(
        temperature=float(rng.choice([0, 1, 0.1, 5])),
        top_k=int(rng.choice([0, 1, 3, 1000])),
        top_p=float(rng.choice([1, 0.9, 0, 1e-9, 0.5])),
        min_p=float(rng.choice([0, 0.1, 1])),
        seed=int(rng.integers(2**63)),
        candidate_index=0,
        position=0,
    )


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_a_step_is_computed_or_refused_whatever_its_indices_are(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_refused = 0
    for kind in KINDS:
        model = kind[str(rng.choice(list(kind)))](int(rng.integers(1, 3)))
        device = CpuDevice(
            model,
            MAX_TOKENS,
            MAX_SEQUENCES,
            MAX_BLOCKS,
            num_threads=int(rng.choice([1, 2, 3, 5, 24])),
            quantization=Quantization(str(rng.choice(["none", "int8", "int4"]))),
            variant=str(rng.choice(VARIANTS)),
        )
        device.allocate_kv(NUM_BLOCKS)
        for _ in range(STEPS_OF_A_DEVICE):
            columns = random_step(rng, model.vocab_size)
            is_broken = rng.random() < 0.4 and break_one_index(rng, columns, model.vocab_size)
            try:
                logits = device.forward(StepInput(**columns))
            except ValueError:
                assert is_broken
                num_refused += 1
                continue
            best = device.argmax(logits)
            token_ids = device.draw(logits, [random_draw(rng) for _ in range(len(logits))])
            if not is_broken:  # another position or slot reads what an earlier step left there
                assert np.isfinite(logits).all()
                assert (best == logits.argmax(-1)).all()
                assert all(0 <= token_id < model.vocab_size for token_id in token_ids)
    assert num_refused > 0
