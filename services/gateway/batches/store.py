"""The folder of files and batches. Each object is a small JSON file, replaced as a whole, beside its data.

    files/ID.json, files/ID.data
    batches/ID.json, batches/ID.results, batches/ID.lock, batches/ID.cancel

Whoever holds the lock of a batch runs it and is the only one to write its object. Every call blocks for as long as the
disk takes: they are made from threads.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from octavo.services.common.errors import Reason, Resource, ServingError

T = TypeVar("T", "StoredFile", "StoredBatch")

_ID = re.compile(r"(file|batch)_[0-9a-f]{32}")
RUNNING = ("validating", "in_progress", "finalizing", "cancelling")
"""States of a batch that somebody has to go on with."""


@dataclass(frozen=True)
class StoreLimits:
    """What one tenant may keep."""

    max_file_bytes: int
    max_total_bytes: int
    max_files: int = 1000
    max_batches: int = 1000


@dataclass
class StoredFile:
    """A file; OpenAI's File object, but for `tenant`."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created_at: int


@dataclass
class StoredBatch:
    """A batch; OpenAI's Batch object, but for `tenant`. Times are seconds since 1970."""

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    created_at: int
    expires_at: int
    completion_window: str = "24h"
    status: str = "validating"
    metadata: dict[str, str] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0
    completed: int = 0
    failed: int = 0
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None

    def enter(self, status: str) -> None:
        """Change the state, and note when."""
        self.status = status
        setattr(self, f"{status}_at", int(time.time()))


