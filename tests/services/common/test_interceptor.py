"""What the interceptor makes of exceptions that are no ServingError."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from octavo.services.common.interceptor import ErrorInterceptor

REQUEST = health_pb2.HealthCheckRequest()


class Servicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # generated without types
    """Has one method of its own, with a bug; the others are those that are generated."""

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - named by the proto
        raise NotImplementedError("deep inside")


@pytest.fixture
async def stub() -> AsyncIterator[Any]:
    server = aio.server(interceptors=[ErrorInterceptor()])
    health_pb2_grpc.add_HealthServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield health_pb2_grpc.HealthStub(channel)
    await server.stop(0)


async def test_a_method_that_nobody_has_written_is_unimplemented_and_no_fault(stub: Any, caplog: Any) -> None:
    with pytest.raises(aio.AioRpcError) as unary:
        await stub.List(health_pb2.HealthListRequest())
    with pytest.raises(aio.AioRpcError) as stream:
        await stub.Watch(REQUEST).read()

    assert {unary.value.code(), stream.value.code()} == {grpc.StatusCode.UNIMPLEMENTED}
    assert "List is not implemented" in (unary.value.details() or "")
    assert not [record for record in caplog.records if record.name.startswith("octavo")]


async def test_a_bug_of_the_same_type_is_internal_and_logged(stub: Any, caplog: Any) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await stub.Check(REQUEST)

    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "deep inside" in caplog.text
