"""Gateways are replaced under a gRPC channel with the usual policy, to try UNAVAILABLE again: no call fails.

A call that meets a stopping server ends with CANCELLED, which no policy tries again; one that meets a connection
whose age is up, in the same moment, with UNAVAILABLE.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from grpc import aio

from octavo.inference.v1 import model_pb2, model_pb2_grpc
from octavo.services.gateway.app import Gateway
from octavo.services.gateway.config import GatewayConfig

NUM_STOPS = 8
NUM_CALLERS = 8
RETRIES = {
    "maxAttempts": 4, "initialBackoff": "0.01s", "maxBackoff": "0.1s", "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE"],
}  # fmt: skip
SERVICE_CONFIG = {"methodConfig": [{"name": [{}], "retryPolicy": RETRIES}]}


class Balancer:
    """Forwards each new connection to the gateway that is ready, as a Service does, and leaves the others alone."""

    def __init__(self) -> None:
        self.ready_port = 0
        self.num_open: Counter[int] = Counter()  # connections by the gateway's port
        self.changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[int]:
        """Listen; the value is the port."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        yield server.sockets[0].getsockname()[1]
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        port = self.ready_port
        self.num_open[port] += 1  # from now on, though it takes a while
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))
        finally:
            self._tasks.discard(task)
            self.num_open[port] -= 1
            async with self.changed:
                self.changed.notify_all()

    async def until_left(self, port: int) -> None:
        """Return when no connection to a gateway is left."""
        async with self.changed:
            await self.changed.wait_for(lambda: not self.num_open[port])


async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(1 << 16):
            sink.write(data)
            await sink.drain()
    sink.close()


@pytest.mark.timeout(120)
async def test_connections_that_have_aged_are_told_in_time_so_that_no_call_meets_a_stopping_gateway(
    config: GatewayConfig,
) -> None:
    config = dataclasses.replace(config, max_connection_age_s=1, admin_address="")
    balancer, answers = Balancer(), Counter[Any]()

    async def call(stub: Any) -> None:
        while True:
            try:
                await stub.GetModel(model_pb2.GetModelRequest(name="tiny"))
                answers["OK"] += 1
            except aio.AioRpcError as error:
                answers[error.code(), error.details()] += 1

    old = Gateway(config)
    await old.start()
    balancer.ready_port = old.port
    async with (
        balancer.running() as port,
        aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.service_config", json.dumps(SERVICE_CONFIG))]) as channel,
    ):
        stub = model_pb2_grpc.ModelServiceStub(channel)  # type: ignore[no-untyped-call]
        await stub.GetModel(model_pb2.GetModelRequest(name="tiny"))  # connected
        callers = [asyncio.create_task(call(stub)) for _ in range(NUM_CALLERS)]
        for _ in range(NUM_STOPS):
            new = Gateway(config)
            await new.start()
            balancer.ready_port = new.port  # the other one is no longer ready, and goes on answering
            await balancer.until_left(old.port)
            await old.stop(5.0)
            old = new
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
    await old.stop(0.0)
    assert answers.keys() == {"OK"}, answers
    assert answers["OK"] > 100 * NUM_STOPS
