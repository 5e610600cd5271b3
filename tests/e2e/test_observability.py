"""What operators see of a real deployment: metrics of every process, one trace over all, lines, `octavo top`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from octavo.services.telemetry import catalog

from .otlp import Collector, Received
from .stack import Stack

TRACE = "5c7a2d3e4f60718293a4b5c6d7e8f901"
PARENT = "1122334455667788"
PROMPT = "Count from one to a hundred, in words: sesame, one, two, three, four,"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


@pytest.fixture(scope="module")
def observed(smollm2: Path, collector: Collector) -> Iterator[Stack]:
    flags = ("--metrics-address", "127.0.0.1:0", "--otlp-endpoint", collector.url, "--log-format", "json")
    running = Stack(
        smollm2, "--device", "cpu", "--kv-cache-memory", "256MiB", "--workers", "2", "--log-level", "info", *flags
    )
    yield running
    assert running.stop() == 0


def metrics_addresses(stack: Stack) -> list[str]:
    """Return them as `octavo serve` prints them: gateways, schedulers, workers."""
    (line,) = [line for line in stack.lines if line.startswith("ready in ")]
    return line.partition("metrics ")[2].partition(" (")[0].split()


def scrape(address: str, path: str = "/metrics") -> dict[str, float]:
    text = httpx.get(f"http://{address}{path}").raise_for_status().text
    return {
        sample.name + "".join(f"[{value}]" for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def complete(stack: Stack, max_tokens: int, **headers: str) -> Iterator[str]:
    """Stream a completion, as an OpenAI client does."""
    body = {"model": "smollm2-135m-instruct", "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0,
            "stream": True, "ignore_eos": True}  # fmt: skip
    with httpx.stream("POST", f"{stack.http_url}/v1/completions", json=body, headers=headers, timeout=120) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                yield event["choices"][0]["text"] if event["choices"] else ""


def is_whole(spans: list[Received]) -> bool:
    names = [(span.service, span.name) for span in spans]
    return {
        ("octavo-gateway", "octavo.request"),
        ("octavo-gateway", "octavo.failover"),
        ("octavo-scheduler", "octavo.queue"),
        ("octavo-scheduler", "octavo.prefill"),
        ("octavo-scheduler", "octavo.decode"),
        ("octavo-scheduler", "octavo.recovery"),
        ("octavo-worker", "octavo.worker.prefill"),
        ("octavo-worker", "octavo.worker.decode"),
    } <= set(names)


@pytest.mark.timeout(180)
def test_a_request_that_loses_its_scheduler_and_then_its_worker_is_one_trace(
    observed: Stack, collector: Collector
) -> None:
    pids = observed.children("scheduler") + observed.children("worker")
    pieces: list[str] = []
    kills = {10: observed.children("scheduler"), 60: observed.children("worker")}
    for piece in complete(observed, 100, traceparent=f"00-{TRACE}-{PARENT}-01"):
        pieces.append(piece)
        for pid in kills.pop(len(pieces), []):
            os.kill(pid, signal.SIGKILL)

    spans = collector.wait_for(TRACE, is_whole, timeout_s=30)

    assert not set(pids) & {*observed.children("scheduler"), *observed.children("worker")}
    (request,) = [span for span in spans if span.name == "octavo.request"]
    assert request.parent_id == PARENT
    assert request.attributes["gen_ai.usage.output_tokens"] == 100
    for span in spans:
        assert span is request or span.parent_id == request.span_id, span
        assert request.start <= span.start <= span.end, span
    assert not [span for span in collector.spans if "sesame" in str(span)]


def test_every_process_can_be_scraped_and_each_metric_is_there(observed: Stack) -> None:
    "".join(complete(observed, 40))
    addresses = metrics_addresses(observed)
    assert len(addresses) == 4  # a gateway, a scheduler, two workers
    processes = [scrape(address) for address in addresses]
    gateway, scheduler, workers = processes[0], processes[1], processes[2:]

    for samples, metrics in (
        (gateway, catalog.GATEWAY),
        (scheduler, catalog.SCHEDULER),
        (workers[0], catalog.WORKER),
    ):
        names = " ".join(samples)
        on_events = {catalog.REJECTIONS, catalog.INTERRUPTIONS, catalog.REFUSALS, catalog.WORKER_FAULTS}
        assert [metric.name for metric in metrics if metric.name not in names and metric not in on_events] == []
    name = "smollm2-135m-instruct"
    assert gateway[f"vllm:generation_tokens_total[{name}]"] == gateway["octavo_output_tokens_total[]"] >= 40
    parts = ("plan", "transport", "forward", "sample")
    steps = scheduler["octavo_steps_total"]
    assert steps > 0
    for part in parts[1:]:
        assert scheduler[f"octavo_step_seconds_count[{part}]"] == steps
    assert scheduler["octavo_step_seconds_sum[forward]"] > scheduler["octavo_step_seconds_sum[plan]"] > 0
    assert sum(each["octavo_worker_steps_total"] for each in workers) > 0
    assert scrape(addresses[0], "/metrics/load")["vllm:num_requests_running"] == 0


def test_a_call_is_one_json_line_with_its_request_id_and_without_its_text(observed: Stack) -> None:
    "".join(complete(observed, 8, **{"x-request-id": "line-1"}))
    observed.wait_for_line("line-1", timeout_s=30)

    lines: list[dict[str, Any]] = [json.loads(line) for line in observed.lines if line.startswith("{")]
    (line,) = [line for line in lines if line.get("request_id") == "line-1"]
    assert (line["logger"], line["code"], line["output_tokens"]) == ("octavo.access", "OK", 8)
    assert line["prompt_tokens"] > 8
    assert 0 < line["ttft_ms"] <= line["duration_ms"]
    assert not [line for line in observed.lines if "sesame" in line]


def test_top_shows_schedulers_and_workers(observed: Stack) -> None:
    command = [sys.executable, "-m", "octavo.services.cli", "top", "--address", observed.address, "--once"]
    done = subprocess.run(
        [*command, "--interval-s", "0.1"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "160"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for word in ("smollm2-135m-instruct", "scheduler / worker-0", "scheduler / worker-1", "out tok/s", "cache hits"):
        assert word in done.stdout, done.stdout
