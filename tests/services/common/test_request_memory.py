"""Requests take a limited part of the memory, while they arrive and while they run; each tenant bears its own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from octavo.services.common import receiving
from octavo.services.common.errors import Reason, ServingError
from octavo.services.common.receiving import Receiving
from octavo.services.common.request_memory import RequestMemory


def refused(memory: RequestMemory, tenant: str, size: int) -> bool:
    try:
        memory.hold(tenant, size).release()
    except ServingError as error:
        return error.reason == Reason.QUEUE_FULL and error.retry_after_ms > 0
    return False


def test_a_tenant_takes_half_and_leaves_the_rest_to_others() -> None:
    memory = RequestMemory(100, 10)
    hold = memory.hold("a", 40)

    assert refused(memory, "a", 11)
    assert not refused(memory, "b", 50)
    hold.release()
    assert not refused(memory, "a", 50)
    assert memory.held_bytes == 0


def test_all_together_take_no_more_than_there_is() -> None:
    memory = RequestMemory(100, 10)
    for tenant in "ab":
        memory.hold(tenant, 45)

    assert refused(memory, "c", 11)
    assert not refused(memory, "c", 10)


def test_the_nameless_tenant_may_take_all() -> None:
    memory = RequestMemory(100, 10)
    memory.hold("", 60)

    assert not refused(memory, "", 40)
    assert refused(memory, "", 41)


def test_one_request_alone_fits_however_long() -> None:
    memory = RequestMemory(100, 10)

    hold = memory.hold("a", 1000)
    assert refused(memory, "b", 1)
    hold.release()
    hold.release()  # does nothing
    assert memory.held_bytes == 0


async def test_a_stream_waits_for_room() -> None:
    memory = RequestMemory(100, 10)
    first = memory.hold("a", 50)
    waiting = asyncio.ensure_future(memory.hold_within("a", 20, 60))
    await asyncio.sleep(0)
    assert not waiting.done()

    first.release()

    (await waiting).release()
    assert memory.held_bytes == 0


async def test_a_stream_that_waits_too_long_is_refused() -> None:
    memory = RequestMemory(100, 10)
    memory.hold("a", 50)

    with pytest.raises(ServingError, match="tenant"):
        await memory.hold_within("a", 20, 0)


class Sender:
    """A call whose request arrives when the test says so."""

    def __init__(self) -> None:
        self.request: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.is_read = asyncio.Event()

    async def read(self) -> bytes:
        self.is_read.set()
        return await self.request


def receive(where: Receiving, tenant: str) -> tuple[Sender, asyncio.Future[Any]]:
    sender = Sender()
    return sender, asyncio.ensure_future(where.receive(sender, tenant, 60))


async def test_a_tenant_receives_in_half_of_the_places() -> None:
    where = Receiving(4)
    calls = [receive(where, "a") for _ in range(100)]
    other, received = receive(where, "b")
    await other.is_read.wait()
    assert sum(sender.is_read.is_set() for sender, _ in calls) == receiving._FAST_PLACES // 2

    other.request.set_result(b"b")
    for sender, _ in calls:
        sender.request.set_result(b"a")

    assert await received == b"b"
    assert set(await asyncio.gather(*(call for _, call in calls))) == {b"a"}


async def test_slow_requests_leave_the_way_and_too_many_of_them_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "_FAST_S", 0.0)
    where = Receiving(4)
    slow = [receive(where, "a") for _ in range(20)]  # more than the places: each is slow at once

    refused, received = await asyncio.wait([call for _, call in slow], timeout=0.5)
    assert len(refused) == 18  # a tenant has half of the four
    assert all("slowly" in str(call.exception()) for call in refused)
    other, of_other = receive(where, "b")
    other.request.set_result(b"b")
    assert await of_other == b"b"

    for sender, call in slow:
        if call in received:
            sender.request.set_result(b"a")
    assert await asyncio.gather(*received) == [b"a", b"a"]
    assert not where._slow


async def test_a_call_that_is_cancelled_gives_its_place_back() -> None:
    where = Receiving(1)
    calls = [receive(where, "a") for _ in range(50)]
    await calls[0][0].is_read.wait()
    for _, call in calls:
        call.cancel()
    await asyncio.gather(*(call for _, call in calls), return_exceptions=True)

    sender, call = receive(where, "a")
    sender.request.set_result(b"x")
    assert await call == b"x"
    assert where._fast._value == receiving._FAST_PLACES


async def test_a_request_that_does_not_arrive_in_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "_FAST_S", 0.0)

    with pytest.raises(ServingError, match="in time"):
        await Receiving(1).receive(Sender(), "a", 0.01)
