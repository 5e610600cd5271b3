"""Reads the metadata at the head of a GGUF file; the tensors behind it are not touched."""

from __future__ import annotations

import mmap
import struct
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_MAX_ENTRIES = 100_000
_MAX_ITEMS = 16_777_216
_MAX_DIMENSIONS = 8
_WANTED, _CONTEXT = ("tokenizer.", "general."), ".context_length"
_EMBEDDING = "token_embd.weight"


class GgufError(ValueError):
    """The file is not a GGUF file that can be read."""


@dataclass(frozen=True)
class GgufHead:
    """What a file says before its tensors' data.

    metadata        numbers, bools, strings, and lists or arrays of them
    embedding_rows  token ids that the model has a vector for; None if the file does not hold the embedding
    """

    metadata: dict[str, Any]
    embedding_rows: int | None


def read_head(path: Path) -> GgufHead:
    """Return the head of a file. Raises GgufError, OSError."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).head()
    except GgufError as error:
        raise GgufError(f"{path}: {error}") from None
    except (struct.error, IndexError, UnicodeDecodeError, ValueError) as error:  # mmap's, of an empty file, too
        raise GgufError(f"{path} is not a whole GGUF file: {error}; download it again") from None


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def head(self) -> GgufHead:
        if self._data[:4] != b"GGUF":
            raise GgufError("this is not a GGUF file: it does not start with 'GGUF'")
        self._at = 4
        version = self._scalar("<I")
        if version not in (2, 3):
            raise GgufError(f"GGUF version {version} is not supported; versions 2 and 3 are")
        num_tensors, num_entries = self._scalar("<Q"), self._scalar("<Q")
        if num_entries > _MAX_ENTRIES or num_tensors > _MAX_ENTRIES:
            raise GgufError(f"the file claims {num_entries} metadata entries and {num_tensors} tensors")
        entries: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self._string()
            value = self._value(self._scalar("<I"), key.startswith(_WANTED) or key.endswith(_CONTEXT))
            if value is not None:
                entries[key] = value
        rows = None
        for _ in range(num_tensors):
            name, shape = self._tensor()
            if name == _EMBEDDING:
                rows = shape[-1]  # GGUF begins with the shortest way
        return GgufHead(entries, rows)

    def _tensor(self) -> tuple[str, list[int]]:
        name, num_dimensions = self._string(), self._scalar("<I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise GgufError(f"the tensor {name[:50]!r} has {num_dimensions} dimensions")
        shape = [self._scalar("<Q") for _ in range(num_dimensions)]
        self._skip(12)  # its type and place
        return name, shape

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _skip(self, size: int) -> None:
        if self._at + size > len(self._data):
            raise IndexError("a value ends behind the file's end")
        self._at += size

    def _string(self) -> str:
        return self._bytes().decode()

    def _bytes(self) -> bytes:
        size = self._scalar("<Q")
        self._skip(size)
        return self._data[self._at - size : self._at]

    def _value(self, kind: int, is_wanted: bool) -> Any:
        """Return a value, or None if it is not wanted."""
        if kind == _STRING:
            data = self._bytes()
            return data.decode() if is_wanted else None
        if kind == _ARRAY:
            return self._list(is_wanted)
        if kind not in _SCALARS:
            raise GgufError(f"metadata of unknown type {kind}")
        value = self._scalar(_SCALARS[kind])
        return value if is_wanted else None

    def _list(self, is_wanted: bool) -> list[str] | array[Any] | None:
        kind, size = self._scalar("<I"), self._scalar("<Q")
        if size > _MAX_ITEMS:
            raise GgufError(f"the file claims a list of {size} items")
        if kind == _STRING:
            if is_wanted:
                return [self._string() for _ in range(size)]
            for _ in range(size):
                self._skip(self._scalar("<Q"))
            return None
        if kind not in _SCALARS:
            raise GgufError(f"metadata holds a list of unknown type {kind}")
        start = self._at
        self._skip(size * struct.calcsize(_SCALARS[kind]))
        if not is_wanted:
            return None
        items: array[Any] = array(_SCALARS[kind][1].replace("?", "B"))
        items.frombytes(self._data[start : self._at])
        if sys.byteorder == "big":
            items.byteswap()
        return items
