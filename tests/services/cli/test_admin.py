"""`octavo admin` as an operator types it, at a scheduler with a worker and requests, over sockets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from grpc import aio

from octavo.admin.v1 import admin_pb2_grpc
from octavo.services.cli import admin
from octavo.services.common import config as config_loader
from octavo.services.common.api_keys import make_key
from octavo.services.common.interceptor import ErrorInterceptor
from octavo.services.common.operating import AdminKeys
from octavo.services.scheduler.admin import AdminServicer
from octavo.services.scheduler.config import Quota
from octavo.services.scheduler.core.quarantine import QuarantinedRequest
from tests.services.scheduler.test_engine import Gateway, Process, WorkerClient, expected_output, running, until

Octavo = Callable[..., Awaitable[tuple[int, str]]]


class Site:
    """A scheduler with one worker, which works, and one gateway; and the command line at its admin service."""

    def __init__(
        self, process: Process, worker: WorkerClient, gateway: Gateway, address: str, key: str, capsys: Any
    ) -> None:
        self.process, self.engine, self.worker, self.gateway = process, process.engine, worker, gateway
        self.core = process.engine.core
        self.address, self.key, self._capsys = address, key, capsys

    async def octavo(self, *words: str, key: str | None = None) -> tuple[int, str]:
        """Return the status and what was printed."""
        key = self.key if key is None else key
        line = [*words, f"--address={self.address}", *([f"--api-key={key}"] if key else [])]
        config = config_loader.parse(admin.AdminConfig, line, prog="octavo admin", environ={})
        status = await admin._run(config)
        told = self._capsys.readouterr()
        return status, (told.out + told.err).strip()


@pytest.fixture
async def site(tmp_path: Path, capsys: Any) -> AsyncIterator[Site]:
    key, entry = make_key("ops", is_admin=True)
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump([entry]))
    async with running(tmp_path) as process:
        server = aio.server(interceptors=[ErrorInterceptor(AdminKeys(tmp_path / "keys.yaml").authorize)])
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminServicer(process.engine, process.config), server)
        address = f"unix:{tmp_path}/admin.sock"
        server.add_insecure_port(address)
        await server.start()
        worker, gateway = await process.connect()
        yield Site(process, worker, gateway, address, key, capsys)
        worker.close()
        await server.stop(0)


async def test_requests_are_listed_and_ended_by_id_or_tenant(site: Site) -> None:
    for handle, tenant in ((1, "a"), (2, "a"), (3, "b"), (4, "b")):
        await site.gateway.submit(handle, max_new_tokens=400, tenant=tenant)
    await until(lambda: site.core.num_requests == 4)

    _, listed = await site.octavo("list", "--tenant=a")
    assert [line.split()[:2] for line in listed.splitlines()[1:]] == [["request-1", "a"], ["request-2", "a"]]

    assert await site.octavo("cancel", "request-1,request-3,nobody") == (0, "2 requests ended")
    failed = [(await site.gateway.receive("failed")).failed for _ in range(2)]
    assert [(each.handle, each.code, each.reason) for each in failed] == [
        (1, 1, "ADMIN_CANCELLED"),
        (3, 1, "ADMIN_CANCELLED"),
    ]
    assert await site.octavo("cancel", "request-2", "--tenant=b") == (0, "0 requests ended")
    assert await site.octavo("cancel", "--tenant=b") == (0, "1 requests ended")
    assert [request.submit.request_id for request in site.core.requests()] == ["request-2"]


async def test_a_scheduler_is_drained_and_taken_back(site: Site) -> None:
    site.worker.work()
    assert await site.octavo("drain", "--grace-s=1s") == (0, "takes no new requests; 0 still run")
    await site.gateway.submit(1)
    assert (await site.gateway.receive("rejected")).rejected.reason == "DRAINING"

    assert (await site.octavo("undrain"))[0] == 0
    while (await site.gateway.receive("load")).load.draining:
        pass  # those from before
    await site.gateway.submit(2)
    assert await site.gateway.finish(2)


async def test_a_quota_is_set_at_once_and_what_is_not_named_stays(site: Site) -> None:
    await site.gateway.submit(1, max_new_tokens=400, tenant="hot")
    await until(lambda: site.core.num_requests == 1)

    assert (await site.octavo("quota", "--tenant=hot", "--max-requests=1", "--weight=0.5"))[0] == 0
    assert (await site.octavo("quota", "--tenant=hot", "--tokens-per-s=1000"))[0] == 0

    await site.gateway.submit(2, tenant="hot")
    assert (await site.gateway.receive("rejected")).rejected.reason == "QUOTA_EXCEEDED"
    assert site.core.tenants.quotas == {"hot": Quota(1, 1000.0)}
    _, told = await site.octavo("tenants")
    assert [line.split() for line in told.splitlines()[1:]] == [
        ["(others)", "no", "limit", "no", "limit", "1"],
        ["hot", "1", "1000", "0.5"],
    ]
    status, told = await site.octavo("quota", "--tenant=hot", "--weight=-1")
    assert (status, "weight" in told) == (1, True)


async def test_a_quarantine_is_shown_and_lifted(site: Site) -> None:
    quarantine = site.core.quarantine
    now = asyncio.get_running_loop().time()
    for number in range(3):
        key = bytes([number]) * 32
        quarantine._quarantined[key] = QuarantinedRequest(now + 100 * number, f"request-{number}", "a")

    _, told = await site.octavo("quarantine")
    assert [line.split()[:3] for line in told.splitlines()[1:]] == [
        ["01" * 8, "request-1", "a"],
        ["02" * 8, "request-2", "a"],
    ], "the first one's time is over"
    assert await site.octavo("lift", "01" * 8) == (0, "1 requests are let in again")
    assert [each.request_id for each in quarantine.quarantined(now).values()] == ["request-2"]
    assert await site.octavo("lift") == (0, "1 requests are let in again")


async def test_a_worker_that_is_evicted_gives_its_requests_away_and_comes_back_later(site: Site) -> None:
    await site.gateway.submit(1, max_new_tokens=20)
    plan = (await site.worker.receive("step_plan")).step_plan

    status, told = await site.octavo("evict", "w1", "--hold-s=1h")
    assert (status, told) == (0, "out for 3600 s; 1 of its requests go on elsewhere or wait")
    await site.worker.send(step_result=site.worker.model.execute(plan))
    await site.worker.receive("fenced")
    await site.worker.hello()
    second = site.process.worker("w2")
    await second.join()
    second.work()
    assert await site.gateway.finish(1) == expected_output(list(range(100, 140)), 20)
    assert [load.worker_id for load in site.engine.load().workers] == ["w2"], "the first one said hello as well"

    status, told = await site.octavo("evict", "w1")
    assert (status, "no worker 'w1' is here" in told) == (1, True)
    second.close()


@pytest.fixture
def _level() -> Iterator[None]:
    names = (None, *logging.getLogger().manager.loggerDict)
    levels = {name: logging.getLogger(name).level for name in names}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.usefixtures("_level")
async def test_a_process_logs_more_and_says_what_it_is_doing(site: Site) -> None:
    logging.getLogger().setLevel("INFO")
    assert await site.octavo("log-level", "debug") == (0, "debug in place of info")
    assert logging.getLogger().level == logging.DEBUG
    status, told = await site.octavo("log-level", "loud")
    assert (status, "debug, info, warning, error" in told) == (1, True)

    status, told = await site.octavo("stacks")
    assert status == 0
    assert "_tick_forever" in told, "the scheduler's own task"
    assert "Current thread" in told
    assert (await site.octavo("flush"))[1].endswith("blocks forgotten")


@pytest.mark.parametrize(
    "action",
    [
        "undrain", "cancel a", "tenants", "quota --tenant=a --weight=2", "quarantine", "lift", "evict w1", "stacks",
        "log-level debug", "flush", "list", "drain",
    ],
)  # fmt: skip
async def test_nobody_operates_without_an_admins_key(site: Site, action: str) -> None:
    before = site.core.tenants
    for key in ("", "oct_000000000000_" + "x" * 43):
        status, told = await site.octavo(*action.split(), key=key)
        assert (status, "key" in told) == (1, True), told
    assert site.core.tenants is before
    assert site.engine.load().workers_ready == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("cancel", "needs ids of requests, or --tenant"),
        ("evict", "needs the worker's name"),
        ("log-level", "needs debug, info"),
        ("quota --weight=2", "needs --tenant"),
        ("quota --tenant=a", "needs --max-requests, --tokens-per-s or --weight"),
        ("restart", "must be one of drain"),
        ("evict w --hold-s=2000h", "from 0 to a day"),
    ],
)
def test_a_line_that_says_too_little_is_refused_before_anything_is_asked(line: str, said: str) -> None:
    with pytest.raises(config_loader.ConfigError, match=said):
        config_loader.parse(admin.AdminConfig, line.split(), prog="octavo admin", environ={})
