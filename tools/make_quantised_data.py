"""Make tests/data/quantised: small matrices that compressed-tensors has quantised, beside what it says they are.

    python -m venv ENV && ENV/bin/pip install compressed-tensors==0.20.1 && ENV/bin/python tools/make_quantised_data.py

A file has the tensors of the matrix `layer`, `values`, which the tool dequantises them to, and in its metadata what
config.json has as `quantization_config`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

FOLDER = Path(__file__).parent.parent / "tests/data/quantised"
ROWS, COLUMNS = 48, 128
# By file: the tool's format, and what it is told of weights.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "w4a16": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "w4a16_zero_points": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False},
    ),
    "w8a16": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "w8a8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "fp8_channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8_tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8_block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 64]},
    ),
}


def factors(weight: torch.Tensor, args: QuantizationArgs) -> dict[str, torch.Tensor]:
    """Return scales and zero points that cover the weights' range."""
    rows, columns = weight.shape
    height, width = args.block_structure or (1, args.group_size or columns)
    if args.strategy == "tensor":
        height, width = rows, columns
    grown = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
    blocks = grown.unflatten(1, (-1, width)).unflatten(0, (-1, height)).transpose(1, 2).flatten(2)
    levels = 448.0 if args.type == "float" else 2**args.num_bits - 1.0
    if args.symmetric:
        half = 448.0 if args.type == "float" else levels / 2
        scale = blocks.abs().amax(-1) / half
        return {"weight_scale": (scale.flatten() if args.strategy == "tensor" else scale).bfloat16()}
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    scale = ((high - low) / levels).bfloat16()
    lowest = -(2 ** (args.num_bits - 1))
    zero = (lowest - low / scale.float()).round().clamp(lowest, -lowest - 1)
    return {"weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}


def main() -> None:
    """Write a file for each case."""
    FOLDER.mkdir(exist_ok=True)
    for seed, (name, (kind, settings)) in enumerate(CASES.items()):
        weight = (torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) / 8).bfloat16()
        args = QuantizationArgs(**settings)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        tool = BaseCompressor.get_value_from_registry(kind)
        stored = tool.compress({"weight": weight, **factors(weight.float(), args)}, scheme)
        values = tool.decompress(dict(stored), scheme)["weight"]
        tensors = {f"layer.{suffix}": tensor.contiguous() for suffix, tensor in stored.items()}
        config = {
            "quant_method": "compressed-tensors",
            "format": kind,
            "quantization_status": "compressed",
            "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
            "ignore": ["lm_head"],
        }
        told = {"quantization_config": json.dumps(config, sort_keys=True)}
        save_file({**tensors, "values": values.contiguous()}, FOLDER / f"{name}.safetensors", told)


if __name__ == "__main__":
    main()
