"""The decoder that Llama and the families like it are: layers of attention and of a gated feed-forward layer.

`families.py` has what they differ in, `experts.py` the feed-forward layers that are a mixture of experts. What can be
is folded into weights and tables, so that a device knows nothing of it:

- A multiplier m of what layers add: the stream is kept divided by m, of which a norm with an epsilon / m^2 makes the
  same. A divisor of logits goes into the last norm's weight.
- Layers that are not rotated have tables that rotate by nothing, those that read the stream itself a norm that
  changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.models import experts, latent
from octavo.gpu_worker.models.config import ModelConfig
from octavo.gpu_worker.models.rope import make_rotary, make_unrotated
from octavo.gpu_worker.ops import Activation, EncoderOps, LatentOps, Linear, Module, Norm, Ops, Rotary, Value

if TYPE_CHECKING:  # what a model needs of memory is known without torch
    import torch

# RMSNorm with an epsilon beyond any mean of squares: x / sqrt(mean(x^2) + 2^80) * 2^40 is x itself, bit for bit.
_IDENTITY_EPS = 2.0**80
_IDENTITY_WEIGHT = 2.0**40


@dataclass(frozen=True)
class _FeedForward:
    """A dense feed-forward layer."""

    gate: Linear
    up: Linear
    down: Linear

    post_norm: Norm | None

    def forward(self, ops: Ops, residual: Value, norm: Norm, activation: Activation) -> Value:
        """Return residual + down(activation(gate(h)) * up(h)), h = norm(residual); normed before it is added."""
        update = ops.linear(ops.gated_linear(ops.norm(residual, norm), self.gate, self.up, activation), self.down)
        return ops.add(residual, update if self.post_norm is None else ops.norm(update, self.post_norm))


@dataclass(frozen=True)
class _Layer:
    """Weights of one decoder layer. `qkv` is queries, keys and values in one matrix, or what makes latent ones."""

    input_norm: Norm
    qkv: Linear | latent.LatentAttention
    q_norm: Norm | None
    k_norm: Norm | None
    output: Linear
    post_norm: Norm | None
    mlp_norm: Norm
    mlp: _FeedForward | experts.ExpertsFeedForward
    rotary: Rotary
    window: int
    sinks: torch.Tensor | None


class Decoder:
    """A decoder over `Ops`. Takes its tensors out of `tensors`, so that joined ones are not held twice.

    `tensors` has exactly the names of `tensor_shapes(config)`. Positions stay below `max_positions`.
    With config.has_head it gives logits, else hidden states.
    """

    def __init__(self, config: ModelConfig, tensors: dict[str, torch.Tensor], max_positions: int) -> None:
        import torch

        self.config = config
        self.num_layers = config.num_layers
        self.heads = config.heads
        self.vocab_size = config.vocab_size
        self._scale = config.attention_scale or config.heads.head_dim**-0.5
        rope = make_rotary(config.rope, max_positions)
        window_rope = rope if config.window_rope is None else make_rotary(config.window_rope, max_positions)
        rotary = [window_rope if window else rope for window in config.windows]
        if config.unrotated:
            nothing = make_unrotated(max_positions)
            rotary = [nothing if layer in config.unrotated else tables for layer, tables in enumerate(rotary)]
        self._embedding = tensors.pop("model.embed_tokens.weight")
        self.dtype = self._embedding.dtype
        # The stream, which norms make the same of at any scale.
        self._embedding_scale = config.embedding_scale / config.residual_multiplier
        identity = Norm(torch.full((config.hidden_size,), _IDENTITY_WEIGHT * config.residual_multiplier), _IDENTITY_EPS)
        self._layers = [
            _take_layer(config, tensors, layer, rotary[layer], identity) for layer in range(config.num_layers)
        ]
        self._norm = _take_stream_norm(config, tensors, "model.norm")
        if config.has_head and config.logits_divisor != 1:
            self._norm = Norm(self._norm.weight.float() / config.logits_divisor, self._norm.eps)
        self._head: Linear | None = None
        if config.has_head:
            self._head = Linear(self._embedding if config.tie_word_embeddings else tensors.pop("lm_head.weight"))
        assert not tensors, f"unused tensors: {sorted(tensors)}"

    def forward(self, ops: Ops) -> Value:
        """Run one step through `ops`; return the logits, or the hidden states without a head."""
        residual = ops.embed(self._embedding, self._embedding_scale)
        for index, layer in enumerate(self._layers):
            attended = self._attend(ops, ops.norm(residual, layer.input_norm), index, layer)
            update = ops.linear(attended, layer.output)
            residual = ops.add(residual, update if layer.post_norm is None else ops.norm(update, layer.post_norm))
            residual = layer.mlp.forward(ops, residual, layer.mlp_norm, self.config.activation)
        return ops.logits(ops.norm(residual, self._norm), self._head, self.config.logits_soft_cap)

    def _attend(self, ops: Ops, x: Value, index: int, layer: _Layer) -> Value:
        """Attend to what came before, over the cache."""
        if isinstance(layer.qkv, latent.LatentAttention):
            return layer.qkv.attend(cast(LatentOps, ops), x, index, self.heads, layer.rotary, self._scale)
        qkv = ops.linear(x, layer.qkv)
        queries = ops.rotary_write_kv(qkv, index, self.heads, layer.rotary, layer.q_norm, layer.k_norm)
        return ops.paged_attention(
            queries, index, self.heads, self._scale, layer.window, self.config.attention_soft_cap, layer.sinks
        )


class BidirectionalDecoder(Decoder):
    """A decoder whose tokens see each other, before and behind them: an encoder, without a cache and without a head.

    Its `ops` are both `Ops` and `EncoderOps`.
    """

    def __init__(self, config: ModelConfig, tensors: dict[str, torch.Tensor], max_positions: int) -> None:
        super().__init__(config, tensors, max_positions)
        self.num_layers = 0  # that have a cache
        self.output_size = config.hidden_size

    def _attend(self, ops: Ops, x: Value, index: int, layer: _Layer) -> Value:
        assert isinstance(layer.qkv, Linear), index
        both = cast(EncoderOps, ops)
        rotated = both.rotate(ops.linear(x, layer.qkv), self.heads, layer.rotary, layer.q_norm, layer.k_norm)
        return both.self_attention(rotated, self.heads, self._scale, layer.window // 2)


def build(config: ModelConfig, tensors: dict[str, torch.Tensor], max_positions: int) -> Decoder:
    """Return the decoder that a config describes; see `Decoder`. Raises ModelError."""
    if not config.is_bidirectional:
        return Decoder(config, tensors, max_positions)
    if config.has_head:
        raise ModelError(
            f"{config.architecture}: use_bidirectional_attention is of a model for vectors, and this folder has no "
            "modules.json, which says how they are made"
        )
    if min((window for window in config.windows if window), default=2) < 2:
        raise ModelError(f"{config.architecture}: a sliding_window of 1 has no half, with use_bidirectional_attention")
    return BidirectionalDecoder(config, tensors, max_positions)


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every tensor a checkpoint must hold."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.heads.head_dim
    q_size, kv_size = config.heads.num_heads * dim, config.heads.num_kv_heads * dim
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    if config.has_head and not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)
    linears = {
        "self_attn.q_proj": (q_size, hidden, config.qkv_bias),
        "self_attn.k_proj": (kv_size, hidden, config.qkv_bias),
        "self_attn.v_proj": (kv_size, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, q_size, config.output_bias),
    }
    if config.latent is not None:
        linears = latent.linear_shapes(config, config.latent)
    dense = {
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        norms = config.norms
        names = filter(None, (norms.attention, norms.attention_post, norms.mlp, norms.mlp_post))
        yield from ((f"{prefix}{name}.weight", (hidden,)) for name in names)
        has_experts = experts.in_layer(config, layer)
        if has_experts:
            yield from ((prefix + name, shape) for name, shape in experts.tensor_shapes(config).items())
        for name, (rows, columns, bias) in (linears if has_experts else {**linears, **dense}).items():
            yield f"{prefix}{name}.weight", (rows, columns)
            if bias:
                yield f"{prefix}{name}.bias", (rows,)
        if config.latent is not None:
            others = latent.other_shapes(config.latent, config.heads.num_heads)
            yield from ((f"{prefix}{name}.weight", shape) for name, shape in others.items())
        if config.has_sinks:
            yield f"{prefix}self_attn.sinks", (config.heads.num_heads,)
        if config.qk_norm:
            yield f"{prefix}self_attn.q_norm.weight", (q_size if config.norms_all_heads else dim,)
            yield f"{prefix}self_attn.k_norm.weight", (kv_size if config.norms_all_heads else dim,)


def _take_norm(config: ModelConfig, tensors: dict[str, torch.Tensor], name: str) -> Norm:
    """Take a norm out of `tensors`."""
    weight = tensors.pop(f"{name}.weight")
    return Norm(weight.float() + config.norm_offset if config.norm_offset else weight, config.rms_norm_eps)


def _take_stream_norm(config: ModelConfig, tensors: dict[str, torch.Tensor], name: str) -> Norm:
    """Take a norm of the residual stream, which is kept divided by what layers' results are multiplied by."""
    norm = _take_norm(config, tensors, name)
    return Norm(norm.weight, norm.eps / config.residual_multiplier**2)


