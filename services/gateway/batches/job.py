"""Runs one batch: checks its file, answers its requests, and makes files of the results."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from octavo.services.batch.lines import Line, read_lines
from octavo.services.batch.results import Answer, ResultFile
from octavo.services.batch.runner import BatchRun, Sender
from octavo.services.gateway.batches.store import BatchStore, StoredBatch

_MAX_ERRORS = 20
_POLL_S = 1.0
_GIVE_UP_S = 3600.0


class BatchJob:
    """A batch whose lock is held. It can be stopped between any two steps, by a kill too, and be begun again.

    make_sender  returns what sends the requests of a tenant
    window       most requests on their way at once
    """

    def __init__(
        self,
        store: BatchStore,
        batch: StoredBatch,
        make_sender: Callable[[StoredBatch], Sender],
        window: int,
        max_requests: int,
    ) -> None:
        self._store = store
        self._batch = batch
        self._sender = make_sender(batch)
        self._window = window
        self._max_requests = max_requests
        self._input = store.data_path(batch.input_file_id)

    async def run(self) -> None:
        """Go on from the state that the batch is in, to its end. Raises what only a bug or a broken disk raises."""
        batch = self._batch
        if batch.status == "validating":
            await asyncio.to_thread(self._validate)
        if batch.status in ("in_progress", "cancelling"):
            await self._answer_all()
        if batch.status in ("finalizing", "cancelling"):
            await asyncio.to_thread(self._finish)

    def _validate(self) -> None:
        """Count the requests, and refuse the whole batch if a line is none: nothing was computed yet."""
        batch = self._batch
        try:
            for line in self._lines():
                batch.total += 1
                if line.fault:
                    batch.errors.append({"code": "invalid_line", "line": line.index + 1, "message": line.fault})
                elif batch.total > self._max_requests:
                    message = f"there are more than {self._max_requests} requests: make several batches of them"
                    batch.errors.append({"code": "too_many_requests", "line": line.index + 1, "message": message})
                    break
                if len(batch.errors) == _MAX_ERRORS:
                    break
        except FileNotFoundError:
            batch.errors.append({"code": "file_deleted", "line": None, "message": "the input file was deleted"})
        if not batch.total and not batch.errors:
            batch.errors.append({"code": "empty_file", "line": None, "message": "the input file has no requests"})
        batch.enter("failed" if batch.errors else "in_progress")
        self._store.save(batch)

    async def _answer_all(self) -> None:
        batch = self._batch
        with ResultFile(self._store.results_path(batch)) as results:
            self._count(results)
            if batch.status == "in_progress":
                run = BatchRun(self._lines(), results, self._sender, window=self._window, give_up_s=_GIVE_UP_S)
                running = asyncio.create_task(run.run())
                try:
                    await self._watch(running, results)
                finally:
                    running.cancel()
                    await asyncio.gather(running, return_exceptions=True)
            self._count(results)

    async def _watch(self, running: asyncio.Task[None], results: ResultFile) -> None:
        """Follow a run to its end, or until the batch is cancelled or expires."""
        batch = self._batch
        while not running.done():
            await asyncio.wait((running,), timeout=_POLL_S)
            if await asyncio.to_thread(self._store.is_to_be_cancelled, batch):
                batch.enter("cancelling")
                break
            if time.time() >= batch.expires_at:
                batch.expired_at = int(time.time())
                break
            self._count(results)
            await asyncio.to_thread(self._store.save, batch)
        else:
            running.result()
        if batch.status == "in_progress":
            batch.enter("finalizing")
        await asyncio.to_thread(self._store.save, batch)

    def _count(self, results: ResultFile) -> None:
        self._batch.failed = results.num_failed
        self._batch.completed = results.num_done - results.num_failed

    def _finish(self) -> None:
        """Part the results into the file of answers and the file of errors. Done again as a whole after a kill."""
        batch = self._batch
        if batch.expired_at is not None:
            self._expire_rest()
        answers, errors = self._store.temporary_path(), self._store.temporary_path()
        with contextlib.ExitStack() as stack:
            stack.callback(answers.unlink, missing_ok=True)
            stack.callback(errors.unlink, missing_ok=True)
            with (
                answers.open("xb") as good,
                errors.open("xb") as bad,
                self._store.results_path(batch).open("rb") as results,
            ):
                for result in results:
                    (good if b'"response": {"status_code": 200,' in result else bad).write(result)
            batch.output_file_id = self._keep(answers, "output")
            batch.error_file_id = self._keep(errors, "errors")
        batch.enter(
            "cancelled" if batch.status == "cancelling" else "expired" if batch.expired_at is not None else "completed"
        )
        self._store.save(batch)
        self._store.remove_working_files(batch)

    def _expire_rest(self) -> None:
        """Give each request without a result an error that says so."""
        expired = Answer(0, "", {"code": "batch_expired", "message": "the batch expired before this was answered"})
        with ResultFile(self._store.results_path(self._batch)) as results:
            for line in self._lines():
                if not results.has(line):
                    results.add(line, expired)
            self._count(results)

    def _keep(self, path: Path, what: str) -> str | None:
        batch = self._batch
        if not path.stat().st_size:
            return None
        return self._store.add_result(batch, what, path).id

    def _lines(self) -> Iterator[Line]:
        return read_lines(self._input, {}, self._batch.endpoint)
