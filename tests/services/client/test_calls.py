"""When a call is tried again, against an address that is scripted: what gRPC does with a real one is in test_client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from octavo.services.client import OctavoError, calls

REFUSED = OctavoError(grpc.StatusCode.UNAVAILABLE, "Connection refused")
NO_WORKER = OctavoError(grpc.StatusCode.UNAVAILABLE, "no worker is ready", reason="NO_WORKER")


class Script:
    """Answers a call, or fails it, `failures` times with `error`."""

    def __init__(self, error: OctavoError, failures: int) -> None:
        self.error = error
        self.left = failures

    async def __call__(self, endpoint: Any) -> str:
        del endpoint
        if not self.left:
            return "answer"
        self.left -= 1
        raise self.error


@pytest.fixture
async def endpoints(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[calls.Endpoints]:
    async def no_pause(attempt: int, error: OctavoError, deadline: float | None) -> None:
        pass

    endpoints = calls.Endpoints(["unix:/nonexistent/socket"], None)
    monkeypatch.setattr(endpoints, "pause", no_pause)
    yield endpoints
    await endpoints.close()


async def test_an_address_that_has_answered_gets_the_time_that_a_gateway_takes_to_be_back(
    endpoints: calls.Endpoints,
) -> None:
    assert await endpoints.call(Script(REFUSED, 0), None) == "answer"
    assert await endpoints.call(Script(REFUSED, 13), None) == "answer"
    with pytest.raises(OctavoError, match="Connection refused"):
        await endpoints.call(Script(REFUSED, 14), None)


async def test_one_that_never_answered_is_given_up_sooner(endpoints: calls.Endpoints) -> None:
    with pytest.raises(OctavoError, match="Connection refused"):
        await endpoints.call(Script(REFUSED, 7), None)


async def test_so_is_one_that_says_itself_why_it_cannot(endpoints: calls.Endpoints) -> None:
    assert await endpoints.call(Script(NO_WORKER, 6), None) == "answer"
    with pytest.raises(OctavoError, match="no worker is ready"):
        await endpoints.call(Script(NO_WORKER, 7), None)


async def test_an_address_that_just_failed_is_passed_over_while_there_is_another_one() -> None:
    endpoints = calls.Endpoints(["unix:/nonexistent/a", "unix:/nonexistent/b"], None)
    bad, good = endpoints.pick(), endpoints.pick()
    now = asyncio.get_running_loop().time()

    bad.failed_at = now
    assert [endpoints.pick() for _ in range(4)] == [good] * 4
    good.failed_at = now + 0.1  # both: whoever failed first has had the most time since
    assert [endpoints.pick() for _ in range(2)] == [bad] * 2
    bad.failed_at = good.failed_at = now - 2.0  # long ago
    assert {endpoints.pick(), endpoints.pick()} == {bad, good}
    await endpoints.close()
