"""The alerts and the dashboard that come with the chart: nothing in them asks for what is not there."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from octavo.services.cli import server_options
from octavo.services.cli.admin import AdminConfig
from octavo.services.cli.serve_config import PROCESSES
from octavo.services.common.config import settings_of
from octavo.services.telemetry import catalog
from tests.helm.chart import find, rendered_with
from tests.monitoring import incidents

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "helm" / "octavo" / "files"
RULES = FILES / "rules.yaml"
RULES_TEST = Path(__file__).with_name("rules_test.yaml")
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="apt-get install prometheus: promtool")


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def dashboard_queries() -> list[str]:
    panels = json.loads((FILES / "dashboard.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def exposed_names() -> set[str]:
    names = set()
    for metric in (*catalog.COMMON, *catalog.GATEWAY, *catalog.SCHEDULER, *catalog.WORKER):
        suffixes = ("_bucket", "_count", "_sum") if metric.kind == "histogram" else ("",)
        names |= {metric.name + suffix for suffix in suffixes}
    return names


def run_promtool(folder: Path, rules_text: str) -> subprocess.CompletedProcess[str]:
    (folder / "rules.yaml").write_text(rules_text)
    shutil.copy(RULES_TEST, folder / "rules_test.yaml")
    command = ["promtool", "test", "rules", str(folder / "rules_test.yaml")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@needs_promtool
def test_every_alert_fires_when_it_should_and_not_before(tmp_path: Path) -> None:
    done = run_promtool(tmp_path, RULES.read_text())
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    cases = [case for test in yaml.safe_load(RULES_TEST.read_text())["tests"] for case in test["alert_rule_test"]]
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == alerts
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == alerts


@needs_promtool
@pytest.mark.parametrize(
    "change",
    [
        ("octavo_workers_ready == 0", "octavo_workers_ready == 1"),
        ("vector(0.01)", "vector(0.03)"),
        ("(max_over_time(octavo_workers_ready[1h]) > 0", "(octavo_workers_ready >= 0"),
        ("vector(1800)", "vector(600)"),
        ("sum by (namespace, job) (rate(octavo_requests_total[5m]))", "sum(rate(octavo_requests_total[5m]))"),
    ],
)
def test_the_cases_find_a_rule_that_is_wrong(tmp_path: Path, change: tuple[str, str]) -> None:
    assert change[0] in RULES.read_text()
    assert run_promtool(tmp_path, RULES.read_text().replace(*change)).returncode != 0


def test_rules_and_dashboard_name_only_metrics_that_are_exposed() -> None:
    queries = [rule["expr"] for rule in rules()] + dashboard_queries()
    assert len(queries) > 50
    for query in queries:
        named = set(re.findall(r"\boctavo_[a-z_]+", query))
        assert named <= exposed_names(), query
        recorded = set(re.findall(r"\boctavo:[a-z_]+:[a-z0-9_]+", query))
        assert recorded <= {rule.get("record") for rule in rules()}, query


def lost(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Yield where something of `before` is missing or another in `after`."""
    if isinstance(before, dict):
        for key, value in before.items():
            yield from lost(value, after.get(key), f"{path}.{key}")
    elif isinstance(before, list):
        for at, (one, other) in enumerate(itertools.zip_longest(before, after or ())):
            yield from lost(one, other, f"{path}[{at}]")
    elif before != after:
        yield path


def test_the_dashboard_is_what_grafanas_schema_knows() -> None:
    from grafana_foundation_sdk.cog import encoder, plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    dashboard = json.loads((FILES / "dashboard.json").read_text())

    def lost_of(it: Any) -> list[str]:
        read = Dashboard.from_json(copy.deepcopy(it))
        return list(lost(it, json.loads(encoder.JSONEncoder().encode(read))))

    assert lost_of(dashboard) == []
    dashboard["panels"][1]["targets"][0]["legend"] = "no such thing"
    assert lost_of(dashboard) == [".panels[1].targets[0].legend"]


