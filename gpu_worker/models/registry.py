"""The architectures that this worker can run, by the name in a checkpoint's config.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.models import decoder, families
from octavo.gpu_worker.models.config import ModelConfig, Traits
from octavo.gpu_worker.ops import Model

if TYPE_CHECKING:  # what a model needs of memory is known without torch
    import torch


@dataclass(frozen=True)
class Architecture:
    """How to read, check and build one architecture."""

    traits: Traits
    tensor_shapes: Callable[[ModelConfig], Iterator[tuple[str, tuple[int, ...]]]]
    build: Callable[[ModelConfig, dict[str, torch.Tensor], int], Model]


ARCHITECTURES: dict[str, Architecture] = {
    name: Architecture(traits, decoder.tensor_shapes, decoder.build) for name, traits in families.ARCHITECTURES.items()
}


def find_architecture(name: str, where: str) -> Architecture:
    """Return the architecture called `name`; `where` names the file in the message if there is none."""
    found = ARCHITECTURES.get(name)
    if found is None:
        others = "" if find_spec("transformers") else "; more are with transformers: pip install 'octavo[transformers]'"
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"{where}: architecture {name!r} is not supported; supported are {known}{others}")
    return found
