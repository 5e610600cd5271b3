"""Probes: what each service says, and that only readiness depends on anything."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from octavo.services.common.probes import ProbeServer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass
class Probed:
    """A process that is ready or not, and a stub that asks it."""

    stub: health_pb2_grpc.HealthStub
    ready: bool = False

    async def status(self, service: str) -> int:
        answer = await self.stub.Check(health_pb2.HealthCheckRequest(service=service))
        status: int = answer.status
        return status


@pytest.fixture
async def probed() -> AsyncIterator[Probed]:
    address = "unix-abstract:octavo-test-probes"
    async with grpc.aio.insecure_channel(address) as channel:
        it = Probed(health_pb2_grpc.HealthStub(channel))
        server = ProbeServer(address, lambda: it.ready)
        await server.start()
        yield it
        await server.stop()


async def test_a_process_that_is_not_ready_is_alive_and_started(probed: Probed) -> None:
    assert [await probed.status(name) for name in ("startup", "liveness")] == [SERVING, SERVING]
    assert [await probed.status(name) for name in ("readiness", "")] == [NOT_SERVING, NOT_SERVING]
    probed.ready = True
    assert [await probed.status(name) for name in ("readiness", "")] == [SERVING, SERVING]


async def test_a_probe_for_something_else_is_told_what_there_is(probed: Probed) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="startup, liveness, readiness") as caught:
        await probed.status("live")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_watch_gets_each_change(probed: Probed) -> None:
    changes = aiter(probed.stub.Watch(health_pb2.HealthCheckRequest(service="readiness")))
    assert (await anext(changes)).status == NOT_SERVING
    probed.ready = True
    assert (await anext(changes)).status == SERVING


async def test_an_address_that_is_taken_is_told() -> None:
    with pytest.raises(RuntimeError):
        ProbeServer("203.0.113.1:1", lambda: True)
