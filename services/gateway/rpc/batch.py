"""BatchGenerate: many requests over one call, a window of them at a time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace

from octavo.inference.v1 import generation_pb2
from octavo.services.common.errors import Reason, ServingError, to_status
from octavo.services.common.interceptor import hold_request
from octavo.services.common.request_memory import Hold
from octavo.services.gateway.requests.accounting import Call
from octavo.services.gateway.requests.calls import GenerateCalls
from octavo.services.gateway.requests.generation import ask_for_whole_answer, whole_answer

Write = Callable[[generation_pb2.BatchGenerateResponse], Awaitable[None]]

_MAX_PAUSE_S = 5.0
_NO_ROOM = (Reason.QUEUE_FULL, Reason.QUOTA_EXCEEDED, Reason.SCHEDULER_UNREACHABLE, Reason.NO_WORKERS)


@dataclass(frozen=True)
class BatchLimits:
    """What one call may take.

    window  items that are read and not answered yet
    wait_s  how long an item waits for room in the queue before it is answered with the refusal
    """

    window: int
    wait_s: float


class BatchCall:
    """One call of BatchGenerate."""

    def __init__(self, calls: GenerateCalls, limits: BatchLimits, call: Call) -> None:
        self._calls = calls
        self._wait_s = limits.wait_s
        self._room = asyncio.Semaphore(limits.window)
        self._call = call
        self._writing = asyncio.Lock()
        self._reading: asyncio.Timeout | None = None
        self._interrupted: ServingError | None = None

    async def run(self, requests: AsyncIterator[generation_pb2.BatchGenerateRequest], write: Write) -> None:
        """Answer every item. Raises ServingError, once the running items are answered, if the gateway stops."""
        async with asyncio.TaskGroup() as items:
            try:
                async with asyncio.timeout(None) as self._reading:
                    number = 0
                    async for request in requests:
                        await self._room.acquire()
                        items.create_task(self._answer(number, request, hold_request(), write))
                        number += 1
            except TimeoutError:
                if self._interrupted is None:
                    raise
            except ServingError as error:  # a request that cannot be read: those before it are answered
                self._interrupted = error
            finally:
                self._reading = None
        if self._interrupted is not None:
            raise self._interrupted

    async def _answer(
        self, number: int, request: generation_pb2.BatchGenerateRequest, hold: Hold | None, write: Write
    ) -> None:
        try:
            response = await self._outcome(request, f"{self._call.request_id}-{number}")
            if response is not None:
                async with self._writing:
                    await write(response)
        finally:
            if hold is not None:
                hold.release()
            self._room.release()  # only now: answers that their client does not read count, too

    async def _outcome(
        self, request: generation_pb2.BatchGenerateRequest, request_id: str
    ) -> generation_pb2.BatchGenerateResponse | None:
        """Return what an item came to; None if the gateway stops and another one has to answer it."""
        response = generation_pb2.BatchGenerateResponse(item_id=request.item_id)
        try:
            await self._calls.check(request, self._call.tenant)
            response.response.CopyFrom(await self._generate(request.generation, request_id))
        except ServingError as error:
            if self._calls.draining and error.reason in (Reason.DRAINING, Reason.STREAM_INTERRUPTED):
                self._interrupt()
                return None
            response.error_status = to_status(error, request_id).SerializeToString()
        return response

    async def _generate(
        self, generation: generation_pb2.Generation, request_id: str
    ) -> generation_pb2.GenerateResponse:
        """Return an item's whole output; wait for room in the queue. Raises ServingError.

        An item is one call in all records, however often it is tried.
        """
        ask_for_whole_answer(generation)
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._wait_s
        with self._calls.recorded(replace(self._call, request_id=request_id), generation.model) as record:
            while True:
                try:
                    async with self._calls.attempt(record, generation) as run:
                        coalesce_ms = generation.output.max_coalesce_ms
                        return await whole_answer(run, generation.candidate_count or 1, coalesce_ms)
                except ServingError as error:
                    pause_s = min(max(error.retry_after_ms / 1000, 0.05), _MAX_PAUSE_S) * random.uniform(1.0, 1.2)
                    if error.reason not in _NO_ROOM or loop.time() + pause_s > give_up_at:
                        raise
                await asyncio.sleep(pause_s)

    def _interrupt(self) -> None:
        """Read no further items: the client sends what was not answered to another gateway."""
        if self._interrupted is None:
            message = "the gateway is stopping; send the items without a result again"
            self._interrupted = ServingError(Reason.DRAINING, message, retry_after_ms=500)
        if self._reading is not None and not self._reading.expired():
            self._reading.reschedule(asyncio.get_running_loop().time())
