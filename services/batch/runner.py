"""Sends the requests of a file, a window of them at a time, and keeps every result."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Protocol

from octavo.services.batch.lines import Line
from octavo.services.batch.results import Answer, ResultFile

_SYNC_S = 5.0
_PAUSE_S = (0.1, 10.0)
_LINES_AT_ONCE = 256
_BUSY = (429, 503)
_SERVER_FAILED = 500
_MAX_FAILURES = 3  # of one request at a server that answers others: then it is the request's fault


class TryAgain(Exception):  # noqa: N818 - no error yet
    """A request was not answered, and may be sent again.

    blameless  whatever it asked for, it would not have been answered: the queue was full, or nobody was there
    """

    def __init__(self, answer: Answer, blameless: bool, retry_after_s: float = 0.0) -> None:
        super().__init__(str(answer.body))
        self.answer = answer
        self.blameless = blameless
        self.retry_after_s = retry_after_s


def final(answer: Answer, retry_after: str) -> Answer:
    """Return an answer that the request will not get a better one than. Raises TryAgain. `retry_after`: the header."""
    if answer.status in _BUSY:
        raise TryAgain(answer, blameless=True, retry_after_s=float(retry_after) if retry_after.isdecimal() else 0.0)
    if answer.status >= _SERVER_FAILED:
        raise TryAgain(answer, blameless=False)
    return answer


class GaveUpError(Exception):
    """No request was answered for a long time; what is done is kept."""


class Sender(Protocol):
    """Sends one request."""

    async def __call__(self, line: Line) -> Answer:
        """Return what came back. Raises TryAgain."""


class BatchRun:
    """One run over `lines`, those that have a result left out.

    window      most requests on their way at once; with `ordered`, results that wait for earlier ones count as well
    give_up_s   how long the run goes on while nothing at all is answered, unless the server is busy with its requests.
                A request that was refused (429, 503) while others were answered, and then alone for so long, fails
    on_result   is called after each result was kept
    """

    def __init__(
        self,
        lines: Iterable[Line],
        results: ResultFile,
        send: Sender,
        *,
        window: int,
        ordered: bool = False,
        give_up_s: float = 300.0,
        on_result: Callable[[Line, Answer], None] | None = None,
    ) -> None:
        self._lines = lines
        self._results = results
        self._send = send
        self._ordered = ordered
        self._give_up_s = give_up_s
        self._on_result = on_result
        self._room = asyncio.Semaphore(window)
        self._order: deque[Line] = deque()
        self._early: dict[int, Answer] = {}
        self._answered_at = 0.0
        self._succeeded_at = 0.0  # when a request was last answered as it wanted
        self._num_sent = 0  # requests that the server has and has not answered

    async def run(self) -> None:
        """Return when every line has its result. Raises GaveUpError, ResultsError, OSError."""
        self._answered_at = asyncio.get_running_loop().time()
        try:
            async with _synced(self._results), asyncio.TaskGroup() as requests:
                for number, line in enumerate(self._lines):
                    if number % _LINES_AT_ONCE == 0:
                        await asyncio.sleep(0)  # millions of lines that are done already stop nobody else
                    if self._results.has(line):
                        continue
                    await self._room.acquire()
                    if self._ordered:
                        self._order.append(line)
                    requests.create_task(self._answer(line))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _answer(self, line: Line) -> None:
        if line.fault:
            answer = Answer(0, "", {"code": "invalid_line", "message": line.fault})
        else:
            answer = await self._persist(line)
        if not self._ordered:
            self._keep(line, answer)
            return
        self._early[line.index] = answer
        while self._order and self._order[0].index in self._early:
            first = self._order.popleft()
            self._keep(first, self._early.pop(first.index))

    def _keep(self, line: Line, answer: Answer) -> None:
        self._results.add(line, answer)
        self._room.release()
        if self._on_result is not None:
            self._on_result(line, answer)

    async def _persist(self, line: Line) -> Answer:
        """Return what a request came to in the end."""
        loop = asyncio.get_running_loop()
        failures = 0
        attempt = 0
        refused_at = 0.0
        while True:
            try:
                self._num_sent += 1
                try:
                    answer = await self._send(line)
                finally:
                    self._num_sent -= 1
            except TryAgain as again:
                failures += not again.blameless
                refused_at = refused_at or loop.time()
                if failures == _MAX_FAILURES or self._is_too_much(again.answer, refused_at):
                    answer = again.answer
                else:
                    silent_s = loop.time() - self._answered_at
                    # A server that has no room because it computes what it got from here is alive.
                    is_alive = again.answer.status in _BUSY and self._num_sent > 0
                    if silent_s > self._give_up_s and not is_alive:
                        raise GaveUpError(f"nothing was answered for {silent_s:.0f} s: {again}") from None
                    least, longest = _PAUSE_S
                    pause_s = min(max(again.retry_after_s, least * 2 ** min(attempt, 10)), longest)
                    await asyncio.sleep(pause_s * random.uniform(1.0, 1.3))
                    attempt += 1
                    continue
            self._answered_at = loop.time()
            if not answer.failed:
                self._succeeded_at = loop.time()
            return answer

    def _is_too_much(self, refused: Answer, refused_at: float) -> bool:
        """Whether a server took other requests, has none of this run left, and yet has no room for this one."""
        now = asyncio.get_running_loop().time()
        is_idle = refused.status in _BUSY and self._num_sent == 0
        return is_idle and refused_at < self._succeeded_at < now - self._give_up_s


@asynccontextmanager
async def _synced(results: ResultFile) -> AsyncIterator[None]:
    """Bring results to the disk every few seconds."""

    async def sync() -> None:
        while True:
            await asyncio.sleep(_SYNC_S)
            await asyncio.to_thread(results.sync)

    syncing = asyncio.create_task(sync())
    try:
        yield
    finally:
        syncing.cancel()
        await asyncio.gather(syncing, return_exceptions=True)
