"""What gateways know about prefix caches."""

from __future__ import annotations

import asyncio
import math
from array import array
from pathlib import Path

import pytest

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.process import memory_limit
from octavo.services.gateway.schedulers.prefix_index import (
    MAX_NAMES,
    LostEventsError,
    PrefixHolders,
    PrefixIndex,
    names_that_fit,
    prompt_block_hashes,
)
from octavo.services.scheduler.groups.block_allocator import BlockAllocator
from octavo.services.scheduler.kv_cache.cache_events import CacheEvents
from octavo.services.scheduler.requests.outbox import Outbox
from octavo.services.scheduler.requests.sequence import Request, Sequence


def event(event_id: int, **fields: object) -> scheduler_pb2.WatchCacheResponse:
    return scheduler_pb2.WatchCacheResponse(event_id=event_id, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_tokens", [0, 1, 16, 17, 50])
def test_blocks_have_the_names_that_the_scheduler_gives_them(num_tokens: int) -> None:
    submit = scheduler_pb2.Submit(prompt_token_ids=range(7, 7 + num_tokens), cache_salt="salt", adapter="a")
    request = Request(submit, "g", handle=1, arrival=1, admitted_at=0, deadline=1, soft_deadline=1)
    seq = Sequence(request, 0, array("I", request.submit.prompt_token_ids), 1000, 1000, Outbox())
    BlockAllocator(8, CacheEvents(0), {}).get_computed_blocks(seq)

    hashes = prompt_block_hashes(submit, 16)

    # The block of the very last token is computed anew, so it is no hit.
    known = seq.block_hashes[: max(0, num_tokens - 1) // 16]
    assert hashes == [int.from_bytes(name[:8], "little") for name in known]


def test_only_blocks_from_the_start_on_count() -> None:
    index = PrefixIndex()
    index.apply(event(1, cleared=True, stored_block_hashes=[1, 2, 4]))
    assert [index.count_cached(each) for each in ([], [1, 2, 3, 4], [3, 1], [1, 2, 4])] == [0, 2, 0, 3]
    index.apply(event(2, removed_block_hashes=[1], stored_block_hashes=[3]))
    assert index.count_cached([1, 2]) == 0
    assert index.count_cached([3]) == 1


def test_a_missing_event_is_noticed_and_a_cleared_one_starts_over() -> None:
    index = PrefixIndex()
    index.apply(event(5, cleared=True, epoch=1, stored_block_hashes=[1]))
    for wrong in (
        event(7, epoch=1, stored_block_hashes=[2]),
        event(6, epoch=2, stored_block_hashes=[2]),
        event(5, epoch=1, stored_block_hashes=[2]),
    ):
        with pytest.raises(LostEventsError):
            index.apply(wrong)
    index.apply(event(9, cleared=True, epoch=2, stored_block_hashes=[3]))
    assert (index.count_cached([1]), index.count_cached([3]), index.last_event_id, index.epoch) == (0, 1, 9, 2)


def test_an_event_can_come_in_parts_and_signs_of_life_change_nothing() -> None:
    index = PrefixIndex()
    index.apply(event(5, cleared=True, more_follows=True, stored_block_hashes=[1]))
    index.apply(event(5, more_follows=True, stored_block_hashes=[2]))
    index.apply(event(5, stored_block_hashes=[3]))
    index.apply(event(5))
    index.apply(event(6, removed_block_hashes=[3, 2], stored_block_hashes=[2]))
    assert index.count_cached([1, 2, 3]) == 2
    index.apply(event(7, more_follows=True, stored_block_hashes=[4]))
    with pytest.raises(LostEventsError):
        index.apply(event(8, stored_block_hashes=[5]))


def test_a_request_that_bypasses_the_cache_has_no_prefix() -> None:
    assert prompt_block_hashes(scheduler_pb2.Submit(prompt_token_ids=range(64), bypass_prefix_cache=True), 16) == []


def test_no_two_schedulers_stand_under_one_bit_though_others_have_left() -> None:
    holders = PrefixHolders()
    gone, stays = PrefixIndex(holders), PrefixIndex(holders)
    holders.leave(gone)

    new = [PrefixIndex(holders) for _ in range(3)]

    assert len({index.bit for index in (stays, *new)}) == 4


def test_who_lacks_the_start_of_a_prompt_has_nothing_of_it_whatever_follows() -> None:
    holders = PrefixHolders()
    whole, start, tail = (PrefixIndex(holders) for _ in range(3))
    for index, blocks in ((whole, [1, 2, 3]), (start, [1]), (tail, [2, 3])):
        index.apply(event(1, cleared=True, stored_block_hashes=blocks))

    found = holders.cached([1, 2, 3, 4])

    assert found == [(1, 1 << whole.bit | 1 << start.bit), (3, 1 << whole.bit)]


def test_a_scheduler_that_is_forgotten_slice_by_slice_is_found_no_more_and_its_bit_is_free_afterwards() -> None:
    holders = PrefixHolders()
    gone, stays = PrefixIndex(holders), PrefixIndex(holders)
    names = [number << 48 for number in range(1, 30_000)]
    for index in (gone, stays):
        index.apply(event(1, cleared=True, stored_block_hashes=names))
    holders.leave(gone)

    assert (gone.count_cached(names), stays.count_cached(names)) == (0, 29_999)
    num_slices = 0
    while holders.is_forgetting(1 << gone.bit):
        assert PrefixIndex(holders).bit > stays.bit  # its bit is given away when no block has it
        holders.settle_some()
        num_slices += 1
    assert num_slices > 10, "too much at once"
    assert PrefixIndex(holders).bit == gone.bit == 0
    assert (gone.count_cached(names), stays.count_cached(names), holders.num_names) == (0, 29_999, 29_999)


def test_an_index_that_starts_over_knows_what_it_is_told_then_and_nothing_else() -> None:
    holders = PrefixHolders()
    index = PrefixIndex(holders)
    index.apply(event(1, cleared=True, stored_block_hashes=range(1, 9000)))
    index.apply(event(2, cleared=True, epoch=1, stored_block_hashes=[5, 6]))
    assert (index.count_cached([5, 6]), index.count_cached([7]), holders.num_names) == (2, 0, 2)


def test_an_index_that_starts_over_after_a_removal_knows_nothing_of_before() -> None:
    index = PrefixIndex()
    index.apply(event(1, cleared=True, stored_block_hashes=[1, 2]))
    index.apply(event(2, removed_block_hashes=[1]))

    index.apply(event(3, cleared=True, stored_block_hashes=[3]))

    assert [index.count_cached([name]) for name in (1, 2, 3)] == [0, 0, 1]


def test_a_name_that_two_have_makes_room_for_two_when_it_is_thinned_out() -> None:
    holders = PrefixHolders(max_names=8)
    for index in (PrefixIndex(holders), PrefixIndex(holders)):
        index.apply(event(1, cleared=True, stored_block_hashes=range(1, 9)))

    while holders.settle_some():
        pass

    assert holders.num_names == 8
    assert [count for count, _ in holders.cached(range(1, 9))] == [8], "every second block of both"


@pytest.mark.asyncio
async def test_while_names_are_thinned_out_others_get_their_turns() -> None:
    holders = PrefixHolders(max_names=20_000)
    indexes = [PrefixIndex(holders) for _ in range(3)]
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count())
    for at, index in enumerate(indexes):
        names = [(at + 3 * number) * 0x9E3779B97F4A7C15 % 2**64 for number in range(1, 9000)]
        index.apply(event(1, cleared=True, stored_block_hashes=names))
    turns = 0
    await asyncio.gather(*(index.settle() for index in indexes))  # who waits first does it for all
    counting.cancel()
    assert holders.num_names < 20_000
    assert turns > 10


@pytest.mark.parametrize(
    ("files", "limit", "names"),
    [
        ({"memory.max": "1073741824\n"}, 1 << 30, 1_917_396),
        ({"memory.max": "max\n"}, math.inf, MAX_NAMES),
        ({"memory/memory.limit_in_bytes": "536870912\n"}, 1 << 29, 958_698),
        ({}, math.inf, MAX_NAMES),
    ],
)
def test_a_container_with_little_memory_knows_fewer_names(
    tmp_path: Path, files: dict[str, str], limit: float, names: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_limit(tmp_path) == limit
    assert names_that_fit(limit) == names