def _take_layer(
    config: ModelConfig, tensors: dict[str, torch.Tensor], layer: int, rotary: Rotary, identity: Norm
) -> _Layer:
    """Take one layer's tensors out of `tensors`. `identity` stands for a norm that there is not."""
    import torch

    prefix = f"model.layers.{layer}."

    def linear(name: str, is_partial: bool = False) -> Linear:
        bias = tensors.pop(f"{prefix}{name}.bias", None)
        weight = tensors.pop(f"{prefix}{name}.weight")
        is_reordered = config.is_interleaved and name.endswith(("q_proj", "k_proj"))
        return Linear(weight, bias, is_partial, (Module("" if is_reordered else prefix + name, weight.shape[0]),))

    def norm(name: str) -> Norm:
        return _take_norm(config, tensors, prefix + name)

    def stream_norm(name: str) -> Norm:
        return _take_stream_norm(config, tensors, prefix + name) if name else identity

    def post_norm(name: str) -> Norm | None:
        return norm(name) if name else None

    def joined() -> Linear:
        parts = [linear(f"self_attn.{name}_proj") for name in "qkv"]
        biases = [part.bias for part in parts if part.bias is not None]
        return Linear(
            torch.cat([part.weight for part in parts]),
            torch.cat(biases) if biases else None,
            modules=tuple(module for part in parts for module in part.modules),
        )

    norms = config.norms
    return _Layer(
        input_norm=stream_norm(norms.attention),
        qkv=joined() if config.latent is None else latent.take_layer(config, config.latent, tensors, prefix),
        q_norm=norm("self_attn.q_norm") if config.qk_norm else None,
        k_norm=norm("self_attn.k_norm") if config.qk_norm else None,
        output=linear("self_attn.o_proj", is_partial=True),
        post_norm=post_norm(norms.attention_post),
        mlp_norm=stream_norm(norms.mlp),
        mlp=(
            experts.take_layer(config, tensors, prefix)
            if experts.in_layer(config, layer)
            else _FeedForward(
                linear("mlp.gate_proj"),
                linear("mlp.up_proj"),
                linear("mlp.down_proj", is_partial=True),
                post_norm(norms.mlp_post),
            )
        ),
        rotary=rotary,
        window=config.windows[layer],
        sinks=tensors.pop(f"{prefix}self_attn.sinks").float() if config.has_sinks else None,
    )
