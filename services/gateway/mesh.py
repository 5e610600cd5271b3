"""What a gateway and the mesh around it tell each other in headers and trailers.

In come the headers of the Gateway API Inference Extension, which an endpoint picker or a gateway sets; out
goes the load, as an ORCA report, for clients and proxies that balance by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from octavo.inference.v1 import generation_pb2, load_pb2
from octavo.scheduler.v1 import scheduler_pb2

OBJECTIVE = "x-gateway-inference-objective"
FAIRNESS_ID = "x-gateway-inference-fairness-id"
MODEL_REWRITE = "x-gateway-model-name-rewrite"
LOAD_TRAILER = "endpoint-load-metrics-bin"

_FAIRNESS_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}")
_REPORT_S = 0.5


class MeshHeaders:
    """Reads the headers `x-gateway-*`, if they may be believed: clients could set them, too."""

    def __init__(self, is_trusted: bool, objectives: Sequence[str] = ()) -> None:
        """`objectives` are NAME=PRIORITY. Raises ValueError."""
        self._is_trusted = is_trusted
        self._priorities = parse_objectives(objectives)

    def apply(self, generation: generation_pb2.Generation, headers: Mapping[str, str]) -> generation_pb2.Generation:
        """Return a request with the model and the priority that the headers say; itself if they say nothing."""
        model = self.model(generation.model, headers)
        priority = self._priorities.get(headers.get(OBJECTIVE, "")) if self._is_trusted else None
        if model == generation.model and priority is None:
            return generation
        changed = generation_pb2.Generation()
        changed.CopyFrom(generation)
        changed.model = model
        if priority is not None:
            changed.scheduling.priority = priority
        return changed

    def model(self, model: str, headers: Mapping[str, str]) -> str:
        """Return which model answers a request for `model`."""
        return headers.get(MODEL_REWRITE, model) if self._is_trusted else model

    def tenant(self, tenant: str, headers: Mapping[str, str]) -> str:
        """Return whose call it is: a credential's tenant comes before the header's."""
        fairness_id = headers.get(FAIRNESS_ID, "")
        if tenant or not self._is_trusted or not _FAIRNESS_ID.fullmatch(fairness_id):
            return tenant
        return fairness_id


def parse_objectives(objectives: Sequence[str]) -> dict[str, int]:
    """Return priorities by the name of their objective. Raises ValueError."""
    priorities = {}
    for entry in objectives:
        name, _, priority = entry.rpartition("=")
        try:
            priorities[name] = int(priority)
        except ValueError:
            raise ValueError(f"--mesh-objectives: {entry!r} is not NAME=PRIORITY") from None
        if not name or not -100 <= priorities[name] <= 100:
            raise ValueError(f"--mesh-objectives: {entry!r} needs a name and a priority from -100 to 100")
    return priorities


class LoadReports:
    """Makes the ORCA report of this gateway: how busy its schedulers are, and how many calls end."""

    def __init__(self, loads: Callable[[], Sequence[scheduler_pb2.Load]], clock: Callable[[], float]) -> None:
        self._loads = loads
        self._clock = clock
        self._ended = self._failed = 0
        self._since = clock()
        self._report = load_pb2.LoadReport()

    def call_ended(self, failed: bool) -> None:
        """Count a call; `failed` by fault of the server."""
        self._ended += 1
        self._failed += failed

    def trailer(self, cost: Mapping[str, float]) -> tuple[str, bytes]:
        """Return the trailing metadata of a call that cost so many tokens, by kind."""
        seconds = self._clock() - self._since
        if seconds >= _REPORT_S:
            self._report = self._measure(seconds)
            self._since += seconds
            self._ended = self._failed = 0
        # Serialized messages that follow each other are one message: only the cost is new.
        return LOAD_TRAILER, self._report.SerializeToString() + load_pb2.LoadReport(
            request_cost=cost
        ).SerializeToString()

    def _measure(self, seconds: float) -> load_pb2.LoadReport:
        loads = self._loads()
        total = sum(load.kv_blocks_total for load in loads)
        used = 1 - sum(load.kv_blocks_free for load in loads) / total if total else 0.0
        waiting, running = sum(load.waiting for load in loads), sum(load.running for load in loads)
        # Above 1 it has more than it computes at once: waiting counts against what runs.
        utilization = used + waiting / max(running, 1)
        return load_pb2.LoadReport(
            application_utilization=utilization,
            rps_fractional=self._ended / seconds,
            eps=self._failed / seconds,
            utilization={"kv_cache": used},
            named_metrics={"running": running, "waiting": waiting},
        )
