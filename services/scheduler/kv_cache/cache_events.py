"""Cache events tell gateways, which route by it, what the prefix caches of all groups hold."""

from __future__ import annotations

from collections import deque

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.config import BLOCK_SIZE

MAX_HASHES = 8_192  # in a message: a gateway takes it between two turns of its event loop
MAX_EVENTS = 256  # kept for watchers that come back
NAME_BYTES = 8


class CacheEvents:
    """Counts in how many groups a block's name is cached, and turns changes into events.

    The pools report to `stored` and `removed`; `flush` closes an event. A block that came and went
    between two flushes is in none.
    """

    def __init__(self, epoch: int = 0) -> None:
        self._epoch = epoch
        self._counts: dict[int, int] = {}
        self._changed: dict[int, bool] = {}  # whether the name was cached at the last flush
        self._event_id = 0
        self._events: deque[scheduler_pb2.WatchCacheResponse] = deque(maxlen=MAX_EVENTS)

    def stored(self, block_hash: bytes) -> None:
        """A pool caches a block."""
        name = int.from_bytes(block_hash[:NAME_BYTES], "little")
        count = self._counts.get(name, 0)
        self._counts[name] = count + 1
        if count == 0:
            self._changed.setdefault(name, False)

    def removed(self, block_hash: bytes) -> None:
        """A pool no longer caches a block that it had."""
        name = int.from_bytes(block_hash[:NAME_BYTES], "little")
        count = self._counts[name] - 1
        if count:
            self._counts[name] = count
        else:
            del self._counts[name]
            self._changed.setdefault(name, True)

    def flush(self) -> list[scheduler_pb2.WatchCacheResponse]:
        """Return the messages of what has changed since the last call, and keep them for `since`."""
        removed = [name for name, was in self._changed.items() if was and name not in self._counts]
        stored = [name for name, was in self._changed.items() if not was and name in self._counts]
        self._changed.clear()
        messages = []
        while removed or stored:
            self._event_id += 1
            message = self._message(removed_block_hashes=removed[:MAX_HASHES], stored_block_hashes=stored[:MAX_HASHES])
            removed, stored = removed[MAX_HASHES:], stored[MAX_HASHES:]
            messages.append(message)
        self._events.extend(messages)
        return messages

    def since(self, event_id: int, epoch: int) -> list[scheduler_pb2.WatchCacheResponse]:
        """Return the events after `event_id` if they are kept, else everything. Call `flush` before."""
        first = self._events[0].event_id if self._events else self._event_id + 1
        if event_id and epoch == self._epoch and first - 1 <= event_id <= self._event_id:
            return [event for event in self._events if event.event_id > event_id]
        return self._everything()

    def sign_of_life(self) -> scheduler_pb2.WatchCacheResponse:
        """Return an empty message."""
        return self._message()

    def _everything(self) -> list[scheduler_pb2.WatchCacheResponse]:
        names = list(self._counts)
        parts = [names[at : at + MAX_HASHES] for at in range(0, len(names), MAX_HASHES)] or [[]]
        messages = [self._message(stored_block_hashes=part, more_follows=True) for part in parts]
        messages[0].cleared = True
        messages[-1].more_follows = False
        return messages

    def _message(
        self,
        *,
        stored_block_hashes: list[int] | None = None,
        removed_block_hashes: list[int] | None = None,
        more_follows: bool = False,
    ) -> scheduler_pb2.WatchCacheResponse:
        return scheduler_pb2.WatchCacheResponse(
            event_id=self._event_id,
            stored_block_hashes=stored_block_hashes or (),
            removed_block_hashes=removed_block_hashes or (),
            more_follows=more_follows,
            epoch=self._epoch,
            kv_block_size=BLOCK_SIZE,
        )
