"""A scheduler behind a DNS name: its certificate has to be made out to that name, not to the address found."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from grpc import aio

from octavo.scheduler.v1 import scheduler_pb2_grpc
from octavo.services.common.tls import listen, server_credentials
from octavo.services.common.tls_files import TlsFiles
from octavo.services.gateway.schedulers.pool import SchedulerPool
from tests.certificates import Authority

from .conftest import FakeScheduler


async def connects(folder: Path, dns_name: str, log: pytest.LogCaptureFixture) -> bool:
    """Whether a gateway told to use localhost takes a scheduler whose certificate is made out to `dns_name` only."""
    authority = Authority(folder)
    files = TlsFiles(*authority.issue("scheduler", names=[dns_name]), authority.ca)
    fake = FakeScheduler("unused")
    server = aio.server()
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(fake, server)  # type: ignore[no-untyped-call]
    port = listen(server, "127.0.0.1:0", server_credentials(files))
    await server.start()
    pool = SchedulerPool([f"localhost:{port}"], "gateway", tls=TlsFiles(*authority.issue("gateway"), authority.ca))
    pool.start()
    try:
        async with asyncio.timeout(30):
            while not pool.healthy and "scheduler at 127.0.0.1" not in log.text:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return pool.healthy
    finally:
        await pool.close()
        await server.stop(0)


async def test_its_certificate_is_verified_for_the_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert await connects(tmp_path, "localhost", caplog)


async def test_a_certificate_for_another_name_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not await connects(tmp_path, "elsewhere.test", caplog)
