"""What the store keeps: files and batches, and what a tenant may keep of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

RUNNING = ("validating", "in_progress", "finalizing", "cancelling")
"""States of a batch that somebody has to go on with."""


@dataclass(frozen=True)
class StoreLimits:
    """What one tenant may keep, and for how long.

    max_files          uploads are refused from there on, and new batches, which would make further files
    max_batches        waiting or running ones
    max_ended_batches  those that ended; the oldest go first
    max_uploads        files on their way to one gateway at once
    retention_s        how long files are kept, and batches from their end on; 0: for ever
    """

    max_file_bytes: int
    max_total_bytes: int
    max_files: int = 1000
    max_batches: int = 1000
    max_ended_batches: int = 10_000
    max_uploads: int = 8
    retention_s: int = 0

    def end_of(self, start: int, asked_s: int | None = None) -> int | None:
        """Return until when something is kept that is there since `start`; None: for ever."""
        times = [seconds for seconds in (self.retention_s or None, asked_s) if seconds is not None]
        return start + min(times) if times else None


@dataclass(frozen=True)
class StoredFile:
    """A file; OpenAI's File object, but for `tenant`. Times are seconds since 1970."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int | None = None


@dataclass
class StoredBatch:
    """A batch; OpenAI's Batch object, but for `tenant`. Times are seconds since 1970.

    output_expires_after_s  how long its files of results are kept, if it is less than the store's retention
    """

    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    created_at: int
    expires_at: int
    completion_window: str = "24h"
    status: str = "validating"
    metadata: dict[str, str] | None = None
    output_expires_after_s: int | None = None
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

    @property
    def running(self) -> bool:
        """Somebody has to go on with it."""
        return self.status in RUNNING

    def enter(self, status: str) -> None:
        """Change the state, and note when."""
        self.status = status
        setattr(self, f"{status}_at", int(time.time()))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> StoredBatch:
        """Return the batch that was written like this, by another version too: fields not known here are left out."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})
