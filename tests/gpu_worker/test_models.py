"""The Llama family gives the logits that transformers gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from octavo.gpu_worker.devices.reference import ReferenceDevice
from octavo.gpu_worker.loading import load_model

from .paged import MAX_BLOCKS, Paged
from .tiny import ARCHITECTURES, make_checkpoint


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def load(folder: Path) -> Paged:
    loaded = load_model(folder, "auto", 0, lambda *_: None)
    return Paged(ReferenceDevice(loaded.model, 512, 8, MAX_BLOCKS))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, name)
    paged = load(tmp_path)
    token_ids = random_tokens(150)  # several times as long as the sliding windows
    with torch.no_grad():
        true = model(torch.tensor([token_ids])).logits[0]

    whole = paged.compute(paged.new(token_ids), chunk=150)
    chunked = paged.compute(paged.new(token_ids), chunk=37)

    assert (whole - true).abs().max() < 1e-3
    assert (chunked - true).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["llama", "llama_yarn", "mistral"])
def test_a_config_as_written_before_2026_and_shards_mean_the_same(name: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "new", name)
    make_checkpoint(tmp_path / "old", name, legacy=True, shards=3)
    assert len(list((tmp_path / "old").glob("*.safetensors"))) > 1
    token_ids = random_tokens(80)

    new, old = (load(tmp_path / kind) for kind in ("new", "old"))

    assert torch.equal(new.compute(new.new(token_ids), 80), old.compute(old.new(token_ids), 80))


def test_bfloat16_weights_are_computed_in_float32(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "qwen3", dtype="bfloat16")
    paged = load(tmp_path)
    token_ids = random_tokens(60)
    with torch.no_grad():
        true = model.float()(torch.tensor([token_ids])).logits[0]

    assert (paged.compute(paged.new(token_ids), 60) - true).abs().max() < 1e-3
