"""The table of requests that have not ended, by gateway and handle, with their deadlines."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.config import SchedulerConfig
from octavo.services.scheduler.requests.outbox import Outbox
from octavo.services.scheduler.requests.resume import ResumableRequests
from octavo.services.scheduler.requests.sequence import NOBODY, Request, Sequence, SequenceState

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
        self, requests: Mapping[Key, Request], position: Callable[[Sequence], int], now: float
    ) -> dict[str, scheduler_pb2.Progress]:
        """Return what is due, one message for each gateway; `position` tells a sequence's place in the queue."""
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
            report.phases.append(seq.phase())
            report.queue_positions.append(position(seq))
            report.prefill_tokens_done.append(min(seq.num_computed_tokens, seq.num_prompt_tokens))
        return reports

    def check_invariants(self, requests: Mapping[Key, Request]) -> None:
        """Assert that only requests that have not ended are reported on, and each of them will be."""
        assert self._due.keys() <= requests.keys()
        assert {(due, key) for key, due in self._due.items()} <= set(self._next)


NEVER = math.inf


class RequestTable:
    """Owner of requests by gateway and handle, of their deadlines and of what can be resumed."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.resumable = ResumableRequests(config.max_resume_window_ms, config.max_resume_bytes, config.weights())
        self._by_key: dict[tuple[str, int], Request] = {}
        self._by_id: dict[str, dict[Request, None]] = {}  # by the client's name for it, of any tenant; none empty
        self._deadlines: list[tuple[float, str, int]] = []  # heap of (time, gateway, handle)
        self._progress = ProgressReports()

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._by_key.values())

    def get(self, gateway_id: str, handle: int) -> Request | None:
        """Return a request of a gateway."""
        return self._by_key.get((gateway_id, handle))

    def with_id(self, request_id: str) -> list[Request]:
        """Return the requests that clients gave this id, oldest first."""
        return list(self._by_id.get(request_id, ()))

    def holds(self, request: Request) -> bool:
        """Return whether a request has not ended. Its key alone does not tell: a gateway may use it anew."""
        return self._by_key.get(request.key) is request

    def of_gateway(self, gateway_id: str) -> list[Request]:
        """Return all requests of a gateway, oldest first."""
        return [request for request in self if request.gateway_id == gateway_id]

    def add(self, request: Request, now: float) -> None:
        """File a request under its gateway and handle, which name no other one."""
        assert request.key not in self._by_key, request
        self._by_key[request.key] = request
        self._by_id.setdefault(request.submit.request_id, {})[request] = None
        self._set_deadline(request)
        if request.gateway_id != NOBODY:
            self._progress.add(request.key, request, now)

    def remove(self, request: Request) -> None:
        """Let go of a request that has ended."""
        assert self._by_key.pop(request.key) is request, request
        alike = self._by_id[request.submit.request_id]
        del alike[request]
        if not alike:
            del self._by_id[request.submit.request_id]
        self._progress.remove(request.key)

    def hand_over(self, request: Request, gateway_id: str, handle: int, outbox: Outbox, now: float) -> None:
        """Make a request, which may have ended, another gateway's or nobody's."""
        is_live = self.holds(request)
        if is_live:
            self.remove(request)
        self.resumable.detached.pop(request, None)
        request.attach(gateway_id, handle, outbox)
        if is_live:
            self.add(request, now)

    def take_overdue(self, now: float) -> Iterator[Request]:
        """Yield the requests of which a deadline has passed. The caller may end them meanwhile."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, gateway_id, handle = heapq.heappop(self._deadlines)
            request = self.get(gateway_id, handle)
            if request is not None:
                yield request
        if len(self._deadlines) > 64 + 4 * len(self._by_key):  # mostly of requests that have ended
            self._deadlines = []
            for request in self:
                self._set_deadline(request)

    def take_progress(self, position: Callable[[Sequence], int], now: float) -> dict[str, scheduler_pb2.Progress]:
        """Return the reports that are due, by gateway."""
        return self._progress.take(self._by_key, position, now)

    def _set_deadline(self, request: Request) -> None:
        """File the times at which a request must be looked at."""
        for time in (request.deadline, request.soft_deadline):
            if time is not NEVER:
                heapq.heappush(self._deadlines, (time, request.gateway_id, request.handle))

    def check_invariants(self) -> None:
        """Assert that each is filed once, has something unfinished, and is known nowhere else when it is not here."""
        for key, request in self._by_key.items():
            assert request.key == key, request
            alive = sum(seq.state is not SequenceState.FINISHED for seq in request.sequences)
            assert alive == request.num_unfinished > 0, request
        assert {request for alike in self._by_id.values() for request in alike} == set(self._by_key.values())
        self._progress.check_invariants(self._by_key)
        self.resumable.check_invariants(set(self))