def test_each_query_of_the_dashboard_follows_its_variables() -> None:
    variables = json.loads((FILES / "dashboard.json").read_text())["templating"]["list"]
    assert [each["name"] for each in variables] == ["datasource", "namespace", "release", "model"]
    selector = 'namespace=~"$namespace",release=~"$release",model=~"$model"'
    for query in dashboard_queries():
        assert query.count("{" + selector) == len(re.findall(r"\boctavo_[a-z_]+", query)), query


def test_what_is_scraped_has_the_labels_that_the_dashboard_asks_for() -> None:
    objects = rendered_with("cpu", "monitoring.enabled=true", 'networkPolicy.monitoring=[{"podSelector":{}}]')
    scraped = [
        *find(objects, "ServiceMonitor", "demo-gateway")["spec"]["endpoints"],
        *find(objects, "PodMonitor", "demo-engine")["spec"]["podMetricsEndpoints"],
    ]
    assert len(scraped) == 3
    for each in scraped:
        labels = {rule["targetLabel"]: rule["replacement"] for rule in each["relabelings"]}
        assert labels == {"release": "demo", "model": "smollm2-135m-instruct"}


def test_every_metric_is_on_the_dashboard_or_in_a_rule_or_is_for_looking_up() -> None:
    shown = " ".join([rule["expr"] for rule in rules()] + dashboard_queries())
    looked_up = {
        catalog.CACHE_CONFIG, catalog.WAITING_TOKENS, catalog.ADMISSIONS, catalog.REFUSALS, catalog.PREFILL_TIME,
        catalog.DECODE_TIME, catalog.WORKER_JOINED, catalog.WORKER_JOINS, catalog.WORKER_STEPS, catalog.WORKER_TOKENS,
        catalog.WORKER_FAULTS, catalog.WORKER_KV_BLOCKS, catalog.ACCEPTED_TOKENS, catalog.DRAFT_TOKENS,
        catalog.DRAFT_TIME, catalog.MODEL_SCHEDULERS, catalog.ADAPTERS, catalog.ADAPTER_LOADS,
    }  # fmt: skip
    everything = (*catalog.COMMON, *catalog.GATEWAY, *catalog.SCHEDULER, *catalog.WORKER)
    assert [metric.name for metric in everything if metric.name not in shown] == [
        metric.name for metric in everything if metric in looked_up
    ]


