"""BERT, RoBERTa and XLM-RoBERTa: encoders with a norm after each residual, and learned positions (arXiv 1810.04805)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.models.classifier import Classifier, ClassifierLayer, read_activation
from octavo.gpu_worker.models.config import MAX_LAYERS, MAX_POSITIONS, Json, Values
from octavo.gpu_worker.ops import Activation, EncoderOps, Heads, LayerNorm, Linear, Value

if TYPE_CHECKING:  # what a model needs of memory is known without torch
    import torch


@dataclass(frozen=True)
class BertConfig:
    """What the forward pass must know of config.json. The first `position_offset` learned positions are never used."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    heads: Heads
    num_segments: int
    position_table_size: int
    position_offset: int
    layer_norm_eps: float
    activation: Activation
    num_labels: int

    @property
    def max_position_embeddings(self) -> int:
        """Longest sequence."""
        return self.position_table_size - self.position_offset

    @property
    def classifier(self) -> Classifier:
        """The head that BertForSequenceClassification and the like have."""
        is_bert = self.architecture.startswith("Bert")
        inner, outer = ("bert.pooler.dense", "classifier") if is_bert else ("classifier.dense", "classifier.out_proj")
        return Classifier(
            "cls",
            (ClassifierLayer(inner, self.hidden_size, activation="tanh"), ClassifierLayer(outer, self.num_labels)),
        )

    @classmethod
    def from_json(cls, values: Json, architecture: str, num_labels: int, where: str) -> BertConfig:
        """Read a parsed config.json; `where` names the file in messages. Raises ModelError."""
        read = Values(values, where)
        if values.get("position_embedding_type", "absolute") not in ("absolute", None):
            raise ModelError(f"{where}: position_embedding_type {values['position_embedding_type']!r} is not supported")
        hidden, num_heads = read.integer("hidden_size"), read.integer("num_attention_heads")
        if num_heads < 1 or hidden % num_heads:
            raise ModelError(f"{where}: {num_heads} attention heads do not share {hidden} dimensions evenly")
        config = cls(
            architecture=architecture,
            vocab_size=read.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.integer("intermediate_size"),
            num_layers=read.integer("num_hidden_layers"),
            heads=Heads(num_heads, num_heads, hidden // num_heads),
            num_segments=read.integer("type_vocab_size", 2),
            position_table_size=read.integer("max_position_embeddings"),
            # RoBERTa's positions begin after that of its padding.
            position_offset=0 if architecture.startswith("Bert") else read.integer("pad_token_id", 1) + 1,
            layer_norm_eps=read.number("layer_norm_eps", 1e-12),
            activation=read_activation(values, "hidden_act", where),
            num_labels=num_labels,
        )
        sizes = (config.vocab_size, hidden, config.intermediate_size, config.num_layers, config.num_segments)
        if min(*sizes, config.max_position_embeddings) < 1:
            raise ModelError(f"{where}: a size is below 1; the checkpoint is damaged")
        if config.num_layers > MAX_LAYERS or config.position_table_size > MAX_POSITIONS:
            raise ModelError(f"{where}: at most {MAX_LAYERS} layers and {MAX_POSITIONS} positions are supported")
        return config

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name, without its beginning, and the shape of every tensor that is read."""
        return _tensor_shapes(self)

    def build(self, tensors: dict[str, torch.Tensor], max_positions: int) -> BertModel:
        """Return the model of exactly the tensors of `tensor_shapes`, for positions below `max_positions`."""
        return BertModel(self, tensors, max_positions)


@dataclass(frozen=True)
class _Layer:
    """Weights of one layer. `qkv` is queries, keys and values in one matrix."""

    qkv: Linear
    output: Linear
    attention_norm: LayerNorm
    up: Linear
    down: Linear
    norm: LayerNorm


class BertModel:
    """An encoder over `EncoderOps`. `tensors` has exactly the names of `config.tensor_shapes()`."""

    num_layers = 0  # that have a cache

    def __init__(self, config: BertConfig, tensors: dict[str, torch.Tensor], max_positions: int) -> None:
        del max_positions  # there is a vector for each
        self.config = config
        self.heads = config.heads
        self.vocab_size = config.vocab_size
        self.output_size = config.hidden_size
        self._scale = config.heads.head_dim**-0.5
        self._words = tensors["embeddings.word_embeddings.weight"]
        self._positions = tensors["embeddings.position_embeddings.weight"][config.position_offset :].contiguous()
        self._segments = tensors["embeddings.token_type_embeddings.weight"]
        self._norm = _norm(config, tensors, "embeddings.LayerNorm")
        self._layers = [_layer(config, tensors, f"encoder.layer.{index}.") for index in range(config.num_layers)]
        self.dtype = self._words.dtype

    def forward(self, ops: EncoderOps) -> Value:
        """Run one step through `ops`; return the hidden states [R, hidden_size]."""
        x = ops.layer_norm(ops.embed_sum(self._words, self._positions, self._segments), self._norm)
        for layer in self._layers:
            attended = ops.self_attention(ops.linear(x, layer.qkv), self.heads, self._scale)
            x = ops.layer_norm(ops.linear_residual(attended, layer.output, x), layer.attention_norm)
            inner = ops.linear(x, layer.up, self.config.activation)
            x = ops.layer_norm(ops.linear_residual(inner, layer.down, x), layer.norm)
        return ops.hidden(x)


def _tensor_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config.vocab_size, hidden),
        "embeddings.position_embeddings.weight": (config.position_table_size, hidden),
        "embeddings.token_type_embeddings.weight": (config.num_segments, hidden),
        "embeddings.LayerNorm.weight": (hidden,),
        "embeddings.LayerNorm.bias": (hidden,),
    }
    linears = {
        "attention.self.query": (hidden, hidden),
        "attention.self.key": (hidden, hidden),
        "attention.self.value": (hidden, hidden),
        "attention.output.dense": (hidden, hidden),
        "intermediate.dense": (inner, hidden),
        "output.dense": (hidden, inner),
    }
    for layer in range(config.num_layers):
        prefix = f"encoder.layer.{layer}."
        for name, shape in linears.items():
            shapes[f"{prefix}{name}.weight"] = shape
            shapes[f"{prefix}{name}.bias"] = shape[:1]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{prefix}{name}.weight"] = shapes[f"{prefix}{name}.bias"] = (hidden,)
    return shapes


def _layer(config: BertConfig, tensors: dict[str, torch.Tensor], prefix: str) -> _Layer:
    import torch

    def linear(name: str) -> Linear:
        return Linear(tensors[f"{prefix}{name}.weight"], tensors[f"{prefix}{name}.bias"])

    parts = [linear(f"attention.self.{name}") for name in ("query", "key", "value")]
    biases = [part.bias for part in parts if part.bias is not None]
    return _Layer(
        qkv=Linear(torch.cat([part.weight for part in parts]), torch.cat(biases)),
        output=linear("attention.output.dense"),
        attention_norm=_norm(config, tensors, f"{prefix}attention.output.LayerNorm"),
        up=linear("intermediate.dense"),
        down=linear("output.dense"),
        norm=_norm(config, tensors, f"{prefix}output.LayerNorm"),
    )


def _norm(config: BertConfig, tensors: dict[str, torch.Tensor], name: str) -> LayerNorm:
    return LayerNorm(tensors[f"{name}.weight"], tensors[f"{name}.bias"], config.layer_norm_eps)
