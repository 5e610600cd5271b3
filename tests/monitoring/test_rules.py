"""The alerts and the dashboard that come with the chart: nothing in them asks for what is not there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from octavo.services.telemetry import catalog

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "helm" / "octavo" / "files"
RULES = FILES / "rules.yaml"
RULES_TEST = Path(__file__).with_name("rules_test.yaml")
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (package prometheus)")


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
@pytest.mark.parametrize("change", [("octavo_workers_ready == 0", "octavo_workers_ready == 1"), ("> 0.01", "> 0.03")])
def test_the_cases_find_a_rule_that_is_wrong(tmp_path: Path, change: tuple[str, str]) -> None:
    assert change[0] in RULES.read_text()
    assert run_promtool(tmp_path, RULES.read_text().replace(*change)).returncode != 0


def test_rules_and_dashboard_name_only_metrics_that_are_exposed() -> None:
    queries = [rule["expr"] for rule in rules()] + dashboard_queries()
    assert len(queries) > 50
    for query in queries:
        named = set(re.findall(r"\boctavo_[a-z_]+", query))
        assert named <= exposed_names(), query
        recorded = set(re.findall(r"\boctavo:[a-z_]+:[a-z0-9]+", query))
        assert recorded <= {rule.get("record") for rule in rules()}, query


def test_every_metric_is_on_the_dashboard_or_in_a_rule_or_is_for_looking_up() -> None:
    shown = " ".join([rule["expr"] for rule in rules()] + dashboard_queries())
    looked_up = {
        catalog.CACHE_CONFIG, catalog.WAITING_TOKENS, catalog.ADMISSIONS, catalog.REFUSALS, catalog.PREFILL_TIME,
        catalog.DECODE_TIME, catalog.WORKER_JOINED, catalog.WORKER_JOINS, catalog.WORKER_STEPS, catalog.WORKER_TOKENS,
        catalog.WORKER_FAULTS, catalog.WORKER_KV_BLOCKS, catalog.ACCEPTED_TOKENS, catalog.MODEL_SCHEDULERS,
    }  # fmt: skip
    everything = (*catalog.COMMON, *catalog.GATEWAY, *catalog.SCHEDULER, *catalog.WORKER)
    assert [metric.name for metric in everything if metric.name not in shown] == [
        metric.name for metric in everything if metric in looked_up
    ]
