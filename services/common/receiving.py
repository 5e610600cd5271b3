"""Bounds what requests take while they arrive.

gRPC keeps a request until its last byte is there, and does not say how much of it there is. So each request counts as
the longest that is allowed. It is received in one of a few places, which short requests leave at once; one that is slow
goes on in one of other places, so that clients that send little by little are in nobody's way but each other's.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any
from weakref import WeakValueDictionary

from octavo.services.common.errors import Reason, ServingError

_FAST_PLACES = 16
_FAST_S = 1.0  # then a request is slow
_WAIT_S = 30.0  # for a place
_RETRY_AFTER_MS = 1000


class Receiving:
    """The places in which requests are received. A tenant with a name gets half of either kind."""

    def __init__(self, max_slow: int) -> None:
        self._fast = asyncio.Semaphore(_FAST_PLACES)
        self._fast_of: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()  # by tenant, while in use
        self._max_slow = max_slow
        self._slow: Counter[str] = Counter()  # by tenant; never 0

    async def receive(self, context: Any, tenant: str, seconds: float | None) -> Any:
        """Return the next request's bytes, or gRPC's end of file. Raises MALFORMED_REQUEST, QUEUE_FULL.

        seconds  how long the request may take to arrive; None: as long as it likes
        """
        loop = asyncio.get_running_loop()
        place = _Place(tenant, None if seconds is None else loop.time() + seconds)
        await self._enter(place)
        try:
            async with asyncio.timeout(None) as limit:
                slow = loop.call_later(_FAST_S, self._become_slow, place, limit)
                try:
                    return await context.read()
                finally:
                    slow.cancel()
        except TimeoutError:
            if place.is_refused:
                raise _full("too many requests arrive slowly") from None
            raise ServingError(Reason.MALFORMED_REQUEST, "the request did not arrive in time; send it faster") from None
        finally:
            self._leave(place)

    def _become_slow(self, place: _Place, limit: asyncio.Timeout) -> None:
        self._leave(place)
        most = max(1, self._max_slow // 2) if place.tenant else self._max_slow
        place.is_slow = self._slow[place.tenant] < most and self._slow.total() < self._max_slow
        place.is_refused = not place.is_slow
        if place.is_slow:
            self._slow[place.tenant] += 1
        limit.reschedule(place.until if place.is_slow else asyncio.get_running_loop().time())

    async def _enter(self, place: _Place) -> None:
        """Take a fast place. Raises QUEUE_FULL."""
        try:
            for semaphore in self._semaphores(place.tenant):
                if semaphore.locked():
                    async with asyncio.timeout(_WAIT_S):
                        await semaphore.acquire()
                else:
                    await semaphore.acquire()
                place.semaphores.append(semaphore)
        except TimeoutError:
            self._leave(place)
            raise _full("too many requests arrive at once") from None
        except BaseException:
            self._leave(place)
            raise

    def _semaphores(self, tenant: str) -> list[asyncio.Semaphore]:
        if not tenant:
            return [self._fast]
        own = self._fast_of.get(tenant)
        if own is None:
            own = self._fast_of[tenant] = asyncio.Semaphore(_FAST_PLACES // 2)
        return [own, self._fast]

    def _leave(self, place: _Place) -> None:
        """Give up the place that a request has, if it has one."""
        while place.semaphores:
            place.semaphores.pop().release()
        if place.is_slow:
            place.is_slow = False
            self._slow[place.tenant] -= 1
            if not self._slow[place.tenant]:
                del self._slow[place.tenant]


class _Place:
    """Where a request is received."""

    __slots__ = ("is_refused", "is_slow", "semaphores", "tenant", "until")

    def __init__(self, tenant: str, until: float | None) -> None:
        self.tenant = tenant
        self.until = until  # a time of the event loop
        self.semaphores: list[asyncio.Semaphore] = []
        self.is_slow = False
        self.is_refused = False


def _full(message: str) -> ServingError:
    return ServingError(Reason.QUEUE_FULL, message + "; send it again later", retry_after_ms=_RETRY_AFTER_MS)
