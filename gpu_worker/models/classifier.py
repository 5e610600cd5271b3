"""What models with a head for labels have behind their hidden states, as their config.json says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from octavo.gpu_worker.errors import ModelError, shown
from octavo.gpu_worker.models.config import Json
from octavo.gpu_worker.ops import Activation

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

MAX_LABELS = 65536


@dataclass(frozen=True)
class ClassifierNorm:
    """A LayerNorm behind a layer."""

    name: str
    has_bias: bool
    eps: float


@dataclass(frozen=True)
class ClassifierLayer:
    """A linear layer by the name of its tensors. `activation` is one of the pooler's."""

    name: str
    out_features: int
    has_bias: bool = True
    activation: str = "identity"
    norm: ClassifierNorm | None = None


@dataclass(frozen=True)
class Classifier:
    """How a score is made of hidden states: pooled, then layer after layer, the last of which has an output a label."""

    pooling: Literal["cls", "mean"]
    layers: tuple[ClassifierLayer, ...]

    def tensor_shapes(self, hidden_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and shape of each tensor."""
        in_features = hidden_size
        for layer in self.layers:
            yield f"{layer.name}.weight", (layer.out_features, in_features)
            if layer.has_bias:
                yield f"{layer.name}.bias", (layer.out_features,)
            if layer.norm is not None:
                yield f"{layer.norm.name}.weight", (layer.out_features,)
                if layer.norm.has_bias:
                    yield f"{layer.norm.name}.bias", (layer.out_features,)
            in_features = layer.out_features


def num_labels_of(values: Json, where: str) -> int:
    """Return how many labels a classifier tells apart; one is a score. Raises ModelError."""
    named = values.get("id2label")
    count = values.get("num_labels") or (len(named) if isinstance(named, dict) and named else 2)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_LABELS:
        raise ModelError(f"{where}: the classifier has {shown(count)} labels, expected 1 to {MAX_LABELS}")
    return count


def read_activation(values: Json, key: str, where: str) -> Activation:
    """Return the activation of an encoder's layers. Raises ModelError."""
    activation = _ACTIVATIONS.get(str(values.get(key, "gelu")))
    if activation is None:
        raise ModelError(f"{where}: {key} {values[key]!r} is not one of {sorted(_ACTIVATIONS)}")
    return activation
