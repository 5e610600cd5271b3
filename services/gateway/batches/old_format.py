"""Takes over what earlier versions kept, a JSON file for each object: files/ID.json and batches/ID.json."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

from octavo.services.gateway.batches.index import Index, insert_batch
from octavo.services.gateway.batches.objects import StoredBatch, StoredFile, StoreLimits

_log = logging.getLogger(__name__)
_ID = re.compile(r"(file|batch)_[0-9a-f]{32}")
_AT_ONCE = 500
_LEFT_S = 24 * 3600


class OldFormat:
    """The JSON files of a folder. Each is removed when the database has its object; what cannot be read is renamed.

    Nothing is lost on the way: what is taken over is kept from now on as long as if it were new.
    """

    def __init__(self, index: Index, files: Path, batches: Path, limits: StoreLimits) -> None:
        self._index = index
        self._files = files
        self._batches = batches
        self._limits = limits

    def adopt_files(self) -> None:
        """Take over all files, and remove what killed uploads left. Raises OSError."""
        self._take_files(sorted(self._files.glob("file_*.json"), key=_created_at))
        for folder in (self._files, self._batches):
            for path in folder.glob(".*"):
                if path.stat().st_mtime < time.time() - _LEFT_S:
                    path.unlink(missing_ok=True)

    def adopt_batches(self, lock: Callable[[str], BinaryIO | None]) -> None:
        """Take over the batches that no gateway of an earlier version is running. Raises OSError."""
        paths = sorted(self._batches.glob("batch_*.json"), key=_created_at)
        for start in range(0, len(paths), _AT_ONCE):
            locked = {path: lock(path.stem) for path in paths[start : start + _AT_ONCE]}
            try:
                self._take_batches([path for path, each in locked.items() if each is not None])
            finally:
                for each in locked.values():
                    if each is not None:
                        each.close()

    def _take_files(self, paths: Sequence[Path]) -> None:
        names = [each.name for each in fields(StoredFile) if each.name != "expires_at"]
        taken = []
        for path in paths:
            data = path.with_suffix(".data")
            if data.exists() and (values := _read(path, names)) is not None:
                taken.append({**values, "bytes": data.stat().st_size})
        if paths:
            with self._index.change() as db:
                db.executemany(
                    "INSERT OR IGNORE INTO files (id, tenant, filename, purpose, bytes, created_at, expires_at, kept) "
                    "VALUES (:id, :tenant, :filename, :purpose, :bytes, :created_at, :expires_at, 1)",
                    [{**values, "expires_at": self._limits.end_of(int(time.time()))} for values in taken],
                )
        for path in paths:
            path.unlink(missing_ok=True)

    def _take_batches(self, paths: Sequence[Path]) -> None:
        """Take over batches that nobody else runs meanwhile, with the files that they name."""
        needed = ("id", "tenant", "endpoint", "input_file_id", "created_at", "expires_at")
        batches = [StoredBatch.of(values) for path in paths if (values := _read(path, needed)) is not None]
        named = [name for each in batches for name in (each.input_file_id, each.output_file_id, each.error_file_id)]
        files = [self._files / f"{name}.json" for name in named if name is not None and _ID.fullmatch(name)]
        self._take_files([path for path in dict.fromkeys(files) if path.exists()])
        if batches:
            with self._index.change() as db:
                for batch in batches:
                    insert_batch(db, batch, None if batch.running else self._limits.end_of(int(time.time())))
                    if (self._batches / f"{batch.id}.cancel").exists():
                        db.execute("UPDATE batches SET cancel = 1 WHERE id = ?", (batch.id,))
        for batch in batches:
            # The lock of one that runs is left: somebody else may have it by now.
            for kind in ("json", "cancel") if batch.running else ("json", "cancel", "results", "lock"):
                (self._batches / f"{batch.id}.{kind}").unlink(missing_ok=True)


def _read(path: Path, needed: Sequence[str]) -> dict[str, Any] | None:
    """Return an object with all fields it needs, of which `id` is its file's name. What is none is put aside."""
    try:
        values = json.loads(path.read_bytes())
        is_ours = isinstance(values, dict) and values.get("id") == path.stem and _ID.fullmatch(path.stem) is not None
        if is_ours and all(name in values for name in needed):
            return dict(values)
        fault = "it is no object of ours"
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        fault = str(error)
    aside = path.with_suffix(".unreadable")
    path.rename(aside)
    _log.error("%s cannot be read, and is now %s: %s", path, aside.name, fault)
    return None


def _created_at(path: Path) -> tuple[float, str]:
    """Return the key by which objects are older and newer."""
    try:
        return float(json.loads(path.read_bytes())["created_at"]), path.name
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return 0.0, path.name
