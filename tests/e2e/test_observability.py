"""What operators see of a real deployment: metrics of every process, one trace over all, lines, `octavo top`."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from octavo.services.telemetry import catalog

from .otlp import Collector, Received
from .prometheus import Prometheus
from .stack import Stack

TRACE = "5c7a2d3e4f60718293a4b5c6d7e8f901"
PARENT = "1122334455667788"
FILES = Path(__file__).resolve().parents[2] / "helm" / "octavo" / "files"
PROMPT = "Count from one to a hundred, in words: sesame, one, two, three, four,"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


@pytest.fixture(scope="module")
def observed(smollm2: Path, collector: Collector) -> Iterator[Stack]:
    flags = ("--metrics-address", "127.0.0.1:0", "--otlp-endpoint", collector.url, "--log-format", "json")
    running = Stack(smollm2, "--device", "cpu", "--kv-cache-memory", "256MiB", "--log-level", "info", *flags)
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
    kills = {8: observed.children("scheduler"), 30: observed.children("worker")}
    for piece in complete(observed, 60, traceparent=f"00-{TRACE}-{PARENT}-01"):
        pieces.append(piece)
        for pid in kills.pop(len(pieces), []):
            os.kill(pid, signal.SIGKILL)

    spans = collector.wait_for(TRACE, is_whole, timeout_s=30)

    assert not set(pids) & {*observed.children("scheduler"), *observed.children("worker")}
    (request,) = [span for span in spans if span.name == "octavo.request"]
    assert request.parent_id == PARENT
    assert request.attributes["gen_ai.usage.output_tokens"] == 60
    for span in spans:
        assert span is request or span.parent_id == request.span_id, span
        assert request.start <= span.start <= span.end, span
    assert not [span for span in collector.spans if "sesame" in str(span)]


def test_every_process_can_be_scraped_and_each_metric_is_there(observed: Stack) -> None:
    "".join(complete(observed, 40))
    addresses = metrics_addresses(observed)
    assert len(addresses) == 3
    processes = [scrape(address) for address in addresses]
    gateway, scheduler, worker = processes

    for samples, metrics in (
        (gateway, catalog.GATEWAY),
        (scheduler, catalog.SCHEDULER),
        (worker, catalog.WORKER),
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
    assert worker["octavo_worker_steps_total"] >= 40
    while scrape(addresses[0], "/metrics/load")["vllm:num_requests_running"]:
        pass  # the gateway knows it from the scheduler's next report


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
    for word in ("smollm2-135m-instruct", "scheduler / worker-0", "out tok/s", "cache hits"):
        assert word in done.stdout, done.stdout


@pytest.fixture(scope="module")
def prometheus(observed: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has the rules of the chart; only that alerts need not last."""
    if shutil.which("prometheus") is None:
        pytest.skip("needs prometheus: apt-get install prometheus")
    rules = yaml.safe_load((FILES / "rules.yaml").read_text())
    for rule in itertools.chain.from_iterable(group["rules"] for group in rules["groups"]):
        rule.pop("for", None)
    running = Prometheus(
        tmp_path_factory.mktemp("prometheus"), metrics_addresses(observed), rules, release="a", model="m"
    )
    yield running
    running.close()


def chosen(query: str, release: str) -> str:
    """Return a query of the dashboard as Grafana sends it, for all namespaces and models."""
    for name, value in (("__rate_interval", "10s"), ("namespace", ".*"), ("model", ".*"), ("release", release)):
        query = query.replace(f"${name}", value)
    assert "$" not in query
    return query


def test_every_query_of_the_dashboard_has_an_answer_in_a_live_prometheus(
    observed: Stack, prometheus: Prometheus
) -> None:
    panels = json.loads((FILES / "dashboard.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    assert len(queries) > 30
    over = threading.Event()

    def call() -> None:
        while not over.is_set():
            refused = httpx.post(f"{observed.http_url}/v1/completions", json={"model": "none", "prompt": "a"})
            assert refused.status_code == 404
            "".join(complete(observed, 8))
            left = complete(observed, 50)
            next(left)
            left.close()

    caller = threading.Thread(target=call)
    caller.start()
    try:
        for query in queries:
            live = chosen(query, "a|b")
            prometheus.wait_for(query, lambda live=live: bool(prometheus.query(live)), timeout_s=60)  # type: ignore[misc]
        for query in queries:
            if "vector(0)" not in query:  # which stands for nothing
                assert not prometheus.query(chosen(query, "b")), query
    finally:
        over.set()
        caller.join()


def test_an_alert_fires_when_the_processes_are_gone(observed: Stack, prometheus: Prometheus) -> None:
    def firing() -> set[str]:
        return {sample["metric"]["instance"] for sample in prometheus.query(alerts)}

    alerts = 'ALERTS{alertname="OctavoTargetDown", alertstate="firing"}'
    addresses = set(metrics_addresses(observed))
    prometheus.wait_for("all are seen", lambda: len(prometheus.query("octavo_build_info")) == len(addresses), 30)
    assert firing() == set()
    assert observed.stop() == 0
    prometheus.wait_for("all are missed", lambda: firing() == addresses, timeout_s=30)
