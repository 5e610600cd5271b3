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
    "rms_norm_eps": 1e-2,  # so large that a norm with another one shows
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
    "glm4_moe": (  # the best experts of the best groups, of which the bias decides some
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        {
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "n_shared_experts": 2,
            "routed_scaling_factor": 2.5,
            "use_qk_norm": True,
            "attention_bias": True,
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeForCausalLM",
        {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 48, "use_bias": False},
    ),
}
# Sizes of which none is another's.
_LATENT_SIZES = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 80,
    "moe_intermediate_size": 40,
}
LATENT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "deepseek_v2": (  # as the small one: queries of the hidden state, the best experts of all
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {
            **_LATENT_SIZES,
            "q_lora_rank": None,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
        },
    ),
    "deepseek_v2_groups": (
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {
            **_LATENT_SIZES,
            "q_lora_rank": 64,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_shared_experts": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 4.0,
            "attention_bias": True,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **_LATENT_SIZES,
            "q_lora_rank": 64,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "mscale": 0.7,
                "mscale_all_dim": 1.5,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "deepseek_v3_halves": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {**_LATENT_SIZES, "q_lora_rank": 64, "first_k_dense_replace": 3, "rope_interleave": False},
    ),
    "glm4_moe_lite": (
        "Glm4MoeLiteConfig",
        "Glm4MoeLiteForCausalLM",
        {**_LATENT_SIZES, "q_lora_rank": 64, "n_routed_experts": 6, "num_experts_per_tok": 2},
    ),
}
_MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.22,
    "logits_scaling": 4.0,
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
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {"head_dim": 32}),
    "gemma2": (  # caps so low that they show
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 40,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (  # every second layer has a window
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 40,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            },
        },
    ),
    **EXPERTS,
    **LATENT,
    "minimax_m2": (
        "MiniMaxM2Config",
        "MiniMaxM2ForCausalLM",
        {"head_dim": 32, "num_local_experts": 6, "num_experts_per_tok": 2, "partial_rotary_factor": 0.5},
    ),
    "solar_open": (
        "SolarOpenConfig",
        "SolarOpenForCausalLM",
        {"head_dim": 32, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
    "dots1": (
        "Dots1Config",
        "Dots1ForCausalLM",
        {
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 48,
            "first_k_dense_replace": 1,
            "sliding_window": 40,
            "max_window_layers": 1,
        },
    ),
    "exaone_moe": (
        "ExaoneMoeConfig",
        "ExaoneMoeForCausalLM",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "sliding_window": 40,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mellum": (
        "MellumConfig",
        "MellumForCausalLM",
        {
            "head_dim": 32,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "sliding_window": 40,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "mlp_layer_types": ["sparse", "dense", "sparse"],
        },
    ),
    "vaultgemma": (
        "VaultGemmaConfig",
        "VaultGemmaForCausalLM",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 40,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "helium": ("HeliumConfig", "HeliumForCausalLM", {"head_dim": 16}),
    "cwm": (
        "CwmConfig",
        "CwmForCausalLM",
        {"head_dim": 32, "sliding_window": 40, "rope_parameters": LLAMA3_ROPE},
    ),
    "phi3": (  # the long factors, as the context is longer than the original one
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 64,
            "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.25, 1.5, 1.75, 2.0, 2.25],
                "long_factor": [1.0, 2.0, 4.0, 6.0, 8.0, 12.0],
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "phi3_window": ("Phi3Config", "Phi3ForCausalLM", {"sliding_window": 40, "pad_token_id": 0}),
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {**_MULTIPLIERS, "attention_bias": True},
    ),
    "granite_moe": (
        "GraniteMoeConfig",
        "GraniteMoeForCausalLM",
        {**_MULTIPLIERS, "num_local_experts": 5, "num_experts_per_tok": 2},
    ),
    "granite_moe_shared": (  # a shared expert of one and a half times the size
        "GraniteMoeSharedConfig",
        "GraniteMoeSharedForCausalLM",
        {**_MULTIPLIERS, "num_local_experts": 5, "num_experts_per_tok": 2, "shared_intermediate_size": 144},
    ),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"no_rope_layer_interval": 2, "pad_token_id": 0}),
    "seed_oss": ("SeedOssConfig", "SeedOssForCausalLM", {"head_dim": 32}),
    "ernie4_5": ("Ernie4_5Config", "Ernie4_5ForCausalLM", {"head_dim": 32, "use_bias": True}),
    "ministral": (
        "MinistralConfig",
        "MinistralForCausalLM",
        {
            "head_dim": 32,
            "sliding_window": 40,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "glm": ("GlmConfig", "GlmForCausalLM", {"head_dim": 32, "pad_token_id": 0}),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", {"head_dim": 32, "pad_token_id": 0, "tie_word_embeddings": False}),
    "exaone4": (
        "Exaone4Config",
        "Exaone4ForCausalLM",
        {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {"tie_word_embeddings": False}),
    "olmo3": (
        "Olmo3Config",
        "Olmo3ForCausalLM",
        {
            "sliding_window": 40,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                },
            },
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": 16,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "truncate": False,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "olmoe": (
        "OlmoeConfig",
        "OlmoeForCausalLM",
        {"num_experts": 5, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    ),
}

_GPT = {"vocab_size": 320, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}
_LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 20}
# Architectures that have no description, and are computed by the modules of transformers: learned positions, partial
# rotary, a window, one key head, other norms and activations, rotated pairs, latent keys, experts. All but the
# settings is as in ARCHITECTURES.
FALLBACKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "word_embed_proj_dim": 64}
        | {"vocab_size": 320, "max_position_embeddings": 512},
    ),
    "phi": ("PhiConfig", "PhiForCausalLM", COMMON | {"tie_word_embeddings": False}),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", COMMON | {"sliding_window": 40}),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", COMMON | {"tie_word_embeddings": False}),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", _GPT | {"rotary_dim": 8}),
    "gpt_bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", _GPT),
    "persimmon": ("PersimmonConfig", "PersimmonForCausalLM", COMMON | {"tie_word_embeddings": False}),
    "minicpm3": ("MiniCPM3Config", "MiniCPM3ForCausalLM", COMMON | {"num_key_value_heads": 4} | _LATENT),
    "phimoe": (
        "PhimoeConfig",
        "PhimoeForCausalLM",
        COMMON | {"num_local_experts": 4, "tie_word_embeddings": False, "sliding_window": None},
    ),
}


