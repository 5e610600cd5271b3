"""Runs one batch: checks its file, answers its requests, and makes files of the results."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator

from octavo.services.batch.lines import Line, read_lines
from octavo.services.batch.results import Answer, ResultFile
from octavo.services.batch.runner import BatchRun, Sender
from octavo.services.gateway.batches.objects import StoredBatch
from octavo.services.gateway.batches.store import BatchStore

_MAX_ERRORS = 20
_POLL_S = 1.0
_GIVE_UP_S = 3600.0


class _InputGoneError(Exception):
    """The bytes of the input file are not there."""


class BatchJob:
    """A batch that is claimed. It can be stopped between any two steps, by a kill too, and be begun again.

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
        self._input = store.files.data_path(batch.input_file_id)

    async def run(self) -> None:
        """Go on from the state that the batch is in, to its end. Raises what only a bug or a broken disk raises."""
        batch = self._batch
        if batch.status == "validating":
            if await asyncio.to_thread(self._store.is_to_be_cancelled, batch):
                batch.enter("cancelling")
            else:
                await asyncio.to_thread(self._validate)
        if batch.status in ("in_progress", "cancelling"):
            try:
                await self._answer_all()
            except _InputGoneError:
                self._add_error("file_deleted", None, "the input file is not there any more")
                batch.enter("finalizing")
        if batch.status in ("finalizing", "cancelling"):
            await asyncio.to_thread(self._finish)

    def give_up(self) -> None:
        """End a batch that cannot be run. Raises OSError."""
        self._add_error("run_failed", None, "it could not be run, often, until its time was over; see the server's log")
        self._batch.enter("failed")
        self._store.end(self._batch)

    def _validate(self) -> None:
        """Count the requests, and refuse the whole batch if a line is none: nothing was computed yet."""
        batch = self._batch
        try:
            for line in self._lines():
                batch.total += 1
                if line.fault:
                    self._add_error("invalid_line", line.index + 1, line.fault)
                elif batch.total > self._max_requests:
                    message = f"there are more than {self._max_requests} requests: make several batches of them"
                    self._add_error("too_many_requests", line.index + 1, message)
                    break
                if len(batch.errors) == _MAX_ERRORS:
                    break
        except _InputGoneError:
            self._add_error("file_deleted", None, "the input file is not there any more")
        if not batch.total and not batch.errors:
            self._add_error("empty_file", None, "the input file has no requests")
        batch.enter("failed" if batch.errors else "in_progress")
        (self._store.save if batch.running else self._store.end)(batch)

    def _add_error(self, code: str, line: int | None, message: str) -> None:
        self._batch.errors.append({"code": code, "line": line, "message": message})

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
            before = (batch.completed, batch.failed)
            self._count(results)
            if (batch.completed, batch.failed) != before:
                await asyncio.to_thread(self._store.save, batch)
        else:
            running.result()
        if batch.status == "in_progress":
            batch.enter("finalizing")
        await asyncio.to_thread(results.sync)  # whoever goes on from there takes those that are missing for unasked
        await asyncio.to_thread(self._store.save, batch)

    def _count(self, results: ResultFile) -> None:
        self._batch.failed = results.num_failed
        self._batch.completed = results.num_done - results.num_failed

    def _finish(self) -> None:
        """Part the results into the file of answers and the file of errors. Done again as a whole after a kill."""
        batch = self._batch
        if batch.expired_at is not None:
            self._expire_rest()
        with (
            self._store.begin_result(batch, "output") as answers,
            self._store.begin_result(batch, "errors") as errors,
        ):
            with self._store.results_path(batch).open("rb") as results:
                for result in results:
                    (answers if b'"response": {"status_code": 200,' in result else errors).write(result)
            batch.output_file_id = answers.id if answers.size else None
            batch.error_file_id = errors.id if errors.size else None
            batch.enter(self._end_of(batch.status))
            self._store.end(batch, [each for each in (answers, errors) if each.size])

    def _end_of(self, status: str) -> str:
        """Return the state that a batch ends in."""
        if status == "cancelling":
            return "cancelled"
        if self._batch.errors:
            return "failed"
        return "expired" if self._batch.expired_at is not None else "completed"

    def _expire_rest(self) -> None:
        """Give each request without a result an error that says so."""
        expired = Answer(0, "", {"code": "batch_expired", "message": "the batch expired before this was answered"})
        with ResultFile(self._store.results_path(self._batch)) as results, contextlib.suppress(_InputGoneError):
            for line in self._lines():
                if not results.has(line):
                    results.add(line, expired)
            self._count(results)

    def _lines(self) -> Iterator[Line]:
        try:
            yield from read_lines(self._input, {}, self._batch.endpoint)
        except FileNotFoundError:
            raise _InputGoneError from None
