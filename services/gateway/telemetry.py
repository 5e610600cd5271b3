"""Where a gateway's metrics and traces are kept, and where they are served."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING

from octavo import __version__
from octavo.services.common.tls_files import certificate_ends
from octavo.services.gateway.config import GatewayConfig
from octavo.services.gateway.mesh import LoadReports
from octavo.services.gateway.requests.accounting import Accounting
from octavo.services.gateway.requests.calls import GenerateCalls
from octavo.services.gateway.schedulers.pool import SchedulerPool
from octavo.services.telemetry import catalog
from octavo.services.telemetry.store import Store
from octavo.services.telemetry.tracing import open_tracer

if TYPE_CHECKING:
    from octavo.services.telemetry.exposition import MetricsServer

PICKER_PATH = "/metrics/load"
"""What an endpoint picker reads: the load of all schedulers, under vLLM's names."""


class GatewayTelemetry:
    """Of one gateway. What is served: its own metrics, and at another path the load of its schedulers."""

    def __init__(self, config: GatewayConfig, gateway_id: str, schedulers: SchedulerPool) -> None:
        """Raises ValueError if traces are wanted and the library is missing."""
        enabled = bool(config.metrics_address)
        self._address = config.metrics_address
        self._certificates = {"tls": config.tls, "hop": config.hop_tls}
        self._gateway_id = gateway_id
        self._store = Store((*catalog.COMMON, *catalog.GATEWAY), model=config.served_name, enabled=enabled)
        self._picker = Store(catalog.PICKER, model=config.served_name, enabled=enabled)
        self._tracer = open_tracer(config, "gateway", gateway_id, __version__)
        self.load_reports = LoadReports(lambda: [peer.load for peer in schedulers.peers], time.monotonic)
        self.accounting = Accounting(
            self._store, self._tracer, config.metrics_max_tenants, config.access_log, self.load_reports.call_ended
        )
        self._server: MetricsServer | None = None

    @property
    def port(self) -> int:
        """The port that metrics are served at; 0 for none."""
        return 0 if self._server is None else self._server.port

    def serve(self, calls: GenerateCalls, schedulers: SchedulerPool) -> None:
        """Serve metrics, if that is configured, from the running event loop. Raises OSError."""
        if not self._address:
            return
        from octavo.services.telemetry.exposition import METRICS_PATH, MetricsServer, describe_process, on_loop

        describe_process(self._store, "gateway", self._gateway_id, __version__)

        def refresh() -> None:
            self._read_state(calls, schedulers)
            self._read_load(schedulers)

        stores = {METRICS_PATH: self._store, PICKER_PATH: self._picker}
        self._server = MetricsServer(self._address, stores, on_loop(asyncio.get_running_loop(), self._store, refresh))

    def close(self) -> None:
        """Serve no more, and send the traces that are left."""
        if self._server is not None:
            self._server.close()
        self._tracer.close()

    def _read_state(self, calls: GenerateCalls, schedulers: SchedulerPool) -> None:
        store, peers = self._store, schedulers.peers
        store.value(catalog.REQUESTS_RUNNING).set(calls.num_requests)
        store.value(catalog.FAILOVERS).set(schedulers.num_failovers)
        store.value(catalog.SCHEDULERS, "connected").set(len(peers))
        store.value(catalog.SCHEDULERS, "healthy").set(sum(peer.healthy for peer in peers))
        versions = Counter(peer.load.model_version for peer in peers if peer.load.model_version)
        store.replace_all(catalog.MODEL_SCHEDULERS, {(version,): num for version, num in versions.items()})
        store.value(catalog.SCHEDULERS, "unusable").set(schedulers.num_unfit)
        store.replace_all(catalog.CERTIFICATE_END, certificate_ends(self._certificates))

    def _read_load(self, schedulers: SchedulerPool) -> None:
        picker, loads = self._picker, [peer.load for peer in schedulers.peers]
        total = sum(load.kv_blocks_total for load in loads)
        free = sum(load.kv_blocks_free for load in loads)
        picker.value(catalog.PICKER_WAITING).set(sum(load.waiting for load in loads))
        picker.value(catalog.PICKER_RUNNING).set(sum(load.running for load in loads))
        picker.value(catalog.PICKER_KV_USAGE).set(1 - free / total if total else 0.0)
        block_size = next((peer.welcome.kv_block_size for peer in schedulers.peers if peer.welcome is not None), 0)
        picker.replace(catalog.PICKER_CACHE_CONFIG, str(block_size), str(total))
