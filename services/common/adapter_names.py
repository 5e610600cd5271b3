"""What the names of LoRA adapters mean: a table that gateways and schedulers keep alike by telling what changes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from octavo.scheduler.v1 import scheduler_pb2

_NAME = re.compile(r"[A-Za-z0-9][\w.:/-]*")
_MAX_NAME_BYTES = 200
MAX_NAMES = 10_000
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_PATH = 4096


def is_name(text: str) -> bool:
    """Return whether an adapter may be called so: a folder, and what requests give for a model."""
    return _NAME.fullmatch(text) is not None and len(text.encode()) <= _MAX_NAME_BYTES


def key_of(name: str, sha256: str) -> str:
    """Return Submit.adapter: what prefixes are shared within, and workers load adapters by."""
    return f"{name}@{sha256}"


def name_of(key: str) -> str:
    """Return the name in Submit.adapter, which is all of it where there is no SHA-256."""
    return key.rpartition("@")[0] or key


class AdapterNames:
    """Entries by name. Of two for one name the later one holds, by its version, in whatever order they come."""

    def __init__(self) -> None:
        self._entries: dict[str, scheduler_pb2.AdapterName] = {}

    def __iter__(self) -> Iterator[scheduler_pb2.AdapterName]:
        """Iterate over the names that mean something."""
        return (entry for entry in self._entries.values() if not entry.is_removed)

    def get(self, name: str) -> scheduler_pb2.AdapterName | None:
        """Return what a name means."""
        entry = self._entries.get(name)
        return None if entry is None or entry.is_removed else entry

    def version_after(self, name: str, now_ms: int) -> int:
        """Return the version of a change of a name that is made now."""
        entry = self._entries.get(name)
        return now_ms if entry is None else max(now_ms, entry.version + 1)

    def merge(self, names: Iterable[scheduler_pb2.AdapterName]) -> list[scheduler_pb2.AdapterName]:
        """Take entries; return those that are new here. What is no entry is left out."""
        new = [entry for entry in names if _is_sound(entry) and self._is_later(entry)]
        for entry in new:
            self._entries.pop(entry.name, None)
            self._entries[entry.name] = entry
        while len(self._entries) > MAX_NAMES:  # of those that mean nothing any more the oldest, if there are any
            oldest = next(
                (name for name, entry in self._entries.items() if entry.is_removed), next(iter(self._entries))
            )
            del self._entries[oldest]
        return new

    def all(self) -> scheduler_pb2.AdapterNames:
        """Return all entries, those of names that were taken away included."""
        return scheduler_pb2.AdapterNames(names=self._entries.values())

    def _is_later(self, entry: scheduler_pb2.AdapterName) -> bool:
        known = self._entries.get(entry.name)
        return known is None or (known.version, known.is_removed, known.sha256) < (
            entry.version,
            entry.is_removed,
            entry.sha256,
        )


def _is_sound(entry: scheduler_pb2.AdapterName) -> bool:
    is_named = is_name(entry.name) and _SHA256.fullmatch(entry.sha256) is not None
    return is_named and len(entry.path) <= _MAX_PATH
