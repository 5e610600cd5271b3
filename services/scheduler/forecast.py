"""When a request would be through: measured rates, divided among tenants as the queue divides them.

Tenants that have something in the queue are served in proportion to their weights: see FairShare. So when a
tenant has had all that it has there, the counters of the others have got as far as its own will then be. What
that is in tokens, at the measured price of a token, is how long the tenant's next request waits.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping

from octavo.services.scheduler.policy import FairShare, WaitingQueue
from octavo.services.scheduler.tally import Tally
from octavo.services.scheduler.work import Prices, Work
from octavo.services.scheduler.worker_group import WorkerGroup

MIN_MEASURED_S = 0.5  # of full load, before its pace is believed
PACE_WINDOW_S = 10.0
UNMET_S = 5.0
"""A tenant that was refused for lack of room has more to do for so long than what it has in the queue."""
MAX_UNMET = 10_000  # tenants
RECENT_S = 5.0  # of a window of what was admitted


class RecentTokens:
    """How many tokens a second each tenant had admitted lately: in this window, and in the one before."""

    def __init__(self) -> None:
        self._since = 0.0
        self._now: Counter[str] = Counter()
        self._before: Counter[str] = Counter()

    def add(self, tenant: str, tokens: int, now: float) -> None:
        """Count tokens."""
        self._turn(now)
        self._now[tenant] += tokens

    def per_s(self, now: float) -> dict[str, float]:
        """Return the rates of all tenants that have one."""
        self._turn(now)
        seconds = RECENT_S + now - self._since
        return {tenant: tokens / seconds for tenant, tokens in (self._now + self._before).items()}

    def _turn(self, now: float) -> None:
        if now - self._since > RECENT_S:
            is_next = now - self._since < 2 * RECENT_S
            self._before = self._now if is_next else Counter()
            self._now, self._since = Counter(), now


class Forecast:
    """Measures how fast work is done while there is more than can run, and foretells from that."""

    def __init__(
        self, groups: Mapping[str, WorkerGroup], waiting: WaitingQueue, fair_share: FairShare, tally: Tally
    ) -> None:
        self._groups = groups
        self._waiting = waiting
        self._fair_share = fair_share
        self._tally = tally
        # Seconds' worth of work that was done at full load, and seconds that took. Cached prefixes, missing blocks
        # and the time between steps show in it, as they do in no worker's price of a token.
        self._done_s = 0.0
        self._full_s = 0.0
        self._observed: tuple[float, Work] | None = None  # time, and all that was done; None: a slot was free
        self._unmet_until: dict[str, float] = {}  # by tenant, the first to end first
        self._admitted = RecentTokens()

    # -- what is learned -------------------------------------------------------------------------

    def observe(self, now: float) -> None:
        """Learn how fast work is done. To be called many times a second."""
        done = Work(self._tally.looked_up_tokens, self._tally.output_tokens)
        if self._observed is not None:
            then, done_then = self._observed
            since = Work(done.prompt - done_then.prompt, done.output - done_then.output)
            self._full_s += now - then
            self._done_s += Prices.of(self._groups.values()).seconds(since)
        is_full = bool(self._groups) and (bool(len(self._waiting)) or not self._num_free_slots())
        self._observed = (now, done) if is_full else None
        if self._full_s > PACE_WINDOW_S:  # what is old counts for less and less
            self._full_s /= 2
            self._done_s /= 2
        while self._unmet_until and next(iter(self._unmet_until.values())) <= now:
            del self._unmet_until[next(iter(self._unmet_until))]

    def admitted(self, tenant: str, work: Work, now: float) -> None:
        """Learn that a tenant has more to do."""
        self._admitted.add(tenant, work.tokens, now)

    def turned_away(self, tenant: str, now: float) -> None:
        """Learn that a tenant has more to do than there is room for."""
        self._unmet_until.pop(tenant, None)
        if len(self._unmet_until) < MAX_UNMET:
            self._unmet_until[tenant] = now + UNMET_S

    # -- what is foretold: 0 if nothing is known yet ---------------------------------------------

    def queue_s(self) -> float:
        """Return how long it takes until all that waits has been served."""
        return Prices.of(self._groups.values()).seconds(self._waiting.work()) / self._pace()

    def share(self, tenant: str) -> float:
        """Return the part of the queue that is a tenant's among those that wait or would like to."""
        tenants = {tenant, *self._waiting.tenants(), *self._unmet_until}
        return self._fair_share.weight(tenant) / sum(map(self._fair_share.weight, tenants))

    def wait_s(self, tenant: str, priority: int, num_sequences: int, own: Work, within_s: float, now: float) -> float:
        """Return after how long, at the latest, all sequences of a new request run; 0 if at once.

        own       the work of all of them but one
        within_s  the time in which it matters what others will ask for
        """
        num_free = self._num_free_slots()
        if not len(self._waiting) and num_free >= num_sequences:
            return 0.0
        running, next_slot_s = self._running()
        before = Work(own.prompt, own.output)
        before.add(running[tenant])
        before.add(self._waiting.work(tenant, priority))
        wait_s = self._until_done_s(tenant, before, running, within_s, now) / self._pace()
        return wait_s if num_free or not self._groups else max(wait_s, next_slot_s)

    def run_s(self, work: Work, max_prefill_tokens: int) -> float:
        """Return how long a sequence takes from its slot to its end."""
        groups = self._groups.values()
        if not groups:
            return 0.0
        whole, rest = divmod(work.prompt, max_prefill_tokens)
        prefill_s = min(whole * group.cost.seconds(max_prefill_tokens) + group.cost.seconds(rest) for group in groups)
        token_s = max(
            max(group.cost.mean_s, group.cost.seconds(group.num_running)) / group.row_tokens for group in groups
        )
        return prefill_s + work.output * token_s

    def _running(self) -> tuple[defaultdict[str, Work], float]:
        """Return what each tenant's running sequences have left, and after how long the first one may be through."""
        running: defaultdict[str, Work] = defaultdict(Work)
        next_slot_s = math.inf
        for group in self._groups.values():
            shortest = math.inf
            for seq in group.running():
                left, work = seq.num_expected_left, running[seq.request.submit.tenant]
                work.prompt += max(seq.num_behind - 1, 0)
                work.output += left
                shortest = min(shortest, left)
            next_slot_s = min(next_slot_s, shortest * group.cost.mean_s / group.row_tokens)
        return running, next_slot_s

    def _until_done_s(self, tenant: str, own: Work, running: Mapping[str, Work], within_s: float, now: float) -> float:
        """Return what is computed, in seconds' worth, until a tenant has had all of `own`."""
        prices, fair_share = Prices.of(self._groups.values()), self._fair_share
        waiting, recent = set(self._waiting.tenants()), self._admitted.per_s(now)
        lowest = fair_share.lowest(waiting)

        def counter(name: str) -> float:
            return fair_share.counter(name) if name in waiting else max(fair_share.counter(name), lowest)

        reached = counter(tenant) + fair_share.cost(tenant, own.tokens)
        total_s = prices.seconds(own)
        for other in (waiting | self._unmet_until.keys() | recent.keys() | running.keys()) - {tenant}:
            tokens = max(0.0, reached - counter(other)) * fair_share.weight(other)
            if other not in waiting and other not in self._unmet_until:  # it does not even want its share
                tokens = min(tokens, running[other].tokens + recent.get(other, 0.0) * within_s)
            alike = self._waiting.work(other) if other in waiting else own
            total_s += tokens * prices.seconds(alike) / alike.tokens if alike.tokens else 0.0
        return total_s

    def _pace(self) -> float:
        """Return how much of a second's worth of work is done in a second of full load."""
        return self._done_s / self._full_s if self._full_s >= MIN_MEASURED_S and self._done_s else 1.0

    def _num_free_slots(self) -> int:
        return sum(len(group.free_slots) for group in self._groups.values())
