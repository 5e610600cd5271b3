"""What may take too long or too much, computed beside the gateway: the gateway's side of `limited_server`.

One process for each use, which is started again when it has ended. Tenants take turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
import subprocess
import sys
from collections.abc import Callable

from octavo.services.common.errors import ServingError
from octavo.services.gateway.offload.limited_server import ANSWER, REQUEST, SOCKET_BYTES, Outcome, pair
from octavo.services.gateway.offload.shares import Turns

log = logging.getLogger(__name__)
_MAX_WAIT_S = 60.0
_START_S = 60.0
_ANSWER_S = 15.0  # far longer than a fork may live
_SIZE = struct.Struct(">I")


class ProcessError(RuntimeError):
    """The process has ended, or was not ready in time: `returncode` is None. One below 0 is a signal."""

    def __init__(self, returncode: int | None) -> None:
        super().__init__("it was not ready in time" if returncode is None else f"it ended with status {returncode}")
        self.returncode = returncode


class LimitedProcess:
    """Asks a process, `num_at_once` requests at a time."""

    def __init__(
        self,
        module: str,
        first_frame: Callable[[], bytes],
        num_at_once: int,
        max_waiting: int,
        busy: Callable[[], ServingError],
    ) -> None:
        """first_frame: what sets the process up; called in a thread, once for each process that is started.

        busy: makes the error for requests that find no place to wait, wait too long, or get no answer
        """
        self._module = module
        self._first_frame = first_frame
        self._busy = busy
        self._turns = Turns(num_at_once, max_waiting, _MAX_WAIT_S, busy)
        self._process: _Process | None = None
        self._starting = asyncio.Lock()
        self._asking: set[asyncio.Task[tuple[Outcome, bytes] | None]] = set()
        self._warm_up: asyncio.Task[bytes] | None = None
        self._is_closed = False

    def start_soon(self) -> None:
        """Start the process in the background, so that the first request need not wait for it."""
        self._warm_up = asyncio.create_task(self.start())
        self._warm_up.add_done_callback(self._log_failure)

    async def start(self) -> bytes:
        """Start the process, unless it runs; return what it answered when it was set up. Raises ProcessError."""
        return (await self._running()).ready

    async def close(self) -> None:
        """End the process; requests that wait for it get what `busy` makes."""
        self._is_closed = True
        if self._warm_up is not None:
            self._warm_up.cancel()
            await asyncio.gather(self._warm_up, return_exceptions=True)
        if self._process is not None:
            await self._process.close()
        if self._asking:
            await asyncio.wait(self._asking)

    async def ask(self, tenant: str, payload: bytes) -> tuple[Outcome, bytes]:
        """Return what came of a request, and the answer if it is DONE. Raises what `busy` makes."""
        await self._turns.begin(tenant)
        asking = asyncio.create_task(self._ask(payload))
        self._asking.add(asking)
        asking.add_done_callback(self._asking.discard)
        asking.add_done_callback(lambda _: self._turns.end())  # not when the caller leaves: a fork is busy until then
        answer = await asyncio.shield(asking)
        if answer is None or answer[0] is Outcome.LATE:
            raise self._busy()
        return answer

    async def _ask(self, payload: bytes) -> tuple[Outcome, bytes] | None:
        try:
            return await (await self._running()).ask(payload)
        except (ProcessError, OSError) as error:
            if not self._is_closed:
                log.error("%s: the process does not start: %s", self._module, error)
            return None

    async def _running(self) -> _Process:
        """Return the process; a new one if the last one has ended."""
        if self._process is not None and not self._process.has_ended:
            return self._process
        async with self._starting:
            if self._is_closed:
                raise ProcessError(None)
            if self._process is None or self._process.has_ended:
                first = await asyncio.to_thread(self._first_frame)
                self._process = await _Process.start(self._module, first)
                if self._is_closed:  # meanwhile
                    await self._process.close()
            return self._process

    def _log_failure(self, task: asyncio.Task[bytes]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.error("%s: the process does not start: %s", self._module, task.exception())


class _Process:
    """One process, and what it owes."""

    def __init__(
        self, process: subprocess.Popen[bytes], streams: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    ) -> None:
        self._process = process
        self._from, self._to = streams
        self._owed: dict[int, asyncio.Future[tuple[Outcome, bytes] | None]] = {}
        self._num_asked = 0
        self._reader: asyncio.Task[None] | None = None
        self.ready = b""
        self.has_ended = False

    @classmethod
    async def start(cls, module: str, first: bytes) -> _Process:
        """Start one, and wait until it is ready. Raises ProcessError."""
        own, its = pair()
        with its:  # not the event loop's way, which forks: gRPC's threads do not go with that
            streams = await asyncio.open_connection(sock=own, limit=SOCKET_BYTES)
            try:
                command = (sys.executable, "-m", module)
                process = subprocess.Popen(command, stdin=its.fileno(), stdout=its.fileno())  # noqa: ASYNC220 - a ms
            except OSError:
                streams[1].close()
                raise
        self = cls(process, streams)
        try:
            async with asyncio.timeout(_START_S):
                self._to.write(_SIZE.pack(len(first)) + first)
                _, _, self.ready = await self._read_answer()
        except (asyncio.IncompleteReadError, ConnectionError):
            self._to.close()
            raise ProcessError(await asyncio.to_thread(process.wait)) from None  # it has closed its socket: it ends
        except TimeoutError:
            await self.close()
            raise ProcessError(None) from None
        except BaseException:
            await self.close()
            raise
        self._reader = asyncio.create_task(self._read())
        return self

    async def ask(self, payload: bytes) -> tuple[Outcome, bytes] | None:
        """Return the answer to a request; None if none came."""
        self._num_asked += 1
        number = self._num_asked % (1 << 32)
        if self.has_ended:
            return None
        future: asyncio.Future[tuple[Outcome, bytes] | None] = asyncio.get_running_loop().create_future()
        self._owed[number] = future
        self._to.write(REQUEST.pack(len(payload), number) + payload)
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await future
        except TimeoutError:
            log.error("no answer in %g s: the process is started again", _ANSWER_S)
            self._kill()
            return None

    async def close(self) -> None:
        """End it."""
        self._kill()
        if self._reader is not None:
            await self._reader
        await asyncio.to_thread(self._process.wait)

    def _kill(self) -> None:
        self.has_ended = True
        self._process.kill()
        self._to.close()

    async def _read_answer(self) -> tuple[int, Outcome, bytes]:
        size, number, outcome = ANSWER.unpack(await self._from.readexactly(ANSWER.size))
        return number, Outcome(outcome), await self._from.readexactly(size) if size else b""

    async def _read(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                number, outcome, payload = await self._read_answer()
                future = self._owed.pop(number, None)
                if future is not None and not future.done():
                    future.set_result((outcome, payload))
        self.has_ended = True
        self._to.close()
        await asyncio.to_thread(self._process.wait)  # it has closed its socket: it ends
        for future in self._owed.values():
            if not future.done():
                future.set_result(None)
