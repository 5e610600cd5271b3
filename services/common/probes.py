"""grpc.health.v1 for whoever runs the process, such as Kubernetes: plain, on a port with nothing else on it.

Three services: `startup` and `liveness` are SERVING whenever they are answered, for it is the process's
own event loop that answers; `readiness` is SERVING while new work is taken. None depends on
another process but `readiness`, so nobody is restarted because of a peer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from octavo.services.common.grpc_options import SMALL_MESSAGE_BYTES, public_server_options

_WATCH_S = 0.25
_MAX_STREAMS = 64  # watches by one connection: whoever reaches the port may not pile them up
_ALWAYS = ("startup", "liveness")
_WHILE_READY = ("readiness", "")


class ProbeServer:
    """Answers probes from the moment it starts until it is stopped, also while the process drains."""

    def __init__(self, address: str, is_ready: Callable[[], bool]) -> None:
        """Bind `address`; RuntimeError if it is taken. `is_ready` is asked on the event loop for each probe."""
        self._server = aio.server(options=public_server_options(SMALL_MESSAGE_BYTES, _MAX_STREAMS))
        health_pb2_grpc.add_HealthServicer_to_server(_Probes(is_ready), self._server)
        if self._server.add_insecure_port(address) == 0:
            raise RuntimeError(f"{address} cannot be bound")

    async def start(self) -> None:
        """Take probes from now on."""
        await self._server.start()

    async def stop(self, grace_s: float = 0.0) -> None:
        """Take none any more; those that are being answered have `grace_s`."""
        await self._server.stop(grace_s)


class _Probes(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # generated without types
    def __init__(self, is_ready: Callable[[], bool]) -> None:
        self._is_ready = is_ready

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - named by the proto
        """Answer one probe."""
        status = self._status(request.service)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            names = ", ".join(name for name in (*_ALWAYS, *_WHILE_READY) if name)
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no {request.service!r}: ask for {names}")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802, ARG002
        """Send each change of a status."""
        last = None
        while True:
            status = self._status(request.service)
            if status != last:
                last = status
                yield health_pb2.HealthCheckResponse(status=status)
            await asyncio.sleep(_WATCH_S)

    def _status(self, service: str) -> Any:
        statuses = health_pb2.HealthCheckResponse
        if service in _ALWAYS:
            return statuses.SERVING
        if service in _WHILE_READY:
            return statuses.SERVING if self._is_ready() else statuses.NOT_SERVING
        return statuses.SERVICE_UNKNOWN
