"""Runs the batches of a folder that nobody else runs: new ones, and what a gateway that died left."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from octavo.services.batch.runner import Sender
from octavo.services.gateway.batches.job import BatchJob
from octavo.services.gateway.batches.store import RUNNING, BatchStore, StoredBatch

_log = logging.getLogger(__name__)
_SCAN_S = 5.0


@dataclass(frozen=True)
class JobLimits:
    """jobs: batches at once; window: requests of a batch at once; max_requests: of a batch in all."""

    jobs: int
    window: int
    max_requests: int


class BatchJobs:
    """The batches that this gateway runs."""

    def __init__(self, store: BatchStore, make_sender: Callable[[StoredBatch], Sender], limits: JobLimits) -> None:
        self._store = store
        self._make_sender = make_sender
        self._limits = limits
        self._running: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        self._scanning: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look for batches from now on."""
        self._scanning = asyncio.create_task(self._scan())

    def wake(self) -> None:
        """Look at once: there is a new batch."""
        self._wake.set()

    async def stop(self) -> None:
        """Stop all batches where they are; another gateway, or this one's next start, goes on with them."""
        tasks = [task for task in (self._scanning, *self._running.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _scan(self) -> None:
        while True:
            try:
                waiting = [
                    batch for batch in await asyncio.to_thread(self._store.batches, None) if batch.status in RUNNING
                ]
                for batch in reversed(waiting):  # the oldest first
                    if len(self._running) < self._limits.jobs and batch.id not in self._running:
                        self._running[batch.id] = asyncio.create_task(self._run(batch))
            except OSError as error:
                _log.warning("cannot look for batches: %s", error)
            self._wake.clear()
            try:
                async with asyncio.timeout(_SCAN_S):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _run(self, found: StoredBatch) -> None:
        """Run a batch if its lock is free."""
        try:
            with self._store.lock(found) as is_ours:
                if not is_ours:
                    return
                batch = self._store.batch(found.tenant, found.id)  # as its last runner left it
                if batch.status in RUNNING:
                    limits = self._limits
                    await BatchJob(self._store, batch, self._make_sender, limits.window, limits.max_requests).run()
        except Exception:
            _log.exception("batch %s stopped; it will be gone on with", found.id)
            await asyncio.sleep(_SCAN_S)
        finally:
            del self._running[found.id]
            self._wake.set()
