"""Adapters as PEFT writes them are read as PEFT means them; what is broken is refused with file, field and advice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.common.adapter_files import AdapterError, read_files
from octavo.gpu_worker.devices.reference.device import ReferenceDevice
from octavo.gpu_worker.loading.adapters import PeftAdapter
from octavo.gpu_worker.loading.loading import load_model
from octavo.gpu_worker.ops import LoraPair
from tests.peft_folders import module_shapes, random_tensors, write_adapter

from .paged import MAX_BLOCKS, Paged
from .tiny import make_checkpoint

SHAPES = {"model.layers.0.self_attn.q_proj": (64, 64), "model.layers.1.mlp.down_proj": (64, 96)}
RANK = 4


def read(folder: Path) -> list[LoraPair]:
    return list(PeftAdapter(read_files(folder), SHAPES).pairs())


def tensors() -> dict[str, np.ndarray[Any, Any]]:
    return random_tensors(SHAPES, RANK, seed=1)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "olmo2"])
def test_logits_are_those_of_merged_weights(name: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "base", name)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    shapes = module_shapes(config)
    adapter = random_tensors(shapes, RANK, seed=1)
    write_adapter(tmp_path / "adapter", adapter, RANK, lora_alpha=2, use_rslora=True)
    merged = load_file(tmp_path / "base" / "model.safetensors")
    for module in shapes:
        a, b = (torch.from_numpy(adapter[f"base_model.model.{module}.lora_{which}.weight"]) for which in "AB")
        merged[f"{module}.weight"] = merged[f"{module}.weight"].float() + 2 / RANK**0.5 * b @ a
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    save_file(merged, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    token_ids = list(range(5, 85))

    def logits(folder: str, files: Path | None) -> torch.Tensor:
        loaded = load_model(tmp_path / folder, "auto", 0, lambda *_: None)
        device = ReferenceDevice(loaded.model, 512, 8, MAX_BLOCKS)
        if files is not None:
            read_here = PeftAdapter(read_files(files), device.adapter_modules())
            device.set_adapter(1, device.pack_adapter(read_here.pairs()))
        paged = Paged(device)
        if files is not None:
            forward = device.forward

            def adapted(step: Any) -> Any:
                from dataclasses import replace

                return forward(replace(step, adapter_ids=np.ones(len(step.token_ids), np.int32)))

            device.forward = adapted  # type: ignore[method-assign]
        return paged.compute(paged.new(token_ids), chunk=80)

    with_adapter, with_merged, plain = (
        logits("base", tmp_path / "adapter"),
        logits("merged", None),
        logits("base", None),
    )

    assert (plain - with_merged).abs().max() > 0.1
    assert (with_adapter - with_merged).abs().max() < 2e-4 * max(1.0, with_merged.abs().max())


def test_scales_and_types_are_those_of_the_files(tmp_path: Path) -> None:
    values = tensors()
    write_adapter(tmp_path / "f32", values, RANK, lora_alpha=8)
    halves = {name: each.astype(np.float16) for name, each in values.items()}
    write_adapter(tmp_path / "f16", halves, RANK, lora_alpha=8, use_rslora=True)
    words = {name: (each.view(np.uint32) >> 16).astype(np.uint16) for name, each in values.items()}
    write_adapter(tmp_path / "bf16", words, RANK, alpha_pattern={"down_proj": 2, "layers.0.self_attn.q_proj": 1})

    single, half, brain = read(tmp_path / "f32"), read(tmp_path / "f16"), read(tmp_path / "bf16")

    assert [pair.scale for pair in single] == [2.0, 2.0]
    assert [pair.scale for pair in half] == [4.0, 4.0]
    assert [pair.scale for pair in brain] == [0.25, 0.5]
    for one, other, third in zip(single, half, brain, strict=True):
        assert (one.a == values[f"base_model.model.{one.module}.lora_A.weight"]).all()
        np.testing.assert_allclose(one.b, other.b, atol=1e-3)
        np.testing.assert_allclose(one.b, third.b, rtol=1e-2)


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return what writes an adapter whose tensors were changed."""

    def write(folder: Path) -> None:
        values = tensors()
        change(values)
        write_adapter(folder, values, RANK)

    return write


