"""Signs of life for requests that asked for them."""

from __future__ import annotations

from collections.abc import Mapping

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.outputs import phase
from octavo.services.scheduler.policy import WaitingQueue
from octavo.services.scheduler.sequence import Request, Sequence

Key = tuple[str, int]  # gateway and handle


class ProgressReports:
    """When the next Progress of each request is due."""

    def __init__(self) -> None:
        self._due: dict[Key, float] = {}

    def add(self, key: Key, request: Request, now: float) -> None:
        """Report on a request from now on, if it asked for that."""
        if request.submit.progress_interval_ms:
            self._due[key] = now + request.submit.progress_interval_ms / 1000

    def remove(self, key: Key) -> None:
        """Report on a request no longer."""
        self._due.pop(key, None)

    def take(
        self, requests: Mapping[Key, Request], waiting: WaitingQueue, now: float
    ) -> dict[str, scheduler_pb2.Progress]:
        """Return what is due, one message for each gateway."""
        reports: dict[str, scheduler_pb2.Progress] = {}
        positions: dict[Sequence, int] = {}
        for key, due in self._due.items():
            if due > now:
                continue
            request = requests[key]
            self._due[key] = now + request.submit.progress_interval_ms / 1000
            positions = positions or {seq: n for n, seq in enumerate(waiting.in_order(now, len(waiting)))}
            seq = request.sequences[0]
            report = reports.setdefault(request.gateway_id, scheduler_pb2.Progress())
            report.handles.append(request.handle)
            report.phases.append(phase(seq))
            report.queue_positions.append(positions.get(seq, 0))
            report.prefill_tokens_done.append(min(seq.num_computed, seq.num_prompt))
        return reports

    def check_invariants(self, requests: Mapping[Key, Request]) -> None:
        """Assert that only requests that have not ended are reported on."""
        assert self._due.keys() <= requests.keys()
