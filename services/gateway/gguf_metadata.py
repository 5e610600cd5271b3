"""Reads the metadata at the head of a GGUF file; the tensors behind it are not touched."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_MAX_ENTRIES = 100_000
_MAX_ITEMS = 16_777_216


class GgufError(ValueError):
    """The file is not a GGUF file that can be read."""


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a file: numbers, bools, strings, and lists of them. Raises GgufError, OSError."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _Reader(data).metadata()
        except (struct.error, IndexError, UnicodeDecodeError) as error:
            raise GgufError(f"{path} is not a whole GGUF file: {error}") from None


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def metadata(self) -> dict[str, Any]:
        if self._data[:4] != b"GGUF":
            raise GgufError("this is not a GGUF file: it does not start with 'GGUF'")
        self._at = 4
        version = self._scalar("<I")
        if version not in (2, 3):
            raise GgufError(f"GGUF version {version} is not supported; versions 2 and 3 are")
        self._scalar("<Q")  # number of tensors
        num_entries = self._scalar("<Q")
        if num_entries > _MAX_ENTRIES:
            raise GgufError(f"the file claims {num_entries} metadata entries")
        entries: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self._string()
            entries[key] = self._value(self._scalar("<I"))
        return entries

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _string(self) -> str:
        size = self._scalar("<Q")
        if self._at + size > len(self._data):
            raise IndexError("a string ends behind the file's end")
        text = self._data[self._at : self._at + size].decode()
        self._at += size
        return text

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._list()
        if kind not in _SCALARS:
            raise GgufError(f"metadata of unknown type {kind}")
        return self._scalar(_SCALARS[kind])

    def _list(self) -> list[Any]:
        kind, size = self._scalar("<I"), self._scalar("<Q")
        if size > _MAX_ITEMS:
            raise GgufError(f"the file claims a list of {size} items")
        if kind == _STRING:
            return [self._string() for _ in range(size)]
        if kind not in _SCALARS:
            raise GgufError(f"metadata holds a list of unknown type {kind}")
        form = f"<{size}{_SCALARS[kind][1]}"
        values = list(struct.unpack_from(form, self._data, self._at))
        self._at += struct.calcsize(form)
        return values
