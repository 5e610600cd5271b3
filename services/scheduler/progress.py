"""Signs of life for requests that asked for them."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.outputs import phase
from octavo.services.scheduler.sequence import Request
from octavo.services.scheduler.waiting_queue import WaitingQueue

Key = tuple[str, int]  # gateway and handle

MIN_INTERVAL_MS = 50  # whatever a gateway asks for; the rule of the public field says the same


class ProgressReports:
    """When the next Progress of each request is due."""

    def __init__(self) -> None:
        self._due: dict[Key, float] = {}
        self._next: list[tuple[float, Key]] = []  # heap; what is in it of a request that is not due then says nothing

    def add(self, key: Key, request: Request, now: float) -> None:
        """Report on a request from now on, if it asked for that."""
        interval_ms = request.submit.progress_interval_ms
        if not interval_ms:
            return
        due = self._due[key] = now + max(interval_ms, MIN_INTERVAL_MS) / 1000
        heapq.heappush(self._next, (due, key))
        if len(self._next) > 64 + 2 * len(self._due):  # mostly of requests that have ended
            self._next = [(due, key) for key, due in self._due.items()]
            heapq.heapify(self._next)

    def remove(self, key: Key) -> None:
        """Report on a request no longer."""
        self._due.pop(key, None)

    def take(
        self, requests: Mapping[Key, Request], waiting: WaitingQueue, now: float
    ) -> dict[str, scheduler_pb2.Progress]:
        """Return what is due, one message for each gateway."""
        reports: dict[str, scheduler_pb2.Progress] = {}
        while self._next and self._next[0][0] <= now:
            due, key = heapq.heappop(self._next)
            if self._due.get(key) != due:
                continue
            request = requests[key]
            self.add(key, request, now)
            seq = request.sequences[0]
            report = reports.setdefault(request.gateway_id, scheduler_pb2.Progress())
            report.handles.append(request.handle)
            report.phases.append(phase(seq))
            report.queue_positions.append(waiting.position(seq) if seq in waiting else 0)
            report.prefill_tokens_done.append(min(seq.num_computed, seq.num_prompt))
        return reports

    def check_invariants(self, requests: Mapping[Key, Request]) -> None:
        """Assert that only requests that have not ended are reported on, and each of them will be."""
        assert self._due.keys() <= requests.keys()
        assert {(due, key) for key, due in self._due.items()} <= set(self._next)
