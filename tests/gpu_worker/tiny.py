"""Tiny random checkpoints, made by transformers, so that it can give the true logits for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
EXPERTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 40, "tie_word_embeddings": False},
    ),
    "qwen3_moe": (  # the second layer is dense
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "head_dim": 32,
            "num_experts": 9,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "qwen2_moe": (  # a shared expert of one and a half times the size; weights that do not sum to one
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 72,
            "decoder_sparse_step": 2,
        },
    ),
}
# Names of the config and model classes of transformers, and what is special.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": LLAMA3_ROPE}),
    "llama_biased": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 24, "tie_word_embeddings": False},
    ),
    "llama_linear": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama_yarn": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "mistral": (
        "MistralConfig",
        "MistralForCausalLM",
        {"head_dim": 32, "sliding_window": 40, "tie_word_embeddings": False},
    ),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32}),
    **EXPERTS,
}


def make_checkpoint(
    folder: Path, name: str, *, shards: int = 1, legacy: bool = False, dtype: str = "float32", **settings: Any
) -> Any:
    """Save a random model of ARCHITECTURES to `folder`; return transformers' model, in eval mode.

    legacy    rotary settings spelled as before 2026: rope_theta and rope_scaling
    settings  in place of those of COMMON
    """
    import transformers

    config_class, model_class, special = ARCHITECTURES[name]
    config = getattr(transformers, config_class)(**{**COMMON, **special, **settings}, attn_implementation="eager")
    model = getattr(transformers, model_class)(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter_name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter_name.endswith("norm.weight"):
                parameter.copy_(1 + 0.1 * noise)
            elif parameter_name.endswith("bias") or "embed" in parameter_name or "lm_head" in parameter_name:
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
            parameter.data = parameter.data.to(getattr(torch, dtype))  # not the buffers: rotation stays float32
    model.eval()
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // shards + 1 if shards > 1 else 2 * size)
    if legacy:
        spell_as_before_2026(folder / "config.json")
    return model


def spell_as_before_2026(path: Path) -> None:
    """Rewrite a config.json's rotary settings."""
    config = json.loads(path.read_text())
    rotary = config.pop("rope_parameters")
    config["rope_theta"] = rotary.pop("rope_theta")
    config["rope_scaling"] = None if rotary == {"rope_type": "default"} else rotary
    path.write_text(json.dumps(config))
