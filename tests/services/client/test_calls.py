"""When a call is tried again, against an address that is scripted: what gRPC does with a real one is in test_client."""

from __future__ import annotations

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

    monkeypatch.setattr(calls, "pause", no_pause)
    endpoints = calls.Endpoints(["unix:/nonexistent/socket"], None)
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
