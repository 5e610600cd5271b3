"""Spans for OpenTelemetry, sent by OTLP over gRPC. Off by default: then nothing is imported and nothing is kept.

Between our processes a span's context travels as a W3C `traceparent`; who starts a span names its parent
by that string, so no context of the library's is carried through event loops.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from octavo.services.telemetry.config import TelemetryConfig

Attributes = Mapping[str, str | int | float | bool]

_TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-(?P<flags>[0-9a-f]{2})")
_EXPORT_MS = 1000
_MAX_QUEUED_SPANS = 4096
_FLUSH_MS = 2000


class Span:
    """Something that takes time. This class itself records nothing: it is what there is without a collector."""

    traceparent = ""
    """What a child in another process names as its parent; empty if nothing is recorded."""

    def set(self, **attributes: str | float | bool) -> None:
        """Add attributes; `__` in a name stands for a dot."""

    def end(self, error: str = "", end_s: float = 0.0) -> None:
        """End it, now or at a time of time.time(). `error`: why it failed."""


class Tracer:
    """Starts spans. This class itself records nothing."""

    enabled = False

    def start(
        self,
        name: str,
        traceparent: str,
        attributes: Attributes | None = None,
        *,
        start_s: float = 0.0,
        is_server: bool = False,
    ) -> Span:
        """Start a span below `traceparent` (empty: a new trace), now or at a time of time.time()."""
        del name, traceparent, attributes, start_s, is_server
        return _NO_SPAN

    def span(
        self, name: str, traceparent: str, start_s: float, end_s: float, attributes: Attributes | None = None
    ) -> None:
        """Record a span that is over. Times are those of time.time()."""

    def close(self) -> None:
        """Send what has not been sent; takes two seconds at most."""


_NO_SPAN = Span()


def is_sampled(traceparent: str) -> bool:
    """Return whether a valid traceparent says that its trace is recorded."""
    match = _TRACEPARENT.fullmatch(traceparent)
    return match is not None and bool(int(match["flags"], 16) & 1)


def open_tracer(config: TelemetryConfig, process: str, name: str, version: str) -> Tracer:
    """Return a tracer that sends to the configured endpoint; without one it does nothing. Raises ValueError.

    process   "gateway", "scheduler" or "worker"; traces show "octavo-PROCESS"
    name      which one of them
    """
    if not config.otlp_endpoint:
        return Tracer()
    try:
        return _OtlpTracer(config.otlp_endpoint, config.otlp_sample_ratio, process, name, version)
    except ModuleNotFoundError as error:
        raise ValueError(f"otlp_endpoint needs {error.name}: pip install 'octavo[otel]'") from None


class _OtlpSpan(Span):
    def __init__(self, span: Any) -> None:
        self._span = span
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"

    def set(self, **attributes: str | float | bool) -> None:
        for name, value in attributes.items():
            self._span.set_attribute(name.replace("__", "."), value)

    def end(self, error: str = "", end_s: float = 0.0) -> None:
        if error:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end(end_time=_nanoseconds(end_s))


class _OtlpTracer(Tracer):
    enabled = True

    def __init__(self, endpoint: str, ratio: float, process: str, name: str, version: str) -> None:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        about = {"service.name": f"octavo-{process}", "service.instance.id": name, "service.version": version}
        self._provider = TracerProvider(
            # A caller that does not record its trace decides for us, too.
            sampler=ParentBased(TraceIdRatioBased(ratio)), resource=Resource.create(about), shutdown_on_exit=False
        )  # fmt: skip
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_FLUSH_MS / 1000)
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, max_queue_size=_MAX_QUEUED_SPANS, schedule_delay_millis=_EXPORT_MS)
        )
        self._tracer = self._provider.get_tracer("octavo", version)
        self._propagator = TraceContextTextMapPropagator()

    def start(
        self,
        name: str,
        traceparent: str,
        attributes: Attributes | None = None,
        *,
        start_s: float = 0.0,
        is_server: bool = False,
    ) -> Span:
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind

        parent = self._propagator.extract({"traceparent": traceparent}, Context())
        kind = SpanKind.SERVER if is_server else SpanKind.INTERNAL
        start = _nanoseconds(start_s)
        return _OtlpSpan(self._tracer.start_span(name, parent, kind, attributes=attributes, start_time=start))

    def span(
        self, name: str, traceparent: str, start_s: float, end_s: float, attributes: Attributes | None = None
    ) -> None:
        self.start(name, traceparent, attributes, start_s=start_s).end(end_s=max(end_s, start_s))

    def close(self) -> None:
        self._provider.force_flush(_FLUSH_MS)
        self._provider.shutdown()


def _nanoseconds(seconds: float) -> int | None:
    return int(seconds * 1e9) if seconds else None


def wall_clock_offset() -> float:
    """Return what turns a time of time.monotonic() into one of time.time()."""
    return time.time() - time.monotonic()
