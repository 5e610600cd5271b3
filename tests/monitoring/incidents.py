"""What Prometheus sees of two releases, a small one beside a large one, while something happens to the small one.

Each incident is a row: the alert that it must raise within five minutes, and the series that change by it.
"""

from __future__ import annotations

from typing import Any

STEP_S = 15
BEFORE = 40  # steps before the incident: ten minutes
AFTER = 60
DETECTED = "15m"
Values = dict[str, str]

# What a healthy process exposes: a gauge is a number, a counter "+" and what it grows by in a step.
GATEWAY: Values = {
    "up": "1", 'octavo_build_info{process="gateway"}': "1", "octavo_start_time_seconds": "-90000",
    'octavo_gateway_schedulers{state="healthy"}': "2", 'octavo_gateway_schedulers{state="unusable"}': "0",
    'octavo_requests_total{code="OK"}': "+15", 'octavo_requests_total{code="INVALID_ARGUMENT"}': "+1",
    'octavo_requests_total{code="INTERNAL"}': "+0", 'octavo_requests_total{code="UNAVAILABLE"}': "+0",
    'octavo_requests_total{code="ABORTED"}': "+0", 'octavo_requests_total{code="RESOURCE_EXHAUSTED"}': "+0",
    "octavo_failovers_total": "+0", "octavo_event_loop_lag_seconds": "0.002",
    'octavo_certificate_end_seconds{use="tls"}': "7776000", 'octavo_certificate_end_seconds{use="hop"}': "7776000",
    'octavo_time_to_first_token_seconds_bucket{le="5"}': "+15",
    'octavo_time_to_first_token_seconds_bucket{le="10"}': "+15",
    'octavo_time_to_first_token_seconds_bucket{le="+Inf"}': "+15",
}  # fmt: skip
ENGINE: Values = {
    "up": "1", 'octavo_build_info{process="scheduler"}': "1", "octavo_start_time_seconds": "-90000",
    "octavo_workers_ready": "1", "octavo_oldest_step_seconds": "0.1", "octavo_quarantined_requests": "0",
    'octavo_worker_losses_total{crashed="true"}': "+0", 'octavo_worker_losses_total{crashed="false"}': "+0",
    "octavo_queue_estimate_seconds": "0.5", "octavo_kv_cache_usage_ratio": "0.6", "octavo_preemptions_total": "+0",
    "octavo_draining": "0", "octavo_event_loop_lag_seconds": "0.002",
    'octavo_step_seconds_sum{part="forward"}': "+3", 'octavo_step_seconds_count{part="forward"}': "+100",
    'octavo_inter_token_latency_seconds_bucket{le="0.2"}': "+100",
    'octavo_inter_token_latency_seconds_bucket{le="0.5"}': "+100",
    'octavo_inter_token_latency_seconds_bucket{le="+Inf"}': "+100",
}  # fmt: skip
GONE = "_"

# Incident: (alert, whose series, what they are from then on).
INCIDENTS: dict[str, tuple[str, str, Values]] = {
    "a gateway is gone": ("TargetDown", "gateway", {**dict.fromkeys(GATEWAY, GONE), "up": "0"}),
    "an engine is gone": ("TargetDown", "engine", {**dict.fromkeys(ENGINE, GONE), "up": "0"}),
    "no engine answers": ("GatewayWithoutScheduler", "gateway", {'octavo_gateway_schedulers{state="healthy"}': "0"}),
    "engines have another model": ("GatewayWithoutScheduler", "gateway", {
        'octavo_gateway_schedulers{state="healthy"}': "0", 'octavo_gateway_schedulers{state="unusable"}': "2"}),
    "a worker does not come back": ("SchedulerWithoutWorkers", "engine", {"octavo_workers_ready": "0"}),
    "a device hangs": ("StepHangs", "engine", {"octavo_oldest_step_seconds": "90"}),
    "a worker crashes again and again": ("WorkerCrashes", "engine", {
        'octavo_worker_losses_total{crashed="true"}': "+1"}),
    "a worker leaves again and again": ("WorkerCrashes", "engine", {
        'octavo_worker_losses_total{crashed="false"}': "+1"}),
    "a request kills workers": ("Quarantine", "engine", {"octavo_quarantined_requests": "1"}),
    "a gateway runs out of memory": ("Restarts", "gateway", {"octavo_start_time_seconds": "+60"}),
    "a scheduler runs out of memory": ("Restarts", "engine", {"octavo_start_time_seconds": "+60"}),
    "a scheduler is lost": ("Failovers", "gateway", {"octavo_failovers_total": "+1"}),
    "a bug fails one call in ten": ("RequestsFail", "gateway", {'octavo_requests_total{code="INTERNAL"}': "+1.5"}),
    "calls find no scheduler": ("RequestsFail", "gateway", {
        'octavo_requests_total{code="OK"}': "+0", 'octavo_requests_total{code="UNAVAILABLE"}': "+15"}),
    "streams break": ("RequestsFail", "gateway", {'octavo_requests_total{code="ABORTED"}': "+1"}),
    "more is asked than can be computed": ("RequestsRefused", "gateway", {
        'octavo_requests_total{code="RESOURCE_EXHAUSTED"}': "+30"}),
    "a tenant uses up its quota": ("RequestsRefused", "gateway", {
        'octavo_requests_total{code="RESOURCE_EXHAUSTED"}': "+3"}),
    "the queue grows": ("QueueLong", "engine", {"octavo_queue_estimate_seconds": "90"}),
    "first tokens are late": ("TimeToFirstTokenHigh", "gateway", {
        'octavo_time_to_first_token_seconds_bucket{le="5"}': "+10"}),
    "tokens are late": ("InterTokenLatencyHigh", "engine", {
        'octavo_inter_token_latency_seconds_bucket{le="0.2"}': "+50"}),
    "the cache is full": ("CacheThrashes", "engine", {
        "octavo_kv_cache_usage_ratio": "0.99", "octavo_preemptions_total": "+15"}),
    "a node is slow": ("EngineSlow", "engine", {'octavo_step_seconds_sum{part="forward"}': "+30"}),
    "a certificate for clients is not renewed": ("CertificateEnds", "gateway", {
        'octavo_certificate_end_seconds{use="tls"}': "259200"}),
    "a certificate between processes is not renewed": ("CertificateEnds", "gateway", {
        'octavo_certificate_end_seconds{use="hop"}': "259200"}),
    "an event loop is blocked": ("LoopLags", "engine", {"octavo_event_loop_lag_seconds": "2"}),
}  # fmt: skip

