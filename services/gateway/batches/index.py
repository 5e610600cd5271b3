"""The database of a store: which files and batches there are, and what each tenant has of them.

A rollback journal and not a write-ahead log, which needs memory that all its processes share: so gateways of several
machines may have one folder, as long as its file system has locks (NFS 4 has).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from octavo.services.gateway.batches.objects import StoredBatch

_VERSION = 1
_BUSY_S = 30.0

# `usage` is kept by triggers, so it is true whatever statement changes the rows.
_SCHEMA = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY,     -- grows with time: the order of lists
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL,         -- of a file that is being written: what is reserved for it
    created_at INTEGER NOT NULL,
    expires_at INTEGER,             -- from then on nobody sees it, and it is removed; NULL: never
    kept INTEGER NOT NULL           -- 0 while it is being written
);
CREATE INDEX files_of_tenant ON files (tenant, number);
CREATE INDEX files_by_expiry ON files (expires_at) WHERE expires_at IS NOT NULL;

CREATE TABLE batches (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    running INTEGER NOT NULL,
    input_file_id TEXT NOT NULL,
    keep_until INTEGER,             -- NULL: for ever, or until it ends
    cancel INTEGER NOT NULL DEFAULT 0,
    object TEXT NOT NULL            -- StoredBatch as JSON
);
CREATE INDEX batches_of_tenant ON batches (tenant, number);
CREATE INDEX batches_running ON batches (tenant, number, id) WHERE running;
CREATE INDEX batches_ended ON batches (tenant, number) WHERE NOT running;
CREATE INDEX batches_by_input ON batches (input_file_id) WHERE running;
CREATE INDEX batches_by_expiry ON batches (keep_until) WHERE keep_until IS NOT NULL;

CREATE TABLE usage (
    tenant TEXT PRIMARY KEY,
    files INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0,
    running INTEGER NOT NULL DEFAULT 0,
    ended INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TRIGGER file_added AFTER INSERT ON files BEGIN
    INSERT OR IGNORE INTO usage (tenant) VALUES (NEW.tenant);
    UPDATE usage SET files = files + 1, bytes = bytes + NEW.bytes WHERE tenant = NEW.tenant;
END;
CREATE TRIGGER file_changed AFTER UPDATE OF bytes ON files BEGIN
    UPDATE usage SET bytes = bytes + NEW.bytes - OLD.bytes WHERE tenant = NEW.tenant;
END;
CREATE TRIGGER file_removed AFTER DELETE ON files BEGIN
    UPDATE usage SET files = files - 1, bytes = bytes - OLD.bytes WHERE tenant = OLD.tenant;
END;
CREATE TRIGGER batch_added AFTER INSERT ON batches BEGIN
    INSERT OR IGNORE INTO usage (tenant) VALUES (NEW.tenant);
    UPDATE usage SET running = running + NEW.running, ended = ended + 1 - NEW.running WHERE tenant = NEW.tenant;
END;
CREATE TRIGGER batch_ended AFTER UPDATE OF running ON batches WHEN NEW.running != OLD.running BEGIN
    UPDATE usage SET running = running + NEW.running - OLD.running, ended = ended - NEW.running + OLD.running
        WHERE tenant = NEW.tenant;
END;
CREATE TRIGGER batch_removed AFTER DELETE ON batches BEGIN
    UPDATE usage SET running = running - OLD.running, ended = ended - 1 + OLD.running WHERE tenant = OLD.tenant;
END;
CREATE TRIGGER tenant_left AFTER UPDATE ON usage
    WHEN NEW.files = 0 AND NEW.running = 0 AND NEW.ended = 0 BEGIN
    DELETE FROM usage WHERE tenant = NEW.tenant;
END;
"""


class Index:
    """A connection to the database, for all threads of a process: one transaction at a time."""

    def __init__(self, path: Path) -> None:
        """Open it, or make it. Raises OSError."""
        self._path = path
        self._lock = threading.Lock()
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        with self._errors():
            # No transactions but ours; the lock above makes threads take turns.
            self._db = sqlite3.connect(path, _BUSY_S, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode = TRUNCATE")
            self._db.execute("PRAGMA synchronous = FULL")
        with self.change() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version > _VERSION:
                raise OSError(errno.EINVAL, f"{path} was made by a newer version: use that, or another folder")
            if not version:
                for statement in _statements(_SCHEMA):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {_VERSION}")

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """Begin a transaction that writes; it is on the disk at the end, or undone. Raises OSError."""
        with self._lock, self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def select(self, table: str, where: str, **values: object) -> list[sqlite3.Row]:
        """Return rows of a table; `:now` is the time. Raises OSError."""
        return self.rows(f"SELECT * FROM {table} WHERE {where}", {"now": int(time.time()), **values})  # noqa: S608

    def page(
        self, table: str, where: str, tenant: str, limit: int, after: str | None, **values: object
    ) -> list[sqlite3.Row]:
        """Return a tenant's rows, newest first, those after the one that `after` names. Raises OSError."""
        if after is not None:
            where += f" AND number < (SELECT number FROM {table} WHERE id = :after AND tenant = :tenant)"  # noqa: S608
        where = f"tenant = :tenant AND {where} ORDER BY number DESC LIMIT :limit"
        return self.select(table, where, tenant=tenant, limit=limit, after=after, **values)

    def rows(self, sql: str, values: Mapping[str, object] | None = None) -> list[sqlite3.Row]:
        """Return what a query finds. Raises OSError."""
        with self._lock, self._errors():
            return self._db.execute(sql, values or {}).fetchall()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn the library's errors into the disk's: it is full, it is broken, it is locked for too long."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise OSError(errno.EIO, f"{self._path}: {error}") from error


def usage_of(db: sqlite3.Connection, tenant: str) -> Mapping[str, int]:
    """Return what a tenant has: files, their bytes, running and ended batches."""
    row = db.execute("SELECT files, bytes, running, ended FROM usage WHERE tenant = ?", (tenant,)).fetchone()
    return dict(row) if row is not None else {"files": 0, "bytes": 0, "running": 0, "ended": 0}


def insert_batch(db: sqlite3.Connection, batch: StoredBatch, keep_until: int | None) -> None:
    """Add a batch, unless it is there."""
    db.execute(
        "INSERT OR IGNORE INTO batches (id, tenant, running, input_file_id, keep_until, object) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        (batch.id, batch.tenant, batch.running, batch.input_file_id, keep_until, encoded(batch)),
    )


def encoded(batch: StoredBatch) -> str:
    """Return the text that the database has of a batch."""
    return json.dumps(asdict(batch))


def _statements(script: str) -> Iterator[str]:
    """Part a script, which `executescript` would commit."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
