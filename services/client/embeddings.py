"""Vectors, rankings and labels, as the client returns them."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import embedding_pb2
from octavo.services.client.request import make_message

INPUTS_AT_ONCE = 256
"""Most inputs of one call of Embed; longer lists become several calls."""


class EmbedOptions(TypedDict, total=False):
    """Keyword arguments of Client.embed, named after the fields of EmbedRequest. A field left out means its default."""

    model: str
    dimensions: int
    prompt_name: str
    normalize: bool
    truncate: bool
    priority: int


@dataclass(frozen=True, repr=False)
class Embeddings:
    """A vector for each input, in their order: arrays of float32, which numpy takes as they are."""

    vectors: Sequence[array[float]]
    usage: common_pb2.Usage
    model_version: str

    def __repr__(self) -> str:
        size = len(self.vectors[0]) if self.vectors else 0
        return f"Embeddings({len(self.vectors)} vectors of {size}, prompt_tokens={self.usage.prompt_tokens})"


@dataclass(frozen=True)
class Ranked:
    """A document's place in what was given, from 0, and its score."""

    index: int
    score: float


@dataclass(frozen=True)
class Labelled:
    """The most probable label of a text, and the probability of each label."""

    label: str
    probabilities: dict[str, float]


def labelled(response: embedding_pb2.ClassifyResponse) -> list[Labelled]:
    """Return an answer's labels, one for each input."""
    return [
        Labelled(each.label, dict(zip(response.labels, each.probabilities, strict=True))) for each in response.results
    ]


def embed_requests(
    model: str, inputs: Sequence[str | Sequence[int]], options: EmbedOptions
) -> list[embedding_pb2.EmbedRequest]:
    """Return the calls that embed `inputs`."""
    fields = {name: value for name, value in options.items() if name != "model"}
    if unknown := [name for name in fields if name not in embedding_pb2.EmbedRequest.DESCRIPTOR.fields_by_name]:
        raise TypeError(f"unknown option {unknown[0]!r}")
    settings = make_message(embedding_pb2.EmbedRequest, {"model": model, **fields})
    pieces = [inputs[start : start + INPUTS_AT_ONCE] for start in range(0, len(inputs), INPUTS_AT_ONCE)]
    requests = [embedding_pb2.EmbedRequest(inputs=[_input(each) for each in piece]) for piece in pieces]
    for request in requests:
        request.MergeFrom(settings)
    return requests


def gather(responses: Iterable[embedding_pb2.EmbedResponse]) -> Embeddings:
    """Return what several calls brought as one."""
    vectors: list[array[float]] = []
    usage = common_pb2.Usage()
    version = ""
    for response in responses:
        vectors += [_vector(embedding.values) for embedding in response.embeddings]
        usage.prompt_tokens += response.usage.prompt_tokens
        version = response.model_version
    return Embeddings(vectors, usage, version)


def _input(value: str | Sequence[int]) -> embedding_pb2.EmbedInput:
    if isinstance(value, str):
        return embedding_pb2.EmbedInput(text=value)
    return embedding_pb2.EmbedInput(token_ids=common_pb2.TokenIds(ids=value))


def _vector(values: bytes) -> array[float]:
    vector = array("f")
    vector.frombytes(values)
    if sys.byteorder == "big":
        vector.byteswap()
    return vector
