"""Who reaches whom: Services, routes, certificates and NetworkPolicies."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from octavo.services.telemetry import catalog

from .chart import SETS, Object, containers, find, pod_specs, rendered, rendered_with, template


def policy(name: str, values: str) -> Object:
    spec: Object = find(rendered(values), "NetworkPolicy", name)["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]  # what is not listed is denied
    return spec


def ports(rules: list[Object]) -> set[int]:
    return {port["port"] for rule in rules for port in rule.get("ports", [])}


def test_schedulers_take_calls_from_gateways_only_and_engines_reach_nothing_but_dns() -> None:
    engine = policy("demo-engine", "cpu")
    (rule,) = engine["ingress"]
    (peer,) = rule["from"]
    assert peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "gateway"
    assert ports([rule]) == {50052}
    assert engine["egress"] == [
        {"ports": [{"port": port, "protocol": protocol} for port in (53, 5353) for protocol in ("UDP", "TCP")]}
    ]


def test_engines_over_nodes_reach_each_other_and_nothing_else() -> None:
    engine = policy("demo-engine", "multi-node")
    for rule in (engine["ingress"][1], engine["egress"][1]):
        (peer,) = rule.get("from", rule.get("to"))
        assert peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "engine"
    assert len(engine["ingress"]) == len(engine["egress"]) == 2


def test_gateways_take_calls_from_whom_the_values_name() -> None:
    (rule,) = policy("demo-gateway", "cpu-production")["ingress"][:1]
    assert [list(peer) for peer in rule["from"]] == [["namespaceSelector"], ["podSelector"]]
    assert rule["from"][1]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "test"
    assert ports([rule]) == {50051, 8000}
    egress = policy("demo-gateway", "cpu-production")["egress"]
    assert ports(egress) == {53, 5353, 50052}
    assert all("to" in rule for rule in egress[1:])


def test_traces_go_to_the_collectors_that_the_values_name_and_nowhere_else() -> None:
    peers = '[{"podSelector":{"matchLabels":{"app":"otel"}}}]'
    values = ["gateway.settings.otlp_endpoint=http://otel:4317", f"networkPolicy.collectors={peers}"]
    done = template(["values-cpu.yaml"], values, "1.37")
    assert done.returncode == 0, done.stderr
    objects = [each for each in yaml.safe_load_all(done.stdout) if each]
    for name in ("demo-gateway", "demo-engine"):
        rules = find(objects, "NetworkPolicy", name)["spec"]["egress"]
        assert {"to": json.loads(peers), "ports": [{"port": 4317}]} in rules


def test_only_the_job_that_fetches_reaches_the_outside() -> None:
    outside = [
        each["metadata"]["name"]
        for each in rendered("cpu")
        if each["kind"] == "NetworkPolicy"
        and any("to" not in rule and ports([rule]) != {53, 5353} for rule in each["spec"]["egress"])
    ]
    assert outside == ["demo-fetch"]


@pytest.mark.parametrize("name", SETS)
def test_ports_say_what_is_spoken_and_lead_to_a_container(name: str) -> None:
    objects = rendered(name)
    pods = {
        "gateway": find(objects, "Deployment", "demo-gateway")["spec"]["template"],
        "engine": next(
            each["spec"].get("template") or each["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
            for each in objects
            if each["metadata"]["name"] == "demo-engine" and each["kind"] in ("StatefulSet", "LeaderWorkerSet")
        ),
    }
    for each in objects:
        if each["kind"] != "Service":
            continue
        pod = pods[each["metadata"]["labels"]["app.kubernetes.io/component"]]
        open_ports = {port["name"]: port["containerPort"] for one in containers(pod) for port in one.get("ports", [])}
        for port in each["spec"]["ports"]:
            assert port["name"].startswith("grpc-") == (port["appProtocol"] in ("grpc", "tls"))
            assert open_ports[port["targetPort"]] == port["port"]
            assert len(port["name"]) <= 15
    engines = find(objects, "Service", "demo-engine")["spec"]
    assert engines["clusterIP"] == "None"
    assert engines["publishNotReadyAddresses"] is True
    assert find(objects, "Service", "demo-gateway-headless")["spec"]["clusterIP"] == "None"


def test_certificates_are_made_out_to_the_names_that_are_dialled() -> None:
    objects = rendered("cpu-production")
    gateway = containers(find(objects, "Deployment", "demo-gateway")["spec"]["template"])[-1]
    flags = {each.split("=")[0]: each.split("=", 1)[1] for each in gateway["args"] if "=" in each}
    dialled = flags["--scheduler-addresses"].rpartition(":")[0]
    assert dialled in find(objects, "Certificate", "demo-engine-hop-tls")["spec"]["dnsNames"]
    test = find(objects, "Pod", "demo-test-stream")["spec"]["containers"][0]
    called = next(each.split("=")[1] for each in test["args"] if each.startswith("--address=")).rpartition(":")[0]
    assert called in find(objects, "Certificate", "demo-tls")["spec"]["dnsNames"]
    volumes = find(objects, "Deployment", "demo-gateway")["spec"]["template"]["spec"]["volumes"]
    secrets = {volume["name"]: volume["secret"]["secretName"] for volume in volumes if "secret" in volume}
    made = {each["spec"]["secretName"] for each in objects if each["kind"] == "Certificate"}
    assert {secrets["tls"], secrets["hop-tls"]} <= made


def test_metrics_are_read_by_whom_the_values_name_and_at_every_process() -> None:
    for values, workers in (("cpu-production", 1), ("multi-node-production", 8)):
        objects = rendered(values)
        scraped = {each["port"] for each in find(objects, "PodMonitor", "demo-engine")["spec"]["podMetricsEndpoints"]}
        assert scraped == {"metrics", *(f"metrics-{number}" for number in range(workers))}
        for _, pod in pod_specs(objects):
            for container in containers(pod):
                flags = dict(each[2:].split("=", 1) for each in container["args"] if "=" in each)
                if "metrics-address" in flags:
                    port = next(each for each in container["ports"] if each["name"].startswith("metrics"))
                    assert flags["metrics-address"] == f"0.0.0.0:{port['containerPort']}"
                    assert container["name"] == "gateway" or port["name"] in scraped
        for component in ("gateway", "engine"):
            rules = policy(f"demo-{component}", values)["ingress"]
            (rule,) = (each for each in rules if 9090 in ports([each]))
            assert [list(peer) for peer in rule["from"]] == [["namespaceSelector"]]
            if component == "engine":
                assert rule["ports"][1] == {"port": 9100, "endPort": 9099 + workers}
    assert not any("metrics-address" in str(pod) for _, pod in pod_specs(rendered("cpu")))


def test_what_scales_is_a_metric_that_there_is() -> None:
    names = {value.name for value in vars(catalog).values() if isinstance(value, catalog.Metric)}
    scaled = find(rendered("cpu-production"), "ScaledObject", "demo-engine")["spec"]["triggers"]
    queries = [each["metadata"]["query"] for each in scaled]
    assert {re.search(r"octavo_\w+", query)[0] for query in queries} == {  # type: ignore[index]
        "octavo_sequences_waiting",
        "octavo_kv_cache_usage_ratio",
    }
    assert {each["metadata"]["ignoreNullValues"] for each in scaled} == {"false"}, "no answer is not a zero"
    assert {"octavo_sequences_waiting", "octavo_kv_cache_usage_ratio", "octavo_requests_in_flight"} <= names


def test_a_route_lets_the_public_rpcs_through_and_no_others() -> None:
    rules = find(rendered("cpu-production"), "GRPCRoute", "demo-grpc")["spec"]["rules"]
    methods = {(each["method"]["service"], each["method"]["method"]) for rule in rules for each in rule["matches"]}
    assert ("octavo.inference.v1.GenerationService", "GenerateStream") in methods
    assert {service.rpartition(".")[0] for service, _ in methods} == {"octavo.inference.v1", "grpc.health.v1"}
    http = find(rendered("cpu-production"), "HTTPRoute", "demo-http")["spec"]["rules"]
    assert all(rule["timeouts"] == {"request": "0s", "backendRequest": "0s"} for rule in http)


@pytest.mark.parametrize("values", [[], ["gateway.service.type=LoadBalancer"], ["gateway.service.type=NodePort"]])
def test_clients_from_anywhere_reach_the_public_ports_and_nothing_else(values: list[str]) -> None:
    """A load balancer, a node port and a Gateway of another namespace are no pods of this one."""
    objects = rendered_with("cpu", *values)
    for name, open_ports in (("demo-gateway", {50051, 8000}), ("demo-engine", set())):
        rules = find(objects, "NetworkPolicy", name)["spec"]["ingress"]
        assert ports([rule for rule in rules if "from" not in rule]) == open_ports
        peers = [peer for rule in rules for peer in rule.get("from", ())]
        labels = [peer["podSelector"]["matchLabels"] for peer in peers]
        assert {each["app.kubernetes.io/instance"] for each in labels} <= {"demo"}
    assert ports(find(objects, "NetworkPolicy", "demo-engine")["spec"]["ingress"]) == {50052}


@pytest.mark.parametrize(
    ("mesh", "let_in", "let_out"), [("istio-ambient", {15008}, {15008}), ("istio-sidecar", set(), {15012})]
)
def test_a_meshs_own_traffic_passes(mesh: str, let_in: set[int], let_out: set[int]) -> None:
    objects = rendered_with("cpu", f"networkPolicy.mesh={mesh}")
    before = rendered("cpu")
    for name in ("demo-gateway", "demo-engine"):
        spec, was = (find(each, "NetworkPolicy", name)["spec"] for each in (objects, before))
        assert ports(spec["ingress"]) - ports(was["ingress"]) == let_in
        assert ports(spec["egress"]) - ports(was["egress"]) == let_out
        probes = {"from": [{"ipBlock": {"cidr": "169.254.7.127/32"}}]}
        assert (probes in spec["ingress"]) == (mesh == "istio-ambient")


def test_operators_reach_the_admin_port_from_where_the_values_say_and_rules_can_be_added() -> None:
    objects = rendered("most")
    for name in ("demo-gateway", "demo-engine"):
        spec = find(objects, "NetworkPolicy", name)["spec"]
        (rule,) = (each for each in spec["ingress"] if 50056 in ports([each]))
        assert rule["from"] == [{"podSelector": {}}]
    assert {"from": [{"podSelector": {}}]} in find(objects, "NetworkPolicy", "demo-engine")["spec"]["ingress"]
    assert {"ports": [{"port": 3128}]} in find(objects, "NetworkPolicy", "demo-gateway")["spec"]["egress"]
    for title, pod in pod_specs(objects):
        for container in containers(pod):
            served = container["name"] in ("gateway", "scheduler")
            assert any(each.startswith("--admin-keys=") for each in container["args"]) == served, title
    assert "--admin-address" not in str(rendered("cpu"))


def test_the_fetch_reaches_the_ports_that_the_values_name() -> None:
    rules = find(rendered_with("cpu", "networkPolicy.fetchPorts=[443,9000]"), "NetworkPolicy", "demo-fetch")["spec"]
    assert ports(rules["egress"]) == {53, 5353, 443, 9000}


def test_without_the_operator_metrics_are_served_and_annotated() -> None:
    objects = rendered("most")
    assert not [each for each in objects if "monitoring.coreos.com" in each["apiVersion"]]
    for kind, name in (("Deployment", "demo-gateway"), ("StatefulSet", "demo-engine")):
        annotations = find(objects, kind, name)["spec"]["template"]["metadata"]["annotations"]
        assert annotations["prometheus.io/scrape"] == "true"
        assert annotations["prometheus.io/port"] == "9090"


@pytest.mark.parametrize(("values", "spoken"), [(["tls.enabled=true", "tls.existingSecret=s"], "tls"), ([], "grpc")])
def test_a_port_says_tls_where_it_is_encrypted(values: list[str], spoken: str) -> None:
    objects = rendered_with("cpu", *values)
    for name in ("demo-gateway", "demo-gateway-headless"):
        assert find(objects, "Service", name)["spec"]["ports"][0]["appProtocol"] == spoken
    over_tls = rendered_with("cpu", "transport.tls.enabled=true", "transport.tls.existingSecret=s")
    assert find(over_tls, "Service", "demo-engine")["spec"]["ports"][0]["appProtocol"] == "tls"
    named = rendered_with("cpu", "gateway.service.appProtocol=kubernetes.io/h2c")
    assert find(named, "Service", "demo-gateway")["spec"]["ports"][0]["appProtocol"] == "kubernetes.io/h2c"


def test_a_public_issuer_makes_the_certificate_of_the_public_names_alone() -> None:
    objects = rendered_with(
        "cpu-production", "certManager.publicIssuerRef.name=acme", 'tls.dnsNames=["llm.example.com"]'
    )
    public = find(objects, "Certificate", "demo-tls")["spec"]
    assert (public["dnsNames"], public["issuerRef"]["name"]) == (["llm.example.com"], "acme")
    inner = find(objects, "Certificate", "demo-engine-hop-tls")["spec"]
    assert inner["issuerRef"]["name"] == "octavo"
    test = find(objects, "Pod", "demo-test-stream")["spec"]["containers"][0]["args"]
    assert "--service=readiness" in test
    assert not any(each.startswith("--tls") for each in test)
    address = next(each for each in test if each.startswith("--address=")).rpartition(":")[2]
    for name in ("demo-gateway", "demo-test"):
        spec = find(objects, "NetworkPolicy", name)["spec"]
        assert int(address) in ports(spec["ingress"] if name == "demo-gateway" else spec["egress"])


@pytest.mark.parametrize(
    ("implementation", "kind", "limit"),
    [
        ("envoy-gateway", "BackendTrafficPolicy", lambda spec: spec["timeout"]["http"]["requestTimeout"] == "0s"),
        ("gke", "GCPBackendPolicy", lambda spec: spec["default"]["timeoutSec"] >= 86_400),
    ],
)
def test_a_route_lifts_its_implementations_limit_on_streams(implementation: str, kind: str, limit: Any) -> None:
    objects = rendered_with("cpu-production", f"route.implementation={implementation}")
    spec = find(objects, kind, "demo-streams")["spec"]
    assert limit(spec)
    names = {(each["kind"], each["metadata"]["name"]) for each in objects}
    targets = spec.get("targetRefs") or [spec["targetRef"]]
    assert {(each["kind"], each["name"]) for each in targets} <= names


def test_several_releases_share_a_host_by_the_models_name() -> None:
    objects = rendered_with("cpu-production", "route.matchModel=true")
    for kind, name in (("GRPCRoute", "demo-grpc"), ("HTTPRoute", "demo-http")):
        matches = [match for rule in find(objects, kind, name)["spec"]["rules"] for match in rule["matches"]]
        headers = [{"name": "x-model", "value": "smollm2-135m-instruct"}]
        assert all(match["headers"] == headers for match in matches)
