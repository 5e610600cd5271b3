"""Names of metrics are an interface: dashboards and alerts of others use them."""

from __future__ import annotations

import re
from pathlib import Path

from octavo.services.telemetry import catalog

# Add lines freely; a line that changes or goes breaks what somebody has built on it, so it needs a new major version.
FROZEN = Path(__file__).with_name("names.txt")
DOCS = Path(__file__).resolve().parents[3] / "docs" / "observability.md"
BEGIN, END = "<!-- metrics: made by tests/services/telemetry/test_catalog.py -->\n", "<!-- end -->"


GROUPS = {
    "every": catalog.COMMON,
    "gateway": catalog.GATEWAY,
    "scheduler": catalog.SCHEDULER,
    "worker": catalog.WORKER,
    "picker": catalog.PICKER,
}


def rows() -> list[str]:
    return [
        " ".join([process, metric.kind, metric.name, "{" + ",".join(metric.labels) + "}", metric.alias]).rstrip()
        for process, metrics in GROUPS.items()
        for metric in metrics
    ]


def test_no_name_or_label_that_was_released_changes() -> None:
    assert rows() == FROZEN.read_text().splitlines()


def test_every_metric_belongs_to_one_kind_of_process() -> None:
    grouped = [*catalog.COMMON, *catalog.GATEWAY, *catalog.SCHEDULER, *catalog.WORKER, *catalog.PICKER]
    defined = [value for value in vars(catalog).values() if isinstance(value, catalog.Metric)]
    assert len(grouped) == len(set(grouped)) == len(defined)
    assert set(grouped) == set(defined)


def test_names_follow_the_conventions_of_prometheus() -> None:
    for metric in (*catalog.COMMON, *catalog.GATEWAY, *catalog.SCHEDULER, *catalog.WORKER):
        assert re.fullmatch(r"octavo_[a-z_]+", metric.name), metric.name
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric.name
        assert (metric.kind == "histogram") == bool(metric.buckets), metric.name
        assert list(metric.buckets) == sorted(set(metric.buckets)), metric.name
        assert not set(metric.labels) & {"le", "quantile", "job", "instance"}, metric.name


def test_each_vllm_name_is_exposed_by_one_kind_of_process_so_that_sums_count_once() -> None:
    aliases = [metric.alias for metric in (*catalog.GATEWAY, *catalog.SCHEDULER, *catalog.WORKER) if metric.alias]
    assert len(aliases) == len(set(aliases))
    # Those that its documentation, its dashboards and the Gateway API Inference Extension name.
    assert set(aliases) >= {
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:num_preemptions_total",
        "vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total",
        "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds", "vllm:e2e_request_latency_seconds",
        "vllm:request_queue_time_seconds", "vllm:request_prefill_time_seconds", "vllm:request_decode_time_seconds",
        "vllm:iteration_tokens_total", "vllm:cache_config_info",
    }  # fmt: skip


def table() -> str:
    """Return the table of metrics in the docs."""
    lines = ["| process | metric | kind | what | vLLM's name |", "| --- | --- | --- | --- | --- |"]
    for process, metrics in GROUPS.items():
        for metric in metrics:
            labels = f" {{{', '.join(metric.labels)}}}" if metric.labels else ""
            alias = f"`{metric.alias}`" if metric.alias else ""
            lines.append(f"| {process} | `{metric.name}{labels}` | {metric.kind} | {metric.help} | {alias} |")
    return "\n".join(lines) + "\n"


def test_the_table_in_the_docs_is_current() -> None:
    """After a change that is meant: python tests/services/telemetry/test_catalog.py."""
    assert BEGIN + table() + END in DOCS.read_text()


if __name__ == "__main__":
    before, rest = DOCS.read_text().split(BEGIN)
    DOCS.write_text(before + BEGIN + table() + END + rest.split(END)[1])
