"""Runs the batches of a folder that nobody else runs: new ones, and what a gateway that died left."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from octavo.services.batch.runner import Sender
from octavo.services.gateway.batches.job import BatchJob
from octavo.services.gateway.batches.objects import StoredBatch
from octavo.services.gateway.batches.store import BatchStore, Claim

_log = logging.getLogger(__name__)
_SCAN_S = 5.0
_CARE_S = 60.0
_PUT_OFF_S = (5.0, 600.0)
_MAX_FAILURES = 10


@dataclass(frozen=True)
class JobLimits:
    """jobs: batches at once; window: requests of a batch at once; max_requests: of a batch in all."""

    jobs: int
    window: int
    max_requests: int


@dataclass
class _Failures:
    """How often a batch stopped with an error, and until when others go first."""

    count: int = 0
    until: float = 0.0


class BatchJobs:
    """The batches that this gateway runs, and the care for the store."""

    def __init__(self, store: BatchStore, make_sender: Callable[[StoredBatch], Sender], limits: JobLimits) -> None:
        self._store = store
        self._make_sender = make_sender
        self._limits = limits
        self._running: dict[str, asyncio.Task[None]] = {}
        self._failures: dict[str, _Failures] = {}
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Look for batches, and for what has expired, from now on."""
        self._tasks = [asyncio.create_task(self._scan()), asyncio.create_task(self._care())]

    def wake(self) -> None:
        """Look at once: there is a new batch."""
        self._wake.set()

    async def stop(self) -> None:
        """Stop all batches where they are; another gateway, or this one's next start, goes on with them."""
        tasks = [*self._tasks, *self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _scan(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._begin()
            except Exception:
                _log.exception("cannot look for batches; it will be tried again")
            try:
                async with asyncio.timeout(_SCAN_S):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _begin(self) -> None:
        """Begin batches that nobody runs, while there is room."""
        if len(self._running) >= self._limits.jobs:
            return
        waiting = await asyncio.to_thread(self._store.waiting)
        known = {batch_id for _, batch_id in waiting}
        self._failures = {batch_id: each for batch_id, each in self._failures.items() if batch_id in known}
        for tenant, batch_id in waiting:
            if len(self._running) >= self._limits.jobs:
                break
            failures = self._failures.get(batch_id)
            if batch_id in self._running or (failures is not None and time.monotonic() < failures.until):
                continue
            claim = await asyncio.to_thread(self._store.claim, tenant, batch_id)
            if claim is not None:
                self._running[batch_id] = asyncio.create_task(self._run(claim))

    async def _run(self, claim: Claim) -> None:
        """Run a batch; if it cannot go on, others go first for a while."""
        batch_id = claim.batch_id
        try:
            batch = await asyncio.to_thread(self._store.batch, claim.tenant, batch_id)  # as its last runner left it
            if batch.running:
                limits = self._limits
                job = BatchJob(self._store, batch, self._make_sender, limits.window, limits.max_requests)
                failures = self._failures.get(batch_id, _Failures())
                if failures.count >= _MAX_FAILURES and time.time() >= batch.expires_at:
                    await asyncio.to_thread(job.give_up)
                else:
                    await job.run()
        except Exception:
            failures = self._failures.setdefault(batch_id, _Failures())
            least, longest = _PUT_OFF_S
            put_off_s = min(least * 2**failures.count, longest)
            failures.count += 1
            failures.until = time.monotonic() + put_off_s
            _log.exception("batch %s stopped; it will be gone on with in %.0f s", batch_id, put_off_s)
        finally:
            claim.release()
            del self._running[batch_id]
            self._wake.set()

    async def _care(self) -> None:
        """Remove what has expired."""
        while True:
            try:
                while await asyncio.to_thread(self._store.remove_expired):
                    pass
            except Exception:
                _log.exception("cannot remove expired files and batches; it will be tried again")
            await asyncio.sleep(_CARE_S)