# What is no incident: whose series, what they were before it, what they are from then on.
ORDINARY: dict[str, list[tuple[str, Values, Values]]] = {
    "an installation, whose model loads for ten minutes": [
        ("gateway", {**GATEWAY, 'octavo_gateway_schedulers{state="healthy"}': "0", "octavo_start_time_seconds": "0",
                     'octavo_requests_total{code="OK"}': "+0"}, {"octavo_start_time_seconds": "0"}),
        ("engine", {**ENGINE, "octavo_workers_ready": "0", "octavo_start_time_seconds": "0"},
         {"octavo_start_time_seconds": "0"}),
    ],
    "an upgrade, in which a pod drains and another one loads its model": [
        ("gateway", GATEWAY, {'octavo_gateway_schedulers{state="healthy"}': "1"}),
        ("engine", {**ENGINE, "octavo_draining": "1"}, dict.fromkeys(ENGINE, GONE)),
        ("new-engine", dict.fromkeys(ENGINE, GONE), {**ENGINE, "octavo_start_time_seconds": "600",
                                                     "octavo_workers_ready": "0"}),
    ],
    "a scale-up": [
        ("gateway", GATEWAY, {'octavo_gateway_schedulers{state="healthy"}': "3"}),
        ("new-engine", dict.fromkeys(ENGINE, GONE), {**ENGINE, "octavo_start_time_seconds": "600",
                                                     "octavo_workers_ready": "0"}),
    ],
}  # fmt: skip


def series(namespace: str, instance: str, before: Values, after: Values) -> list[dict[str, str]]:
    """Return what Prometheus scrapes of a process, as promtool wants it."""
    found = []
    for name in before:
        was, now = before[name], after.get(name, before[name])
        metric, _, labels = name.rstrip("}").partition("{")
        role = instance.rpartition("-")[0]
        labels = ", ".join(filter(None, (labels, f'namespace="{namespace}", job="{role}", instance="{instance}"')))
        start = BEFORE * float(was) if was.startswith("+") else float(was) if was != GONE else 0
        values = f"0{was}x{BEFORE - 1}" if was.startswith("+") else f"{was}x{BEFORE - 1}"
        values += f" {start:g}{now}x{AFTER}" if now.startswith("+") else f" {now}x{AFTER}"
        found.append({"series": f"{metric}{{{labels}}}", "values": values})
    return found


def scene(changes: list[tuple[str, Values, Values]]) -> list[dict[str, str]]:
    """Return the series of a large release and of a small one, to whose processes something happens."""
    found = []
    for number in range(20):
        found += series("large", f"engine-{number}", ENGINE, ENGINE)
    busy = {name: f"+{400 * int(value)}" if value.startswith("+") else value for name, value in GATEWAY.items()}
    found += series("large", "gateway-0", busy, busy)
    changed = {who: (before, after) for who, before, after in changes}
    for who, healthy in (("gateway", GATEWAY), ("engine", ENGINE)):
        found += series("small", f"{who}-0", *changed.get(who, (healthy, healthy)))
    found += series("small", "engine-1", ENGINE, ENGINE) + series("small", "engine-2", ENGINE, ENGINE)
    if "new-engine" in changed:
        found += series("small", "engine-3", *changed["new-engine"])
    return found


def promtool_tests() -> list[dict[str, Any]]:
    """Return a test for each incident and for whatever is none."""
    firing = '(count(ALERTS{alertstate="firing"%s}) or vector(0))'
    tests = []
    for title, (alert, who, after) in INCIDENTS.items():
        healthy = GATEWAY if who == "gateway" else ENGINE
        asked = [
            ("9m", firing % "", 0),
            (DETECTED, firing % f', namespace="small", alertname="Octavo{alert}"' + " > bool 0", 1),
            (DETECTED, firing % ', namespace="large"', 0),
        ]
        tests.append(test(title, scene([(who, healthy, after)]), asked))
    for title, changes in ORDINARY.items():
        asked = [(f"{minutes}m", firing % "", 0) for minutes in range(1, 25)]
        tests.append(test(title, scene(changes), asked))
    return tests


def test(title: str, input_series: list[dict[str, str]], asked: list[tuple[str, str, int]]) -> dict[str, Any]:
    """Return a test with what is asked: (when, query, answer)."""
    return {
        "name": title,
        "interval": f"{STEP_S}s",
        "input_series": input_series,
        "promql_expr_test": [
            {"expr": query, "eval_time": when, "exp_samples": [{"labels": "{}", "value": value}]}
            for when, query, value in asked
        ],
    }
