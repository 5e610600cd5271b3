"""Where a worker's metrics and traces are kept, and where they are served."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo import __version__
from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.errors import SettingError
from octavo.services.telemetry import catalog
from octavo.services.telemetry.store import BoundedNames, Store
from octavo.services.telemetry.tracing import open_tracer
from octavo.worker.v1 import worker_pb2

if TYPE_CHECKING:
    from octavo.services.telemetry.exposition import MetricsServer

_MAX_REASONS = 32
_IDLE_S = 1.0  # a slot that is not computed for so long has ended, or waits: nothing says so before the next plan


@dataclass
class _TracedSlot:
    """A sequence in a slot whose request is traced. Times are those of time.time()."""

    traceparent: str
    opened_at: float
    first_token_at: float = 0.0
    computed_at: float = 0.0
    num_steps: int = 0


class WorkerTelemetry:
    """Of one worker. Everything is recorded for whole steps; only traced requests are looked at one by one."""

    def __init__(self, config: WorkerConfig, worker_id: str) -> None:
        """Serve metrics, if that is configured. Raises SettingError if that, or tracing, cannot be done."""
        self._store = store = Store((*catalog.COMMON, *catalog.WORKER), enabled=bool(config.metrics_address))
        self._reason = BoundedNames(_MAX_REASONS)
        self._steps = store.value(catalog.WORKER_STEPS)
        self._tokens = store.value(catalog.WORKER_TOKENS)
        self._forward_s = store.value(catalog.WORKER_BUSY, "forward")
        self._sample_s = store.value(catalog.WORKER_BUSY, "sample")
        self._memory = store.value(catalog.WORKER_MEMORY)
        self._joined = store.value(catalog.WORKER_JOINED)
        self._traced: dict[int, _TracedSlot] = {}
        self._server: MetricsServer | None = None
        try:
            self._tracer = open_tracer(config, "worker", worker_id, __version__)
            if config.metrics_address:
                from octavo.services.telemetry.exposition import METRICS_PATH, MetricsServer, describe_process

                describe_process(store, "worker", worker_id, __version__)
                self._server = MetricsServer(config.metrics_address, {METRICS_PATH: store})
        except ValueError as error:
            raise SettingError(str(error)) from None
        except OSError as error:
            raise SettingError(f"metrics_address {config.metrics_address}: {error.strerror}") from None

    def close(self) -> None:
        """Serve no more, and send the traces that are left."""
        self.left()
        if self._server is not None:
            self._server.close()
        self._tracer.close()

    # -- what happens ----------------------------------------------------------------------------

    def joined(self, num_blocks: int) -> None:
        """The worker takes part."""
        self._joined.set(1)
        self._store.value(catalog.WORKER_JOINS).add()
        self._store.value(catalog.WORKER_KV_BLOCKS).set(num_blocks)

    def left(self) -> None:
        """The worker takes part no longer: its slots are nobody's."""
        self._joined.set(0)
        for slot in list(self._traced):
            self._end(slot)

    def fault(self, reason: str) -> None:
        """A fault was reported."""
        self._store.value(catalog.WORKER_FAULTS, self._reason(reason)).add()

    def memory(self, num_bytes: int) -> None:
        """Memory in use was measured."""
        self._memory.set(num_bytes)

    def planned(self, plan: worker_pb2.StepPlan) -> None:
        """A plan was started."""
        self._tokens.add(plan.num_tokens)
        if self._tracer.enabled:
            self._follow(plan)

    def computed(self, result: worker_pb2.StepResult) -> None:
        """A step has its result."""
        self._steps.add()
        self._forward_s.add(result.forward_us / 1e6)
        self._sample_s.add(result.sample_us / 1e6)
        if self._traced:
            now = time.time()
            for slot in self._traced.keys() & set(memoryview(result.slot_indexes).cast("I")):
                traced = self._traced[slot]
                traced.first_token_at = traced.first_token_at or now
                traced.computed_at = now
                traced.num_steps += 1

    def idle(self) -> None:
        """Nothing is in flight: a sequence that is not computed any more has ended."""
        if self._traced:
            now = time.time()
            for slot, traced in list(self._traced.items()):
                if now - max(traced.computed_at, traced.opened_at) > _IDLE_S:
                    self._end(slot)

    # -- traces ----------------------------------------------------------------------------------

    def _follow(self, plan: worker_pb2.StepPlan) -> None:
        """End the spans of freed slots, and begin those of opened ones whose request is traced."""
        if self._traced and plan.freed_slots:
            for slot in self._traced.keys() & set(memoryview(plan.freed_slots).cast("I")):
                self._end(slot)
        for update in plan.sampling_updates:
            if update.traceparent:
                self._traced[update.slot] = _TracedSlot(update.traceparent, time.time())

    def _end(self, slot: int) -> None:
        """Record what a sequence took here: up to its first token, and from there on."""
        traced = self._traced.pop(slot)
        if not traced.first_token_at:
            return
        self._tracer.span("octavo.worker.prefill", traced.traceparent, traced.opened_at, traced.first_token_at)
        about = {"octavo.steps": traced.num_steps}
        self._tracer.span(
            "octavo.worker.decode", traced.traceparent, traced.first_token_at, traced.computed_at, about
        )  # fmt: skip
