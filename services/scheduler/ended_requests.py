"""Requests that have ended and can still be resumed: kept in memory, so in bounds."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from octavo.services.scheduler.sequence import Request

# What a request takes in memory, measured: itself and its message, and each of its parts.
REQUEST_BYTES = 8192
SEQUENCE_BYTES = 4096
TOKEN_BYTES = 8
LOGPROB_BYTES = 320  # of a token, and of
ALTERNATIVE_BYTES = 16  # each of its alternatives


class EndedRequests:
    """Keeps each request for its time, as long as there is room.

    When there is none, the tenant that has most for its weight gives up what ended first. So a tenant pushes out
    its own, and never what another one keeps with less.
    """

    def __init__(self, max_bytes: int, weights: Mapping[str, float]) -> None:
        """`weights`: shares of tenants; others weigh 1."""
        self._max_bytes = max_bytes
        self._weights = weights
        self._by_tenant: dict[str, dict[Request, int]] = {}  # the bytes of each, the first to end first
        self._bytes: dict[str, int] = {}  # by tenant
        self._by_arrival: dict[int, Request] = {}
        # Heaps, with entries that are out of date: when each ends, by arrival, and the largest tenants.
        self._until: list[tuple[float, int]] = []
        self._largest: list[tuple[float, str]] = []
        self.num_bytes = 0

    def __contains__(self, request: Request) -> bool:
        return self._by_arrival.get(request.arrival) is request

    def __len__(self) -> int:
        return len(self._by_arrival)

    def add(self, request: Request, until: float) -> None:
        """Keep a request."""
        assert request not in self, request
        size = size_of(request)
        self._by_tenant.setdefault(request.submit.tenant, {})[request] = size
        self._by_arrival[request.arrival] = request
        heapq.heappush(self._until, (until, request.arrival))
        self._resize(request.submit.tenant, size)

    def remove(self, request: Request) -> None:
        """Keep a request no longer, if it is here."""
        if request not in self:
            return
        tenant = request.submit.tenant
        kept = self._by_tenant[tenant]
        size = kept.pop(request)
        if not kept:
            del self._by_tenant[tenant]
        del self._by_arrival[request.arrival]
        self._resize(tenant, -size)
        if len(self._until) > 64 + 4 * len(self._by_arrival):  # mostly of requests that are gone
            self._until = [entry for entry in self._until if entry[1] in self._by_arrival]
            heapq.heapify(self._until)

    def next_to_go(self, now: float) -> Request | None:
        """Return a request whose time is over, or that has no room; None if there is none."""
        while self._until and self._until[0][0] <= now:
            _, arrival = heapq.heappop(self._until)
            if arrival in self._by_arrival:
                return self._by_arrival[arrival]
        if self.num_bytes <= self._max_bytes:
            return None
        while True:
            weighed, tenant = self._largest[0]
            if -weighed == self._weighed(tenant):
                return next(iter(self._by_tenant[tenant]))
            heapq.heappop(self._largest)

    def _resize(self, tenant: str, change: int) -> None:
        """Count bytes of a tenant more or less."""
        self.num_bytes += change
        size = self._bytes[tenant] = self._bytes.get(tenant, 0) + change
        if not size:
            del self._bytes[tenant]
        else:
            heapq.heappush(self._largest, (-self._weighed(tenant), tenant))
        if len(self._largest) > 64 + 4 * len(self._bytes):  # mostly sizes of the past
            self._largest = [(-self._weighed(other), other) for other in self._bytes]
            heapq.heapify(self._largest)

    def _weighed(self, tenant: str) -> float:
        return self._bytes.get(tenant, 0) / self._weights.get(tenant, 1.0)

    def check_invariants(self) -> None:
        """Assert that bytes and requests agree."""
        assert self._bytes == {tenant: sum(kept.values()) for tenant, kept in self._by_tenant.items()}
        assert self.num_bytes == sum(self._bytes.values())
        everyone = {request for kept in self._by_tenant.values() for request in kept}
        assert everyone == set(self._by_arrival.values())
        assert {request.arrival for request in everyone} <= {arrival for _, arrival in self._until}


def size_of(request: Request) -> int:
    """Return about how many bytes of memory a request takes that has ended."""
    submit = request.submit
    size = REQUEST_BYTES + TOKEN_BYTES * len(submit.prompt_token_ids) + 2 * len(submit.gateway_state)
    size += 2 * submit.constraint.ByteSize()
    for seq in request.sequences:
        size += SEQUENCE_BYTES + TOKEN_BYTES * len(seq.tokens)
        size += (LOGPROB_BYTES + ALTERNATIVE_BYTES * max(seq.num_logprobs, 0)) * len(seq.kept_logprobs)
    return size
