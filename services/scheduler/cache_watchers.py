"""The watchers of the cache are gateways that are told of each change of the prefix cache."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.kv_cache.cache_events import CacheEvents

MAX_UNSENT = 64  # messages; a watcher that reads more slowly gets everything anew
MAX_WATCHERS = 256
QUIET_S = 5.0  # without a change, an empty message is sent


class CacheWatchers:
    """The calls of WatchCache. Everything runs on one event loop."""

    def __init__(self, feed: CacheEvents) -> None:
        self._feed = feed
        self._queues: dict[asyncio.Queue[scheduler_pb2.WatchCacheResponse], None] = {}
        self._next_sign = 0.0

    @property
    def is_full(self) -> bool:
        """No more watchers, please."""
        return len(self._queues) >= MAX_WATCHERS

    def flush(self, now: float) -> None:
        """Send what has changed since the last call."""
        messages = self._feed.flush()
        if messages:
            self._next_sign = now + QUIET_S
        elif now >= self._next_sign:
            self._next_sign = now + QUIET_S
            messages = [self._feed.sign_of_life()]
        for queue in list(self._queues):
            try:
                for message in messages:
                    queue.put_nowait(message)
            except asyncio.QueueFull:
                del self._queues[queue]  # `watch` notices once it has sent what is in there

    async def watch(self, request: scheduler_pb2.WatchCacheRequest) -> AsyncIterator[scheduler_pb2.WatchCacheResponse]:
        """Yield the events after the one that `request` names, then every new one."""
        event_id, epoch = request.after_event_id, request.epoch
        while True:
            queue: asyncio.Queue[scheduler_pb2.WatchCacheResponse] = asyncio.Queue(MAX_UNSENT)
            self._queues[queue] = None  # before anything is sent, so that no event falls in between
            try:
                for message in self._feed.since(event_id, epoch):
                    yield message
                    event_id, epoch = message.event_id, message.epoch
                while queue in self._queues or not queue.empty():
                    message = await queue.get()
                    yield message
                    event_id = message.event_id
            finally:
                self._queues.pop(queue, None)
