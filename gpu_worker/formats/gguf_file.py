"""Reads a .gguf file: its metadata as a ModelConfig, its tensors under their Hugging Face names.

The header is parsed here, not with the gguf package: that one turns each of a vocabulary's strings
into arrays, which takes seconds. Its dequantisation is used as it is.
"""

from __future__ import annotations

import mmap
import struct
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.gpu_worker.errors import ModelError

_MAGIC = b"GGUF"
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_MAX_ENTRIES = 1 << 17  # far above any model
_STRING, _ARRAY = 8, 9
# Struct formats of GGUF's scalar types.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. `shape` is in torch's order, rows first; `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    quantisation: int
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class StringArray:
    """An array of strings in the metadata: how many, and where they begin in the file (`GgufFile.strings`)."""

    length: int
    offset: int


class GgufFile:
    """A mapped GGUF file, header checked: every tensor lies inside the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            with path.open("rb") as handle:
                self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot be read ({error})") from error
        self._at = 0
        try:
            self._parse()
        except (struct.error, UnicodeDecodeError, KeyError, IndexError) as error:
            raise ModelError(f"{path}: the GGUF header is cut off or damaged; download the file again") from error

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
        strings, at = [], array.offset
        for _ in range(array.length):
            (size,) = struct.unpack_from("<Q", self._map, at)
            strings.append(self._map[at + 8 : at + 8 + size])
            at += 8 + size
        try:
            return [string.decode("utf-8") for string in strings]
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path}: the GGUF header is damaged ({error}); download the file again") from None

    def header_bytes(self) -> bytes:
        """Return everything before the tensors' data."""
        return self._map[: self._at]

    def _parse(self) -> None:
        if self._take(4) != _MAGIC:
            raise ModelError(f"{self.path}: not a GGUF file")
        version = self._scalar("I")
        if version not in (2, 3):
            raise ModelError(f"{self.path}: GGUF version {version} is not supported; convert the model again")
        num_tensors, num_values = self._scalar("Q"), self._scalar("Q")
        if max(num_tensors, num_values) > _MAX_ENTRIES:
            raise ModelError(
                f"{self.path}: {num_tensors} tensors and {num_values} values of metadata, at most {_MAX_ENTRIES} are "
                "supported; the file is damaged"
            )
        for _ in range(num_values):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("I"))
        entries = [self._tensor_entry() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ModelError(f"{self.path}: general.alignment is {alignment!r}; the file is damaged")
        data_start = self._at + -self._at % alignment
        for name, shape, quantisation, offset in entries:
            self._add_tensor(name, shape, quantisation, data_start + offset)

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dimensions = self._scalar("I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise ModelError(f"{self.path}: {name} has {num_dimensions} dimensions")
        shape = tuple(reversed([self._scalar("Q") for _ in range(num_dimensions)]))
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _add_tensor(self, name: str, shape: tuple[int, ...], quantisation: int, offset: int) -> None:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

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

    def _take(self, num_bytes: int) -> bytes:
        if num_bytes > len(self._map) - self._at:
            raise IndexError(num_bytes)
        self._at += num_bytes
        return self._map[self._at - num_bytes : self._at]

    def _scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        return self._take(self._scalar("Q")).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        element, length = self._scalar("I"), self._scalar("Q")
        if element == _STRING:
            strings = StringArray(length, self._at)
            for _ in range(length):  # ends at the latest where the file does
                (size,) = struct.unpack_from("<Q", self._map, self._at)
                self._at += 8 + size
                if self._at > len(self._map):
                    raise IndexError(self._at)
            return strings
        code = _SCALARS[element]  # no arrays of arrays: none are in use
        values = array("B" if code == "?" else code)  # takes as much memory as the file does
        values.frombytes(self._take(length * struct.calcsize("<" + code)))
        if sys.byteorder == "big":
            values.byteswap()
        return values
