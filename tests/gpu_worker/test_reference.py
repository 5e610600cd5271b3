"""On the reference device a row's bits depend on its sequence's tokens, and on nothing else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from octavo.gpu_worker.devices.reference.device import ReferenceDevice
from octavo.gpu_worker.loading.loading import load_model
from octavo.gpu_worker.ops import Heads, Model

from .paged import MAX_BLOCKS, Paged
from .test_models import random_tokens
from .tiny import make_checkpoint


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen3", "qwen2_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp(request.param)
    make_checkpoint(path, request.param)
    return path


def make_device(folder: Path) -> ReferenceDevice:
    return ReferenceDevice(load_model(folder, "auto", 0, lambda *_: None).model, 512, 8, MAX_BLOCKS)


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_chunking_a_prompt_changes_no_bit(folder: Path, chunk: int) -> None:
    paged = Paged(make_device(folder))
    token_ids = random_tokens(70 if chunk == 1 else 150)  # more than the sliding windows

    whole = paged.compute(paged.new(token_ids), chunk=len(token_ids))

    assert torch.equal(paged.compute(paged.new(token_ids), chunk), whole)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_chunking_changes_no_bit_at_the_sizes_of_a_real_model(tmp_path: Path, num_threads: int) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    make_checkpoint(tmp_path, "llama_linear", num_hidden_layers=2, **sizes)
    token_ids = random_tokens(100)
    torch.set_num_threads(num_threads)
    try:
        paged = Paged(make_device(tmp_path))
        whole = paged.compute(paged.new(token_ids), chunk=100)
        chunked = paged.compute(paged.new(token_ids), chunk=9)
    finally:
        torch.set_num_threads(1)

    assert torch.equal(chunked, whole)


@pytest.mark.parametrize("num_before", [0, 1, 5, 15, 16, 33])
def test_other_rows_of_a_step_change_no_bit(folder: Path, num_before: int) -> None:
    paged = Paged(make_device(folder))
    token_ids = random_tokens(100)
    alone = paged.compute(paged.new(token_ids), chunk=100)
    others = [paged.new(random_tokens(60, seed=seed)) for seed in (1, 2)]
    sequence = paged.new(token_ids)
    before = [(others[0], num_before)] if num_before else []

    paged.step([*before, (sequence, 70), (others[1], 25)])  # a prompt between two others
    for _ in range(8):  # then token by token, as when it decodes
        paged.step([(others[1], 1), (sequence, 1)])
    paged.step([(sequence, 22)])

    assert torch.equal(torch.stack(sequence.logits), alone)


def test_which_blocks_a_sequence_has_and_what_they_held_changes_no_bit(folder: Path) -> None:
    token_ids = random_tokens(75)
    results = []
    for seed in (0, 1):
        paged = Paged(make_device(folder), seed=seed)
        if seed:  # left by others, and not even finite; block 0 is never written
            paged.device.keys[:, 1:] = torch.nan  # type: ignore[attr-defined]
            paged.device.values[:, 1:] = torch.nan  # type: ignore[attr-defined]
        results.append(paged.compute(paged.new(token_ids), chunk=20))

    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("reader_goes_first", [False, True])
def test_a_sequence_may_read_blocks_that_another_one_fills_in_the_same_step(
    folder: Path, reader_goes_first: bool
) -> None:
    paged = Paged(make_device(folder))
    token_ids = random_tokens(60)
    alone = paged.compute(paged.new(token_ids), chunk=60)
    writer, reader = paged.new(token_ids[:40]), paged.new(token_ids)
    paged.step([(writer, 20)])
    reader.blocks[:2], reader.num_computed = writer.blocks[:2], 32

    paged.step([(reader, 28), (writer, 20)] if reader_goes_first else [(writer, 20), (reader, 28)])

    assert torch.equal(torch.stack(reader.logits), alone[32:])


def test_copied_blocks_hold_the_same_context(folder: Path) -> None:
    paged = Paged(make_device(folder))
    token_ids = random_tokens(64)
    source, copy = paged.new(token_ids), paged.new(token_ids)
    whole = paged.compute(source, chunk=64)

    paged.device.copy_blocks(np.array(list(zip(source.blocks[:3], copy.blocks[:3], strict=True)), np.int32))
    copy.num_computed = 48
    rest = paged.compute(copy, chunk=16)

    assert torch.equal(rest, whole[48:])


def test_a_block_is_sixteen_tokens_of_keys_and_values_in_every_layer() -> None:
    model = SimpleNamespace(num_layers=3, vocab_size=320, heads=Heads(num_heads=4, num_kv_heads=2, head_dim=8))

    device = ReferenceDevice(cast(Model, model), 1, 1, 1)

    assert device.kv_block_bytes() == 3 * 2 * 16 * 2 * 8 * 4


def test_a_tensor_that_is_made_for_a_moment_is_not_taken_for_one_before_it(folder: Path) -> None:
    device = make_device(folder)
    for number in range(50):
        found = device.weight(torch.full((2,), number, dtype=torch.bfloat16))
        assert torch.equal(found, torch.full((2,), float(number), dtype=found.dtype))
