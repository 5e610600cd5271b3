"""ModernBERT: an encoder with rotary positions, norms before each part, and local attention in most layers.

See arXiv 2412.13663.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.models.classifier import Classifier, ClassifierLayer, ClassifierNorm, read_activation
from octavo.gpu_worker.models.config import MAX_LAYERS, MAX_POSITIONS, Json, RopeConfig, Values
from octavo.gpu_worker.models.rope import make_rotary
from octavo.gpu_worker.ops import Activation, EncoderOps, Heads, LayerNorm, Linear, Rotary, Value

if TYPE_CHECKING:  # what a model needs of memory is known without torch
    import torch

_FULL, _LOCAL = "full_attention", "sliding_attention"
_DEFAULT_THETA = {_FULL: 160000.0, _LOCAL: 10000.0}
_THETA_KEYS = {_FULL: "global_rope_theta", _LOCAL: "local_rope_theta"}


@dataclass(frozen=True)
class ModernBertConfig:
    """What the forward pass must know of config.json.

    reaches  for each layer how far away a token sees, 0 for any distance
    thetas   for each layer the base of its rotary frequencies
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: Heads
    max_position_embeddings: int
    reaches: tuple[int, ...]
    thetas: tuple[float, ...]
    norm_eps: float
    norm_bias: bool
    attention_bias: bool
    mlp_bias: bool
    activation: Activation
    classifier: Classifier

    @classmethod
    def from_json(cls, values: Json, num_labels: int, where: str) -> ModernBertConfig:
        """Read a parsed config.json; `where` names the file in messages. Raises ModelError."""
        read = Values(values, where)
        num_layers = read.integer("num_hidden_layers")
        hidden, num_heads = read.integer("hidden_size"), read.integer("num_attention_heads")
        if num_heads < 1 or hidden % num_heads or hidden // num_heads % 2:
            raise ModelError(f"{where}: {num_heads} attention heads do not share {hidden} dimensions evenly")
        if not 1 <= num_layers <= MAX_LAYERS:
            raise ModelError(f"{where}: {num_layers} layers; 1 to {MAX_LAYERS} are supported")
        kinds = _layer_kinds(values, read, num_layers, where)
        thetas = {kind: _theta(values, kind, where) for kind in set(kinds)}
        reach = read.integer("local_attention", 128) // 2
        config = cls(
            vocab_size=read.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.integer("intermediate_size"),
            heads=Heads(num_heads, num_heads, hidden // num_heads),
            max_position_embeddings=read.integer("max_position_embeddings", 8192),
            reaches=tuple(reach if kind == _LOCAL else 0 for kind in kinds),
            thetas=tuple(thetas[kind] for kind in kinds),
            norm_eps=read.number("norm_eps", 1e-5),
            norm_bias=read.flag("norm_bias"),
            attention_bias=read.flag("attention_bias"),
            mlp_bias=read.flag("mlp_bias"),
            activation=read_activation(values, "hidden_activation", where),
            classifier=_classifier(values, read, hidden, num_labels, where),
        )
        sizes = (config.vocab_size, hidden, config.intermediate_size, config.max_position_embeddings)
        if min(sizes) < 1 or (reach < 1 and any(kind == _LOCAL for kind in kinds)):
            raise ModelError(f"{where}: a size is below 1; the checkpoint is damaged")
        if config.max_position_embeddings > MAX_POSITIONS:
            raise ModelError(f"{where}: at most {MAX_POSITIONS} positions are supported")
        return config

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name, without its beginning, and the shape of every tensor that is read."""
        return _tensor_shapes(self)

    def build(self, tensors: dict[str, torch.Tensor], max_positions: int) -> ModernBertModel:
        """Return the model of exactly the tensors of `tensor_shapes`, for positions below `max_positions`."""
        return ModernBertModel(self, tensors, max_positions)


@dataclass(frozen=True)
class _Layer:
    """Weights of one layer. `qkv` is queries, keys and values in one matrix; the first layer has no norm before it."""

    attention_norm: LayerNorm | None
    qkv: Linear
    output: Linear
    norm: LayerNorm
    gate: Linear
    up: Linear
    down: Linear
    rotary: Rotary
    reach: int


class ModernBertModel:
    """An encoder over `EncoderOps`. `tensors` has exactly the names of `config.tensor_shapes()`."""

    num_layers = 0  # that have a cache

    def __init__(self, config: ModernBertConfig, tensors: dict[str, torch.Tensor], max_positions: int) -> None:
        self.config = config
        self.heads = config.heads
        self.vocab_size = config.vocab_size
        self.output_size = config.hidden_size
        self._scale = config.heads.head_dim**-0.5
        self._words = tensors["embeddings.tok_embeddings.weight"]
        self._norm = _norm(config, tensors, "embeddings.norm")
        rotary = {
            theta: make_rotary(RopeConfig("default", theta, config.heads.head_dim), max_positions)
            for theta in set(config.thetas)
        }
        self._layers = [_layer(config, tensors, index, rotary[theta]) for index, theta in enumerate(config.thetas)]
        self._final_norm = _norm(config, tensors, "final_norm")
        self.dtype = self._words.dtype

    def forward(self, ops: EncoderOps) -> Value:
        """Run one step through `ops`; return the hidden states [R, hidden_size]."""
        x = ops.layer_norm(ops.embed(self._words), self._norm)
        for layer in self._layers:
            h = x if layer.attention_norm is None else ops.layer_norm(x, layer.attention_norm)
            qkv = ops.rotate(ops.linear(h, layer.qkv), self.heads, layer.rotary)
            attended = ops.self_attention(qkv, self.heads, self._scale, layer.reach)
            x = ops.linear_residual(attended, layer.output, x)
            gated = ops.gated_linear(ops.layer_norm(x, layer.norm), layer.gate, layer.up, self.config.activation)
            x = ops.linear_residual(gated, layer.down, x)
        return ops.hidden(ops.layer_norm(x, self._final_norm))


def _tensor_shapes(config: ModernBertConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"embeddings.tok_embeddings.weight": (config.vocab_size, hidden)}
    norms = ["embeddings.norm", "final_norm"]
    for layer in range(len(config.reaches)):
        prefix = f"layers.{layer}."
        linears = {
            "attn.Wqkv": (3 * hidden, hidden, config.attention_bias),
            "attn.Wo": (hidden, hidden, config.attention_bias),
            "mlp.Wi": (2 * inner, hidden, config.mlp_bias),
            "mlp.Wo": (hidden, inner, config.mlp_bias),
        }
        for name, (rows, columns, has_bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        norms += [f"{prefix}mlp_norm"] if layer == 0 else [f"{prefix}attn_norm", f"{prefix}mlp_norm"]
    for name in norms:
        shapes[f"{name}.weight"] = (hidden,)
        if config.norm_bias:
            shapes[f"{name}.bias"] = (hidden,)
    return shapes


def _layer_kinds(values: Json, read: Values, num_layers: int, where: str) -> list[str]:
    """Return which attention each layer has; older files say how many layers lie between two with all of it."""
    kinds = values.get("layer_types")
    if kinds is None:
        every = read.integer("global_attn_every_n_layers", 3)
        if every < 1:
            raise ModelError(f"{where}: global_attn_every_n_layers is {every}, expected at least 1")
        return [_LOCAL if layer % every else _FULL for layer in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= {_FULL, _LOCAL}:
        raise ModelError(f"{where}: layer_types must name {_FULL} or {_LOCAL} for each layer")
    return kinds


def _theta(values: Json, kind: str, where: str) -> float:
    """Return the base of the rotary frequencies of layers of a kind."""
    settings = (values.get("rope_parameters") or {}).get(kind) or {}
    if values.get("rope_scaling") or not isinstance(settings, Mapping):
        raise ModelError(f"{where}: scaled rotary positions are not supported for encoders")
    if settings.get("rope_type", "default") != "default":
        raise ModelError(f"{where}: rope_type {settings['rope_type']!r} is not supported for encoders")
    theta = Values(settings, where).optional_number("rope_theta")
    if theta is None:
        theta = Values(values, where).optional_number(_THETA_KEYS[kind])
    return _DEFAULT_THETA[kind] if theta is None else theta


def _classifier(values: Json, read: Values, hidden: int, num_labels: int, where: str) -> Classifier:
    pooling = values.get("classifier_pooling", "cls")
    if pooling not in ("cls", "mean"):
        raise ModelError(f"{where}: classifier_pooling {pooling!r} is not supported; cls and mean are")
    activation = str(values.get("classifier_activation", "gelu"))
    norm = ClassifierNorm("head.norm", read.flag("norm_bias"), read.number("norm_eps", 1e-5))
    head = ClassifierLayer("head.dense", hidden, read.flag("classifier_bias"), activation, norm)
    return Classifier(pooling, (head, ClassifierLayer("classifier", num_labels)))


def _layer(config: ModernBertConfig, tensors: dict[str, torch.Tensor], index: int, rotary: Rotary) -> _Layer:
    prefix = f"layers.{index}."

    def linear(name: str, rows: slice = slice(None)) -> Linear:
        bias = tensors.get(f"{prefix}{name}.bias")
        return Linear(tensors[f"{prefix}{name}.weight"][rows], None if bias is None else bias[rows])

    inner = config.intermediate_size
    return _Layer(
        attention_norm=_norm(config, tensors, f"{prefix}attn_norm") if index else None,
        qkv=linear("attn.Wqkv"),
        output=linear("attn.Wo"),
        norm=_norm(config, tensors, f"{prefix}mlp_norm"),
        gate=linear("mlp.Wi", slice(inner)),
        up=linear("mlp.Wi", slice(inner, None)),
        down=linear("mlp.Wo"),
        rotary=rotary,
        reach=config.reaches[index],
    )


def _norm(config: ModernBertConfig, tensors: dict[str, torch.Tensor], name: str) -> LayerNorm:
    return LayerNorm(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), config.norm_eps)
