"""A collector of OpenTelemetry traces in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class Received:
    """One span. Ids are hexadecimal; times are seconds."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start: float
    end: float
    attributes: dict[str, Any]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps every span that comes in at `url`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.spans: list[Received] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.url = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def close(self) -> None:
        self._server.stop(0)

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - named by the proto
        with self._changed:
            for resource in request.resource_spans:
                about = {each.key: each.value.string_value for each in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self.spans += [_received(about["service.name"], span) for span in scope.spans]
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait_for(self, trace_id: str, enough: Callable[[list[Received]], bool], timeout_s: float) -> list[Received]:
        """Return the spans of a trace once they are enough; fail after the timeout, with what there is."""

        def found() -> list[Received]:
            return [span for span in self.spans if span.trace_id == trace_id]

        with self._changed:
            is_enough = self._changed.wait_for(lambda: enough(found()), timeout_s)
            assert is_enough, sorted((span.service, span.name) for span in found())
            return found()


def _received(service: str, span: Any) -> Received:
    return Received(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano / 1e9,
        span.end_time_unix_nano / 1e9,
        {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes},
    )
