"""Makes one vector of a sequence's hidden states: pooling, then the layers behind it, then its length.

All of it is float32 (sums are float64) in numpy, a sequence at a time: little beside the forward pass,
and a vector's bits then depend on its own sequence only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from octavo.common.v1 import common_pb2
from octavo.gpu_worker.errors import PlanError
from octavo.gpu_worker.ops import Float32Array, Int32Array
from octavo.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from octavo.gpu_worker.steps.batch import Step

PoolingMode = Literal["cls", "mean", "mean_sqrt_len", "last"]


def _sigmoid(x: Float32Array) -> Float32Array:
    return (1 / (1 + np.exp(-np.clip(x, -80, 80)))).astype(np.float32)


def _gelu(x: Float32Array) -> Float32Array:
    return x * 0.5 * (1 + np.array([math.erf(value / math.sqrt(2)) for value in x.tolist()], np.float32))


def _softmax(x: Float32Array) -> Float32Array:
    exact = np.exp(x.astype(np.float64) - x.max())
    result: Float32Array = (exact / exact.sum()).astype(np.float32)
    return result


def _identity(x: Float32Array) -> Float32Array:
    return x


ACTIVATIONS: Mapping[str, Callable[[Float32Array], Float32Array]] = {
    "identity": _identity,
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": _gelu,
    "sigmoid": _sigmoid,
    "softmax": _softmax,
}
"""What a layer behind the pooling may end with."""


@dataclass(frozen=True)
class Dense:
    """y = activation(weight @ x + bias): weight [out_features, in_features], bias [out_features] or None; float32."""

    weight: Float32Array
    bias: Float32Array | None
    activation: str

    def __call__(self, x: Float32Array) -> Float32Array:
        """Return the layer of one vector."""
        y = self.weight @ x
        return ACTIVATIONS[self.activation](y if self.bias is None else y + self.bias).astype(np.float32)

    def identity(self) -> bytes:
        """Return what differs between two layers."""
        return self.activation.encode() + self.weight.tobytes() + (b"" if self.bias is None else self.bias.tobytes())


@dataclass(frozen=True)
class VectorNorm:
    """(x - mean) / sqrt(variance + eps) * weight + bias: weight [features], bias the same or None; float32."""

    weight: Float32Array
    bias: Float32Array | None
    eps: float

    def __call__(self, x: Float32Array) -> Float32Array:
        """Return the norm of one vector."""
        centred = x.astype(np.float64) - x.mean(dtype=np.float64)
        y = centred / math.sqrt((centred * centred).mean() + self.eps) * self.weight
        result: Float32Array = (y if self.bias is None else y + self.bias).astype(np.float32)
        return result

    def identity(self) -> bytes:
        """Return what differs between two layers."""
        return f"norm {self.eps}".encode() + self.weight.tobytes() + (b"" if self.bias is None else self.bias.tobytes())


Layer = Dense | VectorNorm


@dataclass(frozen=True)
class PoolingSettings:
    """What is wanted of one sequence. Fields as in PoolingUpdate, where they are explained; None is unset."""

    dimensions: int
    normalize: bool | None
    second_segment_start: int


@dataclass(frozen=True)
class Pooling:
    """How a model's vectors are made.

    mode       which hidden states: the first token's, the mean of all (or their sum over the root of their
               number), the last one's
    layers     what follows, in order
    normalize  scale vectors to length 1 where a request does not say
    """

    task: common_pb2.ModelTask
    mode: PoolingMode
    hidden_size: int
    layers: tuple[Layer, ...] = ()
    normalize: bool = True

    @property
    def vector_size(self) -> int:
        """Elements of a vector that is not cut."""
        return len(self.layers[-1].weight) if self.layers else self.hidden_size

    def settings(self, update: worker_pb2.PoolingUpdate) -> PoolingSettings:
        """Return an update's settings. Raises PlanError."""
        if update.dimensions > self.vector_size:
            raise PlanError(f"pooling_updates: {update.dimensions} of {self.vector_size} dimensions")
        normalize = update.normalize if update.HasField("normalize") else None
        return PoolingSettings(update.dimensions, normalize, update.second_segment_start)


@dataclass(frozen=True)
class Vectors:
    """The vectors of a step, in the order of its rows.

    values  float32, one vector after the other
    sizes   elements of each; 0 where it was not finite
    """

    values: Float32Array
    sizes: npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Unfinished:
    """What is to be known of a step's rows when their hidden states have been pooled.

    ends      [S] whether each row ends its sequence
    lengths   tokens of each sequence that ends
    settings  what is wanted of it
    """

    ends: npt.NDArray[np.bool_]
    lengths: list[int]
    settings: list[PoolingSettings]


