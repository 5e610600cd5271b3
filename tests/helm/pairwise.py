"""200 sets of values; every two settings of two switches meet in one: python -m tests.helm.pairwise [FIRST [NUMBER]].

Each set is refused with a line that says what to change, or rendered into objects that Kubernetes takes and that shut
neither clients, nor monitoring, nor name servers out. `make chart-values` runs all, a test the first few.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from collections.abc import Iterator
from typing import Any

import jsonschema
import yaml

from . import kubernetes
from .chart import Object, template
from .crds import CHECKS

SIZE = 200
_SEED = 7
_CUDA = "images.worker.repository=octavo-worker-cuda"
_PODS = '[{"namespaceSelector":{}}]'
# Each switch and what it may be set to, as --set lines.
SWITCHES: dict[str, list[list[str]]] = {
    "policy": [[], ["networkPolicy.enabled=false"], ['networkPolicy.clients=[{"podSelector":{}}]'],
               [f"networkPolicy.monitoring={_PODS}"],
               [f"networkPolicy.monitoring={_PODS}", "networkPolicy.mesh=istio-ambient"],
               [f"networkPolicy.monitoring={_PODS}", "networkPolicy.dnsPorts=[53]",
                "networkPolicy.mesh=istio-sidecar"]],
    "service": [[], ["gateway.service.type=LoadBalancer"], ["gateway.service.type=NodePort"], ["gateway.http=false"]],
    "monitoring": [[], ["monitoring.enabled=true"], ["monitoring.enabled=true", "monitoring.operator=false"],
                   ["monitoring.enabled=true", "monitoring.annotations=true", "monitoring.dashboard=false"]],
    "scaling": [[], ["gateway.autoscaling.enabled=true"],
                ["engine.autoscaling.enabled=true", "engine.autoscaling.prometheusAddress=http://p:9090"],
                ["engine.autoscaling.enabled=true"], ["engine.autoscaling.queueSeconds=10"]],
    "tls": [[], ["tls.enabled=true", "tls.existingSecret=s"], ["tls.enabled=true"], ["tls.clientCertificates=true"],
            ["certManager.enabled=true", "certManager.issuerRef.name=i", "tls.enabled=true"],
            ["certManager.enabled=true", "certManager.issuerRef.name=i", "tls.enabled=true",
             "certManager.publicIssuerRef.name=acme", 'tls.dnsNames=["llm.example.com"]']],
    "hop": [[], ["transport.tls.enabled=true", "transport.tls.existingSecret=h"], ["transport.tls.enabled=true"]],
    "route": [[], ["route.enabled=true", 'route.parentRefs=[{"name":"g"}]'], ["route.enabled=true"],
              ["route.enabled=true", 'route.parentRefs=[{"name":"g"}]', "route.implementation=envoy-gateway",
               "route.matchModel=true"]],
    "engine": [[], ["engine.kind=LeaderWorkerSet", "transport.curve.enabled=true", "transport.curve.existingSecret=c"],
               ["engine.kind=LeaderWorkerSet"], ["engine.replicas=1", "engine.rollout.partition=1"],
               ["engine.rollout.maxUnavailable=25%"], ["engine.rollout.type=OnDelete"]],
    "gpus": [[], ["engine.worker.gpus=1"], [_CUDA, "engine.worker.gpus=4", "engine.tensorParallel=4"],
             [_CUDA, "engine.worker.gpus=4"], [_CUDA, "engine.workers=4", "engine.worker.gpus=1"],
             ["engine.workers=2"]],
    "device": [[], ["engine.worker.settings.device=cuda"], ["engine.worker.settings.device=cpu"]],
    "model": [[], ["model.name=m", "model.fetch.source=org/name@v1"], ["model.name=m"],
              ["model.name=m", "model.fetch.enabled=false", "model.claim.create=false", "model.claim.name=c"],
              ["model.name=m", "model.fetch.enabled=false", "model.source=builtin", "model.verify=false"],
              ["model.name=m", "model.fetch.enabled=false", "model.source=image", "model.image.repository=r.test/m"]],
    "claim": [[], ['model.claim.accessModes=["ReadWriteMany"]'], ["engine.cache.kind=claim"],
              ["model.verifyBy=checksum"]],
    "platform": [[], ["platform=openshift"], ["securityContext.runAsUser=1000"], ["clusterDomain=cluster.local"]],
    "admin": [[], ["admin.keysSecret=k"], ["admin.keysSecret=k", f"networkPolicy.admins={_PODS}"],
              [f"networkPolicy.admins={_PODS}"]],
    "batch": [[], ["gateway.batch.claim=files"]],
    "traces": [[], ["gateway.settings.otlp_endpoint=http://o:4317"],
               ["engine.worker.settings.otlp_endpoint=http://o:4317", f"networkPolicy.collectors={_PODS}"]],
    "drain": [[], ["gateway.drain.seconds=5"], ["gateway.drain.seconds=900"], ["engine.drain.preStopSeconds=5"]],
    "version": [["1.37"], ["1.30"], ["1.33"], ["1.35"]],
}  # fmt: skip


def sets() -> list[dict[str, int]]:
    """Return the sets, each a choice for every switch: some cover all pairs, the others are near the defaults."""
    draw = random.Random(_SEED)
    names = list(SWITCHES)
    left = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(SWITCHES[a]))
        for j in range(len(SWITCHES[b]))
    }
    found: list[dict[str, int]] = []
    while left:
        candidates = []
        for _ in range(20):
            choice = {name: draw.randrange(len(SWITCHES[name])) for name in names}
            choice.update(dict(draw.choice(sorted(left))))  # a pair that is missing
            candidates.append(choice)
        best = max(candidates, key=lambda each: len(pairs(each) & left))
        found.append(best)
        left -= pairs(best)
    # Few sets with many switches at once can be rendered: the others have a few that differ from the defaults.
    while len(found) < SIZE:
        chosen = draw.sample(names, draw.randint(2, 4))
        found.append({name: draw.randrange(len(SWITCHES[name])) if name in chosen else 0 for name in names})
    draw.shuffle(found)
    return found


def pairs(choice: dict[str, int]) -> set[tuple[tuple[str, int], tuple[str, int]]]:
    """Return the pairs of settings in a set."""
    return set(itertools.combinations(choice.items(), 2))


def try_set(choice: dict[str, int]) -> str:
    """Render and check a set; return the line it was refused with, or nothing. Raises AssertionError."""
    values = [value for name, at in choice.items() if name != "version" for value in SWITCHES[name][at]]
    (version,) = SWITCHES["version"][choice["version"]]
    done = template([], values, version)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line and "--debug" not in line]
        assert lines[0].startswith("Error: execution error at (octavo/templates/"), done.stderr
        assert not re.search(r"nil pointer|error calling|wrong type|template:.*executing", done.stderr), done.stderr
        return lines[0].split("): ", 1)[1]
    objects = [each for each in yaml.load_all(done.stdout, yaml.CSafeLoader) if each]
    for each in objects:
        check(each, version)
    check_policies(objects)
    return ""


def check(it: Object, version: str) -> None:
    """Assert that a Kubernetes of a version takes an object."""
    group = it["apiVersion"].split("/")[0]
    try:
        if (group, it["kind"]) in CHECKS:
            CHECKS[group, it["kind"]](it)
        else:
            kubernetes.check(it, version)
    except jsonschema.ValidationError as error:
        raise AssertionError(f"{it['kind']} {it['metadata']['name']}: {error.message}") from None


def check_policies(objects: list[Object]) -> None:
    """Assert that who has to get in does: clients, whoever reads metrics; and that pods get their names looked up."""
    specs = {each["metadata"]["name"]: each["spec"] for each in objects if each["kind"] == "NetworkPolicy"}
    if not specs:
        return
    text = json.dumps(objects)
    services = [each for each in objects if each["kind"] == "Service" and each["metadata"]["name"] == "demo-gateway"]
    public = {port["port"] for each in services for port in each["spec"]["ports"]}
    assert public <= open_ports(specs["demo-gateway"]["ingress"]), "clients are shut out"
    if "--metrics-address=" in text:
        for name in ("demo-gateway", "demo-engine"):
            assert 9090 in open_ports(specs[name]["ingress"]), f"nobody reads the metrics of {name}"
    if "otlp-endpoint" in text:
        assert 4317 in open_ports(specs["demo-engine"]["egress"]), "no trace leaves its pod"
    assert open_ports(specs["demo-engine"]["ingress"]) >= {50052}
    for name, spec in specs.items():
        assert 53 in open_ports(spec["egress"]), f"{name} finds no names"


def open_ports(rules: list[Any]) -> set[int]:
    """Return the ports that rules name."""
    return {port["port"] for rule in rules for port in rule.get("ports", ())}


def results(first: int = 0, number: int = SIZE) -> Iterator[tuple[int, str]]:
    """Yield (number, refusal or nothing) of sets."""
    for at, choice in enumerate(sets()[first : first + number], first):
        try:
            yield at, try_set(choice)
        except AssertionError as error:
            values = [value for name, each in choice.items() for value in SWITCHES[name][each]]
            raise AssertionError(f"set {at}, {values}: {error}") from None


if __name__ == "__main__":
    told = dict(results(*map(int, sys.argv[1:])))
    refused = {line for line in told.values() if line}
    print(f"{len(told)} sets: {sum(not line for line in told.values())} rendered and checked, {len(refused)} refusals:")
    print(*sorted(refused), sep="\n")
