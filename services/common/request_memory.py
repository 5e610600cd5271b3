"""Bounds the memory that the requests of calls take, while they arrive and while they run."""

from __future__ import annotations

import asyncio
from collections import Counter

from octavo.services.common.errors import Reason, ServingError
from octavo.services.common.receiving import Receiving

_RETRY_AFTER_MS = 1000


class Hold:
    """A part of the memory, until `release`."""

    def __init__(self, memory: Memory, tenant: str) -> None:
        self._memory = memory
        self._tenant = tenant
        self._size = 0
        self.is_taken = False
        """Somebody else releases it than who got it."""

    def grow(self, size: int) -> None:
        """Take so many bytes more. Raises QUEUE_FULL."""
        self._memory.check(self._tenant, size, self._size)
        self._memory.take(self._tenant, size)
        self._size += size

    def release(self) -> None:
        """Give it back; a second time does nothing."""
        size, self._size = self._size, 0
        if size:
            self._memory.give_back(self._tenant, size)


class Memory:
    """What requests may take together; a tenant with a name may take half of it.

    One request alone always fits, however long.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held: Counter[str] = Counter()  # bytes by tenant; never 0
        self._total = 0
        self._freed = asyncio.Event()

    @property
    def held_bytes(self) -> int:
        """What is taken now."""
        return self._total

    def hold(self, tenant: str, size: int) -> Hold:
        """Take so many bytes. Raises QUEUE_FULL."""
        hold = Hold(self, tenant)
        hold.grow(size)
        return hold

    def check(self, tenant: str, size: int, own_size: int = 0) -> None:
        """Raise QUEUE_FULL if so many bytes cannot be taken now, for a request that has `own_size` already."""
        of_tenant = self._held.get(tenant, 0)
        most = self._max_bytes // 2 if tenant else self._max_bytes
        if of_tenant > own_size and of_tenant + size > most:
            raise _full("this tenant's running requests take all the memory that one tenant may have for them")
        if self._total > own_size and self._total + size > self._max_bytes:
            raise _full("the running requests take all the memory that there is for them")

    def take(self, tenant: str, size: int) -> None:
        """Count bytes as taken; for `Hold`."""
        if size:
            self._held[tenant] += size
            self._total += size

    async def hold_within(self, tenant: str, size: int, seconds: float) -> Hold:
        """Take so many bytes, once there is room for them. Raises QUEUE_FULL if there is none in time."""
        until = asyncio.get_running_loop().time() + seconds
        while True:
            try:
                return self.hold(tenant, size)
            except ServingError:
                try:
                    async with asyncio.timeout_at(until):
                        await self._freed.wait()
                except TimeoutError:
                    pass
                else:
                    continue
                raise

    def give_back(self, tenant: str, size: int) -> None:
        """Make room; for `Hold`."""
        self._total -= size
        self._held[tenant] -= size
        assert self._held[tenant] >= 0, f"tenant {tenant} gave back more than it took"
        if not self._held[tenant]:
            del self._held[tenant]
        freed, self._freed = self._freed, asyncio.Event()
        freed.set()


class RequestMemory(Memory):
    """What requests take while they run. Those that arrive slowly may take as much once more.

    So clients that send little by little are in nobody's way but each other's.
    """

    def __init__(self, max_bytes: int, max_message_bytes: int) -> None:
        """`max_message_bytes`: the longest message of gRPC."""
        super().__init__(max_bytes)
        self.receiving = Receiving(max(1, max_bytes // max_message_bytes))
        """The places for messages of gRPC, which does not say how much of one has come."""
        self.arriving = Memory(max_bytes)
        """What has come of other requests."""


def _full(message: str) -> ServingError:
    return ServingError(Reason.QUEUE_FULL, message + "; send it again later", retry_after_ms=_RETRY_AFTER_MS)
