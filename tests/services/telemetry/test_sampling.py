"""Which traces are recorded: those of callers who record theirs, and a share of the others."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.services.telemetry.config import TelemetryConfig
from octavo.services.telemetry.tracing import open_tracer

pytest.importorskip("opentelemetry.sdk")
PARENT = "00-" + "a" * 32 + "-" + "b" * 16 + "-0"


def is_recorded(span: Any) -> bool:
    return bool(int(span.traceparent[-2:], 16) & 1)


@pytest.fixture
def tracer(request: pytest.FixtureRequest) -> Any:
    config = TelemetryConfig(otlp_endpoint="http://127.0.0.1:1", otlp_sample_ratio=request.param)
    tracer = open_tracer(config, "gateway", "g", "0")
    yield tracer
    tracer._provider._active_span_processor._span_processors = ()  # nothing is sent to nobody
    tracer.close()


@pytest.mark.parametrize(("tracer", "share"), [(0.0, 0), (1.0, 200)], indirect=["tracer"])
def test_a_share_is_recorded_of_what_nobody_decided_about(tracer: Any, share: int) -> None:
    spans = [tracer.start("octavo.request", "") for _ in range(200)]
    assert sum(is_recorded(span) for span in spans) == share


@pytest.mark.parametrize("tracer", [0.0, 1.0], indirect=True)
def test_a_caller_decides_for_its_own_traces(tracer: Any) -> None:
    assert [is_recorded(tracer.start("octavo.request", PARENT + flag)) for flag in "01"] == [False, True]


@pytest.mark.parametrize("ratio", [-0.1, 1.1])
def test_a_share_is_from_nothing_to_all(ratio: float) -> None:
    with pytest.raises(ValueError, match="otlp_sample_ratio"):
        TelemetryConfig(otlp_sample_ratio=ratio).check_telemetry()