class Pooler:
    """The vectors of every slot. What a sequence's earlier chunks add to its vector is kept here."""

    def __init__(self, pooling: Pooling) -> None:
        self._pooling = pooling
        self._settings: dict[int, PoolingSettings] = {}
        self._sums: dict[int, npt.NDArray[np.float64]] = {}  # of the mean, or the first token's state

    def open_slot(self, slot: int, settings: PoolingSettings) -> None:
        """Give a slot to a sequence."""
        self._settings[slot] = settings
        self._sums.pop(slot, None)

    def free_slot(self, slot: int) -> None:
        """Forget a slot."""
        self._settings.pop(slot, None)
        self._sums.pop(slot, None)

    def second_segment_starts(self, step: Step) -> Int32Array:
        """Return where each row's second text starts, [S]; beyond any position if it has one text."""
        slots = step.rows.slots.tolist()
        starts = [self._settings[slot].second_segment_start or np.iinfo(np.int32).max for slot in slots]
        return np.array(starts, np.int32)

    def rows(self, step: Step) -> Int32Array:
        """Return the tokens (indexes into the step's) whose hidden states are wanted, ascending."""
        ends = step.rows.query_ends
        if self._pooling.mode == "cls":
            rows: Int32Array = (ends - step.rows.query_lengths)[step.context_lengths == 0].astype(np.int32)
            return rows
        if self._pooling.mode == "last":
            return (ends - 1)[step.rows.samples].astype(np.int32)
        return np.arange(len(step.token_ids), dtype=np.int32)

    def pool(self, hidden: Float32Array, step: Step) -> Vectors:
        """Return the vectors of the rows that end their sequence; `hidden` [R, hidden_size] are those of `rows`."""
        pooled: list[npt.NDArray[np.float64]] = []
        at = 0
        columns = (step.rows.slots, step.rows.query_lengths, step.context_lengths, step.rows.samples)
        for slot, length, context, ends in zip(*(column.tolist() for column in columns), strict=True):
            count = self._num_rows(length, context, ends)
            state = self._add(slot, hidden[at : at + count], context)
            at += count
            if ends:
                pooled.append(state)
                self._sums.pop(slot, None)
        assert at == len(hidden), f"{at} of {len(hidden)} hidden states were used"
        return self.finish(pooled, self.unfinished(step))

    def unfinished(self, step: Step) -> Unfinished:
        """Return what `finish` must know of a step; it may be called when slots have gone to others."""
        lengths = (step.context_lengths + step.rows.query_lengths)[step.rows.samples]
        settings = [self._settings[slot] for slot in step.rows.slots[step.rows.samples].tolist()]
        return Unfinished(step.rows.samples, lengths.tolist(), settings)

    def finish(self, pooled: Iterable[npt.NDArray[np.floating]], rows: Unfinished) -> Vectors:
        """Return the vectors of the sequences that end.

        pooled  [hidden_size] of each: the state of its first or last token, or the sum of all, as the mode says
        """
        vectors = [
            self._finish(state.astype(np.float64), length, settings)
            for state, length, settings in zip(pooled, rows.lengths, rows.settings, strict=True)
        ]
        sizes = np.array([len(vector) for vector in vectors], np.uint32)
        return Vectors(np.concatenate(vectors) if vectors else np.empty(0, np.float32), sizes)

    def _num_rows(self, length: int, context: int, ends: bool) -> int:
        if self._pooling.mode == "cls":
            return int(context == 0)
        return int(ends) if self._pooling.mode == "last" else length

    def _add(self, slot: int, rows: Float32Array, context: int) -> npt.NDArray[np.float64]:
        """Add a row's hidden states to what its slot has: token after token, however the sequence is chunked."""
        states = rows.astype(np.float64)
        if context and slot in self._sums:
            states = np.vstack([self._sums[slot], states])
        total: npt.NDArray[np.float64] = states.sum(axis=0)
        self._sums[slot] = total
        return total

    def _finish(self, pooled: npt.NDArray[np.float64], length: int, settings: PoolingSettings) -> Float32Array:
        """Return the vector of a sequence, empty if it is not finite."""
        if self._pooling.mode == "mean":
            pooled = pooled / length
        elif self._pooling.mode == "mean_sqrt_len":
            pooled = pooled / math.sqrt(length)
        vector = pooled.astype(np.float32)
        for layer in self._pooling.layers:
            vector = layer(vector)
        if settings.dimensions:
            vector = vector[: settings.dimensions]
        if self._pooling.normalize if settings.normalize is None else settings.normalize:
            exact = vector.astype(np.float64)
            vector = (exact / max(math.sqrt(exact @ exact), 1e-12)).astype(np.float32)
        return vector if np.isfinite(vector).all() else vector[:0]