class BatchStore:
    """See the module."""

    def __init__(self, folder: Path, limits: StoreLimits) -> None:
        """Make the folders. Raises OSError."""
        self._files = folder / "files"
        self._batches = folder / "batches"
        self.limits = limits
        for each in (self._files, self._batches):
            each.mkdir(mode=0o700, parents=True, exist_ok=True)

    # Files

    def add_file(self, tenant: str, filename: str, purpose: str, data: Path) -> StoredFile:
        """Take over the file at `data`, which is moved. Raises QUOTA_EXCEEDED."""
        kept = self.files(tenant)
        size = data.stat().st_size
        total = sum(file.bytes for file in kept) + size
        if len(kept) >= self.limits.max_files or total > self.limits.max_total_bytes:
            raise ServingError(
                Reason.QUOTA_EXCEEDED,
                f"{len(kept)} files are kept, and with this one they have {total} bytes; at most "
                f"{self.limits.max_files} and {self.limits.max_total_bytes} are allowed: delete some",
                quota_subject="tenant",
            )
        return self._take(StoredFile(_new_id("file"), tenant, filename, purpose, size, int(time.time())), data)

    def add_result(self, batch: StoredBatch, what: str, data: Path) -> StoredFile:
        """Take over a file of results: of any size, since the work is done. Again the same file if it is done again."""
        file_id = f"file_{hashlib.sha256(f'{batch.id} {what}'.encode()).hexdigest()[:32]}"
        name = f"{batch.id}_{what}.jsonl"
        size = data.stat().st_size
        return self._take(StoredFile(file_id, batch.tenant, name, "batch_output", size, int(time.time())), data)

    def _take(self, file: StoredFile, data: Path) -> StoredFile:
        data.replace(self.data_path(file.id))
        _write(self._files / f"{file.id}.json", file)
        return file

    def temporary_path(self) -> Path:
        """Return where a file can be written that `add_file` then takes over."""
        return self._files / f".{secrets.token_hex(16)}.tmp"

    def file(self, tenant: str, file_id: str) -> StoredFile:
        """Return a tenant's file. Raises REQUEST_NOT_FOUND."""
        return _read(self._files, file_id, StoredFile, tenant)

    def files(self, tenant: str) -> list[StoredFile]:
        """Return a tenant's files, newest first."""
        return _all(self._files, StoredFile, tenant)

    def data_path(self, file_id: str) -> Path:
        """Return where a file's bytes are."""
        return self._files / f"{file_id}.data"

    def delete_file(self, tenant: str, file_id: str) -> None:
        """Delete a tenant's file. Raises REQUEST_NOT_FOUND."""
        self.file(tenant, file_id)
        (self._files / f"{file_id}.json").unlink(missing_ok=True)
        self.data_path(file_id).unlink(missing_ok=True)

    # Batches

    def add_batch(
        self, tenant: str, endpoint: str, input_file_id: str, window_s: int, metadata: dict[str, str] | None
    ) -> StoredBatch:
        """Make a batch that waits for somebody to run it. Raises REQUEST_NOT_FOUND, QUOTA_EXCEEDED."""
        self.file(tenant, input_file_id)
        running = [batch for batch in self.batches(tenant) if batch.status in RUNNING]
        if len(running) >= self.limits.max_batches:
            message = f"{len(running)} batches are waiting or running; wait for some, or cancel them"
            raise ServingError(Reason.QUOTA_EXCEEDED, message, quota_subject="tenant", retry_after_ms=60_000)
        now = int(time.time())
        batch = StoredBatch(_new_id("batch"), tenant, endpoint, input_file_id, now, now + window_s, metadata=metadata)
        self.save(batch)
        return batch

    def batch(self, tenant: str, batch_id: str) -> StoredBatch:
        """Return a tenant's batch. Raises REQUEST_NOT_FOUND."""
        return _read(self._batches, batch_id, StoredBatch, tenant)

    def batches(self, tenant: str | None) -> list[StoredBatch]:
        """Return a tenant's batches, those of all if None; newest first."""
        return _all(self._batches, StoredBatch, tenant)

    def save(self, batch: StoredBatch) -> None:
        """Write a batch's object: for its maker, and for whoever holds its lock."""
        _write(self._batches / f"{batch.id}.json", batch)

    def results_path(self, batch: StoredBatch) -> Path:
        """Return where the results of a running batch are."""
        return self._batches / f"{batch.id}.results"

    def ask_to_cancel(self, batch: StoredBatch) -> None:
        """Tell whoever runs a batch to end it."""
        (self._batches / f"{batch.id}.cancel").touch(mode=0o600)

    def is_to_be_cancelled(self, batch: StoredBatch) -> bool:
        """Return whether somebody asked for that."""
        return (self._batches / f"{batch.id}.cancel").exists()

    @contextlib.contextmanager
    def lock(self, batch: StoredBatch) -> Iterator[bool]:
        """Try to become the one who runs a batch; yields whether that worked. The system unlocks for the dead."""
        with (self._batches / f"{batch.id}.lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def remove_working_files(self, batch: StoredBatch) -> None:
        """Remove what only a running batch needs."""
        for kind in ("results", "cancel"):
            (self._batches / f"{batch.id}.{kind}").unlink(missing_ok=True)


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(16)}"


def _write(path: Path, value: StoredFile | StoredBatch) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with temporary.open("xb") as file:
        file.write(json.dumps(asdict(value)).encode())
        _sync(file)
    temporary.replace(path)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _read(folder: Path, object_id: str, kind: type[T], tenant: str) -> T:
    """Return an object. An id is a name in a folder, so it is checked before it becomes part of a path."""
    name = {"StoredFile": "file", "StoredBatch": "batch"}[kind.__name__]
    if _ID.fullmatch(object_id) and object_id.startswith(name):
        with contextlib.suppress(FileNotFoundError):
            found = kind(**json.loads((folder / f"{object_id}.json").read_bytes()))
            if found.tenant == tenant:
                return found
    message = f"there is no {name} {object_id[:64]!r}"
    raise ServingError(Reason.REQUEST_NOT_FOUND, message, resource=Resource(name, object_id[:64]))


def _all(folder: Path, kind: type[T], tenant: str | None) -> list[T]:
    found: list[T] = []
    for path in folder.glob("[!.]*.json"):
        with contextlib.suppress(FileNotFoundError):
            each = kind(**json.loads(path.read_bytes()))
            if tenant is None or each.tenant == tenant:
                found.append(each)
    return sorted(found, key=lambda each: (each.created_at, each.id), reverse=True)
