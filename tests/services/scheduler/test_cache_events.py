"""What a gateway learns by watching is what the caches hold."""

from __future__ import annotations

import hashlib
from array import array

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.kv_cache.cache_events import MAX_EVENTS, CacheEvents

from .simulation import World

PROMPT = list(range(100, 140))


def names(prompt: list[int], salt: str = "", adapter: str = "") -> list[int]:
    """The names of a prompt's full blocks, by the rule in scheduler.proto."""
    parent = hashlib.sha256(adapter.encode() + b"\0" + salt.encode()).digest()
    found = []
    for at in range(0, len(prompt) // 16 * 16, 16):
        parent = hashlib.sha256(parent + array("I", prompt[at : at + 16]).tobytes()).digest()
        found.append(int.from_bytes(parent[:8], "little"))
    return found


class Watcher:
    """Follows a feed as a gateway does."""

    def __init__(self, feed: CacheEvents) -> None:
        self.known: set[int] = set()
        self.event_id = 0
        feed.flush()
        self.apply(feed.since(0, 0))

    def apply(self, messages: list[scheduler_pb2.WatchCacheResponse]) -> None:
        for message in messages:
            if message.cleared:
                self.known.clear()
            self.known -= set(message.removed_block_hashes)
            self.known |= set(message.stored_block_hashes)
            self.event_id = message.event_id


def test_blocks_are_named_as_the_contract_says() -> None:
    world = World(max_adapters=1)
    world.submit(PROMPT, max_new_tokens=1, cache_salt="tenant", adapter="lora@ab", adapter_path="/lora")
    world.run()
    assert Watcher(world.core.cache_events).known == set(names(PROMPT, "tenant", "lora@ab"))


def test_a_watcher_follows_what_is_stored_evicted_and_lost() -> None:
    world = World(num_blocks=12, groups=2)
    watcher = Watcher(world.core.cache_events)
    for n in range(8):
        world.submit([n + 1000] * 50, max_new_tokens=3)
        world.run()
        watcher.apply(world.core.cache_events.flush())
        held = {name for group in world.core._groups.values() for name in group.pool._by_hash}
        assert watcher.known == {int.from_bytes(name[:8], "little") for name in held}
    assert watcher.known
    world.lose("group-0")
    world.lose("group-1")
    watcher.apply(world.core.cache_events.flush())
    assert not watcher.known


def test_a_block_that_two_groups_have_is_there_until_both_have_lost_it() -> None:
    feed = CacheEvents()
    watcher = Watcher(feed)
    for change in (feed.stored, feed.stored, feed.removed):
        change(b"x" * 32)
        watcher.apply(feed.flush())
    assert len(watcher.known) == 1
    feed.removed(b"x" * 32)
    watcher.apply(feed.flush())
    assert not watcher.known


def test_a_watcher_that_comes_back_gets_what_it_missed_or_everything() -> None:
    feed = CacheEvents(epoch=5)
    for n in range(3):
        feed.stored(bytes([n]) * 32)
        feed.flush()
    missed = feed.since(1, 5)
    assert [message.event_id for message in missed] == [2, 3]
    assert not missed[0].cleared
    assert feed.since(3, 5) == []
    assert feed.since(1, 4)[0].cleared  # another epoch
    for n in range(MAX_EVENTS):
        feed.stored(n.to_bytes(2, "big") * 16)
        feed.flush()
    (everything,) = feed.since(1, 5)
    assert everything.cleared
    assert len(everything.stored_block_hashes) == MAX_EVENTS + 2  # of the first three, one came twice
