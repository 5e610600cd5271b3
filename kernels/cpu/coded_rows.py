"""Matrices as a GGUF file keeps them, in codes, where a torch tensor is expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from octavo.kernels.cpu import library


@dataclass(frozen=True)
class Codes:
    """Rows of one kind: data [rows, bytes of a row], contiguous; kind is one of library.Q8_0 and so on."""

    kind: int
    data: npt.NDArray[np.uint8]


class CodedRows(torch.Tensor):
    """A matrix that a model takes for a bfloat16 tensor, but that can only be joined by rows and packed.

    parts  its rows, one part after the other: codes, or numbers in a tensor
    """

    parts: tuple[Codes | torch.Tensor, ...]

    @staticmethod
    def __new__(cls, parts: Sequence[Codes | torch.Tensor], columns: int) -> CodedRows:
        """Join `parts`, which have as many columns each."""
        rows = sum(len(part.data) if isinstance(part, Codes) else len(part) for part in parts)
        made: CodedRows = torch.Tensor._make_wrapper_subclass(cls, (rows, columns), dtype=torch.bfloat16)
        made.parts = tuple(parts)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.cat.default and (len(args) == 1 or args[1] == 0):
            return CodedRows([part for matrix in args[0] for part in parts_of(matrix)], args[0][0].shape[1])
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} of a matrix in codes")


def parts_of(matrix: torch.Tensor) -> tuple[Codes | torch.Tensor, ...]:
    """Return the parts of a matrix; an ordinary tensor is one."""
    return matrix.parts if isinstance(matrix, CodedRows) else (matrix,)


def as_matrix(part: Codes | torch.Tensor, columns: int) -> tuple[library.Matrix, object]:
    """Return a part as the library takes it, and what must be kept alive meanwhile."""
    if isinstance(part, Codes):
        return library.Matrix(part.data.ctypes.data, part.kind, len(part.data), columns), part.data
    tensor = part.detach().cpu().contiguous()
    if tensor.dtype not in _TYPES:
        tensor = tensor.to(torch.float32)
    return library.Matrix(tensor.data_ptr(), _TYPES[tensor.dtype], len(tensor), columns), tensor


_TYPES = {torch.bfloat16: library.BF16, torch.float16: library.F16, torch.float32: library.F32}
