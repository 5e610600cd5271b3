"""What all tenants of a gateway use together, in shares: places that are counted, and turns that are waited for."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from octavo.services.common.errors import ServingError

_OF_WHAT_IS_FREE = 8


class Shares:
    """Places that tenants take and give back.

    A tenant gets a further place while it has fewer than eight times as many as are free. So a tenant that is alone
    gets eight ninths of all places, one that has none finds some free, and as places come back the shares of those
    that want many become equal.
    """

    def __init__(self, num_places: int) -> None:
        self.num_places = num_places
        self._taken: Counter[str] = Counter()
        self.num_taken = 0

    def take(self, tenant: str) -> bool:
        """Take a place; False if the tenant gets none now."""
        if self._taken[tenant] >= _OF_WHAT_IS_FREE * (self.num_places - self.num_taken):
            self._forget_idle(tenant)
            return False
        self._taken[tenant] += 1
        self.num_taken += 1
        return True

    def give_back(self, tenant: str) -> None:
        """Give back a place."""
        assert self._taken[tenant] > 0, f"tenant {tenant!r} has no place"
        self._taken[tenant] -= 1
        self.num_taken -= 1
        self._forget_idle(tenant)

    def taken(self, tenant: str) -> int:
        """Return how many places a tenant has."""
        return self._taken.get(tenant, 0)

    def left(self, tenant: str) -> int:
        """Return how many more places a tenant would get now."""
        more = _OF_WHAT_IS_FREE * (self.num_places - self.num_taken) - self.taken(tenant)
        return max(0, -(-more // (_OF_WHAT_IS_FREE + 1)))

    def _forget_idle(self, tenant: str) -> None:
        if not self._taken[tenant]:
            del self._taken[tenant]


class Turns:
    """Lets a few run at once. Those that wait come by tenant, in turns, however many of a tenant wait."""

    def __init__(self, num_slots: int, max_waiting: int, max_wait_s: float, busy: Callable[[], ServingError]) -> None:
        """`busy` makes the error for those that find no place to wait, or have waited for `max_wait_s`."""
        self._num_free = num_slots
        self._places = Shares(max_waiting)
        self._max_wait_s = max_wait_s
        self._busy = busy
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by tenant; the first one is the next

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Run the body when it is the tenant's turn. Raises what `busy` makes."""
        await self.begin(tenant)
        try:
            yield
        finally:
            self.end()

    async def begin(self, tenant: str) -> None:
        """Wait for the tenant's turn, which lasts until `end`. Raises what `busy` makes."""
        if self._num_free:
            self._num_free -= 1
            return
        if not self._places.take(tenant):
            raise self._busy()
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(future)
        try:
            async with asyncio.timeout(self._max_wait_s):
                await future
        except BaseException as error:
            if future.done() and not future.cancelled():  # its turn had begun
                self.end()
            else:
                self._leave(tenant, future)
            if isinstance(error, TimeoutError):
                raise self._busy() from None
            raise
        finally:
            self._places.give_back(tenant)

    def end(self) -> None:
        """End a turn: the next one begins."""
        while self._waiting:
            tenant = next(iter(self._waiting))
            queue = self._waiting.pop(tenant)
            future = queue.popleft()
            if queue:
                self._waiting[tenant] = queue  # behind the others
            if not future.done():
                future.set_result(None)
                return
        self._num_free += 1

    def _leave(self, tenant: str, future: asyncio.Future[None]) -> None:
        queue = self._waiting.get(tenant, deque())
        if future in queue:
            queue.remove(future)
            if not queue:
                del self._waiting[tenant]
