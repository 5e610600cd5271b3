"""What routing remembers of the schedulers, and the few of them that a decision looks at.

With few schedulers all are compared. With many, a request is decided between those that know most of its prompt, the
idle ones and the home of its session: the time of a decision hardly grows with their number.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.process import memory_limit
from octavo.services.gateway.schedulers.prefix_index import PrefixHolders, PrefixIndex, names_that_fit
from octavo.services.gateway.schedulers.routing import RouteRequest, SchedulerView, backlog, choose

_POINTS = 64  # for each scheduler: shares differ by an eighth or so


class SessionRing:
    """Where a session belongs: the same scheduler for every gateway, and little moves when one comes or goes.

    It is a consistent-hash ring: a look-up does not get slower with the number of schedulers.
    """

    def __init__(self) -> None:
        self._points: list[tuple[int, int]] = []

    def add(self, bit: int, scheduler_id: str) -> None:
        """Put a scheduler in."""
        for point in _points(scheduler_id):
            insort(self._points, (point, bit))

    def remove(self, bit: int, scheduler_id: str) -> None:
        """Take it out."""
        for point in _points(scheduler_id):
            at = bisect_left(self._points, (point, bit))
            assert self._points[at] == (point, bit), (bit, scheduler_id)
            del self._points[at]

    def home(self, session_id: str) -> int | None:
        """Return the bit of the scheduler that a session belongs to; None if there is none."""
        if not self._points:
            return None
        at = bisect_left(self._points, (_hash(session_id), -1))
        return self._points[at % len(self._points)][1]


def _points(scheduler_id: str) -> list[int]:
    return [_hash(f"{scheduler_id}\0{number}") for number in range(_POINTS)]


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


_GRAIN_TOKENS = 64.0


class LoadOrder:
    """Schedulers by how busy they are, as masks of their bits, so that the idle ones of any set are found at once.

    Each is in a class of about equal backlogs: differences of 64 tokens, and then of an eighth.
    """

    def __init__(self) -> None:
        self._classes: list[int] = []  # those with members, least busy first
        self._members: dict[int, int] = {}  # class: mask
        self._class_of: dict[int, int] = {}  # bit: class

    def put(self, bit: int, backlog: float) -> None:
        """Note what a scheduler has to do: tokens for each of its workers."""
        number = int(8 * math.log2(1 + backlog / (8 * _GRAIN_TOKENS)))
        if self._class_of.get(bit) == number:
            return
        self.remove(bit)
        self._class_of[bit] = number
        if number not in self._members:
            self._members[number] = 0
            insort(self._classes, number)
        self._members[number] |= 1 << bit

    def remove(self, bit: int) -> None:
        """Leave a scheduler out, until it is put in again."""
        number = self._class_of.pop(bit, None)
        if number is None:
            return
        self._members[number] &= ~(1 << bit)
        if not self._members[number]:
            del self._members[number]
            del self._classes[bisect_left(self._classes, number)]

    def least_busy(self, of: int, count: int, start: int) -> Iterator[int]:
        """Yield up to `count` bits of the mask `of`, the least busy first; among equals from bit `start` on, around."""
        for number in self._classes:
            members = self._members[number] & of
            while members:
                if not count:
                    return
                behind = members >> start << start
                one = (behind or members) & -(behind or members)
                members ^= one
                count -= 1
                yield one.bit_length() - 1


COMPARE_ALL = 32
"""Up to so many schedulers are all compared."""
MAX_PREFIXES = 4
PER_PREFIX = 8
"""Of those that know equally much of the prompt, so many are looked at, for the so many longest prefixes."""


class Route:
    """A scheduler as routing sees it."""

    def __init__(self, router: Router, address: str) -> None:
        self.address = address
        self.scheduler_id = address
        self.prefixes = PrefixIndex(router.holders)
        self.block_size = 0
        self.load = scheduler_pb2.Load()
        self.refused_until = 0.0
        self.is_open = False
        self.sent_tokens = 0
        self.sent_requests = 0
        self._router = router

    def open(self, scheduler_id: str, block_size: int) -> None:
        """The scheduler takes requests."""
        self.close()
        self.scheduler_id, self.block_size, self.is_open = scheduler_id, block_size, True
        self.refused_until = 0.0
        self._router.on_open(self)

    def close(self) -> None:
        """It takes none until it is opened again."""
        if self.is_open:
            self._router.on_close(self)
            self.is_open = False

    def take_load(self, load: scheduler_pb2.Load) -> None:
        """Take what it says of itself, which replaces what was sent since the last time."""
        if _facts(load) != _facts(self.load):
            self._router.num_changes += 1
        self.load = load
        self.sent_tokens = self.sent_requests = 0
        self._router.on_busier(self)

    def sent(self, num_tokens: int, num_requests: int) -> None:
        """Something was sent to it that it has not counted yet."""
        self.sent_tokens += num_tokens
        self.sent_requests += num_requests
        self._router.on_busier(self)

    def view(self, cached_tokens: int, now: float) -> SchedulerView:
        """Describe it, for a request whose first tokens are in its cache."""
        load = self.load
        return SchedulerView(
            scheduler_id=self.scheduler_id,
            running=load.running,
            waiting_uncached_tokens=load.waiting_uncached_tokens,
            estimated_queue_ms=load.estimated_queue_ms,
            kv_blocks_free=load.kv_blocks_free,
            kv_block_size=self.block_size,
            workers_ready=load.workers_ready,
            cached_tokens=cached_tokens,
            sent_tokens=self.sent_tokens,
            sent_requests=self.sent_requests,
            recently_refused=now < self.refused_until,
        )


class Router:
    """The schedulers of a gateway, and the choice between them. It reads no clock and waits for nothing."""

    def __init__(self) -> None:
        self.holders = PrefixHolders(names_that_fit(memory_limit()))
        self.num_changes = 0
        """Grows whenever a scheduler comes or goes, or says something else of its model."""
        self._routes: dict[int, Route] = {}  # the open ones, by their bits
        self._order = LoadOrder()
        self._sessions = SessionRing()
        self._block_sizes: Counter[int] = Counter()

    def add(self, address: str) -> Route:
        """Add a scheduler; it is not open yet."""
        return Route(self, address)

    def remove(self, route: Route) -> None:
        """Forget a scheduler."""
        route.close()
        self.holders.leave(route.prefixes)

    @property
    def block_sizes(self) -> list[int]:
        """For which block sizes `choose` asks for the names of a prompt's blocks: none if there is no choice."""
        if len(self._routes) < 2 or not self.holders.num_names:
            return []
        return [size for size in self._block_sizes if size]

    def choose(
        self,
        request: RouteRequest,
        block_hashes: Callable[[int], Sequence[int]],
        accepts: Callable[[Route], bool],
        now: float,
    ) -> Route | None:
        """Return where a request goes; None if nobody is open and accepted.

        block_hashes   the names of its prompt's blocks, for a block size
        accepts        whether a scheduler may get it; asked about a few
        """
        if len(self._routes) < 2:  # no choice: the prompt need not be hashed
            return next(filter(accepts, self._routes.values()), None)
        known = self._known(block_hashes)
        bits = self._candidates(request, [who for _, who in known])
        routes = [route for route in map(self._routes.__getitem__, bits) if accepts(route)]
        if len(bits) < len(self._routes) and all(now < route.refused_until for route in routes):
            routes = [route for route in self._routes.values() if accepts(route)]
        if len(routes) < 2:
            return routes[0] if routes else None
        views = []
        for route in routes:
            mask = 1 << route.prefixes.bit
            views.append(route.view(next((tokens for tokens, who in known if who & mask), 0), now))
        is_many = len(self._routes) > COMPARE_ALL
        own = self._sessions.home(request.session_id) if is_many and request.session_id else None
        home = next((index for index, route in enumerate(routes) if route.prefixes.bit == own), None)
        return routes[choose(request, views, home)]

    def _known(self, block_hashes: Callable[[int], Sequence[int]]) -> list[tuple[int, int]]:
        """Return (tokens of the prompt, mask of who has at least these in the cache), the most tokens first."""
        known: list[tuple[int, int]] = []
        for size in self.block_sizes:
            known += [(size * count, who) for count, who in self.holders.cached(block_hashes(size))]
        return sorted(known, reverse=True)

    def _candidates(self, request: RouteRequest, prefixes: Sequence[int]) -> list[int]:
        """Return the bits of the schedulers to compare."""
        if len(self._routes) <= COMPARE_ALL:
            return list(self._routes)
        start = zlib.crc32(request.request_id.encode()) % len(self._routes)
        found: dict[int, None] = {}
        longer = 0
        for who in prefixes[:MAX_PREFIXES]:
            found.update(dict.fromkeys(self._order.least_busy(who & ~longer, PER_PREFIX, start)))
            longer |= who
        found.update(dict.fromkeys(self._order.least_busy(-1, PER_PREFIX, start)))
        home = self._sessions.home(request.session_id) if request.session_id else None
        if home is not None:
            found[home] = None
        return list(found)

    # What routes report

    def on_open(self, route: Route) -> None:
        """A scheduler can be chosen."""
        self.num_changes += 1
        bit = route.prefixes.bit
        self._routes[bit] = route
        self._sessions.add(bit, route.scheduler_id)
        self._block_sizes[route.block_size] += 1
        self.on_busier(route)

    def on_close(self, route: Route) -> None:
        """A scheduler cannot be chosen."""
        self.num_changes += 1
        bit = route.prefixes.bit
        del self._routes[bit]
        self._order.remove(bit)
        self._sessions.remove(bit, route.scheduler_id)
        self._block_sizes[route.block_size] -= 1
        self._block_sizes += Counter()  # drops zeros

    def on_busier(self, route: Route) -> None:
        """Its backlog has changed."""
        if route.is_open:
            load = route.load
            tokens = load.waiting_uncached_tokens + route.sent_tokens
            self._order.put(route.prefixes.bit, backlog(tokens, load.running + route.sent_requests, load.workers_ready))


def _facts(load: scheduler_pb2.Load) -> tuple[int, bool, int, bool, str, list[str]]:
    """Return what the gateway tells clients of the model, and hardly ever changes."""
    return (
        load.max_model_len,
        load.may_grow,
        load.vector_size,
        load.prompt_logprobs,
        load.model_version,
        list(load.notes),
    )
