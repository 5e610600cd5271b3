"""Reads a .gguf file: its metadata as a ModelConfig, its tensors under their Hugging Face names.

Of the gguf package the dequantisation is used.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from octavo.gpu_worker.errors import ModelError
from octavo.services.vocabulary.gguf_header import GgufError, GgufHeader, StringArray, TensorEntry

_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. `shape` is in torch's order, rows first; `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    quantisation: int
    offset: int
    num_bytes: int


class GgufFile:
    """A mapped GGUF file, header checked: every tensor lies inside the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, GgufTensor] = {}
        try:
            with path.open("rb") as handle:
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot be read ({error})") from error
        try:
            self._header = GgufHeader(self._map)
        except GgufError as error:
            raise ModelError(f"{path}: {error}") from error
        self.metadata = self._header.metadata
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ModelError(f"{path}: general.alignment is {alignment!r}; the file is damaged")
        data_start = self._header.num_bytes + -self._header.num_bytes % alignment
        for entry in self._header.tensors:
            self._add_tensor(entry, data_start + entry.offset)

    def data(self, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
        """Return a tensor's stored bytes, [rows, bytes of a row], not copied."""
        flat = np.frombuffer(self._map, np.uint8, tensor.num_bytes, tensor.offset)
        return flat.reshape(*tensor.shape[:-1], -1)

    def drop(self, tensor: GgufTensor) -> None:
        """Give the memory of a tensor's pages back; who reads them again gets them again."""
        start, end = (
            place // mmap.PAGESIZE * mmap.PAGESIZE for place in (tensor.offset, tensor.offset + tensor.num_bytes)
        )
        if start < end and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def strings(self, array: StringArray) -> list[str]:
        """Return the strings of an array in the metadata. Raises ModelError."""
        try:
            return self._header.strings(array)
        except GgufError as error:
            raise ModelError(f"{self.path}: {error}") from None

    def header_bytes(self) -> bytes:
        """Return everything before the tensors' data."""
        return self._map[: self._header.num_bytes]

    def _add_tensor(self, entry: TensorEntry, offset: int) -> None:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name, shape, quantisation = entry.name, entry.shape, entry.quantisation
        try:
            block_values, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(quantisation)]
        except (ValueError, KeyError):
            raise ModelError(f"{self.path}: {name} has an unknown quantisation ({quantisation})") from None
        num_values = int(np.prod(shape, dtype=object))
        if shape[-1] % block_values or num_values == 0:
            raise ModelError(f"{self.path}: {name} has a shape that its quantisation cannot have: {list(shape)}")
        if name in self.tensors:
            raise ModelError(f"{self.path}: {name} is there twice")
        num_bytes = num_values // block_values * block_bytes
        if offset + num_bytes > len(self._map):
            raise ModelError(f"{self.path}: the file is cut off inside {name}; download it again")
        self.tensors[name] = GgufTensor(name, shape, quantisation, offset, num_bytes)
