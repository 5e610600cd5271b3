"""What the prefix caches of schedulers hold, as far as they have told."""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence

from octavo.scheduler.v1 import scheduler_pb2

MAX_NAMES = 1 << 22
"""Blocks that all indexes of a gateway together know by name, at most."""
BYTES_PER_NAME = 140
"""At most: 90 if one scheduler has it (benchmarks/prefix_index.py), more if several have."""
_MEMORY_SHARE = 0.25
"""Of the memory that a process may take, for names."""
_SHARD_BITS = 12
"""Names are in so many tables, by their first bits: none takes long to grow or to go through."""
_SHIFT = 64 - _SHARD_BITS
_SLICE = 2000
"""Names that are looked at between two turns of the event loop, at least."""


class LostEventsError(Exception):
    """An event is missing: the index has to start over."""


def names_that_fit(memory_bytes: float) -> int:
    """Return how many names a process may know whose memory is limited so."""
    return int(min(MAX_NAMES, memory_bytes * _MEMORY_SHARE / BYTES_PER_NAME))


class PrefixHolders:
    """Which schedulers have a block in their caches: a bit for each scheduler, under the block's name.

    A lookup takes as long for a thousand schedulers as for one, but for the length of the masks. Memory is bounded:
    when there are too many names, only those are kept that end in one more zero bit. Names are hashes, so every second
    block of any prompt is still known, and a cached prefix is found up to a few blocks. The sample never grows again.

    What is forgotten, because there is too much or a scheduler left, is found by going through all names. `settle` does
    so a slice at a time.
    """

    def __init__(self, max_names: int = MAX_NAMES) -> None:
        self.num_names = 0
        """Over all indexes: a block counts once for each scheduler that has it."""
        self.sample_mask = 0
        """A name is known only if it has none of these bits."""
        self._max_names = max_names
        self._shards: list[dict[int, int]] = [{} for _ in range(1 << _SHARD_BITS)]
        self._forgotten = 0  # bits of schedulers whose blocks are to be dropped: no lookup finds them
        self._left: list[int] = []  # bits among these that are free after that
        self._round: Iterator[bool] | None = None
        self._settling = asyncio.Lock()
        self._next_bit = 0
        self._free_bits: list[int] = []

    def join(self) -> int:
        """Return the number of the bit that stands for an index, its own until it leaves."""
        if self._free_bits:
            return self._free_bits.pop()
        self._next_bit += 1
        return self._next_bit - 1

    def leave(self, index: PrefixIndex) -> None:
        """Forget an index. Its bit is given to another one once no block has it."""
        index.clear()
        (self._left if self.is_forgetting(1 << index.bit) else self._free_bits).append(index.bit)

    def cached(self, block_hashes: Sequence[int]) -> list[tuple[int, int]]:
        """Return (n, who has the first n blocks of a prompt), with n growing and ever fewer who have them."""
        found: list[tuple[int, int]] = []
        holders = ~self._forgotten
        for at, name in enumerate(block_hashes):
            if name & self.sample_mask:
                continue
            still = holders & self._shards[name >> _SHIFT].get(name, 0)
            if not still:
                break
            if still == holders:
                found[-1] = (at + 1, still)
            else:
                found.append((at + 1, still))
                holders = still
        return found

    def add(self, names: Iterable[int], mask: int) -> None:
        """A scheduler, the one bit of `mask`, has blocks."""
        unknown = self.sample_mask
        for name in names:
            if name & unknown:
                continue
            masks = self._shards[name >> _SHIFT]
            before = masks.get(name)
            if before is None:
                masks[name] = mask  # not 0 | mask: most blocks share one object
            elif before & mask:
                continue
            else:
                masks[name] = before | mask
            self.num_names += 1

    def remove(self, names: Iterable[int], mask: int) -> None:
        """A scheduler has blocks no more."""
        for name in names:
            masks = self._shards[name >> _SHIFT]
            before = masks.get(name, 0)
            if not before & mask:
                continue
            if before == mask:
                del masks[name]
            else:
                masks[name] = before ^ mask
            self.num_names -= 1

    def forget(self, mask: int) -> None:
        """A scheduler has none of its blocks any more: nothing may be added for it until all is settled."""
        self._forgotten |= mask

    def is_forgetting(self, mask: int) -> bool:
        """Return whether blocks of a scheduler are still to be dropped."""
        return bool(self._forgotten & mask)

    async def settle(self) -> None:
        """Return once nothing is left to forget; others get their turn meanwhile."""
        if self._is_settled():
            return
        async with self._settling:  # one task does it for all that wait
            while self.settle_some():  # noqa: ASYNC110
                await asyncio.sleep(0)

    def settle_some(self) -> bool:
        """Do a slice of what `settle` does. Return whether there may be more."""
        if self._round is None:
            if self._is_settled():
                return False
            self._round = self._go_through()
        if next(self._round, True):
            self._round = None
        return True

    def _is_settled(self) -> bool:
        return not self._forgotten and self.num_names <= self._max_names

    def _go_through(self) -> Iterator[bool]:
        """Drop what no lookup finds from all tables; yields after each slice."""
        forgotten = self._forgotten
        if self.num_names > self._max_names:
            self.sample_mask = 2 * self.sample_mask + 1
        unknown = self.sample_mask
        num_seen = 0
        for at, masks in enumerate(self._shards):
            num_seen += len(masks)
            kept = {}
            for name, mask in masks.items():
                keeps = 0 if name & unknown else mask & ~forgotten if mask & forgotten else mask
                if keeps:
                    kept[name] = keeps
                if keeps is not mask:
                    self.num_names -= (mask ^ keeps).bit_count()
            self._shards[at] = kept
            if num_seen >= _SLICE:
                num_seen = 0
                yield False
        self._forgotten &= ~forgotten
        left, self._left = self._left, []
        for bit in left:
            (self._left if self.is_forgetting(1 << bit) else self._free_bits).append(bit)


