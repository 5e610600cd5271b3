"""Which model pods have is what the values say, after an upgrade too."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from octavo.services.cli.demo_model import SMOLLM2

from .chart import CHART, Object, containers, find, pod_specs, rendered, rendered_with


def with_values(*values: str) -> list[Object]:
    """Return the objects of values-cpu.yaml with other values."""
    return rendered_with("cpu", *values)


def job(objects: list[Object]) -> Object:
    (found,) = (each for each in objects if each["kind"] == "Job")
    return found


def model_arguments(objects: list[Object]) -> dict[str, str]:
    """Return the argument of each container that names the model's folder or a file in it."""
    found: dict[str, str] = {}
    for title, pod in pod_specs(objects):
        for container in containers(pod):
            for argument in container.get("args", ()):
                if "/models" in argument:
                    found[f"{title.split()[0]} {container['name']}"] = argument.removeprefix("--model=")
    return found


@pytest.mark.parametrize(
    ("values", "folder", "file"),
    [
        ([], "/models/demo", "/model.gguf"),
        (["model.fetch.source=org/name"], "/models/org--name", ""),
        (["model.fetch.source=org/name@refs/pr/1"], "/models/org--name@refs--pr--1", ""),
        (["model.fetch.source=org/name", "model.file=model.gguf"], "/models/org--name", "/model.gguf"),
        (["model.folder=mine"], "/models/mine", "/model.gguf"),
        (["model.folder=mine", "model.fetch.enabled=false"], "/models/mine", ""),
        (["model.fetch.enabled=false"], "/models", ""),
    ],
)
def test_all_pods_read_the_folder_of_what_is_fetched(values: list[str], folder: str, file: str) -> None:
    path = f"{folder}{file}"
    arguments = model_arguments(with_values(*values))
    fetch = {"Job fetch": folder} if "model.fetch.enabled=false" not in values else {}
    assert arguments == fetch | {
        "Deployment verify-model": folder,
        "Deployment gateway": path,
        "StatefulSet verify-model": folder,
        "StatefulSet worker-0": path,
    }


def test_without_any_value_the_demo_is_served_on_cpus_by_the_images_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    objects = rendered("default")
    names = {f"octavo-{name}:{chart['version']}" for name in ("gateway", "scheduler", "worker-cpu")}
    assert {each["image"] for _, pod in pod_specs(objects) for each in containers(pod)} == names
    gateway = find(objects, "Deployment", "demo-gateway")["spec"]["template"]["spec"]["containers"][0]
    assert f"--model-name={SMOLLM2.name}" in gateway["args"]
    assert "--source=demo" in job(objects)["spec"]["template"]["spec"]["containers"][0]["args"]
    assert not any("gpu" in str(each["resources"]) for _, pod in pod_specs(objects) for each in containers(pod))


@pytest.mark.parametrize(
    ("values", "is_one_node"),
    [
        ([], True),
        (['model.claim.accessModes=["ReadWriteMany"]'], False),
        (["model.claim.create=false", "model.claim.name=mine"], False),
        (["model.source=builtin", "model.fetch.enabled=false"], False),
    ],
)
def test_pods_that_mount_what_only_one_node_can_are_on_one_node(values: list[str], is_one_node: bool) -> None:
    for title, pod in pod_specs(with_values(*values)):
        if not title.startswith("Pod "):  # helm's test mounts nothing
            (term,) = pod["spec"].get("affinity", {}).get("podAffinity", {}).get(
                "requiredDuringSchedulingIgnoredDuringExecution"
            ) or [None]
            assert (term is not None) == is_one_node, title
            # The first of them is let in because it is one of those it asks for.
            assert not term or term["labelSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items(), title


def test_a_given_affinity_takes_the_place_of_the_one_node() -> None:
    given = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}}
    objects = with_values(f"engine.affinity={json.dumps(given, separators=(',', ':'))}")
    assert template(find(objects, "StatefulSet", "demo-engine"))["spec"]["affinity"] == given


@pytest.mark.parametrize("folder", ["", "model.folder=mine"])
@pytest.mark.parametrize("source", ["org/b", "org/a@v2"])
def test_another_model_rolls_engines_as_well_as_gateways(source: str, folder: str) -> None:
    before, after = (with_values(f"model.fetch.source={each}", *filter(None, [folder])) for each in ("org/a", source))
    for kind, name in (("Deployment", "demo-gateway"), ("StatefulSet", "demo-engine")):
        assert template(find(before, kind, name)) != template(find(after, kind, name))
    assert job(before)["metadata"]["name"] != job(after)["metadata"]["name"]


def template(manifest: Object) -> Any:
    return manifest["spec"]["template"]


def test_pods_refuse_a_folder_that_another_source_was_fetched_into() -> None:
    objects = with_values("model.fetch.source=org/a", "model.folder=mine")
    for _, pod in pod_specs(objects):
        for container in containers(pod):
            if container["name"] in ("fetch", "verify-model"):
                assert "--source=org/a" in container["args"]


@pytest.mark.parametrize(
    "value",
    [
        "model.fetch.resources.limits.memory=8Gi",
        "model.fetch.podLabels.team=a",
        "securityContext.runAsUser=1000",
        "images.pullPolicy=Always",
    ],
)
def test_whatever_changes_in_the_job_makes_another_job(value: str) -> None:
    """A Job cannot be changed."""
    before, after = job(with_values()), job(with_values(value))
    assert before["spec"] != after["spec"]
    assert before["metadata"]["name"] != after["metadata"]["name"]
