"""Who may operate a scheduler, attach to it and work for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
import zmq
from grpc import aio

from octavo.admin.v1 import admin_pb2, admin_pb2_grpc
from octavo.services.common.api_keys import make_key
from octavo.services.scheduler.__main__ import serve
from octavo.services.scheduler.config import CurveFiles, SchedulerConfig
from octavo.services.scheduler.workers.curve import CurveServer


@pytest.mark.parametrize("address", ["0.0.0.0:50052", "10.0.0.5:1", "[::]:50052", "scheduler.local:50052"])
def test_a_scheduler_that_others_reach_needs_certificates_or_a_trusted_network(address: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hop_certificate"):
        SchedulerConfig(scheduler_address=address)

    SchedulerConfig(scheduler_address=address, trusted_network=True)
    file = tmp_path / "file"
    file.touch()
    SchedulerConfig(scheduler_address=address, hop_certificate=file, hop_key=file, hop_ca=file)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "localhost:1", "unix:/run/s.sock"])
def test_a_scheduler_that_only_this_machine_reaches_needs_nothing(address: str) -> None:
    SchedulerConfig(scheduler_address=address, admin_address=address)


def test_an_admin_service_that_others_reach_needs_keys(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="admin_keys"):
        SchedulerConfig(admin_address="0.0.0.0:1", trusted_network=True)

    SchedulerConfig(admin_address="0.0.0.0:1", admin_keys=tmp_path / "keys.yaml")


async def test_only_admins_operate_a_scheduler(tmp_path: Path) -> None:
    (plain, plain_entry), (admin, admin_entry) = make_key("acme"), make_key("ops", is_admin=True)
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump([plain_entry, admin_entry]))
    address = f"unix:{tmp_path}/admin.sock"
    config = SchedulerConfig(
        scheduler_address=f"unix:{tmp_path}/s.sock",
        worker_endpoint=f"ipc://{tmp_path}/w.sock",
        admin_address=address,
        admin_keys=tmp_path / "keys.yaml",
        grace_s=0.0,
    )
    serving = asyncio.create_task(serve(config))
    try:
        async with aio.insecure_channel(address) as channel:
            await asyncio.wait_for(channel.channel_ready(), 10)
            stub = admin_pb2_grpc.AdminServiceStub(channel)

            async def code(method: Any, request: Any, *credentials: str) -> grpc.StatusCode:
                metadata = [("authorization", credential) for credential in credentials]
                call = method(request, metadata=metadata)
                status: grpc.StatusCode = await call.code()
                return status

            for method, request in (
                (stub.ListRequests, admin_pb2.ListRequestsRequest()),
                (stub.FlushPrefixCache, admin_pb2.FlushPrefixCacheRequest()),
                (stub.Drain, admin_pb2.DrainRequest(grace_ms=1)),
            ):
                assert await code(method, request) == grpc.StatusCode.UNAUTHENTICATED
                assert await code(method, request, admin) == grpc.StatusCode.UNAUTHENTICATED  # no scheme
                assert await code(method, request, f"Bearer {admin[:-2]}xy") == grpc.StatusCode.UNAUTHENTICATED
                assert await code(method, request, f"Bearer {plain}") == grpc.StatusCode.PERMISSION_DENIED
                assert await code(method, request, f"Bearer {admin}") == grpc.StatusCode.OK
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made = zmq.Context()
    yield made
    made.term()


@pytest.mark.parametrize("answers", [True, False])
def test_a_worker_gets_in_only_while_somebody_says_that_it_may(
    tmp_path: Path, context: zmq.Context[zmq.Socket[bytes]], answers: bool
) -> None:
    """Without the thread that looks keys up nobody gets in."""
    _, server_secret = zmq.curve_keypair()
    public, secret = zmq.curve_keypair()
    (tmp_path / "key").write_bytes(server_secret)
    (tmp_path / "allowed").write_bytes(public)
    curve = CurveServer(context, CurveFiles(tmp_path / "key", tmp_path / "allowed"))
    router = context.socket(zmq.ROUTER)
    curve.protect(router)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    if not answers:
        curve.close()

    worker = context.socket(zmq.DEALER)
    worker.curve_secretkey, worker.curve_publickey = secret, public
    worker.curve_serverkey = zmq.curve_public(server_secret)
    worker.connect(f"tcp://127.0.0.1:{port}")
    worker.send(b"hello")

    try:
        assert bool(router.poll(10_000 if answers else 1_000)) == answers
    finally:
        worker.close(0)
        router.close(0)
        if answers:
            curve.close()
