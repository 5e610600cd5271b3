"""Everything the chart makes is what some Kubernetes takes: 1.29 to 1.37, every field known, every type right."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import jsonschema
import pytest

from . import kubernetes
from .chart import CHART, SETS, VERSIONS, Object, helm, pod_specs, rendered, rendered_text, set_flags
from .crds import CHECKS


@functools.cache
def check_core(text: str, version: str) -> None:
    """Validate an object of Kubernetes itself, given as JSON."""
    kubernetes.check(json.loads(text), version)


def check(manifest: Object, version: str) -> None:
    kind = (manifest["apiVersion"].split("/")[0], manifest["kind"])
    if kind in CHECKS:
        CHECKS[kind](manifest)
    else:
        check_core(json.dumps(manifest), version)


@pytest.mark.parametrize("name", SETS)
def test_every_object_is_valid_in_every_version(name: str) -> None:
    for version in VERSIONS:
        # All versions but the oldest get the same: see below.
        for manifest in rendered(name, version if version == VERSIONS[0] else VERSIONS[-1]):
            check(manifest, version)


def test_only_the_oldest_version_gets_other_objects() -> None:
    """Its preStop differs; a new rule for versions must be added to the test above."""
    texts = {version: re.sub(r"resume.key: .*", "", rendered_text("cpu", version)) for version in VERSIONS}
    assert [version for version in VERSIONS if texts[version] != texts[VERSIONS[-1]]] == VERSIONS[:1]


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", "spec.template.spec.containers.0.livenessProbe.grcp", {}),
        ("StatefulSet", "spec.podManagment", "Parallel"),
        ("NetworkPolicy", "spec.egress.0.ports.0.prot", 53),
        ("LeaderWorkerSet", "spec.leaderWorkerTemplate.sise", 2),
        ("GRPCRoute", "spec.rules.0.timeout", "0s"),
        ("HTTPRoute", "spec.rules.0.timeouts.requests", "0s"),
        ("ScaledObject", "spec.minReplicas", 2),
        ("Certificate", "spec.dnsName", "x"),
        ("LeaderWorkerSet", "spec.leaderWorkerTemplate.leaderTemplate.spec.container", []),
    ],
)
def test_the_check_finds_a_field_that_there_is_not(kind: str, path: str, value: object) -> None:
    objects = [each for name in ("cpu-production", "multi-node-production") for each in rendered(name)]
    manifest = json.loads(json.dumps(next(each for each in objects if each["kind"] == kind)))
    place: Any = manifest
    *parents, last = path.split(".")
    for key in parents:
        place = place[int(key)] if key.isdigit() else place[key]
    place[last] = value
    with pytest.raises((jsonschema.ValidationError, AssertionError)):
        check(manifest, VERSIONS[-1])


@pytest.mark.parametrize("name", SETS)
def test_lint_finds_nothing(name: str) -> None:
    files, values = SETS[name]
    flags = [f"--values={CHART / file}" for file in files] + set_flags(values)
    done = helm("lint", "--strict", str(CHART), *flags)
    assert done.returncode == 0, done.stdout
    assert not re.search(r"\[(WARNING|ERROR)\]", done.stdout)


@pytest.mark.parametrize("name", SETS)
def test_names_are_unique_and_every_reference_leads_somewhere(name: str) -> None:
    objects = rendered(name)
    ids = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(set(ids)) == len(ids)
    assert {each["metadata"]["namespace"] for each in objects} == {"llm"}
    for each in objects:
        if each["kind"] in ("ScaledObject", "HorizontalPodAutoscaler"):
            target = each["spec"]["scaleTargetRef"]
            assert (target["kind"], target["name"]) in ids
        if each["kind"] in ("GRPCRoute", "HTTPRoute"):
            for rule in each["spec"]["rules"]:
                assert all(("Service", backend["name"]) in ids for backend in rule["backendRefs"])


@pytest.mark.parametrize("name", SETS)
def test_every_selector_finds_the_pods_it_is_for(name: str) -> None:
    objects = rendered(name)
    labels = [pod["metadata"]["labels"] for _, pod in pod_specs(objects)]
    for each in objects:
        selector = {
            "Service": lambda spec: spec["selector"],
            "PodDisruptionBudget": lambda spec: spec["selector"]["matchLabels"],
            "NetworkPolicy": lambda spec: spec["podSelector"]["matchLabels"],
            "Deployment": lambda spec: spec["selector"]["matchLabels"],
            "StatefulSet": lambda spec: spec["selector"]["matchLabels"],
        }.get(each["kind"])
        if selector is not None:
            wanted = selector(each["spec"]).items()
            found = [pod for pod in labels if wanted <= pod.items()]
            component = each["metadata"]["labels"]["app.kubernetes.io/component"]
            assert found, each["metadata"]["name"]
            assert {pod["app.kubernetes.io/component"] for pod in found} == {component}
