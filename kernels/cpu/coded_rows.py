"""Matrices as a file keeps them, in codes or not read yet, where a torch tensor is expected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from octavo.kernels.group_codes import CodeShape, GroupCodes


@dataclass(frozen=True)
class Coded:
    """Rows in codes, read a piece at a time while they are packed.

    num_rows  how many there are
    shape     what the codes mean
    read      returns some of them
    release   called when they are no longer needed
    """

    num_rows: int
    shape: CodeShape
    read: Callable[[slice], GroupCodes]
    release: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Unread:
    """Rows that are read when they are packed: so only what is being packed takes memory besides what is packed.

    num_rows  how many there are
    read      returns them, a float tensor
    release   called when the tensor is no longer needed
    """

    num_rows: int
    read: Callable[[], torch.Tensor]
    release: Callable[[], None]


Part = Coded | Unread | torch.Tensor


class CodedRows(torch.Tensor):
    """A matrix that a model takes for a tensor, but that can only be joined by rows and packed.

    parts  its rows, one part after the other: codes, numbers that are still to be read, or numbers in a tensor
    """

    parts: tuple[Part, ...]

    @staticmethod
    def __new__(cls, parts: Sequence[Part], columns: int, dtype: torch.dtype = torch.bfloat16) -> CodedRows:
        """Join `parts`, which have as many columns each."""
        rows = sum(map(num_rows, parts))
        made: CodedRows = torch.Tensor._make_wrapper_subclass(cls, (rows, columns), dtype=dtype)
        made.parts = tuple(parts)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Here and not in the dispatch below: on its way there torch imports 500 modules, for shapes that are symbols.
        if func is torch.cat and not kwargs and (len(args) == 1 or args[1] == 0):
            first = args[0][0]
            return CodedRows([part for matrix in args[0] for part in parts_of(matrix)], first.shape[1], first.dtype)
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} of a matrix in codes")


def parts_of(matrix: torch.Tensor) -> tuple[Part, ...]:
    """Return the parts of a matrix; an ordinary tensor is one."""
    return matrix.parts if isinstance(matrix, CodedRows) else (matrix,)


def num_rows(part: Part) -> int:
    """Return how many rows a part has."""
    return len(part) if isinstance(part, torch.Tensor) else part.num_rows


def shapes_of(matrices: Sequence[torch.Tensor]) -> list[CodeShape] | None:
    """Return what the codes of some matrices mean; None if one of them is of numbers."""
    parts = [part for matrix in matrices for part in parts_of(matrix)]
    return [part.shape for part in parts if isinstance(part, Coded)] if _are_coded(parts) else None


def _are_coded(parts: Sequence[Part]) -> bool:
    return all(isinstance(part, Coded) for part in parts)
