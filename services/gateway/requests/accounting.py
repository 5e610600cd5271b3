"""What becomes known of a generate call besides its answer: metrics, a line in the log, a trace.

Everything is recorded once, when a call ends; nothing is done for a token.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from octavo.common.v1 import common_pb2
from octavo.services.common.errors import Reason, ServingError
from octavo.services.common.logging import ACCESS
from octavo.services.gateway.requests.generation import GenerationRun
from octavo.services.telemetry import catalog
from octavo.services.telemetry.store import OTHER, BoundedNames, Store
from octavo.services.telemetry.tracing import Span, Tracer, wall_clock_offset

_access = logging.getLogger(ACCESS)
_REASONS = frozenset(Reason)
_OUR_FAULT = ("INTERNAL", "UNAVAILABLE", "ABORTED", "DATA_LOSS", "UNKNOWN")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
# In vLLM's words where it has one.
_FINISHED = {
    common_pb2.FINISH_REASON_END_OF_SEQUENCE: "stop",
    common_pb2.FINISH_REASON_STOP_SEQUENCE: "stop",
    common_pb2.FINISH_REASON_STOP_TOKEN: "stop",
    common_pb2.FINISH_REASON_MAX_TOKENS: "length",
    common_pb2.FINISH_REASON_CONTEXT_LIMIT: "length",
    common_pb2.FINISH_REASON_TIME_LIMIT: "time_limit",
    common_pb2.FINISH_REASON_CANCELLED: "abort",
    common_pb2.FINISH_REASON_TOOL_CALL: "tool_calls",
}


@dataclass(frozen=True, slots=True)
class Call:
    """What a listener knows of a call besides its request.

    headers   the call's metadata
    deadline  a time of the event loop, or None
    """

    request_id: str
    tenant: str
    headers: Mapping[str, str]
    deadline: float | None = None


class CallRecord:
    """One call while it runs. `run` is set once it is admitted; `prompt_tokens` by a call for vectors, at its end."""

    def __init__(self, call: Call, tenant: str, model: str, span: Span, given: str) -> None:
        """`tenant`: who pays; `given`: the trace context that the call came with, empty if it has none."""
        self.request_id = call.request_id
        self.headers = call.headers
        self.deadline = call.deadline
        self.tenant = tenant
        self.model = model
        self.is_resumed = False
        self.run: GenerationRun | None = None
        self.prompt_tokens = 0
        self.arrived_at = time.monotonic()
        self._span = span
        self._given = given

    @property
    def traceparent(self) -> str:
        """What the scheduler's spans have as their parent: this call's span, or its caller's if this one has none."""
        return self._span.traceparent or self._given


class Accounting:
    """Of one gateway."""

    def __init__(
        self, store: Store, tracer: Tracer, max_tenants: int, access_log: bool, ended: Callable[[bool], None]
    ) -> None:
        """`ended` is told of every call that ends, and whether it failed by fault of the server."""
        self._store = store
        self._tracer = tracer
        self._tenant_label = BoundedNames(max_tenants)
        self._access_log = access_log
        self._ended = ended
        self._duration = store.histogram(catalog.DURATION)

    def refused(self, error: ServingError) -> None:
        """Count a call that never got as far as `call`."""
        self._store.value(catalog.REJECTIONS, _label(error.reason)).add()

    @contextmanager
    def call(self, call: Call, tenant: str, model: str) -> Iterator[CallRecord]:
        """Record the call that the body is, however it ends; `tenant` pays for it."""
        given = _read_traceparent(call.headers)
        attributes = {"octavo.request_id": call.request_id, "octavo.tenant": tenant, "gen_ai.request.model": model}
        span = self._tracer.start("octavo.request", given, attributes, is_server=True)
        record = CallRecord(call, tenant, model, span, given)
        try:
            yield record
        except ServingError as error:
            self._end(record, span, error.code.name, error.reason)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            is_late = call.deadline is not None and asyncio.get_running_loop().time() >= call.deadline
            reason = Reason.GENERATION_TIMEOUT if is_late else Reason.CLIENT_CANCELLED
            self._end(record, span, "DEADLINE_EXCEEDED" if is_late else "CANCELLED", reason)
            raise
        except BaseException:
            self._end(record, span, "INTERNAL", Reason.INTERNAL)
            raise
        self._end(record, span, "OK", "")

    def _end(self, record: CallRecord, span: Span, code: str, reason: str) -> None:
        seconds = time.monotonic() - record.arrived_at
        self._ended(code in _OUR_FAULT)
        store, tenant = self._store, self._tenant_label(record.tenant)
        store.value(catalog.REQUESTS, tenant, code).add()
        if reason:
            kind = catalog.REJECTIONS if record.run is None else catalog.INTERRUPTIONS
            store.value(kind, _label(reason)).add()
        else:
            self._duration.observe(seconds)
        cached = output = failovers = 0
        if prompt := record.prompt_tokens:
            store.value(catalog.PROMPT_TOKENS, tenant).add(prompt)
        ttft_s: float | None = None
        if (run := record.run) is not None:
            usage = run.completed.usage
            if not record.is_resumed:  # the call that broke has paid for the prompt
                prompt = run.started.prompt_tokens
                cached = usage.cached_prompt_tokens or min(run.started.cached_prompt_tokens, prompt)
            output, failovers = run.num_delivered, run.stream.failovers
            store.value(catalog.PROMPT_TOKENS, tenant).add(prompt)
            store.value(catalog.CACHED_TOKENS, tenant).add(cached)
            store.value(catalog.OUTPUT_TOKENS, tenant).add(output)
            for finish in run.finish_reasons:
                store.value(catalog.FINISHES, _FINISHED.get(finish, OTHER)).add()
            if run.first_token_at and not record.is_resumed:
                ttft_s = run.first_token_at - record.arrived_at
                store.histogram(catalog.TTFT, tenant).observe(ttft_s)
        if self._access_log:
            fields = {
                "request_id": record.request_id, "tenant": record.tenant, "model": record.model, "code": code,
                "reason": reason, "prompt_tokens": prompt, "cached_tokens": cached, "output_tokens": output,
                "ttft_ms": None if ttft_s is None else round(1000 * ttft_s, 1),
                "duration_ms": round(1000 * seconds, 1), "failovers": failovers, "resumed": record.is_resumed,
                "scheduler": "" if run is None else run.stream.scheduler_id, "trace_id": record.traceparent[3:35],
            }  # fmt: skip
            _access.info("call ended", extra={"fields": fields})
        if self._tracer.enabled:
            self._trace(record, span, code, reason, prompt, output)

    def _trace(self, record: CallRecord, span: Span, code: str, reason: str, prompt: int, output: int) -> None:
        """End the call's span, and record one for each time that it went on at another scheduler."""
        span.set(
            rpc__grpc__status_code=code, gen_ai__usage__input_tokens=prompt, gen_ai__usage__output_tokens=output
        )  # fmt: skip
        offset = wall_clock_offset()
        for lost_at, taken_over_at in record.run.stream.takeovers if record.run is not None else ():
            self._tracer.span("octavo.failover", span.traceparent, lost_at + offset, taken_over_at + offset)
        span.end(error=reason)


def _read_traceparent(headers: Mapping[str, str]) -> str:
    """Return a call's W3C trace context; empty if it has none that is valid."""
    value = headers.get("traceparent", "")
    return value if _TRACEPARENT.fullmatch(value) else ""


def _label(reason: str) -> str:
    return reason if reason in _REASONS else OTHER
