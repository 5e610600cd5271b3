"""Writes checkpoints whose matrices are quantised, in the layouts that their tools document.

What a matrix's numbers are is computed here from codes, scales and zero points, as the definitions of the layouts say,
and not from what is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
MXFP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def packed(codes: torch.Tensor, bits: int, dim: int, order: tuple[int, ...] = ()) -> torch.Tensor:
    """Put neighbours along a dimension into words of 32 bits, the first one lowest."""
    per_word = 32 // bits
    words = codes.long().movedim(dim, -1)
    words = torch.nn.functional.pad(words, (0, -words.shape[-1] % per_word)).unflatten(-1, (-1, per_word))
    shifts = torch.arange(per_word) * bits
    total = (words[..., list(order) or list(range(per_word))] << shifts).sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32).movedim(-1, dim).contiguous()


def in_codes(
    weight: torch.Tensor, bits: int, group: int, *, symmetric: bool, order: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes [outputs, inputs], scales and zero points [outputs, groups], and the numbers that they are.

    order  of each input, its group
    """
    inputs = weight.shape[1]
    group = group or inputs
    groups = torch.arange(inputs) // group if order is None else order
    count = int(groups.max()) + 1
    low, high = torch.zeros(len(weight), count), torch.zeros(len(weight), count)
    for index in range(count):
        of_group = weight.float()[:, groups == index]
        low[:, index], high[:, index] = of_group.amin(1).clamp(max=0), of_group.amax(1).clamp(min=0)
    most = 2**bits - 1
    if symmetric:
        scales = (torch.maximum(high, -low) / (most // 2)).half().float()
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        scales = ((high - low) / most).half().float()
        zeros = (-low / scales).round().clamp(1, most)
    codes = (weight.float() / scales[:, groups] + zeros[:, groups]).round().clamp(0, most)
    return codes, scales, zeros, (codes - zeros[:, groups]) * scales[:, groups]


def gptq(
    weight: torch.Tensor,
    bits: int = 4,
    group: int = 32,
    *,
    symmetric: bool = True,
    is_ordered: bool = False,
    v2: bool = False,
) -> tuple[Tensors, torch.Tensor]:
    inputs = weight.shape[1]
    order = torch.arange(inputs) // (group or inputs)
    if is_ordered:
        order = order[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
    codes, scales, zeros, values = in_codes(weight, bits, group, symmetric=symmetric, order=order)
    tensors = {
        "qweight": packed(codes.T, bits, 0),
        "qzeros": packed(zeros.T - (0 if v2 else 1), bits, 1),
        "scales": scales.T.half().contiguous(),
        "g_idx": order.to(torch.int32),
        "bias": torch.zeros(len(weight), dtype=torch.float16),
    }
    return tensors, values


def awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, scales, zeros, values = in_codes(weight, 4, 32, symmetric=False)
    tensors = {"qweight": packed(codes.T, 4, 1, AWQ_ORDER), "qzeros": packed(zeros.T, 4, 1, AWQ_ORDER)}
    return {**tensors, "scales": scales.T.half().contiguous()}, values


def compressed(weight: torch.Tensor, *, symmetric: bool = True) -> tuple[Tensors, torch.Tensor]:
    codes, scales, zeros, values = in_codes(weight, 4, 32, symmetric=symmetric)
    tensors = {
        "weight_packed": packed(codes, 4, 1),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
        "input_scale": torch.ones(1),
    }
    if not symmetric:
        tensors["weight_zero_point"] = packed(zeros, 4, 0)
    return tensors, values


def int8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, scales, zeros, values = in_codes(weight, 8, 0, symmetric=True)
    return {"weight": (codes - zeros).to(torch.int8), "weight_scale": scales}, values


def fp8(
    weight: torch.Tensor, block: tuple[int, int] = (0, 0), name: str = "weight_scale"
) -> tuple[Tensors, torch.Tensor]:
    """Return it with a scale for each block; without one, for all."""
    rows, columns = weight.shape
    height, width = (size or whole for size, whole in zip(block, weight.shape, strict=True))
    grown = torch.nn.functional.pad(weight.float(), (0, -columns % width, 0, -rows % height))
    blocks = grown.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    scales = blocks.abs().amax((1, 3)) / 448
    each = scales.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    codes = (weight.float() / each).to(torch.float8_e4m3fn)
    return {"weight": codes, name: scales if block[0] else scales.reshape(())}, codes.float() * each


def mxfp4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    groups = weight.float().unflatten(1, (-1, 32))
    exponents = (groups.abs().amax(-1) / 6).log2().ceil()
    codes = (groups[..., None] / torch.exp2(exponents)[..., None, None] - MXFP4).abs().argmin(-1)
    values = (MXFP4[codes] * torch.exp2(exponents)[..., None]).flatten(1)
    halves = codes.flatten(1).unflatten(1, (-1, 2))
    tensors = {"weight_packed": (halves[..., 0] | halves[..., 1] << 4).to(torch.uint8)}
    return {**tensors, "weight_scale": (exponents + 127).to(torch.uint8)}, values


def of_groups(kind: str, **weights: Any) -> dict[str, Any]:
    """Return a quantization_config of compressed-tensors."""
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "int", "dynamic": False, **weights}}},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


Maker = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
METHODS: dict[str, tuple[dict[str, Any], Maker]] = {
    "gptq": (GPTQ, gptq),
    "gptq, 8 bits, one group": ({**GPTQ, "bits": 8, "group_size": -1}, lambda w: gptq(w, 8, 0)),
    "gptq, zero points": ({**GPTQ, "sym": False}, lambda w: gptq(w, symmetric=False)),
    "gptq, ordered": ({**GPTQ, "desc_act": True, "sym": False}, lambda w: gptq(w, symmetric=False, is_ordered=True)),
    "gptq v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, lambda w: gptq(w, v2=True)),
    "auto-round": (
        {**GPTQ, "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "data_type": "int"},
        gptq,
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, awq),
    "w4a16": (of_groups("pack-quantized", num_bits=4, strategy="group", group_size=32), compressed),
    "w4a16, zero points": (
        of_groups("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False),
        lambda w: compressed(w, symmetric=False),
    ),
    "w8a8": (of_groups("int-quantized", num_bits=8, strategy="channel"), int8),
    "fp8": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8),
    "fp8, channels": (
        of_groups("float-quantized", num_bits=8, type="float", strategy="channel"),
        lambda w: fp8(w, (1, 0)),
    ),
    "fp8, blocks": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 16]},
        lambda w: fp8(w, (32, 16), "weight_scale_inv"),
    ),
    "mxfp4": (of_groups("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32), mxfp4),
}
"""What a config.json says, and what quantises a matrix, by a name of ours."""


def is_quantised(name: str) -> bool:
    """Return whether tools quantise a tensor."""
    return name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight"))


def quantise_folder(folder: Path, method: str) -> Tensors:
    """Quantise the checkpoint in a folder; return the numbers that its tensors are, in float32."""
    settings, make = METHODS[method]
    tensors, values = load_file(folder / "model.safetensors"), dict[str, torch.Tensor]()
    for name in list(tensors):
        if not is_quantised(name):
            values[name] = tensors[name].float()
            continue
        members, values[name] = make(tensors.pop(name))
        prefix = name.removesuffix("weight")
        for suffix, tensor in members.items():
            tensors.setdefault(prefix + suffix, tensor)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return values


def in_mxfp4(folder: Path) -> None:
    """Write the experts of a model in numbers of four bits, as gpt-oss is published."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 124, shape, generator=generator, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
