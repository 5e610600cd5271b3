"""Generate calls, whichever listener they came in by: counted, admitted by the scheduler, ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from octavo.inference.v1 import generation_pb2
from octavo.services.common.errors import Reason, ServingError
from octavo.services.gateway.generation import GenerationRun
from octavo.services.gateway.model import Models
from octavo.services.gateway.prepare import prepare
from octavo.services.gateway.scheduler_pool import SchedulerPool


class GenerateCalls:
    """All generate calls of this gateway."""

    def __init__(self, models: Models, schedulers: SchedulerPool, max_requests: int) -> None:
        self._models = models
        self._schedulers = schedulers
        self._max_requests = max_requests
        self._idle = asyncio.Event()
        self._idle.set()
        self.num_requests = 0
        """Calls that run now."""
        self.draining = False
        """New calls are refused."""

    async def wait_idle(self) -> None:
        """Return when no call runs."""
        await self._idle.wait()

    @asynccontextmanager
    async def admitted(
        self,
        generation: generation_pb2.Generation,
        request_id: str,
        tenant: str,
        headers: Mapping[str, str],
        deadline: float | None,
    ) -> AsyncIterator[GenerationRun]:
        """Submit a request that obeys the rules of its fields, and wait for its admission. Raises ServingError.

        headers: the call's metadata, as for `prepare`; deadline: a time of the event loop, or None.
        However the body ends, the scheduler is told unless it ended the request itself.
        """
        self._enter()
        try:
            workers_limit = self._schedulers.max_model_len
            prepared = await prepare(generation, self._models, workers_limit, request_id, tenant, headers)
            remaining_s = None if deadline is None else deadline - asyncio.get_running_loop().time()
            session_id = generation.scheduling.session_id
            stream = self._schedulers.submit(prepared.submit, remaining_s, session_id)
            try:
                while stream.admitted is None and stream.error is None:
                    await stream.wait()
                if stream.admitted is None:
                    assert stream.error is not None, "a stream is admitted or fails"
                    raise stream.error
                yield GenerationRun(prepared, stream)
            finally:
                stream.close()
        finally:
            self._leave()

    def _enter(self) -> None:
        if self.draining:
            raise ServingError(Reason.DRAINING, "the gateway is stopping; try again", retry_after_ms=500)
        if self.num_requests >= self._max_requests:
            message = f"{self.num_requests} calls are running, as many as this gateway takes; try again later"
            raise ServingError(Reason.QUEUE_FULL, message, retry_after_ms=1000)
        self.num_requests += 1
        self._idle.clear()

    def _leave(self) -> None:
        self.num_requests -= 1
        if self.num_requests == 0:
            self._idle.set()