class PrefixIndex:
    """The blocks in one scheduler's cache, by the first 8 bytes of their hashes."""

    def __init__(self, holders: PrefixHolders | None = None) -> None:
        """`holders` knows the blocks of all indexes that share it."""
        self._holders = PrefixHolders() if holders is None else holders
        self.bit = self._holders.join()
        self._mask = 1 << self.bit
        self.last_event_id = 0
        self.epoch = 0
        self._is_part = False  # more of the last event follows
        self._is_empty = True

    def clear(self) -> None:
        """Forget everything: the next event must be the start of everything there is."""
        if not self._is_empty:
            self._holders.forget(self._mask)
            self._is_empty = True
        self.last_event_id = self.epoch = 0
        self._is_part = False

    async def settle(self) -> None:
        """Return once what was forgotten has made room, as it must have before the next event is taken."""
        await self._holders.settle()

    def apply(self, event: scheduler_pb2.WatchCacheResponse) -> None:
        """Take a change. Raises LostEventsError if one before it did not arrive."""
        if event.cleared:
            self.clear()
            self.epoch = event.epoch
            while self._holders.is_forgetting(self._mask):  # unless the caller has settled that
                self._holders.settle_some()
        elif event.epoch != self.epoch or not self._follows(event):
            raise LostEventsError(f"event {event.event_id} came after {self.last_event_id}")
        self.last_event_id = event.event_id
        self._is_part = event.more_follows
        self._holders.remove(event.removed_block_hashes, self._mask)
        self._holders.add(event.stored_block_hashes, self._mask)
        self._is_empty = self._is_empty and not event.stored_block_hashes

    def count_cached(self, block_hashes: Sequence[int]) -> int:
        """Return how many of a prompt's blocks, from its start on, are in the cache."""
        return max((count for count, who in self._holders.cached(block_hashes) if who & self._mask), default=0)

    def _follows(self, event: scheduler_pb2.WatchCacheResponse) -> bool:
        """Return whether nothing is missing between the last event and this one. A sign of life changes nothing."""
        if self._is_part:
            return event.event_id == self.last_event_id
        changes = event.stored_block_hashes or event.removed_block_hashes
        return event.event_id == self.last_event_id + bool(changes)


def prompt_block_hashes(submit: scheduler_pb2.Submit, block_size: int) -> list[int]:
    """Return the names of the prompt's full blocks, as WatchCache spells them.

    A block is named by SHA-256 of the name before it and its tokens (little-endian uint32); the first one by the
    request's adapter and salt. The last token is left out: it is always computed, so its block cannot be a hit.
    """
    if submit.bypass_prefix_cache:
        return []
    parent = hashlib.sha256(f"{submit.adapter}\0{submit.cache_salt}".encode()).digest()
    tokens = array("I", submit.prompt_token_ids).tobytes()
    width = 4 * block_size
    names = []
    for start in range(0, (len(submit.prompt_token_ids) - 1) // block_size * width, width):
        parent = hashlib.sha256(parent + tokens[start : start + width]).digest()
        names.append(int.from_bytes(parent[:8], "little"))
    return names
