"""The gRPC server of the scheduler is where gateways attach."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from octavo.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from octavo.services.common.errors import Reason, ServingError
from octavo.services.common.protocol import OLDEST_REVISION, PROTOCOL_REVISION, choose_revision
from octavo.services.scheduler.engine import Engine, GatewayConnection

HELLO_TIMEOUT_S = 10.0


class SchedulerServicer(scheduler_pb2_grpc.SchedulerServiceServicer):
    """Carries messages between the streams of gateways and the engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._attached: dict[str, GatewayConnection] = {}  # the open stream of each gateway, by the id it says
        self._num_streams = 0

    async def Attach(self, request_iterator: AsyncIterator[scheduler_pb2.AttachRequest], context: Any) -> None:  # noqa: N802
        """Serve one gateway until it leaves. Requests without a resume window end with the stream."""
        hello = await self._hello(request_iterator)
        gateway_id = hello.gateway_id
        if (old := self._attached.get(gateway_id)) is not None:
            self._engine.detach(old)  # the gateway is back before its old stream was seen to break
        # Requests are known by their stream: what is left of an earlier one, or of an earlier life of a gateway
        # whose handles start again, can never be taken for a request of this one.
        self._num_streams += 1
        hello.gateway_id = f"{gateway_id}#{self._num_streams}"
        connection = self._attached[gateway_id] = self._engine.attach(hello)
        reading = asyncio.create_task(self._read(connection, request_iterator))
        closing = asyncio.create_task(connection.closed.wait())
        writing = asyncio.create_task(self._write(connection, context))
        try:
            await asyncio.wait((reading, closing, writing), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._engine.detach(connection)
            if self._attached.get(gateway_id) is connection:
                del self._attached[gateway_id]
            for task in (reading, closing, writing):
                task.cancel()

    async def WatchCache(  # noqa: N802
        self,
        request: scheduler_pb2.WatchCacheRequest,
        context: Any,  # noqa: ARG002
    ) -> AsyncIterator[scheduler_pb2.WatchCacheResponse]:
        """Stream what the prefix cache holds."""
        watchers = self._engine.cache_watchers
        if watchers.is_full:
            raise ServingError(Reason.QUEUE_FULL, "too many gateways watch the cache", retry_after_ms=5000)
        async for message in watchers.watch(request):
            yield message

    async def _hello(self, requests: AsyncIterator[scheduler_pb2.AttachRequest]) -> scheduler_pb2.Hello:
        """Return the gateway's introduction, with the revision that is spoken with it, or refuse it."""
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            first = await anext(aiter(requests), None)
        if first is None or not first.HasField("hello") or not first.hello.gateway_id:
            raise ServingError(Reason.MALFORMED_REQUEST, "the first message must be a Hello with a gateway id")
        hello: scheduler_pb2.Hello = first.hello
        revision = choose_revision(hello.protocol_revision, hello.oldest_protocol_revision)
        if not revision:
            oldest = hello.oldest_protocol_revision or hello.protocol_revision
            raise ServingError(
                Reason.PROTOCOL_REVISION,
                f"the gateway speaks protocol revisions {oldest} to {hello.protocol_revision}, this scheduler "
                f"{OLDEST_REVISION} to {PROTOCOL_REVISION}: run the same version on both, or the one before",
            )
        hello.protocol_revision = revision
        return hello

    async def _read(self, connection: GatewayConnection, requests: AsyncIterator[scheduler_pb2.AttachRequest]) -> None:
        async for message in requests:
            self._engine.on_gateway_message(connection, message)

    async def _write(self, connection: GatewayConnection, context: Any) -> None:
        while True:
            await context.write(await connection.unsent.get())
