"""Random LoRA adapters as PEFT writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Shapes = Mapping[str, tuple[int, int]]


def module_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return (out_features, in_features) of a decoder's linear layers, by what its config.json says."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = (config[name] * head_dim for name in ("num_attention_heads", "num_key_value_heads"))
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layers = range(config["num_hidden_layers"])
    return {f"model.layers.{layer}.{name}": shape for layer in layers for name, shape in shapes.items()}


def random_tensors(shapes: Shapes, rank: int, seed: int, strength: float = 1.0) -> dict[str, np.ndarray[Any, Any]]:
    """Return A and B of each module, under the names that PEFT gives them."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for module, (rows, columns) in shapes.items():
        for which, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            values = rng.standard_normal(shape).astype(np.float32) * (strength * shape[1] ** -0.5)
            tensors[f"base_model.model.{module}.lora_{which}.weight"] = values
    return tensors


def write_adapter(folder: Path, tensors: Mapping[str, np.ndarray[Any, Any]], rank: int, **config: object) -> Path:
    """Write a folder; `config` are further keys of adapter_config.json, or other values of the usual ones."""
    folder.mkdir(parents=True, exist_ok=True)
    usual = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**usual, **config}))
    head: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, values in tensors.items():
        kind = {"float32": "F32", "float16": "F16", "uint16": "BF16"}[values.dtype.name]
        head[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": [at, at + values.nbytes]}
        at += values.nbytes
    text = json.dumps(head).encode()
    data = len(text).to_bytes(8, "little") + text + b"".join(values.tobytes() for values in tensors.values())
    (folder / "adapter_model.safetensors").write_bytes(data)
    return folder
