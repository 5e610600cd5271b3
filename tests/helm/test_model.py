"""Which model pods have is what the values say, after an upgrade too."""

from __future__ import annotations

from typing import Any

import pytest

from .chart import SETS, Object, containers, find, pod_specs, rendered


def with_values(*values: str) -> list[Object]:
    """Return the objects of values-cpu.yaml with other values."""
    name = " ".join(("model", *values))
    SETS[name] = (SETS["cpu"][0], list(values))
    try:
        return rendered(name)
    finally:
        del SETS[name]


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
    ("values", "folder"),
    [
        ([], "/models/demo"),
        (["model.fetch.source=org/name"], "/models/org--name"),
        (["model.fetch.source=org/name@refs/pr/1"], "/models/org--name@refs--pr--1"),
        (["model.folder=mine"], "/models/mine"),
        (["model.folder=mine", "model.fetch.enabled=false"], "/models/mine"),
        (["model.fetch.enabled=false"], "/models"),
    ],
)
def test_all_pods_read_the_folder_of_what_is_fetched(values: list[str], folder: str) -> None:
    arguments = model_arguments(with_values(*values))
    fetch = {"Job fetch": folder} if "model.fetch.enabled=false" not in values else {}
    assert arguments == fetch | {
        "Deployment verify-model": folder,
        "Deployment gateway": f"{folder}/model.gguf",
        "StatefulSet verify-model": folder,
        "StatefulSet worker-0": f"{folder}/model.gguf",
    }


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
        "commonLabels.team=a",
        "securityContext.runAsUser=1000",
        "images.pullPolicy=Always",
    ],
)
def test_whatever_changes_in_the_job_makes_another_job(value: str) -> None:
    """A Job cannot be changed."""
    before, after = job(with_values()), job(with_values(value))
    assert before["spec"] != after["spec"]
    assert before["metadata"]["name"] != after["metadata"]["name"]