@needs_promtool
def test_each_of_25_incidents_raises_an_alert_within_five_minutes_and_no_ordinary_change_does(tmp_path: Path) -> None:
    assert len(incidents.INCIDENTS) == 25
    assert {series.partition("{")[0] for series in (*incidents.GATEWAY, *incidents.ENGINE)} - {"up"} <= exposed_names()
    (tmp_path / "rules.yaml").write_text(RULES.read_text())
    tests = {"rule_files": ["rules.yaml"], "evaluation_interval": "15s", "tests": incidents.promtool_tests()}
    (tmp_path / "rules_test.yaml").write_text(yaml.safe_dump(tests))
    command = ["promtool", "test", "rules", str(tmp_path / "rules_test.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def release_rules(*values: str) -> str:
    """Return what the chart makes of the rules for release `demo` in namespace `llm`."""
    peers = 'networkPolicy.monitoring=[{"podSelector":{}}]'
    objects = rendered_with("cpu", "monitoring.enabled=true", peers, *values)
    return yaml.safe_dump(find(objects, "PrometheusRule", "demo-octavo")["spec"])


RELEASE_TEST = """
rule_files: [rules.yaml]
evaluation_interval: 30s
tests:
  - interval: 30s
    input_series:
      - {series: 'octavo_workers_ready{namespace="llm", pod="demo-engine-0", job="llm/demo-engine", instance="a:1"}', values: "1x4 0x10"}
      - {series: 'octavo_workers_ready{namespace="llm", pod="demo2-engine-0", job="llm/demo2-engine", instance="b:1"}', values: "1x4 0x10"}
      - {series: 'octavo_workers_ready{namespace="other", pod="demo-engine-0", job="o", instance="c:1"}', values: "1x4 0x10"}
      - {series: 'octavo_requests_total{namespace="llm", pod="demo-gateway-x", job="g", code="OK"}', values: "0+92x40"}
      - {series: 'octavo_requests_total{namespace="llm", pod="demo-gateway-x", job="g", code="INTERNAL"}', values: "0+8x40"}
      - {series: 'octavo_requests_total{namespace="llm", pod="demo2-gateway-x", job="g", code="INTERNAL"}', values: "0+800x40"}
    alert_rule_test:
      - alertname: OctavoSchedulerWithoutWorkers
        eval_time: 5m
        exp_alerts: [{exp_labels: {severity: critical, team: night, release: demo, model: smollm2-135m-instruct,
          namespace: llm, pod: demo-engine-0, job: llm/demo-engine, instance: "a:1"}, exp_annotations: {
          summary: "scheduler a:1 has no worker",
          runbook_url: "https://wiki.test/runbooks/OctavoSchedulerWithoutWorkers.md",
          description: "Its requests are queued for worker_grace_s and refused after that. Look at the workers' logs."}}]
      - alertname: OctavoRequestsFail
        eval_time: 12m
        exp_alerts: [{exp_labels: {severity: critical, team: night, release: demo, model: smollm2-135m-instruct,
          namespace: llm, job: g}, exp_annotations: {
          summary: "8% of calls at g fail by fault of the server",
          runbook_url: "https://wiki.test/runbooks/OctavoRequestsFail.md",
          description: "octavo_interruptions_total and octavo_rejections_total have the reasons."}}]
"""  # noqa: E501


@needs_promtool
def test_a_releases_alerts_are_about_its_own_pods_and_name_release_model_and_runbook(tmp_path: Path) -> None:
    values = ["monitoring.alerts.labels.team=night", "monitoring.alerts.runbooks=https://wiki.test/runbooks"]
    (tmp_path / "rules.yaml").write_text(release_rules(*values))
    (tmp_path / "rules_test.yaml").write_text(RELEASE_TEST)
    command = ["promtool", "test", "rules", str(tmp_path / "rules_test.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_release_has_limits_of_its_own() -> None:
    limits = {
        rule["record"]: (rule["expr"], rule["labels"]["release"])
        for group in yaml.safe_load(release_rules("monitoring.alerts.limits.queue_seconds=60"))["groups"]
        for rule in group["rules"]
        if str(rule.get("record")).startswith("octavo:limit:")
    }
    assert limits["octavo:limit:queue_seconds"] == ("vector(60)", "demo")
    assert limits["octavo:limit:refused_ratio"] == ("vector(0.05)", "demo")


RUNBOOKS = ROOT / "docs" / "runbooks"
INCIDENTS = {
    "out-of-memory", "stuck-worker", "hot-tenant", "bad-node", "poison-request", "slow-model-store", "certificate",
    "kv-pressure", "rollback", "overload",
}  # fmt: skip


def test_every_alert_has_a_runbook_and_every_runbook_an_alert_or_an_incident() -> None:
    pages = {path.stem: path.read_text() for path in RUNBOOKS.glob("*.md")}
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert pages.keys() == alerts | INCIDENTS
    for name, text in pages.items():
        assert text.startswith(f"# {name}\n"), name
        assert "`" in text, f"{name} has no command"


def test_runbooks_name_commands_settings_and_metrics_that_there_are() -> None:
    actions = next(each for each in settings_of(AdminConfig) if each.name == "action").choices
    for path in RUNBOOKS.glob("*.md"):
        text = path.read_text()
        for word in re.findall(r"octavo\s+admin ([a-z-]+)", text):
            assert word in actions, f"{path.name}: {word}"
        for command in re.findall(r"`octavo\s+admin\s([^`]+)`", text):
            server_options.load(AdminConfig, command.split(), prog="octavo admin", description="")
        for name in re.findall(r"`(octavo_[a-z_]+)`", text):
            assert name in exposed_names() | {each.removesuffix("_bucket") for each in exposed_names()}, path.name
        settings = {each.name for kind in PROCESSES.values() for each in settings_of(kind)}
        for name in re.findall(r"`([a-z]+_[a-z_]+)`", text):
            assert name in settings or name.startswith("octavo_"), f"{path.name}: {name}"
