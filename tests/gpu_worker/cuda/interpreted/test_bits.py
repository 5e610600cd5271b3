"""A row's logits have the same bits whatever is in its step, on the cuda device.

What that shows of a GPU: the order of the work that Triton's programs do. Not shown: the order of sums inside a
matrix instruction, and of those in cuBLAS: the CPU's library in its place sums a row by its place among the others on
some processors, so products are taken in one order here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driver import VOCABULARY, Driver, Sequence, cuda_engine, load

from octavo.gpu_worker.devices.cuda import model as cuda_model
from octavo.gpu_worker.devices.cuda import ops as cuda_ops
from octavo.gpu_worker.devices.cuda.runner import CudaRunner
from octavo.gpu_worker.ops import Model

PROMPT = [(37 * index + 11) % VOCABULARY for index in range(30)]
NUM_DECODES = 3
Logits = dict[int, torch.Tensor]


@pytest.fixture(autouse=True)
def _products_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output: torch.Tensor) -> None:
        product = torch.from_numpy(np.einsum("mk,nk->mn", x.float().numpy(), weight.float().numpy(), optimize=False))
        output.copy_(product if bias is None else product + bias.float())

    monkeypatch.setattr(cuda_ops, "multiply", multiply)


def record_logits(runner: CudaRunner, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, torch.Tensor]]:
    """Return slot, position and logits of every row that is sampled from now on."""
    found: list[tuple[int, int, torch.Tensor]] = []
    launch = runner._sampler.launch

    def record(logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, *rest: Any) -> None:
        found.extend(zip(slots.tolist(), positions.tolist(), logits.clone(), strict=True))
        launch(logits, slots, positions, *rest)

    monkeypatch.setattr(runner._sampler, "launch", record)
    return found


def logits_of(
    model: Model, chunks: list[int], others: list[list[int]], monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> Logits:
    """Compute PROMPT in chunks and then decode; return its logits by position.

    others  how many tokens another sequence computes in each step, before PROMPT in the order of the rows
    """
    engine = cuda_engine(model, **settings)
    assert isinstance(engine.runner, CudaRunner)
    recorded = record_logits(engine.runner, monkeypatch)
    driver = Driver(engine, seed=len(others))  # other blocks
    company = [(Sequence([7 + index] * sum(counts), {}, sum(counts)), counts) for index, counts in enumerate(others)]
    for other, _ in company:
        driver.open(other)
    sequence = Sequence(list(PROMPT), {}, len(PROMPT))
    driver.open(sequence)
    for step, count in enumerate([*chunks, *[1] * NUM_DECODES]):
        rows = [(other, counts[step] if step < len(counts) else 1) for other, counts in company]
        driver.step([*rows, (sequence, count)])
    driver.collect_all()
    return {position: logits for slot, position, logits in recorded if slot == sequence.slot}


@pytest.mark.parametrize(("name", "dtype"), [("llama", "float32"), ("qwen3", "bfloat16"), ("mixtral", "bfloat16")])
def test_a_row_has_the_same_bits_alone_in_a_batch_and_in_chunks(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tmp_path, name, dtype=dtype)
    # So that a context of some blocks is attended in several pieces.
    configured = cuda_model.attention_config

    def in_pieces(*args: Any, **settings: Any) -> Any:
        config = configured(*args, **settings)
        return dataclasses.replace(config, block_n=16, split_keys=16)

    monkeypatch.setattr(cuda_model, "attention_config", in_pieces)

    alone = logits_of(model, [30], [], monkeypatch)
    chunked = logits_of(model, [7, 16, 7], [], monkeypatch)
    # Decodes of three rows are padded to four.
    crowded = logits_of(model, [5, 8, 17], [[3, 20, 1], [11, 1, 9]], monkeypatch)

    assert len(alone) == 1 + NUM_DECODES
    for other in (chunked, crowded):
        assert alone.keys() == other.keys()
        for position, logits in alone.items():
            assert torch.equal(logits, other[position]), position
