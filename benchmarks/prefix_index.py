"""Fill a gateway's prefix index beyond what it may know, and see what it takes of memory and of the event loop's turns.

    python benchmarks/prefix_index.py [--schedulers 1000] [--names 8000]

Each scheduler has blocks of its own, which arrive as they do over the wire. Printed are the memory for each name, the
longest turn of the event loop while the index is filled and thinned out, and while every tenth scheduler leaves, and
the time of an event in the steady state. Turns are measured in processor time: a busy machine has other things to do.
Exits with 1 if a turn took more than 10 ms, or a name more memory than the index reckons with.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import resource
import time

from octavo.scheduler.v1.scheduler_pb2 import WatchCacheResponse
from octavo.services.gateway.schedulers.prefix_index import BYTES_PER_NAME, PrefixHolders, PrefixIndex
from octavo.services.scheduler.kv_cache.cache_events import MAX_HASHES

MAX_TURN_S = 0.01
NUM_EVENTS = 5000


class Turns:
    """The longest turn of the event loop so far, in seconds of its thread."""

    def __init__(self) -> None:
        self._longest = 0.0
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        last = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            self._longest, last = max(self._longest, now - last), now

    def take(self) -> float:
        """Return it, and begin anew."""
        longest, self._longest = self._longest, 0.0
        return longest


def resident_bytes() -> int:
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * resource.getpagesize()


def names(count: int) -> list[int]:
    return [random.getrandbits(64) for _ in range(count)]


async def take(index: PrefixIndex, data: bytes) -> None:
    """Do what `watch_cache` does with an event."""
    event = WatchCacheResponse.FromString(data)
    if event.cleared:
        index.clear()
        await index.settle()
    index.apply(event)
    await index.settle()


async def measure(num_schedulers: int, num_names: int) -> bool:
    """Print the figures. Return whether they hold."""
    holders = PrefixHolders()
    indexes = [PrefixIndex(holders) for _ in range(num_schedulers)]
    before, peak, most = resident_bytes(), 0, 0
    sizes = [min(MAX_HASHES, num_names - at) for at in range(0, num_names, MAX_HASHES)]
    turns = Turns()
    for index in indexes:
        for at, size in enumerate(sizes):
            event = WatchCacheResponse(event_id=1, epoch=1, cleared=not at, more_follows=at < len(sizes) - 1)
            event.stored_block_hashes.extend(names(size))
            data = event.SerializeToString()
            await asyncio.sleep(0)  # what the network brings is no work of the loop's
            turns.take()
            await take(index, data)
            filled = max(peak, turns.take())
            most, peak = max(most, holders.num_names), filled
    memory = resident_bytes() - before
    print(f"{num_schedulers} schedulers with {num_names} blocks each: {holders.num_names} names, {most} at most")
    print(f"{memory / most:.0f} bytes a name, {memory / 1e6:.0f} MB; longest turn {filled * 1e3:.1f} ms")
    for index in indexes[::10]:
        holders.leave(index)
    await holders.settle()
    left = turns.take()
    print(f"every tenth leaves: longest turn {left * 1e3:.1f} ms")
    stays = [index for at, index in enumerate(indexes) if at % 10]
    events = []
    for at in range(NUM_EVENTS):
        index = stays[at % len(stays)]
        event = WatchCacheResponse(event_id=2 + at // len(stays), epoch=1)
        event.stored_block_hashes.extend(names(25))
        event.removed_block_hashes.extend(names(25))
        events.append((index, event.SerializeToString()))
    start = time.thread_time()
    for index, data in events:
        await take(index, data)
    each = (time.thread_time() - start) / NUM_EVENTS
    print(f"an event of 25 blocks that come and 25 that go: {each * 1e6:.0f} us")
    return max(filled, left) <= MAX_TURN_S and memory <= most * BYTES_PER_NAME


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedulers", type=int, default=1000)
    parser.add_argument("--names", type=int, default=8000)
    args = parser.parse_args()
    return 0 if asyncio.run(measure(args.schedulers, args.names)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
