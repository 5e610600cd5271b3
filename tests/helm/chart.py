"""The chart as the tests see it: sets of values, rendered by the real Helm, each once."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from .tools import find_helm

CHART = Path(__file__).resolve().parent.parent.parent / "helm" / "octavo"
VERSIONS = [f"1.{minor}" for minor in range(29, 38)]
DIGEST = "sha256:" + "0123456789abcdef" * 4
DIGESTS = [f"images.{name}.digest={DIGEST}" for name in ("gateway", "scheduler", "worker")]
# What a user has to name beside the values files that name no cluster.
NAMED = [
    "model.name=mine",
    "model.claim.name=models",
    "model.claim.create=false",
    "model.fetch.enabled=false",
    *DIGESTS,
]
# Name of a set of values: (files, --set).
SETS: dict[str, tuple[list[str], list[str]]] = {
    "default": ([], []),
    "cpu": (["values-cpu.yaml"], []),
    "gpu": (["values-gpu.yaml"], NAMED),
    "gpu-tensor-parallel": (["values-gpu-tensor-parallel.yaml"], NAMED),
    "multi-node": (["values-multi-node.yaml"], NAMED),
    "cpu-production": (["values-cpu.yaml", "values-production.yaml"], DIGESTS),
    "multi-node-production": (["values-multi-node.yaml", "values-production.yaml"], NAMED),
    "ranks-over-nodes": (
        ["values-multi-node.yaml"],
        [*NAMED, "engine.workers=1", "engine.worker.gpus=2", "engine.tensorParallel=8"],
    ),
    "most": (["values-cpu.yaml"], [
        *DIGESTS, "images.registry=registry.test/mine", "commonLabels.team=a", "clusterDomain=cluster.local",
        "platform=openshift",
        "admin.keysSecret=operators", 'networkPolicy.admins=[{"podSelector":{}}]', "networkPolicy.mesh=istio-ambient",
        'networkPolicy.extraIngress.engine=[{"from":[{"podSelector":{}}]}]', "gateway.batch.claim=files",
        'networkPolicy.extraEgress.gateway=[{"ports":[{"port":3128}]}]',
        'networkPolicy.monitoring=[{"podSelector":{}}]',
        "monitoring.enabled=true", "monitoring.operator=false", "monitoring.annotations=true",
        "gateway.service.type=LoadBalancer", "gateway.service.spec.externalTrafficPolicy=Local",
        "gateway.podSpec.schedulerName=mine", "engine.podSpec.dnsPolicy=ClusterFirst", "gateway.podLabels.a=b",
        *(f'{place}.extraEnv=[{{"name":"A","value":"b"}}]' for place in (
            "gateway", "engine.scheduler", "engine.worker", "model.fetch")),
        *(f'{place}.extraEnvFrom=[{{"secretRef":{{"name":"proxy"}}}}]' for place in (
            "gateway", "engine.scheduler", "engine.worker", "model.fetch")),
        *(f'{place}.extraVolumes=[{{"name":"more","emptyDir":{{}}}}]' for place in (
            "gateway", "engine", "model.fetch")),
        *(f'{place}.extraVolumeMounts=[{{"name":"more","mountPath":"/more"}}]' for place in (
            "gateway", "engine.scheduler", "engine.worker", "model.fetch")),
        "hfToken.existingSecret=hub",
        "engine.rollout.partition=1", "tenants.named.acme.maxRequests=3", "tenants.named.acme.tokensPerSecond=1000000",
        'extraObjects=[{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"{{ .Release.Name }}-x",'
        '"namespace":"llm"}}]',
    ]),
    "least": (
        [],
        [
            *NAMED, "networkPolicy.enabled=false", "gateway.http=false", "gateway.pdb.enabled=false",
            "engine.pdb.enabled=false", "model.verify=false", "serviceAccount.create=false",
            "gateway.drain.preStopSeconds=0", "gateway.topologySpread=false", "engine.topologySpread=false",
        ],
    ),
}  # fmt: skip

Object = dict[str, Any]


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Helm; the test is skipped if there is none."""
    binary, reason = find_helm()
    if binary is None:
        pytest.skip(reason)
    return subprocess.run([str(binary), *arguments], capture_output=True, text=True, check=False, timeout=120)


def set_flags(values: Sequence[str]) -> list[str]:
    """Return Helm's flags for values; those with a list or map are JSON."""
    return [part for value in values for part in ("--set-json" if "=[" in value or "={" in value else "--set", value)]


def template(files: Sequence[str], values: Sequence[str], version: str) -> subprocess.CompletedProcess[str]:
    """Render the chart as release `demo` in namespace `llm`."""
    named = [f"--values={CHART / file}" for file in files]
    cluster = ["--namespace=llm", f"--kube-version={version}.0"]
    return helm("template", "demo", str(CHART), *cluster, *named, *set_flags(values))


@functools.cache
def rendered_text(name: str, version: str = VERSIONS[-1]) -> str:
    """Return what the chart makes of a set of values."""
    done = template(*SETS[name], version)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def rendered(name: str, version: str = VERSIONS[-1]) -> list[Object]:
    """Return its objects; nobody may change them."""
    return [each for each in yaml.load_all(rendered_text(name, version), yaml.CSafeLoader) if each]


def rendered_with(name: str, *values: str, version: str = VERSIONS[-1]) -> list[Object]:
    """Return the objects of a set of values with others on top."""
    files, own = SETS[name]
    done = template(files, [*own, *values], version)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.load_all(done.stdout, yaml.CSafeLoader) if each]


def find(objects: Sequence[Object], kind: str, name: str) -> Object:
    """Return the object of that kind and name."""
    (found,) = (each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name)
    return found


def pod_specs(objects: Sequence[Object]) -> Iterator[tuple[str, Object]]:
    """Return each pod that the objects make, with a title."""
    for each in objects:
        title = f"{each['kind']} {each['metadata']['name']}"
        if each["kind"] == "Pod":
            yield title, each
        elif each["kind"] == "LeaderWorkerSet":
            templates = each["spec"]["leaderWorkerTemplate"]
            yield f"{title} leader", templates["leaderTemplate"]
            yield f"{title} worker", templates["workerTemplate"]
        elif each["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield title, each["spec"]["template"]


def containers(pod: Object) -> list[Object]:
    """Return all containers of a pod."""
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
