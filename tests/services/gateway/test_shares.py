"""What all tenants use together is shared among those that want it."""

from __future__ import annotations

import asyncio

import pytest

from octavo.services.common.errors import Reason, ServingError
from octavo.services.gateway.offload.long_work import LongWork
from octavo.services.gateway.offload.shares import Shares, Turns


def busy() -> ServingError:
    return ServingError(Reason.QUEUE_FULL, "busy")


def turns(num_slots: int = 1, max_waiting: int = 90, max_wait_s: float = 60.0) -> Turns:
    return Turns(num_slots, max_waiting, max_wait_s, busy)


def take_all(shares: Shares, tenant: str) -> int:
    count = 0
    while shares.take(tenant):
        count += 1
    return count


def test_a_tenant_alone_gets_most_places_and_others_find_room() -> None:
    shares = Shares(4096)

    assert take_all(shares, "greedy") == 3641
    assert take_all(shares, "late") > 400
    assert shares.take("later")


def test_shares_become_equal_as_places_come_back() -> None:
    shares = Shares(900)
    take_all(shares, "first")

    for _ in range(5000):  # one call ends after the other, and both want more
        for tenant in ("first", "second"):
            if shares.taken(tenant):
                shares.give_back(tenant)
        for tenant in ("first", "second"):
            take_all(shares, tenant)

    assert abs(shares.taken("first") - shares.taken("second")) <= 20
    assert shares.num_taken > 800


@pytest.mark.parametrize("num_places", [1, 2, 9, 10, 100])
def test_what_is_said_to_be_left_is_what_a_tenant_gets(num_places: int) -> None:
    shares = Shares(num_places)
    shares.take("other")

    for tenant in ("a", "b", "c"):
        left = shares.left(tenant)
        assert take_all(shares, tenant) == left
    assert shares.num_taken <= num_places


def test_nothing_is_kept_of_tenants_without_a_place() -> None:
    shares = Shares(2)

    for index in range(1000):
        if shares.take(str(index)):
            shares.give_back(str(index))
        shares.taken(str(index))

    assert not shares._taken


async def test_tenants_take_turns_however_many_of_one_wait() -> None:
    queue = turns()
    served: list[str] = []

    async def call(tenant: str) -> None:
        async with queue.turn(tenant):
            served.append(tenant)
            await asyncio.sleep(0)

    await queue.begin("running")
    tasks = [asyncio.create_task(call(tenant)) for tenant in [*"aaaaaaaa", "b", "c", "b"]]
    await asyncio.sleep(0)
    queue.end()
    await asyncio.gather(*tasks)

    assert "".join(served) == "abcabaaaaaa"


async def test_one_tenant_does_not_take_all_places_to_wait() -> None:
    queue = turns(max_waiting=90)
    await queue.begin("running")
    greedy = [asyncio.create_task(queue.begin("greedy")) for _ in range(200)]
    await asyncio.sleep(0)

    other = asyncio.create_task(queue.begin("other"))
    await asyncio.sleep(0)

    refused = [task for task in greedy if task.done() and task.exception() is not None]
    assert len(refused) == 120
    queue.end()
    queue.end()
    await asyncio.wait_for(other, 10)
    for task in greedy:
        task.cancel()


async def test_a_turn_that_nobody_waits_for_any_more_goes_to_the_next() -> None:
    queue = turns()
    await queue.begin("running")
    first, second, third = (asyncio.create_task(queue.begin(tenant)) for tenant in ("a", "a", "b"))
    await asyncio.sleep(0)

    second.cancel()  # before its turn
    await asyncio.sleep(0)
    queue.end()  # the first one's turn begins,
    first.cancel()  # and it leaves before it knows
    await asyncio.wait_for(third, 10)

    assert first.cancelled()
    queue.end()
    await asyncio.wait_for(queue.begin("c"), 10)  # no slot was lost
    assert not queue._waiting
    assert not queue._places.num_taken


async def test_who_waits_too_long_is_told_so_and_leaves_no_trace() -> None:
    queue = turns(max_wait_s=0.0)
    await queue.begin("running")

    with pytest.raises(ServingError, match="busy"):
        await queue.begin("late")

    assert not queue._waiting
    queue.end()
    await queue.begin("next")


async def test_a_thread_is_busy_until_its_work_has_ended_whoever_has_left() -> None:
    work = LongWork(1)
    may_end, begun = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def hold() -> None:
        loop.call_soon_threadsafe(begun.set)
        asyncio.run_coroutine_threadsafe(may_end.wait(), loop).result(30)

    leaver = asyncio.create_task(work.run("a", hold))
    await asyncio.wait_for(begun.wait(), 10)
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    following = asyncio.create_task(work.run("b", lambda: "done"))
    await asyncio.sleep(0)

    assert work._turns._num_free == 0
    assert list(work._turns._waiting) == ["b"]
    may_end.set()
    assert await asyncio.wait_for(following, 10) == "done"
    work.close()
