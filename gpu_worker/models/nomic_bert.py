"""NomicBert: BERT with rotary positions, gated layers and no biases (arXiv 2402.01613)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from octavo.gpu_worker.errors import ModelError, shown
from octavo.gpu_worker.models.classifier import Classifier, ClassifierLayer
from octavo.gpu_worker.models.config import ACTIVATIONS, MAX_LAYERS, MAX_POSITIONS, Json, RopeConfig, Values
from octavo.gpu_worker.models.rope import make_rotary
from octavo.gpu_worker.ops import Activation, EncoderOps, Heads, LayerNorm, Linear, Value

if TYPE_CHECKING:  # what a model needs of memory is known without torch
    import torch

# What the published files call settings, and transformers' name for each.
_NAMES = {
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "rotary_emb_base": "rope_theta",
    "rotary_emb_fraction": "partial_rotary_factor",
    "activation_function": "hidden_act",
}
# Settings of which only these values are computed; None is one that is left out.
_ONLY: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish", "swiglu"),
    "num_experts": (None, 0, 1),
    "moe_every_n_layers": (None, 0),
    "prenorm": (None, False),
    "parallel_block": (None, False),
    "use_rms_norm": (None, False),
    "causal": (None, False),
    "qkv_proj_bias": (None, False),
    "mlp_fc1_bias": (None, False),
    "mlp_fc2_bias": (None, False),
    "rotary_emb_interleaved": (None, False),
    "rotary_emb_scale_base": (None, 0),
    "rotary_scaling_factor": (None, 1, 0),
    "rope_type": (None, "default"),
}


@dataclass(frozen=True)
class NomicBertConfig:
    """What the forward pass must know of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    heads: Heads
    num_segments: int
    max_position_embeddings: int
    layer_norm_eps: float
    activation: Activation
    rope: RopeConfig
    num_labels: int

    @property
    def classifier(self) -> Classifier:
        """The head that NomicBertForSequenceClassification has."""
        pooler = ClassifierLayer("nomic_bert.pooler.dense", self.hidden_size, activation="tanh")
        return Classifier("cls", (pooler, ClassifierLayer("classifier", self.num_labels)))

    @classmethod
    def from_json(cls, values: Json, num_labels: int, where: str) -> NomicBertConfig:
        """Read a parsed config.json, in either spelling; `where` names the file in messages. Raises ModelError."""
        rope = values.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise ModelError(f"{where}: rope_parameters is {shown(rope)}, expected an object")
        merged: dict[str, Any] = {new: values[old] for old, new in _NAMES.items() if old in values}
        merged = {"hidden_act": "silu", **values, **merged, **rope}
        for name, known in _ONLY.items():
            if merged.get(name) not in known:
                raise ModelError(f"{where}: {name} is {shown(merged[name])}, which is not supported for NomicBert")
        read = Values(merged, where)
        hidden, num_heads = read.integer("hidden_size"), read.integer("num_attention_heads")
        if num_heads < 1 or hidden % num_heads or hidden // num_heads % 2:
            raise ModelError(f"{where}: {num_heads} attention heads do not share {hidden} dimensions evenly")
        head_dim = hidden // num_heads
        rotary_dim = int(head_dim * read.number("partial_rotary_factor", 1.0))
        config = cls(
            vocab_size=read.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.integer("intermediate_size"),
            num_layers=read.integer("num_hidden_layers"),
            heads=Heads(num_heads, num_heads, head_dim),
            num_segments=read.integer("type_vocab_size", 2),
            max_position_embeddings=read.integer("max_position_embeddings"),
            layer_norm_eps=read.number("layer_norm_eps", 1e-12),
            activation=ACTIVATIONS["silu"],
            rope=RopeConfig("default", read.number("rope_theta", 1000.0), rotary_dim),
            num_labels=num_labels,
        )
        sizes = (config.vocab_size, config.intermediate_size, config.num_layers, config.num_segments)
        if min(*sizes, config.max_position_embeddings) < 1:
            raise ModelError(f"{where}: a size is below 1; the checkpoint is damaged")
        if config.num_layers > MAX_LAYERS or config.max_position_embeddings > MAX_POSITIONS:
            raise ModelError(f"{where}: at most {MAX_LAYERS} layers and {MAX_POSITIONS} positions are supported")
        if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
            raise ModelError(f"{where}: {rotary_dim} rotary dimensions do not fit heads of {head_dim}")
        return config

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name, without its beginning, and the shape of every tensor that is read."""
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "embeddings.word_embeddings.weight": (self.vocab_size, hidden),
            "embeddings.token_type_embeddings.weight": (self.num_segments, hidden),
        }
        norms = ["emb_ln"]
        for layer in range(self.num_layers):
            prefix = f"encoder.layers.{layer}."
            shapes[f"{prefix}attn.Wqkv.weight"] = (3 * hidden, hidden)
            shapes[f"{prefix}attn.out_proj.weight"] = (hidden, hidden)
            shapes[f"{prefix}mlp.fc11.weight"] = shapes[f"{prefix}mlp.fc12.weight"] = (inner, hidden)
            shapes[f"{prefix}mlp.fc2.weight"] = (hidden, inner)
            norms += [f"{prefix}norm1", f"{prefix}norm2"]
        for name in norms:
            shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (hidden,)
        return shapes

    def build(self, tensors: dict[str, torch.Tensor], max_positions: int) -> NomicBertModel:
        """Return the model of exactly the tensors of `tensor_shapes`, for positions below `max_positions`."""
        return NomicBertModel(self, tensors, max_positions)


@dataclass(frozen=True)
class _Layer:
    """Weights of one layer. `qkv` is queries, keys and values in one matrix."""

    qkv: Linear
    output: Linear
    attention_norm: LayerNorm
    gate: Linear
    up: Linear
    down: Linear
    norm: LayerNorm


class NomicBertModel:
    """An encoder over `EncoderOps`. `tensors` has exactly the names of `config.tensor_shapes()`."""

    num_layers = 0  # that have a cache

    def __init__(self, config: NomicBertConfig, tensors: dict[str, torch.Tensor], max_positions: int) -> None:
        self.config = config
        self.heads = config.heads
        self.vocab_size = config.vocab_size
        self.output_size = config.hidden_size
        self._scale = config.heads.head_dim**-0.5
        words = tensors["embeddings.word_embeddings.weight"]
        self.dtype = words.dtype
        # Its tokenizer tells no texts of a pair apart: each token is of the first.
        self._words = words.float() + tensors["embeddings.token_type_embeddings.weight"][0].float()
        self._norm = _norm(config, tensors, "emb_ln")
        self._rotary = make_rotary(config.rope, max_positions)
        self._layers = [_layer(config, tensors, f"encoder.layers.{index}.") for index in range(config.num_layers)]

    def forward(self, ops: EncoderOps) -> Value:
        """Run one step through `ops`; return the hidden states [R, hidden_size]."""
        x = ops.layer_norm(ops.embed(self._words), self._norm)
        for layer in self._layers:
            qkv = ops.rotate(ops.linear(x, layer.qkv), self.heads, self._rotary)
            attended = ops.self_attention(qkv, self.heads, self._scale)
            x = ops.layer_norm(ops.linear_residual(attended, layer.output, x), layer.attention_norm)
            gated = ops.gated_linear(x, layer.gate, layer.up, self.config.activation)
            x = ops.layer_norm(ops.linear_residual(gated, layer.down, x), layer.norm)
        return ops.hidden(x)


def _layer(config: NomicBertConfig, tensors: dict[str, torch.Tensor], prefix: str) -> _Layer:
    def linear(name: str) -> Linear:
        return Linear(tensors[f"{prefix}{name}.weight"])

    return _Layer(
        qkv=linear("attn.Wqkv"),
        output=linear("attn.out_proj"),
        attention_norm=_norm(config, tensors, f"{prefix}norm1"),
        gate=linear("mlp.fc12"),
        up=linear("mlp.fc11"),
        down=linear("mlp.fc2"),
        norm=_norm(config, tensors, f"{prefix}norm2"),
    )


def _norm(config: NomicBertConfig, tensors: dict[str, torch.Tensor], name: str) -> LayerNorm:
    return LayerNorm(tensors[f"{name}.weight"], tensors[f"{name}.bias"], config.layer_norm_eps)
