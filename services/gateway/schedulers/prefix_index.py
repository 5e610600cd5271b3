"""What the prefix caches of schedulers hold, as far as they have told."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from octavo.scheduler.v1 import scheduler_pb2

MAX_NAMES = 1 << 22
"""Blocks that all indexes of a gateway together know by name: some 140 bytes each, 0.6 GB at most."""


class LostEventsError(Exception):
    """An event is missing: the index has to start over."""


class PrefixHolders:
    """Which schedulers have a block in their caches: a bit for each scheduler, under the block's name.

    A lookup takes as long for a thousand schedulers as for one, but for the length of the masks. Memory is bounded:
    when there are too many names, only those are kept that end in one more zero bit. Names are hashes, so every second
    block of any prompt is still known, and a cached prefix is found up to a few blocks. The sample never grows again.
    """

    def __init__(self, max_names: int = MAX_NAMES) -> None:
        self.num_names = 0
        """Over all indexes: a block counts once for each scheduler that has it."""
        self.sample_mask = 0
        """A name is known only if it has none of these bits."""
        self._max_names = max_names
        self._masks: dict[int, int] = {}
        self._to_thin: dict[PrefixIndex, None] = {}
        self._indexes: dict[PrefixIndex, None] = {}
        self._next_bit = 0
        self._free_bits: list[int] = []

    def join(self, index: PrefixIndex) -> int:
        """Return the number of the bit that stands for an index, its own until it leaves."""
        self._indexes[index] = None
        if self._free_bits:
            return self._free_bits.pop()
        self._next_bit += 1
        return self._next_bit - 1

    def leave(self, index: PrefixIndex) -> None:
        """Forget an index. Its bit is given to the next one."""
        index.clear()
        del self._indexes[index]
        self._to_thin.pop(index, None)
        self._free_bits.append(index.bit)

    def cached(self, block_hashes: Sequence[int]) -> list[tuple[int, int]]:
        """Return (n, who has the first n blocks of a prompt), with n growing and ever fewer who have them."""
        found: list[tuple[int, int]] = []
        holders = -1
        for at, name in enumerate(block_hashes):
            if name & self.sample_mask:
                continue
            still = holders & self._masks.get(name, 0)
            if not still:
                break
            if still == holders:
                found[-1] = (at + 1, still)
            else:
                found.append((at + 1, still))
                holders = still
        return found

    def add(self, names: set[int], mask: int) -> None:
        """A scheduler, the one bit of `mask`, has blocks that it had not."""
        masks = self._masks
        for name in names:
            before = masks.get(name)
            masks[name] = before | mask if before else mask  # not 0 | mask: most blocks share one object
        self.num_names += len(names)

    def remove(self, names: set[int], mask: int) -> None:
        """A scheduler has blocks no more that it had."""
        masks = self._masks
        for name in names:
            left = masks[name] & ~mask
            if left:
                masks[name] = left
            else:
                del masks[name]
        self.num_names -= len(names)

    def fit(self) -> None:
        """Keep fewer names if there are too many: one index after the other, so that no call takes long."""
        while self.num_names > self._max_names:
            if not self._to_thin:
                self.sample_mask = 2 * self.sample_mask + 1
                self._to_thin = dict(self._indexes)
            index = next(iter(self._to_thin))
            del self._to_thin[index]
            index.thin()


class PrefixIndex:
    """The blocks in one scheduler's cache, by the first 8 bytes of their hashes."""

    def __init__(self, holders: PrefixHolders | None = None) -> None:
        """`holders` is kept equal to all indexes that share it."""
        self._holders = PrefixHolders() if holders is None else holders
        self._blocks: set[int] = set()
        self.bit = self._holders.join(self)
        self._mask = 1 << self.bit
        self.last_event_id = 0
        self.epoch = 0
        self._is_part = False  # more of the last event follows

    def __len__(self) -> int:
        return len(self._blocks)

    def clear(self) -> None:
        """Forget everything: the next event must be the start of everything there is."""
        self._drop_all()
        self.last_event_id = self.epoch = 0
        self._is_part = False

    def apply(self, event: scheduler_pb2.WatchCacheResponse) -> None:
        """Take a change. Raises LostEventsError if one before it did not arrive."""
        if event.cleared:
            self._drop_all()
            self.epoch = event.epoch
        elif event.epoch != self.epoch or not self._follows(event):
            raise LostEventsError(f"event {event.event_id} came after {self.last_event_id}")
        self.last_event_id = event.event_id
        self._is_part = event.more_follows
        self._drop(self._blocks.intersection(event.removed_block_hashes))
        unknown = self._holders.sample_mask
        stored = {name for name in event.stored_block_hashes if not name & unknown}
        stored -= self._blocks
        self._blocks |= stored
        self._holders.add(stored, self._mask)
        self._holders.fit()

    def thin(self) -> None:
        """Forget the names that are no longer in the sample."""
        unknown = self._holders.sample_mask
        self._drop({name for name in self._blocks if name & unknown})

    def count_cached(self, block_hashes: Sequence[int]) -> int:
        """Return how many of a prompt's blocks, from its start on, are in the cache."""
        return max((count for count, who in self._holders.cached(block_hashes) if who & self._mask), default=0)

    def _drop_all(self) -> None:
        names, self._blocks = self._blocks, set()
        self._holders.remove(names, self._mask)

    def _drop(self, names: set[int]) -> None:
        self._blocks -= names
        self._holders.remove(names, self._mask)

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