def make_fallback(folder: Path, name: str, dtype: str = "float32", shards: int = 1, **settings: Any) -> Any:
    """Save a random model of FALLBACKS to `folder`; return transformers' model, in eval mode."""
    import transformers

    config_class, model_class, special = FALLBACKS[name]
    values = {**special, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": None, **settings}
    config = getattr(transformers, config_class)(**values, attn_implementation="eager")
    model = getattr(transformers, model_class)(config)
    _save(model, folder, shards, dtype)
    return model


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes to a checkpoint's folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = ["<|end|>", "<|start|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))


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
    _save(model, folder, shards, dtype)
    if legacy:
        spell_as_before_2026(folder / "config.json")
    return model


def make_wrapper(folder: Path, name: str) -> Any:
    """Save a random model for text and images, whose text part is one of ARCHITECTURES; return transformers' model."""
    import transformers

    config_class, _, special = ARCHITECTURES[name]
    text = getattr(transformers, config_class)(**{**COMMON, **special})
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes: dict[str, Any] = {"image_size": 28, "patch_size": 14}
    if name == "gemma3":
        config: Any = transformers.Gemma3Config(
            text_config=text,
            vision_config=transformers.SiglipVisionConfig(**vision, **sizes),
            mm_tokens_per_image=4,
            attn_implementation="eager",
        )
        model: Any = transformers.Gemma3ForConditionalGeneration(config)
    else:
        config = transformers.Mistral3Config(
            text_config=text,
            vision_config=transformers.PixtralVisionConfig(**vision, **sizes),
            tie_word_embeddings=text.tie_word_embeddings,
            attn_implementation="eager",
        )
        model = transformers.Mistral3ForConditionalGeneration(config)
    _save(model, folder, 1, "float32")
    return model


def _save(model: Any, folder: Path, shards: int, dtype: str) -> None:
    """Fill a model with random weights, and save it."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        biases = [item for item in model.named_buffers() if item[0].endswith("e_score_correction_bias")]
        for parameter_name, parameter in sorted([*model.named_parameters(), *biases]):
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


def spell_as_before_2026(path: Path) -> None:
    """Rewrite a config.json's rotary settings."""
    config = json.loads(path.read_text())
    rotary = config.pop("rope_parameters")
    config["rope_theta"] = rotary.pop("rope_theta")
    config["rope_scaling"] = None if rotary == {"rope_type": "default"} else rotary
    path.write_text(json.dumps(config))
