"""Serves a process's metrics over HTTP, for Prometheus, from a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from octavo.services.telemetry.catalog import BUILD_INFO, LOOP_LAG, STARTED, Metric
from octavo.services.telemetry.config import split_address
from octavo.services.telemetry.store import Histogram, Store, Value

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

METRICS_PATH = "/metrics"
_CLIENT_S = 5.0  # for a scraper to send its request and to read the answer, all in all
_MAX_CLIENTS = 8  # at once; one more ends the oldest
_REFRESH_S = 2.0


class MetricsServer:
    """Answers GET for the stores' paths. A thread for each client reads and writes; answers are made one at a time.

    A process whose event loop hangs answers with 503, so that its target is down and not frozen.
    """

    def __init__(self, address: str, stores: Mapping[str, Store], refresh: Callable[[], None] = lambda: None) -> None:
        """Bind `address`, host:port, and answer from now on. Raises OSError, ValueError.

        stores   by path
        refresh  brings gauges up to date; called in the server's thread before each answer. May raise TimeoutError
        """
        from prometheus_client import CollectorRegistry, make_wsgi_app

        self._refresh = refresh
        self._answering = threading.Lock()
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
        with self._answering:
            try:
                self._refresh()
            except TimeoutError:
                start_response("503 Service Unavailable", [("content-type", "text/plain")])
                return [b"the process does not answer\n"]
            answer: Iterable[bytes] = app(environ, start_response)
            return answer


def on_loop(loop: asyncio.AbstractEventLoop, store: Store, function: Callable[[], None]) -> Callable[[], None]:
    """Return a function for other threads that runs `function` on the loop and waits; it raises TimeoutError.

    How long the loop let it wait is the process's lag, in `store`.
    """

    async def run(asked_at: float) -> None:
        store.value(LOOP_LAG).set(time.monotonic() - asked_at)
        function()

    def call() -> None:
        try:
            asyncio.run_coroutine_threadsafe(run(time.monotonic()), loop).result(_REFRESH_S)
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


class _Server(ThreadingMixIn, WSGIServer):
    """Bound like gRPC's listeners: a second process at the same port fails. No client keeps others waiting."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self.address_family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        self._began: dict[socket.socket, float] = {}  # by connection, oldest first
        self._lock = threading.Lock()
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind without asking DNS for this machine's name, which can take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread; of too many connections the oldest ends."""
        with self._lock:
            self._began[request] = time.monotonic()
            for oldest in list(self._began)[:-_MAX_CLIENTS]:
                self._end(oldest)
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """End the connections whose time is over; called twice a second, and after each new one."""
        with self._lock:
            for request, began in list(self._began.items()):
                if time.monotonic() - began > _CLIENT_S:
                    self._end(request)

    def shutdown_request(self, request: Any) -> None:
        """Forget and close a connection."""
        with self._lock:
            self._began.pop(request, None)
        super().shutdown_request(request)

    def _end(self, request: socket.socket) -> None:
        """Have the thread of a connection find it closed."""
        del self._began[request]
        with contextlib.suppress(OSError):  # the client has gone
            request.shutdown(socket.SHUT_RDWR)

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
