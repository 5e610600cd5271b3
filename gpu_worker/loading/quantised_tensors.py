"""The quantised matrices of a folder, where its tensors are expected: under one name each, as if they were numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.formats.tensor_kinds import Head, OddTensorError, Plan, Settings, biases_beside, plans_of
from octavo.gpu_worker.memory import FilePages
from octavo.kernels.group_codes import GroupCodes
from octavo.kernels.machine import available_cores

_PIECE_VALUES = 1 << 20
_TYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_ROWS = 128  # of which pieces are multiples

Owners = dict[str, tuple[Path, Any]]


class QuantisedMatrix:
    """A matrix in codes that can be read like a slice of a safetensors file: then as numbers.

    members  its tensors' handles, by suffix
    dtype    of the numbers
    pages    of the files, by their paths: shared, and filled here
    """

    def __init__(
        self,
        name: str,
        plan: Plan,
        members: Mapping[str, tuple[Path, Any]],
        dtype: torch.dtype,
        pages: dict[Path, FilePages],
    ) -> None:
        self.plan = plan
        self._pages = pages
        self._prefix = name.removesuffix("weight")
        self._members = members
        self.dtype = dtype
        self._where = str(next(iter(members.values()))[0])

    def get_dtype(self) -> str:
        """Return the name that safetensors files have for the type of the numbers."""
        return _TYPE_NAMES[self.dtype]

    def get_shape(self) -> list[int]:
        """Return rows and columns."""
        return list(self.plan.shape)

    def codes(self, rows: slice) -> GroupCodes:
        """Return some rows in the common form. Raises ModelError."""
        plan, outputs = self.plan, self.plan.layout.outputs(self.plan)
        step = math.lcm(_ROWS, *(per_element for _, per_element in outputs.values()))
        start, stop = rows.start // step * step, min(-(-rows.stop // step) * step, plan.shape[0])
        arrays = {}
        for suffix in plan.heads:
            handle, name = self._members[suffix][1], self._prefix + suffix
            if suffix not in outputs:
                arrays[suffix] = _array(handle.get_tensor(name))
                continue
            dim, per_element = outputs[suffix]
            place = slice(start // per_element, -(-stop // per_element))
            arrays[suffix] = _array(handle.get_slice(name)[place if dim == 0 else (slice(None), place)])
        try:
            found = plan.layout.read(plan, arrays)
        except OddTensorError as error:
            raise ModelError(f"{self._where}: {self._prefix}{error}") from None
        return found.rows(slice(rows.start - start, rows.stop - start))

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        """Return the numbers of some rows and columns. Raises ModelError."""
        rows, columns = index
        values = torch.empty((rows.stop - rows.start, columns.stop - columns.start), dtype=self.dtype)
        step = max(_PIECE_VALUES // self.plan.shape[1] // _ROWS, 1) * _ROWS
        pieces = [slice(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]

        def fill(piece: slice) -> None:
            numbers = torch.from_numpy(np.ascontiguousarray(self.codes(piece).values()[:, columns]))
            values[piece.start - rows.start : piece.stop - rows.start] = numbers

        with ThreadPoolExecutor(min(available_cores(), len(pieces))) as threads:  # numpy lets others compute
            for _ in threads.map(fill, pieces):
                pass
        self.release()
        return values

    def release(self) -> None:
        """Give the memory of its tensors' pages back."""
        for suffix in self.plan.heads:
            path, handle = self._members[suffix]
            tensor = handle.get_tensor(self._prefix + suffix)
            if path not in self._pages:
                self._pages[path] = FilePages(path)
            self._pages[path].drop(tensor.data_ptr(), tensor.nbytes)


class QuantisedHandle:
    """What is asked for a quantised matrix where else a file is."""

    def __init__(self, matrix: QuantisedMatrix) -> None:
        self._matrix = matrix

    def get_slice(self, _: str) -> QuantisedMatrix:
        """Return the matrix."""
        return self._matrix

    def get_tensor(self, _: str) -> torch.Tensor:
        """Return all of its numbers."""
        return self._matrix[tuple(slice(0, size) for size in self._matrix.plan.shape)]


def add_quantised(settings: Settings, owners: Owners, dtype: torch.dtype, where: str) -> tuple[Owners, set[str]]:
    """Return the handles of a folder's tensors, with one for each quantised matrix, and biases that may be needless.

    Tools write a bias of zeros beside each quantised matrix of a model that has none. Raises ModelError.
    """
    slices = {name: handle.get_slice(name) for name, (_, handle) in owners.items()}
    heads = {name: Head(found.get_dtype(), tuple(found.get_shape())) for name, found in slices.items()}
    plans, taken = plans_of(settings, heads, where)
    handles: Owners = {}
    pages: dict[Path, FilePages] = {}
    for name, plan in plans.items():
        members = {suffix: owners[name.removesuffix("weight") + suffix] for suffix in plan.heads}
        matrix = QuantisedMatrix(name, plan, members, dtype, pages)
        handles[name] = (next(iter(members.values()))[0], QuantisedHandle(matrix))
    return {name: value for name, value in owners.items() if name not in taken} | handles, biases_beside(plans)


def check_needless(names: Iterable[str], owners: Owners) -> None:
    """Raise ModelError if one of some tensors is not all zeros."""
    for name in names:
        path, handle = owners[name]
        if handle.get_tensor(name).count_nonzero():
            raise ModelError(f"{path}: {name} is not zero, but the architecture has no such bias")


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor as numpy has it: floats as float32, bytes that numpy has no type for as they are."""
    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e8m0fnu):
        return tensor.view(torch.uint8).numpy()
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
