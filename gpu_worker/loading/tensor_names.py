"""Where a checkpoint has the tensors of a model: under other names, joined with others, or beside those of images."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from octavo.gpu_worker.errors import ModelError, shown
from octavo.gpu_worker.loading.sharding import Pairs, Part
from octavo.gpu_worker.models.config import Json, ModelConfig
from octavo.gpu_worker.models.families import ARCHITECTURES, TEXT_PARTS

T = TypeVar("T")

log = logging.getLogger("octavo.worker")

_WRAPPER = "ForConditionalGeneration"
# What the names of the text part begin with, in place of "model.", and its head: as written by several versions.
_TEXT_PREFIXES = ("language_model.model.", "model.language_model.", "model.")
_TEXT_HEAD = "language_model.lm_head.weight"
_HEAD = "lm_head.weight"
# Settings of the whole checkpoint that hold for the text part, if it does not say otherwise.
_INHERITED = ("tie_word_embeddings", "quantization_config")


@dataclass(frozen=True)
class Place:
    """Where a tensor is: rows from `first_row` on of the checkpoint's tensor `name` of shape `shape`."""

    name: str
    shape: tuple[int, ...]
    first_row: int = 0

    def of(self, part: Part, pairs: Pairs | None) -> Part:
        """Return a part of the tensor as one of the checkpoint's; `pairs` as in `Part`."""
        rows, *others = part.index
        rows = slice(self.first_row + rows.start, self.first_row + rows.stop)
        return replace(part, source=self.name, index=(rows, *others), pairs=pairs)


def pairs_of(name: str, config: ModelConfig) -> Pairs | None:
    """Return which rows of a tensor lie in pairs that are rotated."""
    module, latent, count = name.split(".")[-2:-1], config.latent, config.rope.rotary_dim
    if not config.is_interleaved:
        return None
    if latent is None:
        return Pairs(config.heads.head_dim, 0, count) if module in (["q_proj"], ["k_proj"]) else None
    if module == ["kv_a_proj_with_mqa"]:
        return Pairs(latent.rank + latent.rope_dim, latent.rank, count)
    return Pairs(latent.query_dim, latent.nope_dim, count) if module in (["q_proj"], ["q_b_proj"]) else None


def place_of(name: str, wanted: Mapping[str, tuple[int, ...]], fused: Mapping[str, tuple[str, ...]]) -> Place:
    """Return where the tensor `name` of `wanted` is in a checkpoint that has the matrices of `fused` joined by rows."""
    for joined, parts in fused.items():
        for index, part in enumerate(parts):
            if f".{part}." in name:
                rows = [wanted.get(name.replace(part, other), (0,))[0] for other in parts]
                shape = (sum(rows), *wanted[name][1:])
                return Place(name.replace(part, joined), shape, sum(rows[:index]))
    return Place(name, wanted[name])


def is_packed_alone(name: str, num_dimensions: int) -> bool:
    """Tell whether a model does nothing with a tensor but join its rows with others' and hand it to a device."""
    is_taken_apart = "shared_expert" in name or name.endswith(
        (".gate.weight", ".router.weight", ".kv_b_proj.weight", "_bias")
    )
    return num_dimensions == 2 and not is_taken_apart


def is_wrapper(architecture: str) -> bool:
    """Return whether an architecture is one for text and other things."""
    return architecture.endswith(_WRAPPER) and architecture not in ARCHITECTURES


def text_part(values: Json, architecture: str, where: str) -> tuple[str, dict[str, Any]]:
    """Return the architecture and the settings of the text part of a parsed config.json. Raises ModelError."""
    text = values.get("text_config", values)
    if not isinstance(text, Mapping):
        raise ModelError(f"{where}: text_config is {shown(text)}, expected an object")
    kind = text.get("model_type")
    if not isinstance(kind, str) or kind not in TEXT_PARTS:
        raise ModelError(
            f"{where}: the text part of {architecture} has the model_type {shown(kind)}, which is not supported; "
            f"supported are {', '.join(TEXT_PARTS)}"
        )
    inherited = {key: values[key] for key in _INHERITED if key in values}
    return TEXT_PARTS[kind], {**inherited, **text}


class TextNames:
    """What a checkpoint for text and other things calls the tensors of its text part."""

    def __init__(self, stored: Container[str]) -> None:
        prefixes = (prefix for prefix in _TEXT_PREFIXES if f"{prefix}embed_tokens.weight" in stored)
        self._prefix = next(prefixes, _TEXT_PREFIXES[0])
        self._head = _TEXT_HEAD if _TEXT_HEAD in stored else _HEAD

    def stored(self, name: str) -> str:
        """Return the checkpoint's name for a tensor of the model."""
        return self._head if name == _HEAD else self._prefix + name.removeprefix("model.")

    def of_text(self, stored: Mapping[str, T], architecture: str) -> dict[str, T]:
        """Return those of the text part; log what is left unread."""
        text = {name: value for name, value in stored.items() if name.startswith(self._prefix) or name == self._head}
        others = stored.keys() - text.keys()
        kinds = sorted({name.removeprefix("model.").split(".")[0] for name in others})
        if others:
            log.info(
                "of %s only text is served: %d tensors are not read (%s)", architecture, len(others), ", ".join(kinds)
            )
        return text
