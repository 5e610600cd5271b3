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

_GATE_UP, _DOWN = ("gate_proj", "up_proj"), ("down_proj",)


@dataclass(frozen=True)
class Stack:
    """A tensor of all experts, [experts, outputs, ...].

    suffix         of the tensors that it stands for
    parts          of an expert whose outputs alternate in it
    num_dimensions that it may have; with two it is of biases, and each part of it is of all experts
    is_transposed  whether it is [experts, inputs, outputs]
    are_in_order   whether the outputs of each part follow those of the last one instead
    """

    suffix: str
    parts: tuple[str, ...]
    num_dimensions: tuple[int, ...] = (3,)
    is_transposed: bool = False
    are_in_order: bool = False

    @property
    def is_of_biases(self) -> bool:
        """Whether it is [experts, outputs]."""
        return self.num_dimensions == (2,)

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """Return the shape of one expert's part, or of all experts' biases."""
        if self.is_of_biases:
            return stored[0], stored[1] // len(self.parts)
        if self.is_transposed:
            return stored[2] // len(self.parts), stored[1]
        return stored[1] // len(self.parts), math.prod(stored[2:])


# By the end of a tensor's name, behind that of the mixture: of gpt-oss, and of Granite.
_STACKS = {
    "experts.gate_up_proj_bias": Stack("bias", _GATE_UP, (2,)),
    "input_linear.weight": Stack("weight", _GATE_UP, are_in_order=True),
    "output_linear.weight": Stack("weight", _DOWN),
} | {
    f"experts.{name}{ending}": Stack(suffix, parts, num_dimensions, is_transposed)
    for name, parts in (("gate_up_proj", _GATE_UP), ("down_proj", _DOWN))
    for ending, suffix, num_dimensions, is_transposed in (
        ("", "weight", (3,), True),
        ("_blocks", "weight_packed", (3, 4), False),
        ("_scales", "weight_scale", (3, 4), False),
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
        block, _, end = name.rpartition(".")
        block, _, module = block.rpartition(".")
        stack = _STACKS.get(f"{module}.{end}")
        if stack is None or (module != "experts" and len(shape) == 2):  # Granite's shared expert has that name, too
            continue
        outputs = 2 if stack.is_transposed else 1
        is_one = len(shape) in stack.num_dimensions and shape[outputs] % len(stack.parts) == 0
        if not is_one or shape[0] > MAX_EXPERTS:
            raise ModelError(
                f"{where}: {name} has shape {list(shape)}, expected {' or '.join(map(str, stack.num_dimensions))} "
                f"dimensions: first at most {MAX_EXPERTS} experts, and as dimension {outputs + 1} outputs, a multiple "
                f"of {len(stack.parts)}"
            )
        for part, module in enumerate(stack.parts):
            if stack.is_of_biases:
                yield f"{block}.experts.{module}_{stack.suffix}", Piece(name, stack, 0, part)
                continue
            for expert in range(shape[0]):
                yield f"{block}.experts.{expert}.{module}.{stack.suffix}", Piece(name, stack, expert, part)


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
        step, here, size = len(stack.parts), slice(expert, expert + 1), self.get_shape()[0]
        start, stop, _ = rows.indices(size)
        if stack.is_of_biases:
            found = self._stored[start:stop][:, part::step]
        elif stack.is_transposed:
            found = self._stored[here][0][:, part::step].T[rows]
        elif stack.are_in_order:
            found = self._stored[here, part * size + start : part * size + stop][0]
        else:
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