def _config(**keys: object) -> Callable[[Path], None]:
    return lambda folder: write_adapter(folder, tensors(), RANK, **keys) and None


def _cut(folder: Path) -> None:
    write_adapter(folder, tensors(), RANK)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _bomb(folder: Path) -> None:
    write_adapter(folder, {}, RANK)
    head = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(4))


def _pickle(folder: Path) -> None:
    write_adapter(folder, tensors(), RANK)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _pipe(folder: Path) -> None:
    write_adapter(folder, tensors(), RANK)
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")


def _set(values: dict[str, Any], name: str, value: np.ndarray[Any, Any]) -> None:
    values[f"base_model.model.{name}"] = value


Q = "model.layers.0.self_attn.q_proj"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "other base": (_edit(lambda v: _set(v, f"{Q}.lora_A.weight", np.ones((4, 32), np.float32))), "of another model"),
    "another layer": (_edit(lambda v: _set(v, "model.layers.9.mlp.up_proj.lora_A.weight", np.ones((4, 4), np.float32))),
                      "is for model.layers.9.mlp.up_proj"),
    "embeddings": (_edit(lambda v: _set(v, "model.embed_tokens.lora_embedding_A", np.ones((4, 4), np.float32))),
                   "is none of base_model"),
    "no partner": (_edit(lambda v: v.pop(f"base_model.model.{Q}.lora_B.weight")), "not its partner"),
    "not a number": (_edit(lambda v: v[f"base_model.model.{Q}.lora_B.weight"].__setitem__((3, 1), np.nan)),
                     "q_proj.lora_B holds a value that is not finite"),
    "infinite": (_edit(lambda v: v[f"base_model.model.{Q}.lora_A.weight"].__setitem__((0, 0), -np.inf)), "not finite"),
    "too large for bfloat16": (_edit(lambda v: v[f"base_model.model.{Q}.lora_A.weight"].__setitem__((0, 0), 3.4e38)),
                               "q_proj.lora_A holds 3.4e+38, and bfloat16 ends at 3.38953e+38"),
    "rank of the config": (_config(r=8), "rank 4, but adapter_config.json says 8"),
    "rank that is no whole number": (_config(r=4.5), "r is 4.5; expected a whole number"),
    "rank bomb": (_edit(lambda v: [_set(v, f"{Q}.lora_A.weight", np.ones((300, 64), np.float32)),
                                   _set(v, f"{Q}.lora_B.weight", np.ones((64, 300), np.float32))]), "rank 300"),
    "size bomb": (_bomb, "has 4 bytes for"),
    "weights that the model has no more": (_config(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "DoRA": (_config(use_dora=True), "use_dora is True"),
    "bias": (_config(bias="all"), "bias is 'all'"),
    "saved modules": (_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "other method": (_config(peft_type="IA3"), "peft_type is 'IA3'; only LORA"),
    "regular expression": (_config(rank_pattern={"(a+)+$": 4}), "no expressions"),
    "alpha": (_config(lora_alpha=float("nan")), "lora_alpha"),
    "pickle": (_pickle, "is a pickle file, which can run any code"),
    "cut off": (_cut, "lies outside of the file"),
    "pipe": (_pipe, "is no file"),
    "no tensors": (_edit(lambda v: v.clear()), "holds no tensors"),
    "nothing": (lambda folder: folder.mkdir(), "no such file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    write, reason = BROKEN[name]
    write(tmp_path / "adapter")

    with pytest.raises(AdapterError) as refused:
        read(tmp_path / "adapter")

    assert reason in str(refused.value)
    assert str(tmp_path) not in str(refused.value)


def test_files_beyond_the_limit_are_not_read(tmp_path: Path) -> None:
    write_adapter(tmp_path, tensors(), RANK)

    with pytest.raises(AdapterError, match="at most 1000 are read"):
        read_files(tmp_path, 1000)
