"""Small random models in float32 of every kind that the device treats differently, also quantised and as files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from octavo.gpu_worker.loading.loading import LoadedModel
from octavo.gpu_worker.models.config import ModelConfig, from_json
from octavo.gpu_worker.models.registry import Architecture, find_architecture
from octavo.gpu_worker.ops import Model
from octavo.kernels.quantized_linear import quantize_weight

CONTEXT = 512
_SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
DENSE: dict[str, Any] = {**_SIZES, "architectures": ["LlamaForCausalLM"]}
EXPERTS: dict[str, Any] = {  # a dense layer, and one with a shared expert
    **_SIZES,
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 72,
    "decoder_sparse_step": 2,
}
_QUANTIZED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def small_model(settings: Mapping[str, Any], stands_for: str = "none") -> LoadedModel:
    """Return the model of a config.json, always with the same weights, in the host's memory.

    stands_for  a quantisation: the weights of linear layers are replaced by what their quantised ones stand for
    """
    config, architecture = _config(settings)
    tensors = _tensors(config, architecture)
    for name, tensor in tensors.items():
        if stands_for in _QUANTIZED and name.endswith("_proj.weight"):
            values, scales = quantize_weight(tensor, _QUANTIZED[stands_for])
            tensors[name] = values.float() * scales[:, None]
    model = architecture.build(config, tensors, CONTEXT)
    return LoadedModel(model, config.architecture, CONTEXT, "small")


def headless_model(settings: Mapping[str, Any]) -> Model:
    """Return the model of a config.json that gives hidden states, in the host's memory."""
    config, architecture = _config(settings)
    config = replace(config, has_head=False)
    return architecture.build(config, _tensors(config, architecture), CONTEXT)


def save_small_model(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the files of `small_model`, for ranks that each read a part."""
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(dict(settings)))
    save_file(_tensors(*_config(settings)), folder / "model.safetensors")


def _config(settings: Mapping[str, Any]) -> tuple[ModelConfig, Architecture]:
    (name,) = settings["architectures"]
    architecture = find_architecture(name, "here")
    return from_json(settings, name, architecture.traits, "here"), architecture


def _tensors(config: ModelConfig, architecture: Architecture) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        name: torch.ones(size)
        if name.endswith("norm.weight")
        else torch.randn(size, generator=random) * size[-1] ** -0.5
        for name, size in architecture.tensor_shapes(config)
    }
