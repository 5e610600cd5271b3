"""grpc.health.v1: SERVING only while a generate call could succeed."""

from __future__ import annotations

import asyncio
from typing import Any

from grpc_health.v1 import health, health_pb2

from octavo.services.gateway.schedulers.pool import SchedulerPool

SERVICE_NAMES = (
    "octavo.inference.v1.GenerationService",
    "octavo.inference.v1.EmbeddingService",
    "octavo.inference.v1.ModelService",
    "octavo.inference.v1.TokenizerService",
    "octavo.inference.v1.LoadService",
)
# The whole server, and generating, need a scheduler with workers; the rest needs the gateway only.
_NEED_SCHEDULER = ("", *SERVICE_NAMES[:2])
_CHECK_S = 0.25
_CHECK_UNREADY_S = 0.02  # whoever waits for this gateway waits for that


class _Health(health.aio.HealthServicer):  # type: ignore[name-defined, misc]  # the stubs do not know it
    """The library's servicer, with the call that it lacks."""

    async def List(self, request: Any, context: Any) -> Any:  # noqa: N802 - named by the proto
        """Return the status of every service."""
        del request, context
        statuses = {name: health_pb2.HealthCheckResponse(status=status) for name, status in self._server_status.items()}
        return health_pb2.HealthListResponse(statuses=statuses)


class HealthMonitor:
    """Keeps the statuses of all services current."""

    def __init__(self, schedulers: SchedulerPool) -> None:
        self.servicer = _Health()
        self._schedulers = schedulers
        self._task: asyncio.Task[None] | None = None
        self._drained = False

    async def start(self) -> None:
        """Set the first statuses and go on checking until `stop`."""
        for name in ("", *SERVICE_NAMES):
            await self._set(name, name not in _NEED_SCHEDULER)
        self._task = asyncio.create_task(self._check())

    async def drain(self, drained: bool) -> None:
        """Set every service to NOT_SERVING until this is called with False."""
        self._drained = drained
        for name in ("", *SERVICE_NAMES):
            await self._set(name, not drained and (name not in _NEED_SCHEDULER or self.ready()))

    async def stop(self) -> None:
        """Set every service to NOT_SERVING, for good."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.servicer.enter_graceful_shutdown()

    def ready(self) -> bool:
        """Return whether a generate call could succeed now."""
        return self._schedulers.ready

    async def _check(self) -> None:
        before = False
        while True:
            now = self.ready() and not self._drained
            if now != before:
                for name in _NEED_SCHEDULER:
                    await self._set(name, now)
                before = now
            await asyncio.sleep(_CHECK_S if now else _CHECK_UNREADY_S)

    async def _set(self, name: str, serving: bool) -> None:
        statuses = health_pb2.HealthCheckResponse
        await self.servicer.set(name, statuses.SERVING if serving else statuses.NOT_SERVING)
