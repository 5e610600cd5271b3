"""Serves a process's metrics over HTTP, for Prometheus, from a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from octavo.services.telemetry.catalog import BUILD_INFO, STARTED, Metric
from octavo.services.telemetry.config import split_address
from octavo.services.telemetry.store import Histogram, Store, Value

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

METRICS_PATH = "/metrics"
_CLIENT_S = 5.0  # for a scraper to send its request and to read the answer
_REFRESH_S = 2.0


class MetricsServer:
    """Answers GET for the stores' paths, one request at a time.

    A process whose event loop hangs answers with 503, so that its target is down and not frozen.
    """

    def __init__(self, address: str, stores: Mapping[str, Store], refresh: Callable[[], None] = lambda: None) -> None:
        """Bind `address`, host:port, and answer from now on. Raises OSError, ValueError.

        stores   by path
        refresh  brings gauges up to date; called in the server's thread before each answer. May raise TimeoutError
        """
        from prometheus_client import CollectorRegistry, make_wsgi_app

        self._refresh = refresh
        self._apps: dict[str, Any] = {}
        for path, store in stores.items():
            registry = CollectorRegistry()
            registry.register(_Collector(store))
            self._apps[path] = make_wsgi_app(registry)
        self._server = _Server(split_address(address), _Handler)
        self._server.set_app(self._answer)
        self.port: int = self._server.server_address[1]
        """The port that is listened on."""
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        app = self._apps.get(environ["PATH_INFO"])
        if app is None:
            start_response("404 Not Found", [("content-type", "text/plain")])
            return [f"there is {' and '.join(self._apps)}\n".encode()]
        try:
            self._refresh()
        except TimeoutError:
            start_response("503 Service Unavailable", [("content-type", "text/plain")])
            return [b"the process does not answer\n"]
        answer: Iterable[bytes] = app(environ, start_response)
        return answer


def on_loop(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> Callable[[], None]:
    """Return a function for other threads that runs `function` on the loop and waits; it raises TimeoutError."""

    async def run() -> None:
        function()

    def call() -> None:
        try:
            asyncio.run_coroutine_threadsafe(run(), loop).result(_REFRESH_S)
        except RuntimeError:  # the loop is closed
            raise TimeoutError from None

    return call


def describe_process(store: Store, process: str, name: str, version: str) -> None:
    """Fill in what every process says of itself."""
    store.replace(BUILD_INFO, process, name, version)
    store.value(STARTED).set(time.time())


class _Collector:
    """A store, as prometheus_client wants it."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[Family]:
        """Yield a family for each metric that has values, and one for its alias."""
        from prometheus_client.core import HistogramMetricFamily
        from prometheus_client.core import Metric as Family

        for metric, children in self._store.values():
            if not children:
                continue
            for name, labels, prefix in self._names(metric):
                family = Family(name.removesuffix("_total"), metric.help, metric.kind)
                for values, child in self._children(metric, name, children):
                    family.add_sample(name, {**prefix, **dict(zip(labels, values, strict=True))}, child.value)
                yield family
        for metric, histograms in self._store.histograms():
            for name, labels, prefix in self._names(metric):
                family = HistogramMetricFamily(name, metric.help, labels=[*prefix, *labels])
                for values, histogram in self._merged(metric, name, histograms):
                    family.add_metric([*prefix.values(), *values], _cumulative(histogram), histogram.sum)
                if family.samples:
                    yield family

    def describe(self) -> Iterator[Family]:
        """Yield nothing: names are checked by a test, not at each start."""
        return iter(())

    def _names(self, metric: Metric) -> Iterator[tuple[str, tuple[str, ...], dict[str, str]]]:
        """Yield the metric's name, labels and constant labels, and those of its alias: vLLM knows no tenants."""
        yield metric.name, metric.labels, {}
        if metric.alias:
            yield metric.alias, _alias_labels(metric), {"model_name": self._store.model}

    def _children(
        self, metric: Metric, name: str, children: dict[tuple[str, ...], Value]
    ) -> Iterable[tuple[tuple[str, ...], Value]]:
        if name == metric.name or _alias_labels(metric) == metric.labels:
            return children.items()
        total = Value()
        total.set(sum(child.value for child in children.values()))
        return [((), total)]

    def _merged(
        self, metric: Metric, name: str, children: dict[tuple[str, ...], Histogram]
    ) -> Iterable[tuple[tuple[str, ...], Histogram]]:
        if name == metric.name or _alias_labels(metric) == metric.labels or not children:
            return children.items()
        total = Histogram(metric.buckets)
        for child in children.values():
            total.counts = [mine + other for mine, other in zip(total.counts, child.counts, strict=True)]
            total.sum += child.sum
        return [((), total)]


def _alias_labels(metric: Metric) -> tuple[str, ...]:
    return tuple(label for label in metric.labels if label != "tenant")


def _cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    from prometheus_client.utils import floatToGoString

    buckets, total = [], 0
    for bound, count in zip([*histogram.bounds, float("inf")], histogram.counts, strict=True):
        total += count
        buckets.append((str(floatToGoString(bound)), float(total)))  # type: ignore[no-untyped-call]
    return buckets


class _Server(WSGIServer):
    """Bound like gRPC's listeners: a second process at the same port fails."""

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self.address_family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind without asking DNS for this machine's name, which can take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a scraper went away."""


class _Handler(WSGIRequestHandler):
    timeout = _CLIENT_S

    def handle(self) -> None:
        """Answer, unless the client takes too long."""
        with contextlib.suppress(OSError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Say nothing of each scrape."""
