"""The model families that the decoder runs: what the name of an architecture says, and its config.json does not.

A family is a description. Most differ from Llama in defaults, in the names of tensors, and in what is normed.
The defaults are those of transformers' config classes: published files leave them out.
"""

from __future__ import annotations

from dataclasses import replace

from octavo.gpu_worker.models.config import LayerNorms, MixtureNames, MixtureTraits, Traits
from octavo.kernels.routing import Routing

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_FUSED_GATE_UP = {"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}
_NORMS_AFTER = LayerNorms(
    attention="", attention_post="post_attention_layernorm", mlp="", mlp_post="post_feedforward_layernorm"
)

LLAMA = Traits({"max_position_embeddings": 2048}, qkv_bias=None, output_bias=None)
MISTRAL = Traits({"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}, windows="all")
QWEN2 = Traits(
    {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
    qkv_bias=True,
    windows="some",
)
QWEN3 = Traits(
    {"max_position_embeddings": 32768, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    qkv_bias=None,
    output_bias=None,
    qk_norm=True,
    windows="some",
)
_GEMMA_NORMS = LayerNorms(
    attention_post="post_attention_layernorm",
    mlp="pre_feedforward_layernorm",
    mlp_post="post_feedforward_layernorm",
)
_GEMMA_DEFAULTS = {
    "max_position_embeddings": 8192,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
}
GEMMA = Traits(_GEMMA_DEFAULTS, qkv_bias=None, output_bias=None, norm_offset=1.0, scales_embedding=True)
GEMMA2 = Traits(
    {
        **_GEMMA_DEFAULTS,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    qkv_bias=None,
    output_bias=None,
    windows="layers",
    norm_offset=1.0,
    norms=_GEMMA_NORMS,
    scales_embedding=True,
)
VAULT_GEMMA = replace(GEMMA2, norms=LayerNorms(mlp="pre_feedforward_layernorm"))
GEMMA3 = Traits(
    {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
    },
    qkv_bias=None,
    output_bias=None,
    qk_norm=True,
    windows="layers",
    norm_offset=1.0,
    norms=_GEMMA_NORMS,
    scales_embedding=True,
)
PHI3 = Traits(
    {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    windows="all",
    fused={"self_attn.qkv_proj": _QKV, **_FUSED_GATE_UP},
)
GRANITE = Traits(
    {
        "max_position_embeddings": 2048,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    qkv_bias=None,
    output_bias=None,
    has_multipliers=True,
)
SMOLLM3 = Traits(
    {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
    },
    qkv_bias=None,
    output_bias=None,
    windows="some",
    unrotated="listed",
)
HELIUM = Traits(
    {"max_position_embeddings": 4096, "head_dim": 128, "rms_norm_eps": 1e-8},
    qkv_bias=None,
    is_interleaved=True,
)
CWM = Traits(
    {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": 8192,
    },
    windows="layers",
)
SEED_OSS = Traits(
    {
        "max_position_embeddings": 524288,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "attention_out_bias": False,
    },
    qkv_bias=None,
    output_bias=None,
    keys={"output_bias": "attention_out_bias"},
)
ERNIE4_5 = Traits(
    {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    qkv_bias=None,
    output_bias=None,
    keys={"attention_bias": "use_bias", "output_bias": "use_bias", "mlp_bias": "use_bias"},
    is_interleaved=True,
)
MINISTRAL = Traits(
    {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    windows="layers",
)
_GLM_DEFAULTS = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1.5625e-07,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
}
GLM = Traits(_GLM_DEFAULTS, qkv_bias=None, is_interleaved=True, fused=_FUSED_GATE_UP)
GLM4 = Traits(
    _GLM_DEFAULTS,
    qkv_bias=None,
    is_interleaved=True,
    fused=_FUSED_GATE_UP,
    norms=LayerNorms(attention_post="post_self_attn_layernorm", mlp_post="post_mlp_layernorm"),
)
EXAONE4 = Traits(
    {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    qk_norm=True,
    windows="layers",
    unrotated="full_attention",
    norms=_NORMS_AFTER,
)
OLMO2 = Traits(
    {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    qkv_bias=None,
    output_bias=None,
    qk_norm=True,
    norms_all_heads=True,
    norms=_NORMS_AFTER,
)
OLMO3 = Traits(
    {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    qkv_bias=None,
    output_bias=None,
    qk_norm=True,
    norms_all_heads=True,
    windows="layers",
    scales_full_rope=True,
    norms=_NORMS_AFTER,
)

_MIXTRAL_NAMES = MixtureNames("block_sparse_moe", "w1", "w3", "w2")
_MIXTRAL_MIXTURE = MixtureTraits(_MIXTRAL_NAMES)
# Of DeepSeek-V3 and those after it: experts are chosen by their scores and a bias, and shared ones have no gate.
_SIGMOID_MIXTURE = MixtureTraits(
    MixtureNames(shared="shared_experts", bias="gate.e_score_correction_bias"),
    Routing("sigmoid", has_shared_gate=False),
)

MIXTRAL = Traits(
    {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    windows="all",
    mixture=_MIXTRAL_MIXTURE,
)
QWEN2_MOE = Traits(
    {
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "num_local_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    qkv_bias=True,
    windows="some",
    mixture=MixtureTraits(),
)
QWEN3_MOE = Traits(
    {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    qkv_bias=None,
    output_bias=None,
    qk_norm=True,
    windows="switched",
    mixture=MixtureTraits(),
)
OLMOE = Traits(
    {
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    qkv_bias=None,
    output_bias=None,
    qk_norm=True,
    norms_all_heads=True,
    mixture=MixtureTraits(),
)

_SHARED = "block_sparse_moe.shared_expert"
GRANITE_MOE = replace(
    GRANITE,
    defaults={**GRANITE.defaults, "num_local_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
    | {"shared_intermediate_size": 0},
    mixture=MixtureTraits(
        MixtureNames("block_sparse_moe", router="router", is_stacked=True), Routing(has_shared_gate=False)
    ),
    keys={"shared_expert_intermediate_size": "shared_intermediate_size"},
    fused={
        "block_sparse_moe.router.layer": ("block_sparse_moe.router",),
        "shared_mlp.input_linear": (f"{_SHARED}.gate_proj", f"{_SHARED}.up_proj"),
        "shared_mlp.output_linear": (f"{_SHARED}.down_proj",),
    },
)
GPT_OSS = Traits(
    {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "sliding_window": 128,
        "sliding_window_pattern": 2,
        "attention_bias": True,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
    qkv_bias=None,
    output_bias=None,
    windows="layers",
    mixture=MixtureTraits(MixtureNames(router="router", has_biases=True, is_stacked=True)),
    activation="swigluoai",
    has_sinks=True,
)

_SIGMOID_KEYS = {"num_experts": "n_routed_experts"}
GLM4_MOE = Traits(
    {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "attention_bias": False,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "use_qk_norm": False,
    },
    qkv_bias=None,
    qk_norm=None,
    mixture=_SIGMOID_MIXTURE,
    keys=_SIGMOID_KEYS,
)
SOLAR_OPEN = Traits(
    {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "attention_bias": False,
        "intermediate_size": 10240,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1280,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
    },
    qkv_bias=None,
    mixture=_SIGMOID_MIXTURE,
    keys=_SIGMOID_KEYS,
)
DOTS1 = Traits(
    {
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "moe_intermediate_size": 1408,
        "norm_topk_prob": False,
        "sliding_window": 4096,
        "max_window_layers": 62,
        "use_sliding_window": True,
    },
    qkv_bias=None,
    output_bias=None,
    qk_norm=True,
    windows="some",
    mixture=_SIGMOID_MIXTURE,
    keys=_SIGMOID_KEYS,
)
EXAONE_MOE = Traits(
    {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "num_local_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1024,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
    },
    qk_norm=True,
    windows="layers",
    unrotated="full_attention",
    mixture=MixtureTraits(
        MixtureNames(shared="shared_experts", bias="e_score_correction_bias"), Routing("sigmoid", has_shared_gate=False)
    ),
    keys={"n_shared_experts": "num_shared_experts"},
)
MINIMAX_M2 = Traits(
    {
        "max_position_embeddings": 196608,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 5000000.0,
        "num_experts_per_tok": 8,
        "num_local_experts": 256,
        "norm_topk_prob": True,
    },
    qk_norm=True,
    norms_all_heads=True,
    mixture=MixtureTraits(replace(_MIXTRAL_NAMES, bias="e_score_correction_bias"), Routing("sigmoid")),
)
ERNIE4_5_MOE = Traits(
    {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "moe_intermediate_size": 1536,
        "moe_k": 6,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "norm_topk_prob": True,
    },
    qkv_bias=None,
    output_bias=None,
    mixture=MixtureTraits(
        MixtureNames(shared="shared_experts", bias="moe_statics.e_score_correction_bias", is_bias_a_row=True),
        Routing(has_shared_gate=False),
    ),
    keys={
        "attention_bias": "use_bias",
        "output_bias": "use_bias",
        "mlp_bias": "use_bias",
        "num_experts": "moe_num_experts",
        "num_experts_per_tok": "moe_k",
        "n_shared_experts": "moe_num_shared_experts",
        "first_k_dense_replace": "moe_layer_start_index",
        "decoder_sparse_step": "moe_layer_interval",
    },
    is_interleaved=True,
)
MELLUM = Traits(
    {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "sliding_window": 1024,
        "sliding_window_pattern": 1,
        "num_local_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 896,
        "norm_topk_prob": True,
    },
    qkv_bias=None,
    output_bias=None,
    qk_norm=True,
    windows="layers",
    mixture=MixtureTraits(),
)

_LATENT_DEFAULTS = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
}
DEEPSEEK_V2 = Traits(
    {
        **_LATENT_DEFAULTS,
        "max_position_embeddings": 2048,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1407,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "topk_method": "greedy",
    },
    qkv_bias=None,
    output_bias=None,
    mixture=MixtureTraits(MixtureNames(shared="shared_experts"), Routing("softmax", num_best=1, has_shared_gate=False)),
    keys=_SIGMOID_KEYS,
    is_interleaved=True,
    is_latent=True,
)
DEEPSEEK_V3 = Traits(
    {
        **_LATENT_DEFAULTS,
        "max_position_embeddings": 4096,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
    },
    qkv_bias=None,
    output_bias=None,
    mixture=_SIGMOID_MIXTURE,
    keys=_SIGMOID_KEYS,
    is_interleaved=True,
    is_latent=True,
)
GLM4_MOE_LITE = replace(
    DEEPSEEK_V3,
    defaults={
        **DEEPSEEK_V3.defaults,
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1536,
        "n_routed_experts": 64,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.8,
    },
)

ARCHITECTURES: dict[str, Traits] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "GemmaForCausalLM": GEMMA,
    "Gemma2ForCausalLM": GEMMA2,
    "VaultGemmaForCausalLM": VAULT_GEMMA,
    "Gemma3ForCausalLM": GEMMA3,
    "HeliumForCausalLM": HELIUM,
    "CwmForCausalLM": CWM,
    "Phi3ForCausalLM": PHI3,
    "GraniteForCausalLM": GRANITE,
    "SmolLM3ForCausalLM": SMOLLM3,
    "SeedOssForCausalLM": SEED_OSS,
    "Ernie4_5ForCausalLM": ERNIE4_5,
    "MinistralForCausalLM": MINISTRAL,
    "GlmForCausalLM": GLM,
    "Glm4ForCausalLM": GLM4,
    "Exaone4ForCausalLM": EXAONE4,
    "Olmo2ForCausalLM": OLMO2,
    "Olmo3ForCausalLM": OLMO3,
    "MixtralForCausalLM": MIXTRAL,
    "Qwen2MoeForCausalLM": QWEN2_MOE,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "OlmoeForCausalLM": OLMOE,
    "GraniteMoeForCausalLM": GRANITE_MOE,
    "GraniteMoeSharedForCausalLM": GRANITE_MOE,
    "GptOssForCausalLM": GPT_OSS,
    "Glm4MoeForCausalLM": GLM4_MOE,
    "SolarOpenForCausalLM": SOLAR_OPEN,
    "Dots1ForCausalLM": DOTS1,
    "ExaoneMoeForCausalLM": EXAONE_MOE,
    "MiniMaxM2ForCausalLM": MINIMAX_M2,
    "Ernie4_5_MoeForCausalLM": ERNIE4_5_MOE,
    "MellumForCausalLM": MELLUM,
    "DeepseekV2ForCausalLM": DEEPSEEK_V2,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
    "Glm4MoeLiteForCausalLM": GLM4_MOE_LITE,
}

# The family of a checkpoint for text and other things, by the `model_type` of its part for text. The positions of
# tokens of text are the same on each axis of an image's: then the rotation is that of the family.
TEXT_PARTS = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_vl": "Qwen2ForCausalLM",
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen2_5_vl": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "glm": "GlmForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
}
