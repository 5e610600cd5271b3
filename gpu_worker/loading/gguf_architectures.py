"""What GGUF files of each architecture are: how they name tensors and settings, and what they leave unsaid.

Names are those of llama.cpp (`gguf.constants`). A row says which architecture of `models/registry.py` it is; what is
in none of its fields is as in `LAYER_NAMES` and `KEYS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple


class Key(NamedTuple):
    """A setting: its name in a GGUF file without the architecture in front, and what it is if the file lacks it.

    A number is multiplied by `scale`.
    """

    name: str
    kind: Literal["integer", "number"]
    default: float | None = None
    scale: float = 1.0


# By the name in a config.json. Head sizes and rotary settings are read apart: they depend on each other.
KEYS: dict[str, Key] = {
    "hidden_size": Key("embedding_length", "integer"),
    "intermediate_size": Key("feed_forward_length", "integer"),
    "max_position_embeddings": Key("context_length", "integer"),
    "rms_norm_eps": Key("attention.layer_norm_rms_epsilon", "number"),
}
_EXPERT_KEYS = {
    "num_experts": Key("expert_count", "integer"),
    "num_experts_per_tok": Key("expert_used_count", "integer"),
}
_SIZED_EXPERT_KEYS = {**_EXPERT_KEYS, "moe_intermediate_size": Key("expert_feed_forward_length", "integer")}
_MULTIPLIER_KEYS = {
    "embedding_multiplier": Key("embedding_scale", "number", 1.0),
    "attention_multiplier": Key("attention.scale", "number"),
    "residual_multiplier": Key("residual_scale", "number", 1.0),
    "logits_scaling": Key("logit_scale", "number", 1.0),
}
_GROUP_KEYS = {
    "n_shared_experts": Key("expert_shared_count", "integer", 0),
    "n_group": Key("expert_group_count", "integer", 1),
    "topk_group": Key("expert_group_used_count", "integer", 1),
    "routed_scaling_factor": Key("expert_weights_scale", "number", 1.0),
}
_GATING_KEY = {"scoring_func": Key("expert_gating_func", "integer")}  # that a row is chosen by
# A tenth of both factors of YaRN, of which the converter takes that they are the same.
_YARN_FACTOR = Key("rope.scaling.yarn_log_multiplier", "number", 0.0, 10.0)
_LATENT_KEYS = {
    **_SIZED_EXPERT_KEYS,
    **_GROUP_KEYS,
    "q_lora_rank": Key("attention.q_lora_rank", "integer", 0),
    "kv_lora_rank": Key("attention.kv_lora_rank", "integer"),
    "qk_rope_head_dim": Key("rope.dimension_count", "integer"),
    "mscale": _YARN_FACTOR,
    "mscale_all_dim": _YARN_FACTOR,
}

# Settings that change what is computed, with the values that change nothing. A row may read one as a key of its own.
NEUTRAL: dict[str, tuple[float | bool, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_gating_func": (0, 1),  # 1 is the softmax
    "expert_group_count": (0, 1),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}

# What ends the name of a row that is read in place of another where experts are scored so; a row may lack it.
GATINGS = {2: "by sigmoids"}

TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# One tensor may hold several: the parts' rows one after the other, or with {} in the name all experts in a stack. A
# name with what it ends with is of that tensor alone, and those of the parts are then whole.
LAYER_NAMES: dict[str, tuple[str, ...]] = {
    "attn_norm": ("input_layernorm",),
    "attn_q": ("self_attn.q_proj",),
    "attn_k": ("self_attn.k_proj",),
    "attn_v": ("self_attn.v_proj",),
    "attn_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_output": ("self_attn.o_proj",),
    "attn_q_norm": ("self_attn.q_norm",),
    "attn_k_norm": ("self_attn.k_norm",),
    "ffn_norm": ("post_attention_layernorm",),
    "ffn_gate": ("mlp.gate_proj",),
    "ffn_up": ("mlp.up_proj",),
    "ffn_down": ("mlp.down_proj",),
    "ffn_gate_inp": ("mlp.gate",),
    "ffn_gate_exps": ("mlp.experts.{}.gate_proj",),
    "ffn_up_exps": ("mlp.experts.{}.up_proj",),
    "ffn_down_exps": ("mlp.experts.{}.down_proj",),
    "ffn_gate_inp_shexp": ("mlp.shared_expert_gate",),
    "ffn_gate_shexp": ("mlp.shared_expert.gate_proj",),
    "ffn_up_shexp": ("mlp.shared_expert.up_proj",),
    "ffn_down_shexp": ("mlp.shared_expert.down_proj",),
    "exp_probs_b.bias": ("mlp.gate.e_score_correction_bias",),
    "attn_sinks.weight": ("self_attn.sinks",),
    "attn_q_a": ("self_attn.q_a_proj",),
    "attn_q_a_norm": ("self_attn.q_a_layernorm",),
    "attn_q_b": ("self_attn.q_b_proj",),
    "attn_kv_a_mqa": ("self_attn.kv_a_proj_with_mqa",),
    "attn_kv_a_norm": ("self_attn.kv_a_layernorm",),
    "attn_kv_b": ("self_attn.kv_b_proj",),
    "attn_k_b": ("self_attn.k_b_proj",),
    "attn_v_b": ("self_attn.v_b_proj",),
}
_SHARED_NAMES = {
    "ffn_gate_shexp": ("mlp.shared_experts.gate_proj",),
    "ffn_up_shexp": ("mlp.shared_experts.up_proj",),
    "ffn_down_shexp": ("mlp.shared_experts.down_proj",),
}
_MIXTRAL_NAMES = {
    "ffn_gate_inp": ("block_sparse_moe.gate",),
    "ffn_gate_exps": ("block_sparse_moe.experts.{}.w1",),
    "ffn_up_exps": ("block_sparse_moe.experts.{}.w3",),
    "ffn_down_exps": ("block_sparse_moe.experts.{}.w2",),
}
_POST_NORM_NAMES = {
    "post_attention_norm": ("post_attention_layernorm",),
    "ffn_norm": ("pre_feedforward_layernorm",),
    "post_ffw_norm": ("post_feedforward_layernorm",),
}


@dataclass(frozen=True)
class GgufArchitecture:
    """One architecture.

    architecture     what a config.json calls it
    names            of tensors, in place of those of LAYER_NAMES
    keys             of settings, besides KEYS
    values           settings that no file has, in the names of a config.json
    rotates_pairs    rotary dimensions are next to each other (llama.cpp's type NORM), not half a head apart
    norm_offset      what the converter added to the weights of norms
    window_pattern   with a sliding window: each layer of so many but the last has it; 0: each layer
    window_theta     the rotary base of layers with a window, None: that of all
    scales_by_width  numbers of layers for which queries are scaled by hidden_size / heads, not by their dimensions
    """

    architecture: str
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    keys: Mapping[str, Key] = field(default_factory=dict)
    values: Mapping[str, object] = field(default_factory=dict)
    rotates_pairs: bool = False
    norm_offset: float = 0.0
    window_pattern: int = 0
    window_theta: float | None = None
    scales_by_width: frozenset[int] | None = None

    @property
    def has_experts(self) -> bool:
        """Whether files of it have experts."""
        return "num_experts" in self.keys


# By general.architecture; "X with experts" is read in place of X where expert_count is above 0, and see GATINGS.
GGUF_ARCHITECTURES: dict[str, GgufArchitecture] = {
    "llama": GgufArchitecture("LlamaForCausalLM", rotates_pairs=True),
    "llama with experts": GgufArchitecture(
        "MixtralForCausalLM",
        names=_MIXTRAL_NAMES,
        keys=_EXPERT_KEYS,
        values={"norm_topk_prob": True},
        rotates_pairs=True,
    ),
    "mistral3": GgufArchitecture("MistralForCausalLM", rotates_pairs=True),
    "qwen2": GgufArchitecture("Qwen2ForCausalLM"),
    "qwen2moe": GgufArchitecture(
        "Qwen2MoeForCausalLM",
        keys={
            **_SIZED_EXPERT_KEYS,
            "shared_expert_intermediate_size": Key("expert_shared_feed_forward_length", "integer"),
        },
        values={"norm_topk_prob": False},
    ),
    "qwen3": GgufArchitecture("Qwen3ForCausalLM"),
    "qwen3moe": GgufArchitecture("Qwen3MoeForCausalLM", keys=_SIZED_EXPERT_KEYS, values={"norm_topk_prob": True}),
    "gemma": GgufArchitecture("GemmaForCausalLM", norm_offset=1.0),
    "gemma2": GgufArchitecture(
        "Gemma2ForCausalLM",
        names=_POST_NORM_NAMES,
        keys={
            "attn_logit_softcapping": Key("attn_logit_softcapping", "number", 50.0),
            "final_logit_softcapping": Key("final_logit_softcapping", "number", 30.0),
        },
        norm_offset=1.0,
        window_pattern=2,
        scales_by_width=frozenset({46}),  # the 27B model
    ),
    "gemma3": GgufArchitecture(
        "Gemma3ForCausalLM",
        names=_POST_NORM_NAMES,
        norm_offset=1.0,
        window_pattern=6,
        window_theta=10000.0,
        scales_by_width=frozenset({62}),  # the 27B model
    ),
    "granite": GgufArchitecture(
        "GraniteForCausalLM",
        keys=_MULTIPLIER_KEYS,
        rotates_pairs=True,
    ),
    "granitemoe": GgufArchitecture(
        "GraniteMoeSharedForCausalLM",
        names={
            "ffn_gate_inp": ("block_sparse_moe.router",),
            "ffn_gate_exps": ("block_sparse_moe.experts.{}.gate_proj",),
            "ffn_up_exps": ("block_sparse_moe.experts.{}.up_proj",),
            "ffn_down_exps": ("block_sparse_moe.experts.{}.down_proj",),
            "ffn_gate_shexp": ("block_sparse_moe.shared_expert.gate_proj",),
            "ffn_up_shexp": ("block_sparse_moe.shared_expert.up_proj",),
            "ffn_down_shexp": ("block_sparse_moe.shared_expert.down_proj",),
        },
        keys={
            **_MULTIPLIER_KEYS,
            **_EXPERT_KEYS,
            "shared_expert_intermediate_size": Key("expert_shared_feed_forward_length", "integer", 0),
        },
        values={"norm_topk_prob": True},
        rotates_pairs=True,
    ),
    "gpt-oss": GgufArchitecture(
        "GptOssForCausalLM",
        names={
            "post_attention_norm": ("post_attention_layernorm",),
            "ffn_gate_inp": ("mlp.router",),
            "ffn_gate_exps.bias": ("mlp.experts.gate_proj_bias",),
            "ffn_up_exps.bias": ("mlp.experts.up_proj_bias",),
            "ffn_down_exps.bias": ("mlp.experts.down_proj_bias",),
        },
        keys=_SIZED_EXPERT_KEYS,
        values={"norm_topk_prob": True, "truncate": False},
        window_pattern=2,
    ),
    "glm4": GgufArchitecture(
        "Glm4ForCausalLM",
        names={
            "post_attention_norm": ("post_self_attn_layernorm",),
            "ffn_up": ("mlp.gate_proj", "mlp.up_proj"),
            "post_ffw_norm": ("post_mlp_layernorm",),
        },
        rotates_pairs=True,
    ),
    "ernie4_5-moe": GgufArchitecture(
        "Ernie4_5_MoeForCausalLM",
        names={**_SHARED_NAMES, "exp_probs_b.bias": ("mlp.moe_statics.e_score_correction_bias",)},
        keys={**_SIZED_EXPERT_KEYS, "n_shared_experts": Key("expert_shared_count", "integer", 0)},
        values={"norm_topk_prob": True},
        rotates_pairs=True,
    ),
    "minimax-m2": GgufArchitecture(
        "MiniMaxM2ForCausalLM",
        names={**_MIXTRAL_NAMES, "exp_probs_b.bias": ("block_sparse_moe.e_score_correction_bias",)},
        keys={**_SIZED_EXPERT_KEYS, **_GATING_KEY},
        values={"norm_topk_prob": True},
    ),
    "dots1": GgufArchitecture(
        "Dots1ForCausalLM",
        names=_SHARED_NAMES,
        keys={**_SIZED_EXPERT_KEYS, **_GROUP_KEYS, **_GATING_KEY},
        values={"norm_topk_prob": False},
    ),
    "deepseek2": GgufArchitecture(
        "DeepseekV2ForCausalLM",
        names=_SHARED_NAMES,
        keys=_LATENT_KEYS,
        values={"norm_topk_prob": False, "topk_method": "group_limited_greedy"},
        rotates_pairs=True,
    ),
    "deepseek2 by sigmoids": GgufArchitecture(
        "DeepseekV3ForCausalLM",
        names=_SHARED_NAMES,
        keys={**_LATENT_KEYS, **_GATING_KEY},
        values={"norm_topk_prob": False},
        rotates_pairs=True,
    ),
    "olmo2": GgufArchitecture(
        "Olmo2ForCausalLM",
        names={
            "post_attention_norm": ("post_attention_layernorm",),
            "post_ffw_norm": ("post_feedforward_layernorm",),
        },
    ),
    "olmoe": GgufArchitecture("OlmoeForCausalLM", keys=_EXPERT_KEYS, values={"norm_topk_prob": False}),
    "smollm3": GgufArchitecture("SmolLM3ForCausalLM", rotates_pairs=True),
    "ernie4_5": GgufArchitecture("Ernie4_5ForCausalLM", rotates_pairs=True),
    # Phi 3 and 4 compute what Llama does; those for long contexts have factors that are refused (rope_factors_long).
    "phi3": GgufArchitecture("LlamaForCausalLM", names={"ffn_up": ("mlp.gate_proj", "mlp.up_proj")}),
    "internlm2": GgufArchitecture("LlamaForCausalLM", rotates_pairs=True),
    "exaone": GgufArchitecture("LlamaForCausalLM"),
    "seed_oss": GgufArchitecture("LlamaForCausalLM", names={"post_attention_norm": ("post_attention_layernorm",)}),
}
