"""Reads the header of a GGUF file: its metadata, and where its tensors lie.

The gguf package is not used for it: that one turns each of a vocabulary's strings into arrays, which takes seconds.
"""

from __future__ import annotations

import mmap
import struct
import sys
from array import array
from dataclasses import dataclass
from typing import Any

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_MAX_DIMENSIONS = 4
_MAX_ENTRIES = 1 << 17  # far above any model
_MAX_ITEMS = 1 << 24


class GgufError(ValueError):
    """The file is not a GGUF file that can be read."""


@dataclass(frozen=True)
class StringArray:
    """An array of strings in the metadata: how many, and where they begin in the file (`GgufHeader.strings`)."""

    length: int
    offset: int


@dataclass(frozen=True)
class TensorEntry:
    """What the header says of a tensor. `shape` is in torch's order, rows first; `offset` counts from the data."""

    name: str
    shape: tuple[int, ...]
    quantisation: int
    offset: int


class GgufHeader:
    """What a file says before its tensors' data.

    metadata   numbers, bools and strings; arrays of numbers; a StringArray for an array of strings
    tensors    in the file's order
    num_bytes  its own length
    """

    def __init__(self, data: mmap.mmap) -> None:
        """Read the header of a mapped file. Raises GgufError, which does not name the file."""
        self._data = data
        self.num_bytes = 0
        try:
            self._parse()
        except (struct.error, UnicodeDecodeError, IndexError) as error:
            what = f"this is not a whole GGUF file: the header is cut off or damaged ({error})"
            raise GgufError(f"{what}; download the file again") from None

    def strings(self, place: StringArray) -> list[str]:
        """Return the strings of an array in the metadata. Raises GgufError."""
        data, at, strings = self._data, place.offset, []
        for _ in range(place.length):
            start = at + 8
            at = start + int.from_bytes(data[at:start], "little")
            strings.append(data[start:at])
        try:
            return [string.decode() for string in strings]
        except UnicodeDecodeError as error:
            raise GgufError(f"the GGUF header is damaged ({error}); download the file again") from None

    def _parse(self) -> None:
        if self._take(4) != b"GGUF":
            raise GgufError("this is not a GGUF file: it does not start with 'GGUF'")
        version = self._scalar("<I")
        if version not in (2, 3):
            raise GgufError(f"GGUF version {version} is not supported, versions 2 and 3 are; convert the model again")
        num_tensors, num_values = self._scalar("<Q"), self._scalar("<Q")
        if max(num_tensors, num_values) > _MAX_ENTRIES:
            claim = f"the file claims {num_tensors} tensors and {num_values} values of metadata"
            raise GgufError(f"{claim}, at most {_MAX_ENTRIES} are supported; the file is damaged")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("<I"))
        self.tensors = [self._tensor() for _ in range(num_tensors)]

    def _tensor(self) -> TensorEntry:
        name, num_dimensions = self._string(), self._scalar("<I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise GgufError(f"the tensor {name[:50]!r} has {num_dimensions} dimensions")
        shape = tuple(reversed([self._scalar("<Q") for _ in range(num_dimensions)]))
        return TensorEntry(name, shape, self._scalar("<I"), self._scalar("<Q"))

    def _take(self, num_bytes: int) -> bytes:
        if num_bytes > len(self._data) - self.num_bytes:
            raise IndexError("a value ends behind the file's end")
        self.num_bytes += num_bytes
        return self._data[self.num_bytes - num_bytes : self.num_bytes]

    def _scalar(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _string(self) -> str:
        return self._take(self._scalar("<Q")).decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_form(kind))
        kind, length = self._scalar("<I"), self._scalar("<Q")
        if length > _MAX_ITEMS:
            raise GgufError(f"the file claims a list of {length} items")
        if kind == _STRING:
            strings = StringArray(length, self.num_bytes)
            for _ in range(length):  # ends at the latest where the file does
                (size,) = struct.unpack_from("<Q", self._data, self.num_bytes)
                self.num_bytes += 8 + size
                if self.num_bytes > len(self._data):
                    raise IndexError("a value ends behind the file's end")
            return strings
        form = _form(kind)  # no arrays of arrays: none are in use
        values: array[Any] = array(form[1].replace("?", "B"))  # takes as much memory as the file does
        values.frombytes(self._take(length * struct.calcsize(form)))
        if sys.byteorder == "big":
            values.byteswap()
        return values


def _form(kind: int) -> str:
    if kind not in _SCALARS:
        raise GgufError(f"metadata of unknown type {kind}; the file is damaged")
    return _SCALARS[kind]
