"""The Llama family: Llama, Mistral, Qwen2 and Qwen3, and models that share their shape (SmolLM2).

`experts.py` has what those of them differ in whose feed-forward layers are a mixture of experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.gpu_worker.models import experts
from octavo.gpu_worker.models.config import ModelConfig, Traits
from octavo.gpu_worker.models.rope import make_rotary
from octavo.gpu_worker.ops import Activation, Linear, Norm, Ops, Value

# The defaults are those of transformers' config classes: published files leave them out.
ARCHITECTURES: dict[str, Traits] = {
    "LlamaForCausalLM": Traits({"max_position_embeddings": 2048}, qkv_bias=None, output_bias=None),
    "MistralForCausalLM": Traits(
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}, windows="all"
    ),
    "Qwen2ForCausalLM": Traits(
        {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
        qkv_bias=True,
        windows="some",
    ),
    "Qwen3ForCausalLM": Traits(
        {"max_position_embeddings": 32768, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
        qkv_bias=None,
        output_bias=None,
        qk_norm=True,
        windows="some",
    ),
}


@dataclass(frozen=True)
class _FeedForward:
    """A dense feed-forward layer."""

    gate: Linear
    up: Linear
    down: Linear

    def forward(self, ops: Ops, residual: Value, norm: Norm, activation: Activation) -> Value:
        """Return residual + down(activation(gate(h)) * up(h)), h = norm(residual)."""
        gated = ops.norm_gated_linear(residual, norm, self.gate, self.up, activation)
        return ops.linear_residual(gated, self.down, residual)


@dataclass(frozen=True)
class _Layer:
    """Weights of one decoder layer. `qkv` is queries, keys and values in one matrix."""

    input_norm: Norm
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    output: Linear
    mlp_norm: Norm
    mlp: _FeedForward | experts.ExpertsFeedForward
    window: int


class LlamaModel:
    """A decoder over `Ops`. Takes its tensors out of `tensors`, so that joined ones are not held twice.

    `tensors` has exactly the names of `tensor_shapes(config)`. Positions stay below `max_positions`.
    With config.has_head it gives logits, else hidden states.
    """

    def __init__(self, config: ModelConfig, tensors: dict[str, torch.Tensor], max_positions: int) -> None:
        self.config = config
        self.num_layers = config.num_layers
        self.heads = config.heads
        self.vocab_size = config.vocab_size
        self._scale = config.heads.head_dim**-0.5
        self._rotary = make_rotary(config.rope, max_positions)
        self._embedding = tensors.pop("model.embed_tokens.weight")
        self.dtype = self._embedding.dtype
        self._layers = [_take_layer(config, tensors, layer) for layer in range(config.num_layers)]
        self._norm = Norm(tensors.pop("model.norm.weight"), config.rms_norm_eps)
        self._head: Linear | None = None
        if config.has_head:
            self._head = Linear(self._embedding if config.tie_word_embeddings else tensors.pop("lm_head.weight"))
        assert not tensors, f"unused tensors: {sorted(tensors)}"

    def forward(self, ops: Ops) -> Value:
        """Run one step through `ops`; return the logits, or the hidden states without a head."""
        residual = ops.embed(self._embedding)
        for index, layer in enumerate(self._layers):
            qkv = ops.norm_linear(residual, layer.input_norm, layer.qkv)
            queries = ops.rotary_write_kv(qkv, index, self.heads, self._rotary, layer.q_norm, layer.k_norm)
            attended = ops.paged_attention(queries, index, self.heads, self._scale, layer.window)
            residual = ops.linear_residual(attended, layer.output, residual)
            residual = layer.mlp.forward(ops, residual, layer.mlp_norm, self.config.activation)
        return ops.logits(residual, self._norm, self._head)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor a checkpoint must hold."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.heads.head_dim
    q_size, kv_size = config.heads.num_heads * dim, config.heads.num_kv_heads * dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if config.has_head and not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    linears = {
        "self_attn.q_proj": (q_size, hidden, config.qkv_bias),
        "self_attn.k_proj": (kv_size, hidden, config.qkv_bias),
        "self_attn.v_proj": (kv_size, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, q_size, config.output_bias),
    }
    dense = {
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        has_experts = experts.in_layer(config, layer)
        if has_experts:
            shapes |= {prefix + name: shape for name, shape in experts.tensor_shapes(config).items()}
        for name, (rows, columns, bias) in (linears if has_experts else {**linears, **dense}).items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        if config.qk_norm:
            shapes[f"{prefix}self_attn.q_norm.weight"] = (dim,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (dim,)
    return shapes


def _take_layer(config: ModelConfig, tensors: dict[str, torch.Tensor], layer: int) -> _Layer:
    """Take one layer's tensors out of `tensors`."""
    prefix = f"model.layers.{layer}."

    def linear(name: str) -> Linear:
        bias = tensors.pop(f"{prefix}{name}.bias", None)
        return Linear(tensors.pop(f"{prefix}{name}.weight"), bias)

    def norm(name: str) -> Norm:
        return Norm(tensors.pop(f"{prefix}{name}.weight"), config.rms_norm_eps)

    parts = [linear(f"self_attn.{name}_proj") for name in "qkv"]
    biases = [part.bias for part in parts if part.bias is not None]
    return _Layer(
        input_norm=norm("input_layernorm"),
        qkv=Linear(torch.cat([part.weight for part in parts]), torch.cat(biases) if biases else None),
        q_norm=norm("self_attn.q_norm") if config.qk_norm else None,
        k_norm=norm("self_attn.k_norm") if config.qk_norm else None,
        output=linear("self_attn.o_proj"),
        mlp_norm=norm("post_attention_layernorm"),
        mlp=(
            experts.take_layer(config, tensors, prefix)
            if experts.in_layer(config, layer)
            else _FeedForward(linear("mlp.gate_proj"), linear("mlp.up_proj"), linear("mlp.down_proj"))
        ),
        window=config.windows[layer],
    )
