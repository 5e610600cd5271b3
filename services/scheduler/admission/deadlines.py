"""The watch of deadlines finds requests that cannot meet theirs any more, so that they end before they cost more."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from octavo.services.scheduler.admission.forecast import Forecast
from octavo.services.scheduler.requests.sequence import Request, SequenceState

MIN_PAUSE_S = 0.1  # between two looks at a request
MIN_KEPT = 64  # entries, before those of requests that have ended are looked for


class DeadlineWatch:
    """Looks at each request when it may be too late for it: at its deadline less the time that it still needs."""

    def __init__(self, forecast: Forecast) -> None:
        self._forecast = forecast
        self._due: list[tuple[float, int, Request]] = []  # heap of (time, arrival, request)
        self._most_kept = MIN_KEPT

    def add(self, request: Request, now: float) -> None:
        """Watch a request that was admitted, if it needs all its time."""
        if request.needs_time:
            self._push(request, now)

    def take(self, now: float) -> Iterator[Request]:
        """Yield the requests that will miss their deadline. The caller ends them."""
        while self._due and self._due[0][0] <= now:
            _, _, request = heapq.heappop(self._due)
            if not request.num_unfinished:
                continue
            if now + self._left_s(request) > request.deadline:
                yield request
            else:
                self._push(request, now)

    def _push(self, request: Request, now: float) -> None:
        due = max(request.deadline - self._left_s(request), now + MIN_PAUSE_S)
        if due < request.deadline:  # else its deadline ends it
            heapq.heappush(self._due, (due, request.arrival, request))
        if len(self._due) > self._most_kept:
            self._due = [entry for entry in self._due if entry[2].num_unfinished]
            heapq.heapify(self._due)
            self._most_kept = MIN_KEPT + 2 * len(self._due)

    def _left_s(self, request: Request) -> float:
        alive = (seq for seq in request.sequences if seq.state is not SequenceState.FINISHED)
        return max(map(self._forecast.least_run_s, alive), default=0.0)
