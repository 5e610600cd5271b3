"""Tenants share what there is: the one that has had least for its weight is served next."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection

MIN_KEPT = 1024  # counters, before those that say nothing any more are looked for
UNMET_S = 5.0
"""A tenant that was refused for lack of room has more to do for so long than what it has in the queue."""
MAX_UNMET = 10_000  # tenants

Turn = tuple[float, int, str]
"""A tenant that waits: its counter, when it joined, and its name."""


class FairShare:
    """Virtual token counters: each tenant's tokens, divided by its weight (Sheng et al., OSDI 2024).

    The tenant that waits and has had least is served next. What a tenant has had while nobody waited
    costs it nothing later, and a tenant that was idle does not save up: one that joins those who wait
    starts at `virtual_time`, unless it has had more.

    virtual_time   how far a tenant that waited all along would be: the counter of the last one served
                   while others waited, and the largest of all while nobody did
    total_weight   of the tenants that wait
    """

    def __init__(self, weights: dict[str, float]) -> None:
        self._weights = weights
        self._counters: dict[str, float] = {}
        self._most_kept = MIN_KEPT
        self._joined: dict[str, int] = {}  # of the tenants that wait: which of all that joined each is
        self._num_joined = 0
        # Heap of those that wait, and of some that left. Counters only grow: what is filed is at most what is true.
        self._turns: list[Turn] = []
        self._highest = 0.0
        self.virtual_time = 0.0
        self.total_weight = 0.0
        self._unmet_until: dict[str, float] = {}  # by tenant that was turned away, the first to end first
        self._competing_weight = 0.0  # of the tenants that wait or were turned away, each once

    def counter(self, tenant: str) -> float:
        """Return what `tenant` has had so far."""
        return self._counters.get(tenant, 0.0)

    def weight(self, tenant: str) -> float:
        """Return the weight of `tenant`."""
        return self._weights.get(tenant, 1.0)

    def change(self, weights: dict[str, float]) -> None:
        """Let other weights count from now on; what tenants have had stays as it was counted."""
        self._weights = weights
        self.total_weight = sum(map(self.weight, self._joined))

    def cost(self, tenant: str, tokens: float) -> float:
        """Return by how much `tokens` raise the counter of `tenant`."""
        return tokens / self._weights.get(tenant, 1.0)

    def charge(self, tenant: str, tokens: int) -> None:
        """Count tokens that were scheduled for `tenant`."""
        counter = self._counters.get(tenant, 0.0) + tokens / self._weights.get(tenant, 1.0)
        self._counters[tenant] = counter
        if counter > self._highest:
            self._highest = counter
        if not self._joined:
            self.virtual_time = self._highest

    def opened(self, tenant: str, tokens: int) -> None:
        """Advance the virtual time: a tenant that waits is served, with `tokens` to compute.

        It also advances as fast as those who wait are served on average, so that tenants that keep
        coming do not hold it, and with it all who were there before, where it is.
        """
        advance = tokens / max(self.total_weight, self.weight(tenant))
        self.virtual_time = min(max(self.virtual_time, self.counter(tenant)) + advance, self._highest)

    # -- the tenants that wait -------------------------------------------------------------------

    def join(self, tenant: str) -> None:
        """Let a tenant wait from now on."""
        self._num_joined += 1
        self._joined[tenant] = self._num_joined
        self._counters[tenant] = max(self.counter(tenant), self.virtual_time)
        self.total_weight += self.weight(tenant)
        if tenant not in self._unmet_until:
            self._compete(self.weight(tenant))
        self.put_back(tenant)
        self._forget_what_is_over()

    def leave(self, tenant: str) -> None:
        """Let a tenant wait no longer."""
        del self._joined[tenant]
        self.total_weight = self.total_weight - self.weight(tenant) if self._joined else 0.0
        if tenant not in self._unmet_until:
            self._compete(-self.weight(tenant))

    def next_turn(self) -> Turn | None:
        """Return whose turn it is of those who wait and were not taken out."""
        while self._turns:
            counter, joined, tenant = turn = self._turns[0]
            if self._joined.get(tenant) != joined:
                heapq.heappop(self._turns)
            elif counter < (true := self.counter(tenant)):
                heapq.heapreplace(self._turns, (true, joined, tenant))
            else:
                return turn
        return None

    def take_turn(self) -> None:
        """Take out the one that `next_turn` returned, until `put_back`."""
        heapq.heappop(self._turns)

    def put_back(self, tenant: str) -> None:
        """Put back a tenant that was taken out, if it still waits."""
        joined = self._joined.get(tenant)
        if joined is not None:
            heapq.heappush(self._turns, (self.counter(tenant), joined, tenant))

    # -- the tenants that wait or would like to ------------------------------------------------------

    def turned_away(self, tenant: str, now: float) -> None:
        """Learn that a tenant has more to do than there is room for."""
        self._forget_unmet(now)
        known = self._unmet_until.pop(tenant, None) is not None
        if known or len(self._unmet_until) < MAX_UNMET:
            self._unmet_until[tenant] = now + UNMET_S
            if not known and tenant not in self._joined:
                self._compete(self.weight(tenant))

    def share(self, tenant: str, now: float) -> float:
        """Return a tenant's part, by weight, of all that wait or were turned away lately, itself included."""
        self._forget_unmet(now)
        weight = self.weight(tenant)
        is_counted = tenant in self._joined or tenant in self._unmet_until
        return weight / max(self._competing_weight + (0.0 if is_counted else weight), weight)

    def _forget_unmet(self, now: float) -> None:
        while self._unmet_until:
            tenant, until = next(iter(self._unmet_until.items()))
            if until > now:
                return
            del self._unmet_until[tenant]
            if tenant not in self._joined:
                self._compete(-self.weight(tenant))

    def _compete(self, weight: float) -> None:
        """Count a tenant more or less; nothing is left of rounding where nobody competes."""
        is_someone = bool(self._joined or self._unmet_until)
        self._competing_weight = self._competing_weight + weight if is_someone else 0.0

    def _forget_what_is_over(self) -> None:
        """Keep the tables bounded, at no more than a constant cost for each that joins."""
        if len(self._turns) > MIN_KEPT + 2 * len(self._joined):
            self._turns = [turn for turn in self._turns if self._joined.get(turn[2]) == turn[1]]
            heapq.heapify(self._turns)
        if len(self._counters) > self._most_kept:  # one that is behind and idle is raised when it joins, known or not
            self._counters = {
                tenant: counter
                for tenant, counter in self._counters.items()
                if counter > self.virtual_time or tenant in self._joined
            }
            self._most_kept = MIN_KEPT + 2 * len(self._counters)

    def check_invariants(self, waiting: Collection[str]) -> None:
        """Assert that those who wait, and nobody else, get their turns. `waiting`: all that do."""
        assert self._joined.keys() == set(waiting), self._joined.keys() ^ set(waiting)
        turns = [turn for turn in self._turns if self._joined.get(turn[2]) == turn[1]]
        assert len(turns) == len(self._joined), "a tenant that waits has no turn, or two"
        assert all(counter <= self.counter(tenant) for counter, _, tenant in turns), turns
        assert math.isclose(self.total_weight, sum(map(self.weight, self._joined)), abs_tol=1e-6)
        competing = sum(map(self.weight, self._joined.keys() | self._unmet_until.keys()))
        assert math.isclose(self._competing_weight, competing, abs_tol=1e-6), (self._competing_weight, competing)
        assert self.virtual_time <= self._highest
