"""Checkpoints that tools have quantised give the numbers of their definitions, on every device."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.devices.cpu.device import CpuDevice
from octavo.gpu_worker.devices.cpu.packed_model import PackedModel
from octavo.gpu_worker.devices.reference.device import ReferenceDevice
from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.formats.quantization_settings import quantization_of
from octavo.gpu_worker.formats.tensor_kinds import Head, plan_matrix
from octavo.gpu_worker.loading.inspection import computed_from, inspect, weight_bytes
from octavo.gpu_worker.loading.loading import load_for_device, load_model
from octavo.gpu_worker.loading.quantised_tensors import _array
from octavo.gpu_worker.loading.sharding import Sharding
from octavo.gpu_worker.loading.weights import Checkpoint, load_folder
from octavo.gpu_worker.quantization import Quantization
from octavo.kernels.cpu import library
from octavo.kernels.group_codes import CodeShape

from .paged import MAX_BLOCKS, Paged
from .quantised import METHODS, quantise_folder
from .test_models import random_tokens
from .tiny import make_checkpoint

DATA = Path(__file__).parent.parent / "data/quantised"


def load(folder: Path, dtype: str = "float32", **wanted: Any) -> Checkpoint:
    return load_folder(folder, dtype, lambda *_: None, **wanted)


def edit_config(folder: Path, **values: Any) -> None:
    """Change settings of the quantisation."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, **changed: torch.Tensor | None) -> None:
    """Replace tensors of the first layer's `up_proj` by their suffix, or take them away."""
    tensors = load_file(folder / "model.safetensors")
    for suffix, tensor in changed.items():
        name = f"model.layers.0.mlp.up_proj.{suffix}"
        del tensors[name]
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", [path.stem for path in sorted(DATA.glob("*.safetensors"))])
def test_what_compressed_tensors_wrote_is_read_as_it_does(name: str) -> None:
    with safe_open(str(DATA / f"{name}.safetensors"), "pt") as file:
        told = json.loads(file.metadata()["quantization_config"])
        tensors = {key.removeprefix("layer."): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        heads = {
            key.removeprefix("layer."): Head(file.get_slice(key).get_dtype(), tuple(file.get_slice(key).get_shape()))
            for key in file.keys()  # noqa: SIM118
        }
    settings = quantization_of({"quantization_config": told}, "config.json")
    assert settings is not None
    plan = plan_matrix(settings, heads)
    assert plan is not None

    codes = plan.layout.read(plan, {suffix: _array(tensors[suffix]) for suffix in plan.heads})

    true = tensors["values"]  # which the tool rounds to the type of its scales
    assert torch.equal(torch.from_numpy(codes.values()).to(true.dtype), true)
    assert true.float().std() > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_a_layout_gives_the_numbers_of_its_definition(tmp_path: Path, method: str) -> None:
    make_checkpoint(tmp_path, "qwen2")
    plain = load(tmp_path).tensors
    values = quantise_folder(tmp_path, method)

    tensors = load(tmp_path).tensors

    for name, true in values.items():
        assert torch.equal(tensors[name], true), name
    changed = (tensors["model.layers.1.mlp.down_proj.weight"] - plain["model.layers.1.mlp.down_proj.weight"]).abs()
    assert 0 < changed.max() < 0.3 * plain["model.layers.1.mlp.down_proj.weight"].abs().max()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_cpu_device_computes_with_the_codes_or_the_numbers(tmp_path: Path, method: str, dtype: str) -> None:
    make_checkpoint(tmp_path, "qwen2", dtype="bfloat16")
    quantise_folder(tmp_path, method)
    token_ids = random_tokens(60)

    def logits(device: Any) -> torch.Tensor:
        paged = Paged(device)
        return paged.compute(paged.new(token_ids), chunk=60)

    exact = logits(ReferenceDevice(load_model(tmp_path, "float32", 0, lambda *_: None).model, 128, 8, MAX_BLOCKS))
    model = load_model(tmp_path, dtype, 0, lambda *_: None, packed_as=Quantization.NONE).model
    found = logits(CpuDevice(model, 128, 8, MAX_BLOCKS, num_threads=2))

    error = (found - exact).square().mean().sqrt() / exact.std()
    assert error < (0.08 if dtype == "auto" else 0.03)  # activations in 8 bits, or in bfloat16


@pytest.mark.parametrize("method", ["gptq, zero points", "gptq, ordered", "awq", "w4a16, zero points", "fp8, blocks"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_has_its_part_of_the_numbers(tmp_path: Path, method: str, rank: int) -> None:
    make_checkpoint(tmp_path, "llama")
    values = quantise_folder(tmp_path, method)

    tensors = load(tmp_path, sharding=Sharding(rank, 2)).tensors

    for name, dim in (("self_attn.q_proj", 0), ("mlp.up_proj", 0), ("mlp.down_proj", 1)):
        full = values[f"model.layers.1.{name}.weight"]
        assert torch.equal(tensors[f"model.layers.1.{name}.weight"], full.chunk(2, dim)[rank]), name


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen2_moe", "phi3"])
def test_other_families_are_read_so_too(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path, name, dtype="bfloat16")
    quantise_folder(tmp_path, "w8a8")
    loaded = load_model(tmp_path, "float32", 0, lambda *_: None).model
    packed = load_model(tmp_path, "auto", 0, lambda *_: None, packed_as=Quantization.NONE).model
    devices = [ReferenceDevice(loaded, 128, 8, MAX_BLOCKS), CpuDevice(packed, 128, 8, MAX_BLOCKS, num_threads=1)]

    exact, found = (paged.compute(paged.new(random_tokens(40)), chunk=40) for paged in map(Paged, devices))

    assert (found - exact).abs().median() < 0.05 * exact.std()


def test_a_latent_model_in_blocks_of_fp8_has_the_numbers_of_its_layout(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v3", dtype="bfloat16")
    values = quantise_folder(tmp_path, "fp8, blocks")

    tensors = load(tmp_path).tensors

    for name in ("q_a_proj", "kv_b_proj", "o_proj"):
        full = values[f"model.layers.1.self_attn.{name}.weight"]
        assert torch.equal(tensors[f"model.layers.1.self_attn.{name}.weight"], full), name
    full = values["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"]
    pairs = torch.cat([full[:128], full[128::2], full[129::2]])  # rotated ones lie half of them apart
    assert torch.equal(tensors["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"], pairs)


def test_what_is_computed_from_what_is_told_beforehand(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", dtype="bfloat16")
    quantise_folder(tmp_path, "gptq")
    found = inspect(tmp_path)
    assert computed_from(found, "cpu", "none") == {"gptq 4 bits codes": 21}
    assert computed_from(found, "reference", "none") == {"gptq 4 bits dequantised": 21}
    assert found.stored["gptq 4 bits"] > 0
    config = WorkerConfig(str(tmp_path), "cpu", num_threads=1, packed_cache=False)
    packed = load_for_device(config, lambda *_: None).model
    assert isinstance(packed, PackedModel)
    held = sum(size for _, size in packed.memory.pieces) - 2 * 512 * 8 * 4  # without rotary tables
    assert weight_bytes(found, "cpu", "none").held == pytest.approx(held, rel=0.02)

    make_checkpoint(tmp_path, "llama", dtype="bfloat16")
    quantise_folder(tmp_path, "gptq, ordered")
    assert computed_from(inspect(tmp_path), "cpu", "none") == {"gptq 4 bits dequantised": 21}


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("gptq", {"quant_method": "bitsandbytes"}, "quantised as 'bitsandbytes'.*supported are gptq, awq"),
        ("gptq", {"quant_method": ["gptq"]}, "not supported"),
        ("gptq", {"bits": 3}, r"quantization_config\.bits is 3, supported: 2, 4, 8"),
        ("gptq", {"bits": True}, "bits is True"),
        ("gptq", {"dynamic": {"-:lm_head": {}}}, "dynamic is"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ("gptq", {"group_size": 48}, "layers.*scales has [23] groups, expected"),
        ("gptq", {"group_size": 1 << 40}, "expected a number of inputs"),
        ("awq", {"version": "gemv"}, "version is 'gemv'"),
        ("w4a16", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ("w4a16", {"transform_config": {"u": {}}}, "transform_config"),
        ("w4a16", {"format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized'"),
        ("w4a16", {"config_groups": {}}, "config_groups is missing"),
        ("w4a16", {"config_groups": {"a": 3}}, "config_groups.a is 3, expected an object"),
        ("w8a8", {"format": "pack-quantized"}, "no tensor is quantised so"),
        ("fp8", {"fmt": "e5m2"}, "fmt is 'e5m2'"),
        ("fp8, blocks", {"weight_block_size": [0, 128]}, "expected two sizes"),
        ("fp8, blocks", {"weight_block_size": [128, 128]}, "weight_scale_inv has shape"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    tmp_path: Path, method: str, values: dict[str, Any], message: str
) -> None:
    make_checkpoint(tmp_path, "llama")
    quantise_folder(tmp_path, method)
    edit_config(tmp_path, **values)
    with pytest.raises(ModelError, match=message):
        load(tmp_path)
    with pytest.raises(ModelError, match=message):
        inspect(tmp_path)


ZEROS = torch.zeros(12, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("method", "changed", "message"),
    [
        ("gptq", {"scales": None}, r"up_proj\.scales (is missing|has shape)"),
        ("gptq", {"qzeros": None}, r"up_proj\.qzeros is missing"),
        ("gptq", {"qzeros": ZEROS}, r"up_proj\.qzeros has shape \[12, 2\], expected \[2, 12\]"),
        ("gptq", {"qzeros": torch.zeros(2, 12, dtype=torch.int32)}, "zero points differ"),
        ("gptq", {"qweight": torch.zeros(8, 80, dtype=torch.int32)}, "scales has shape"),
        ("gptq", {"bias": torch.ones(96)}, "bias is not zero"),
        ("gptq", {"g_idx": torch.zeros(64, dtype=torch.int32)}, "g_idx puts inputs in another order"),
        ("gptq, ordered", {"g_idx": torch.full((64,), 2, dtype=torch.int32)}, "g_idx names groups outside of 2"),
        ("gptq, ordered", {"g_idx": torch.full((64,), -1, dtype=torch.int32)}, "g_idx names groups outside of 2"),
        ("w4a16", {"weight_shape": torch.tensor([96, 65])}, r"weight_shape is \[96, 65\]"),
        ("w4a16", {"weight_scale": torch.ones(96, 3)}, "weight_scale has 3 groups"),
        ("w8a8", {"weight_scale": torch.ones(95, 1)}, r"weight_scale has shape \[95, 1\]"),
        ("fp8", {"weight_scale": torch.ones(1, dtype=torch.int32)}, "weight_scale is of type I32"),
        ("mxfp4", {"weight_scale": torch.ones(96, 3, dtype=torch.uint8)}, "weight_scale has shape"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, method: str, changed: dict[str, torch.Tensor | None], message: str
) -> None:
    make_checkpoint(tmp_path, "llama")
    quantise_folder(tmp_path, method)
    edit_tensors(tmp_path, **changed)
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


def test_a_checkpoint_for_vectors_or_under_a_scheme_is_read_too(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", dtype="bfloat16")
    quantise_folder(tmp_path, "awq")
    model = load_model(tmp_path, "auto", 0, lambda *_: None, packed_as=Quantization.INT8).model
    paged = Paged(CpuDevice(model, 128, 8, MAX_BLOCKS, num_threads=1, quantization=Quantization.INT8))
    assert np.isfinite(paged.compute(paged.new(random_tokens(20)), chunk=20).numpy()).all()


@pytest.mark.parametrize("method", ["gptq, zero points", "w8a8", "mxfp4"])
def test_packed_codes_are_kept_for_the_next_start(tmp_path: Path, method: str) -> None:
    (tmp_path / "model").mkdir()
    make_checkpoint(tmp_path / "model", "qwen2", dtype="bfloat16")
    quantise_folder(tmp_path / "model", method)
    config = WorkerConfig(str(tmp_path / "model"), "cpu", num_threads=1, packed_cache_dir=str(tmp_path / "packed"))

    def start() -> tuple[PackedModel, list[str]]:
        told: list[str] = []
        model = load_for_device(config, lambda name, *_: told.append(name)).model
        assert isinstance(model, PackedModel)
        for thread in threading.enumerate():
            if thread.name == "store packed weights":
                thread.join()
        return model, told

    (packed, first), (found, second) = start(), start()

    assert len(first) > len(second) == 1  # no tensor
    formats = [{op.linear.format for op in model.ops} for model in (found, packed)]
    assert formats[0] == formats[1]
    assert formats[0] & {library.format_of([shape]) for shape in shapes_in(tmp_path / "model")}
    logits = [
        paged.compute(paged.new(random_tokens(20)), chunk=20)
        for paged in (Paged(CpuDevice(model, 128, 8, MAX_BLOCKS, num_threads=1)) for model in (packed, found))
    ]
    assert torch.equal(*logits)


def shapes_in(folder: Path) -> list[CodeShape]:
    """Return what the codes of a folder mean."""
    return [shape for _, shape in inspect(folder).codes.values()]


@pytest.mark.parametrize("told", ["gptq", ["gptq"], {"quant_method": "other"}, {"quant_method": "awq", "bits": 3}])
def test_settings_that_are_not_understood_are_refused_with_their_file(told: object) -> None:
    with pytest.raises(ModelError, match=r"^config\.json: .*quantization_config"):
        quantization_of({"quantization_config": told}, "config.json")
