"""What the prefix caches of schedulers hold, as far as they have told."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from octavo.scheduler.v1 import scheduler_pb2

_MAX_BLOCKS = 1 << 22


class LostEventsError(Exception):
    """An event is missing: the index has to start over."""


class PrefixIndex:
    """The blocks in one scheduler's cache, by the first 8 bytes of their hashes."""

    def __init__(self) -> None:
        self._blocks: set[int] = set()
        self.last_event_id = 0
        self.epoch = 0
        self._is_part = False  # more of the last event follows

    def __len__(self) -> int:
        return len(self._blocks)

    def clear(self) -> None:
        """Forget everything: the next event must be the start of everything there is."""
        self._blocks.clear()
        self.last_event_id = self.epoch = 0
        self._is_part = False

    def apply(self, event: scheduler_pb2.WatchCacheResponse) -> None:
        """Take a change. Raises LostEventsError if one before it did not arrive, or there are too many blocks."""
        if event.cleared:
            self._blocks.clear()
            self.epoch = event.epoch
        elif event.epoch != self.epoch or not self._follows(event):
            raise LostEventsError(f"event {event.event_id} came after {self.last_event_id}")
        self.last_event_id = event.event_id
        self._is_part = event.more_follows
        self._blocks.difference_update(event.removed_block_hashes)
        self._blocks.update(event.stored_block_hashes)
        if len(self._blocks) > _MAX_BLOCKS:
            raise LostEventsError(f"the scheduler's cache has more than {_MAX_BLOCKS} blocks")

    def _follows(self, event: scheduler_pb2.WatchCacheResponse) -> bool:
        """Return whether nothing is missing between the last event and this one. A sign of life changes nothing."""
        if self._is_part:
            return event.event_id == self.last_event_id
        changes = event.stored_block_hashes or event.removed_block_hashes
        return event.event_id == self.last_event_id + bool(changes)

    def count_cached(self, block_hashes: Sequence[int]) -> int:
        """Return how many of a prompt's blocks, from its start on, are in the cache."""
        blocks = self._blocks
        return next((n for n, block_hash in enumerate(block_hashes) if block_hash not in blocks), len(block_hashes))


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
