"""The folder of files and batches. A database says what there is; the contents are files beside it.

    index.db            see octavo.services.gateway.batches.index
    files/ID.data       the bytes of a file
    batches/ID.results  the journal of a batch that runs
    batches/ID.lock     is locked by whoever runs a batch, and is the only one to write its object

No call costs more because there are many files and batches. Every call blocks for as long as the disk takes: they are
made from threads.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import secrets
import sqlite3
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from octavo.services.common.errors import Reason, ServingError
from octavo.services.gateway.batches.file_store import FileStore, FileWriter, check_room, not_found
from octavo.services.gateway.batches.index import Index, encoded, insert_batch, usage_of
from octavo.services.gateway.batches.objects import StoredBatch, StoreLimits
from octavo.services.gateway.batches.old_format import OldFormat

_log = logging.getLogger(__name__)
_REMOVED_AT_ONCE = 500
_VISIBLE = "(keep_until IS NULL OR keep_until > :now)"


class Claim:
    """The right to run a batch. The system ends it with its process."""

    def __init__(self, tenant: str, batch_id: str, lock: BinaryIO) -> None:
        self.tenant = tenant
        self.batch_id = batch_id
        self._lock = lock

    def release(self) -> None:
        """Let another one run it."""
        self._lock.close()


class BatchStore:
    """See the module. `files`: the files."""

    def __init__(self, folder: Path, limits: StoreLimits) -> None:
        """Make the folders, and take over what an earlier version kept there. Raises OSError."""
        self.limits = limits
        self._batches = folder / "batches"
        self._batches.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._index = Index(folder / "index.db")
        self.files = FileStore(folder / "files", self._index, limits)
        self._old_format = OldFormat(self._index, folder / "files", self._batches, limits)
        self._old_format.adopt_files()
        self._old_format.adopt_batches(self._lock)

    def close(self) -> None:
        """Close the database."""
        self._index.close()

    def add_batch(
        self,
        tenant: str,
        endpoint: str,
        input_file_id: str,
        window_s: int,
        metadata: dict[str, str] | None,
        output_expires_after_s: int | None = None,
    ) -> StoredBatch:
        """Make a batch that waits for somebody to run it. Raises REQUEST_NOT_FOUND, QUOTA_EXCEEDED, OSError."""
        now = int(time.time())
        batch = StoredBatch(
            f"batch_{secrets.token_hex(16)}",
            tenant,
            endpoint,
            input_file_id,
            now,
            now + window_s,
            metadata=metadata,
            output_expires_after_s=output_expires_after_s,
        )
        with self._index.change() as db:
            self.files.check(db, tenant, input_file_id)
            usage = usage_of(db, tenant)
            if usage["running"] >= self.limits.max_batches:
                message = f"{usage['running']} batches are waiting or running; wait for some, or cancel them"
                raise ServingError(Reason.QUOTA_EXCEEDED, message, quota_subject="tenant", retry_after_ms=60_000)
            check_room(db, self.limits, tenant)
            excess = usage["ended"] - self.limits.max_ended_batches
            if excess > 0:
                oldest = "SELECT id FROM batches WHERE tenant = ? AND NOT running ORDER BY number LIMIT ?"
                self._drop(db, [row["id"] for row in db.execute(oldest, (tenant, min(excess, _REMOVED_AT_ONCE)))])
            insert_batch(db, batch, None)
        return batch

    def batch(self, tenant: str, batch_id: str) -> StoredBatch:
        """Return a tenant's batch. Raises REQUEST_NOT_FOUND."""
        where = f"id = :id AND tenant = :tenant AND {_VISIBLE}"
        for batch in _decoded(self._index.select("batches", where, id=batch_id, tenant=tenant)):
            return batch
        raise not_found("batch", batch_id)

    def batches(self, tenant: str, limit: int, after: str | None = None) -> list[StoredBatch]:
        """Return a tenant's batches, newest first, those after the one that `after` names."""
        return _decoded(self._index.page("batches", _VISIBLE, tenant, limit, after))

    def save(self, batch: StoredBatch) -> None:
        """Write the object of a batch that goes on: for whoever has its claim. Raises OSError."""
        assert batch.running, f"{batch.id} is {batch.status}"
        with self._index.change() as db:
            db.execute("UPDATE batches SET object = ? WHERE id = ?", (encoded(batch), batch.id))

    def begin_result(self, batch: StoredBatch, what: str) -> FileWriter:
        """Begin a batch's file of results; the same file if it is done again. Raises OSError."""
        file_id = f"file_{hashlib.sha256(f'{batch.id} {what}'.encode()).hexdigest()[:32]}"
        return self.files.begin_result(file_id, batch.tenant, f"{batch.id}_{what}.jsonl")

    def end(self, batch: StoredBatch, results: Sequence[FileWriter] = ()) -> None:
        """Write the object of a batch that ended, and have its tenant see its files of results. Raises OSError."""
        assert not batch.running, f"{batch.id} is {batch.status}"
        for writer in results:
            writer.sync()  # the journal that could make them again is removed below
        with self._index.change() as db:
            for writer in results:
                self.files.show(db, writer, batch.output_expires_after_s)
            db.execute(
                "UPDATE batches SET object = ?, running = 0, keep_until = ? WHERE id = ?",
                (encoded(batch), self.limits.end_of(int(time.time())), batch.id),
            )
        for writer in results:
            writer.leave()
        self._remove_working_files(batch.id)

    def results_path(self, batch: StoredBatch) -> Path:
        """Return where the results of a running batch are."""
        return self._batches / f"{batch.id}.results"

    def ask_to_cancel(self, batch: StoredBatch) -> None:
        """Tell whoever runs a batch to end it. Raises OSError."""
        with self._index.change() as db:
            db.execute("UPDATE batches SET cancel = 1 WHERE id = ?", (batch.id,))

    def is_to_be_cancelled(self, batch: StoredBatch) -> bool:
        """Return whether somebody asked for that."""
        return any(row["cancel"] for row in self._index.select("batches", "id = :id", id=batch.id))

    def waiting(self) -> list[tuple[str, str]]:
        """Return tenant and id of all batches that somebody has to go on with: tenants in turn, the oldest first."""
        rows = self._index.rows(
            "SELECT tenant, id FROM batches WHERE running "
            "ORDER BY row_number() OVER (PARTITION BY tenant ORDER BY number), number"
        )
        return [(row["tenant"], row["id"]) for row in rows]

    def claim(self, tenant: str, batch_id: str) -> Claim | None:
        """Become the one who runs a batch, unless somebody is, or it has ended. Raises OSError."""
        lock = self._lock(batch_id)
        if lock is None:
            return None
        claim = Claim(tenant, batch_id, lock)
        try:
            is_running = self._index.select("batches", "id = :id AND running", id=batch_id)
        except BaseException:
            claim.release()
            raise
        if not is_running:
            self._remove_working_files(batch_id)
            claim.release()
            return None
        return claim

    def _lock(self, batch_id: str) -> BinaryIO | None:
        lock = (self._batches / f"{batch_id}.lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        except BaseException:
            lock.close()
            raise
        return lock

    # Care

    def remove_expired(self) -> bool:
        """Remove some of what has expired; return whether there may be more. Raises OSError.

        Also takes over what a gateway of an earlier version ran until now.
        """
        self._old_format.adopt_batches(self._lock)
        num_files = self.files.remove_expired(_REMOVED_AT_ONCE)
        where = "keep_until <= :now AND NOT running LIMIT :limit"
        if batches := self._index.select("batches", where, limit=_REMOVED_AT_ONCE):
            with self._index.change() as db:
                self._drop(db, [row["id"] for row in batches])
        return _REMOVED_AT_ONCE in (num_files, len(batches))

    def _drop(self, db: sqlite3.Connection, batch_ids: Sequence[str]) -> None:
        for batch_id in batch_ids:
            self._remove_working_files(batch_id)
        db.executemany("DELETE FROM batches WHERE id = ?", [(batch_id,) for batch_id in batch_ids])

    def _remove_working_files(self, batch_id: str) -> None:
        """Remove what only a running batch needs. Whoever waits for its lock finds that it has ended."""
        for kind in ("results", "lock"):
            (self._batches / f"{batch_id}.{kind}").unlink(missing_ok=True)


def _decoded(rows: Iterable[sqlite3.Row]) -> list[StoredBatch]:
    """Return the batches that rows are. One that cannot be read stops no other."""
    batches = []
    for row in rows:
        try:
            batches.append(StoredBatch.of(json.loads(row["object"])))
        except (ValueError, TypeError):
            _log.exception("batch %s cannot be read", row["id"])
    return batches
