"""The files of a store: rows of its database, and their bytes beside it, files/ID.data.

A file's row is there before its bytes and goes after them, so a kill leaves nothing that is not counted, or not removed
in the end.
"""

from __future__ import annotations

import errno
import os
import secrets
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from octavo.services.common import folders
from octavo.services.common.errors import Reason, Resource, ServingError
from octavo.services.gateway.batches.index import Index, usage_of
from octavo.services.gateway.batches.objects import StoredFile, StoreLimits

_UNRESERVED_BYTES = 16 << 20  # of a file being written, at most so much is not counted yet
_WRITING_S = 2 * 3600  # longer than any upload may take
_VISIBLE = "kept AND (expires_at IS NULL OR expires_at > :now)"
_IS_INPUT = "EXISTS (SELECT 1 FROM batches WHERE running AND input_file_id = files.id)"


class FileWriter:
    """A file being written, in its place. A context: what was not kept is removed at the end."""

    def __init__(self, store: FileStore, file_id: str, tenant: str, reserved: int | None) -> None:
        """`reserved`: bytes that are counted already; None: no limit holds."""
        self.id = file_id
        self.tenant = tenant
        self.size = 0
        self._store = store
        self._reserved = reserved
        self._file = store.data_path(file_id).open("wb")
        self._is_kept = False

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Close it, and remove it if it was not kept. Raises OSError."""
        try:
            self._file.close()
        finally:
            if not self._is_kept:
                self._store.remove(self.id)

    def write(self, data: bytes) -> int:
        """Append. Raises QUOTA_EXCEEDED, OSError."""
        self.size += len(data)
        if self._reserved is not None and self.size > self._reserved + _UNRESERVED_BYTES:
            self._reserved = self.size
            self._store.reserve(self)
        return self._file.write(data)

    def seek(self, place: int) -> int:
        """Do nothing: forms seek to the beginning when a file is there."""
        return place

    def close(self) -> None:
        """Do nothing: forms close their files, and this one has still to be kept then."""

    def sync(self) -> None:
        """Have all of it on the disk, under its name. Raises OSError."""
        self._file.flush()
        os.fsync(self._file.fileno())
        folders.sync(self._store.data_path(self.id).parent)

    def keep(self, filename: str, purpose: str, expires_after_s: int | None = None) -> StoredFile:
        """Make it a file that its tenant sees. Raises QUOTA_EXCEEDED, OSError."""
        kept = self._store.keep(self, filename, purpose, expires_after_s)
        self._is_kept = True
        return kept

    def leave(self) -> None:
        """Do not remove it at the end: it was kept together with others."""
        self._is_kept = True


class FileStore:
    """See the module. Every call blocks."""

    def __init__(self, folder: Path, index: Index, limits: StoreLimits) -> None:
        """Make the folder. Raises OSError."""
        self._folder = folder
        self._index = index
        self._limits = limits
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def begin(self, tenant: str, size: int) -> FileWriter:
        """Begin a file of at least `size` bytes, which count from now on. Raises QUOTA_EXCEEDED, OSError."""
        file_id = f"file_{secrets.token_hex(16)}"
        with self._index.change() as db:
            check_room(db, self._limits, tenant, 1, size)
            _insert(db, file_id, tenant, "", "", size)
        return FileWriter(self, file_id, tenant, size)

    def begin_result(self, file_id: str, tenant: str, filename: str) -> FileWriter:
        """Begin a file of results: of any size, since the work is done. The same file if it is done again."""
        with self._index.change() as db:
            _insert(db, file_id, tenant, filename, "batch_output", 0)
        return FileWriter(self, file_id, tenant, None)

    def reserve(self, writer: FileWriter) -> None:
        """Count the bytes that a file has by now. Raises QUOTA_EXCEEDED, OSError."""
        with self._index.change() as db:
            _set_size(db, writer)
            check_room(db, self._limits, writer.tenant)

    def keep(self, writer: FileWriter, filename: str, purpose: str, expires_after_s: int | None) -> StoredFile:
        """Make a file visible, as large as it has become. Raises QUOTA_EXCEEDED, OSError."""
        writer.sync()
        with self._index.change() as db:
            db.execute("UPDATE files SET filename = ?, purpose = ? WHERE id = ?", (filename, purpose, writer.id))
            self.show(db, writer, expires_after_s)
            check_room(db, self._limits, writer.tenant)
        return self.get(writer.tenant, writer.id)

    def show(self, db: sqlite3.Connection, writer: FileWriter, expires_after_s: int | None) -> None:
        """Make a file that is on the disk visible, in a transaction. Raises OSError."""
        now = int(time.time())
        _set_size(db, writer)
        db.execute(
            "UPDATE files SET created_at = ?, expires_at = ?, kept = 1 WHERE id = ?",
            (now, self._limits.end_of(now, expires_after_s), writer.id),
        )

    def check(self, db: sqlite3.Connection, tenant: str, file_id: str) -> None:
        """Raise REQUEST_NOT_FOUND if a tenant has no such file, in a transaction."""
        found = f"SELECT 1 FROM files WHERE id = :id AND tenant = :tenant AND {_VISIBLE}"  # noqa: S608
        if db.execute(found, {"id": file_id, "tenant": tenant, "now": int(time.time())}).fetchone() is None:
            raise not_found("file", file_id)

    def get(self, tenant: str, file_id: str) -> StoredFile:
        """Return a tenant's file. Raises REQUEST_NOT_FOUND."""
        for row in self._index.select(
            "files", f"id = :id AND tenant = :tenant AND {_VISIBLE}", id=file_id, tenant=tenant
        ):
            return _file(row)
        raise not_found("file", file_id)

    def list(
        self, tenant: str, limit: int, after: str | None = None, purpose: str | None = None
    ) -> Sequence[StoredFile]:
        """Return a tenant's files, newest first, those after the one that `after` names."""
        where = f"{_VISIBLE} AND (:purpose IS NULL OR purpose = :purpose)"
        return [_file(row) for row in self._index.page("files", where, tenant, limit, after, purpose=purpose)]

    def data_path(self, file_id: str) -> Path:
        """Return where the bytes are of a file that is in the database."""
        return self._folder / f"{file_id}.data"

    def delete(self, tenant: str, file_id: str) -> None:
        """Delete a tenant's file; its bytes stay, and count, while a batch needs them. Raises REQUEST_NOT_FOUND."""
        with self._index.change() as db:
            self.check(db, tenant, file_id)
            db.execute("UPDATE files SET expires_at = 0 WHERE id = ?", (file_id,))
            (is_input,) = db.execute(f"SELECT {_IS_INPUT} FROM files WHERE id = ?", (file_id,)).fetchone()  # noqa: S608
        if not is_input:
            self.remove(file_id)

    def remove_expired(self, limit: int) -> int:
        """Remove files that nobody sees any more, and no batch needs; return how many. Raises OSError."""
        rows = self._index.select("files", f"expires_at <= :now AND NOT {_IS_INPUT} LIMIT :limit", limit=limit)
        for row in rows:
            self.remove(row["id"])
        return len(rows)

    def remove(self, file_id: str) -> None:
        """Remove a file that nobody sees. Raises OSError."""
        self.data_path(file_id).unlink(missing_ok=True)
        with self._index.change() as db:
            db.execute("DELETE FROM files WHERE id = ?", (file_id,))


