"""The architectures that this worker can run, by the name in a checkpoint's config.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.models import experts, llama
from octavo.gpu_worker.models.config import ModelConfig, Traits
from octavo.gpu_worker.ops import Model


@dataclass(frozen=True)
class Architecture:
    """How to read, check and build one architecture."""

    traits: Traits
    tensor_shapes: Callable[[ModelConfig], dict[str, tuple[int, ...]]]
    build: Callable[[ModelConfig, dict[str, torch.Tensor], int], Model]


ARCHITECTURES: dict[str, Architecture] = {
    name: Architecture(traits, llama.tensor_shapes, llama.LlamaModel)
    for name, traits in {**llama.ARCHITECTURES, **experts.ARCHITECTURES}.items()
}


def find_architecture(name: str, where: str) -> Architecture:
    """Return the architecture called `name`; `where` names the file in the message if there is none."""
    found = ARCHITECTURES.get(name)
    if found is None:
        raise ModelError(f"{where}: architecture {name!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    return found
