"""Experts whose matrices a checkpoint has in one tensor, shown as matrices of their own. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.models.config import MAX_EXPERTS

T = TypeVar("T")

_PARTS = ("gate_proj", "up_proj")


@dataclass(frozen=True)
class Stack:
    """A tensor of all experts.

    suffix         of the tensors that it stands for
    parts          of an expert whose outputs alternate in it
    is_transposed  whether it is [experts, inputs, outputs], not [experts, outputs, ...]
    """

    suffix: str
    parts: tuple[str, ...]
    is_transposed: bool

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """Return the shape of one expert's part."""
        if self.is_transposed:
            return stored[2] // len(self.parts), stored[1]
        return stored[1] // len(self.parts), math.prod(stored[2:])


_STACKS = {
    f"{name}{ending}": Stack(suffix, parts, is_transposed)
    for name, parts in (("gate_up_proj", _PARTS), ("down_proj", ("down_proj",)))
    for ending, suffix, is_transposed in (
        ("", "weight", True),
        ("_blocks", "weight_packed", False),
        ("_scales", "weight_scale", False),
    )
}


@dataclass(frozen=True)
class Piece:
    """One expert's part of the stack `name`."""

    name: str
    stack: Stack
    expert: int
    part: int


def _pieces_of(shapes: Iterable[tuple[str, Path, tuple[int, ...]]]) -> Iterator[tuple[str, Piece]]:
    """Yield what stands in place of each stack among some tensors, by the name that an expert's own would have."""
    for name, where, shape in shapes:
        prefix, _, last = name.rpartition(".")
        stack = _STACKS.get(last) if prefix.endswith(".experts") else None
        if stack is None:
            continue
        outputs = 2 if stack.is_transposed else 1
        is_one = len(shape) in ((3,) if stack.is_transposed else (3, 4)) and shape[outputs] % len(stack.parts) == 0
        if not is_one or shape[0] > MAX_EXPERTS:
            raise ModelError(
                f"{where}: {name} has shape {list(shape)}, expected 3 or 4 dimensions: first at most {MAX_EXPERTS} "
                f"experts, and as dimension {outputs + 1} outputs, a multiple of {len(stack.parts)}"
            )
        for expert in range(shape[0]):
            for part, module in enumerate(stack.parts):
                yield f"{prefix}.{expert}.{module}.{stack.suffix}", Piece(name, stack, expert, part)


class ExpertTensor:
    """A part of a stack that can be asked for like a file's handle, and like a slice of it."""

    def __init__(self, piece: Piece, handle: Any) -> None:
        self._piece = piece
        self._stored = handle.get_slice(piece.name)

    def get_slice(self, _: str) -> ExpertTensor:
        """Return the tensor."""
        return self

    def get_tensor(self, _: str) -> Any:
        """Return all of it."""
        return self[slice(None)]

    def get_dtype(self) -> str:
        """Return the name of its type."""
        return str(self._stored.get_dtype())

    def get_shape(self) -> list[int]:
        """Return rows and columns."""
        return list(self._piece.stack.shape(tuple(self._stored.get_shape())))

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Any:
        """Return some rows, and of them some columns. Reads no other rows of a stack that has them in order."""
        stack, part, expert = self._piece.stack, self._piece.part, self._piece.expert
        rows, *columns = index if isinstance(index, tuple) else (index,)
        step, here = len(stack.parts), slice(expert, expert + 1)
        if stack.is_transposed:
            found = self._stored[here][0][:, part::step].T[rows]
        else:
            start, stop, _ = rows.indices(self.get_shape()[0])
            found = self._stored[here, start * step : stop * step][0][part::step].flatten(1)
        return found[(slice(None), *columns)].contiguous()


def unstacked(
    tensors: Mapping[str, tuple[Path, T]],
    shape_of: Callable[[str, T], tuple[int, ...]],
    part_of: Callable[[Piece, T], T],
) -> dict[str, tuple[Path, T]]:
    """Return tensors, each with its file, with one for each expert's matrix in place of the stacks.

    shape_of  the shape of a tensor, by its name
    part_of   what stands for a piece of a stack

    Raises ModelError.
    """
    pieces = dict(_pieces_of((name, path, shape_of(name, tensor)) for name, (path, tensor) in tensors.items()))
    stacks = {piece.name for piece in pieces.values()}
    experts = {}
    for name, piece in pieces.items():
        path, stack = tensors[piece.name]
        experts[name] = (path, part_of(piece, stack))
    return {name: tensor for name, tensor in tensors.items() if name not in stacks} | experts


def unstacked_handles(owners: Mapping[str, tuple[Path, Any]]) -> dict[str, tuple[Path, Any]]:
    """Return the handles of a folder's tensors, see `unstacked`. Raises ModelError."""
    return unstacked(owners, lambda name, handle: tuple(handle.get_slice(name).get_shape()), ExpertTensor)