def check_room(db: sqlite3.Connection, limits: StoreLimits, tenant: str, files: int = 0, size: int = 0) -> None:
    """Raise QUOTA_EXCEEDED if a tenant has too much, with `files` and `size` bytes in addition."""
    usage = usage_of(db, tenant)
    total_files, total = usage["files"] + files, usage["bytes"] + size
    if total_files > limits.max_files or total > limits.max_total_bytes:
        raise ServingError(
            Reason.QUOTA_EXCEEDED,
            f"it would be {total_files} files that are kept, with {total} bytes; at most "
            f"{limits.max_files} and {limits.max_total_bytes} are allowed: delete some",
            quota_subject="tenant",
        )


def not_found(kind: str, object_id: str) -> ServingError:
    """Return the error for a "file" or a "batch" that is not there, or is another tenant's."""
    resource = Resource(kind, object_id[:64])
    return ServingError(Reason.REQUEST_NOT_FOUND, f"there is no {kind} {object_id[:64]!r}", resource=resource)


def _insert(db: sqlite3.Connection, file_id: str, tenant: str, filename: str, purpose: str, size: int) -> None:
    now = int(time.time())
    db.execute(
        "INSERT INTO files (id, tenant, filename, purpose, bytes, created_at, expires_at, kept) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, 0) "
        "ON CONFLICT (id) DO UPDATE SET bytes = excluded.bytes, expires_at = excluded.expires_at, kept = 0",
        (file_id, tenant, filename, purpose, size, now, now + _WRITING_S),
    )


def _set_size(db: sqlite3.Connection, writer: FileWriter) -> None:
    if not db.execute("UPDATE files SET bytes = ? WHERE id = ? AND NOT kept", (writer.size, writer.id)).rowcount:
        raise OSError(errno.ETIMEDOUT, f"{writer.id} was given up: it took longer than {_WRITING_S} s")


def _file(row: sqlite3.Row) -> StoredFile:
    return StoredFile(*(row[each.name] for each in fields(StoredFile)))
