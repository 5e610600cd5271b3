"""The telemetry of a scheduler keeps its metrics and traces, and serves them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from octavo import __version__
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.tls_files import certificate_ends
from octavo.services.scheduler.config import BLOCK_SIZE, SchedulerConfig
from octavo.services.scheduler.core.metrics import SchedulerMetrics
from octavo.services.telemetry import catalog
from octavo.services.telemetry.store import Store
from octavo.services.telemetry.tracing import open_tracer, wall_clock_offset

if TYPE_CHECKING:
    from octavo.services.telemetry.exposition import MetricsServer


class SchedulerTelemetry:
    """Of one scheduler: the shell's side of a SchedulerMetrics."""

    def __init__(self, config: SchedulerConfig, scheduler_id: str) -> None:
        """Raises ValueError if traces are wanted and the library is missing."""
        self._address = config.metrics_address
        self._certificates = {"hop": config.hop_tls}
        self._scheduler_id = scheduler_id
        self._store = Store(
            (*catalog.COMMON, *catalog.SCHEDULER), model=config.model_name, enabled=bool(config.metrics_address)
        )
        self._tracer = open_tracer(config, "scheduler", scheduler_id, __version__)
        self.metrics = SchedulerMetrics(self._store, self._tracer.enabled)
        self.plan_time = self._store.histogram(catalog.STEP_TIME, "plan")
        self._server: MetricsServer | None = None

    @property
    def port(self) -> int:
        """The port that metrics are served at; 0 for none."""
        return 0 if self._server is None else self._server.port

    def serve(self, load: Callable[[], scheduler_pb2.Load], num_quarantined: Callable[[], int]) -> None:
        """Serve metrics, if that is configured, from the running event loop. Raises OSError."""
        if not self._address:
            return
        from octavo.services.telemetry.exposition import METRICS_PATH, MetricsServer, describe_process, on_loop

        describe_process(self._store, "scheduler", self._scheduler_id, __version__)

        def refresh() -> None:
            self._read_load(load())
            self._store.value(catalog.QUARANTINED).set(num_quarantined())
            self._store.replace_all(catalog.CERTIFICATE_END, certificate_ends(self._certificates))
            self.metrics.write_totals()

        loop = asyncio.get_running_loop()
        self._server = MetricsServer(self._address, {METRICS_PATH: self._store}, on_loop(loop, self._store, refresh))

    def close(self) -> None:
        """Serve no more, and send the traces that are left."""
        self.send_spans()
        if self._server is not None:
            self._server.close()
        self._tracer.close()

    def send_spans(self) -> None:
        """Hand the metrics's spans to the tracer."""
        spans = self.metrics.take_spans()
        if spans:
            offset = wall_clock_offset()
            for each in spans:
                start, end = each.start + offset, each.end + offset
                self._tracer.span(each.name, each.traceparent, start, end, each.attributes)

    def _read_load(self, load: scheduler_pb2.Load) -> None:
        store, total, free = self._store, load.kv_blocks_total, load.kv_blocks_free
        for metric, value in (
            (catalog.RUNNING, load.running),
            (catalog.WAITING, load.waiting),
            (catalog.WAITING_TOKENS, load.waiting_uncached_tokens),
            (catalog.QUEUE_ESTIMATE, load.estimated_queue_ms / 1000),
            (catalog.KV_USAGE, 1 - free / total if total else 0.0),
            (catalog.WORKERS_READY, load.workers_ready),
            (catalog.STEP_AGE, load.step_age_ms / 1000),
            (catalog.DRAINING, float(load.draining)),
            (catalog.ADAPTERS, load.adapters_loaded),
        ):
            store.value(metric).set(value)
        store.value(catalog.KV_BLOCKS, "free").set(free)
        store.value(catalog.KV_BLOCKS, "used").set(total - free)
        store.replace(catalog.CACHE_CONFIG, str(BLOCK_SIZE), str(total))
