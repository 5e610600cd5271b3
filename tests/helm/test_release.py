"""A release's life with the real Helm, against a stand-in for the API server."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from .api_server import ApiServer, running
from .chart import CHART, Object, helm, rendered


class Release:
    """Release `demo` of the chart, with values-cpu.yaml."""

    def __init__(self, server: ApiServer, kubeconfig: Path) -> None:
        self.server = server
        self._kubeconfig = kubeconfig

    def run(self, command: str, *arguments: str) -> str:
        done = helm(command, "demo", *arguments, "--namespace=llm", f"--kubeconfig={self._kubeconfig}")
        assert done.returncode == 0, done.stderr
        return done.stdout

    def apply(self, command: str, *values: str) -> str:
        flags = ["--wait", "--timeout=60s", "--disable-openapi-validation", f"--values={CHART / 'values-cpu.yaml'}"]
        return self.run(command, str(CHART), *flags, *(f"--set={value}" for value in values))

    def object(self, kind: str, name: str) -> Object:
        (found,) = (it for it in self.server.objects.values() if it["kind"] == kind and it["metadata"]["name"] == name)
        return found

    def ids(self) -> set[tuple[str, str]]:
        """What is installed, Helm's own records apart."""
        objects = self.server.objects.values()
        return {(it["kind"], it["metadata"]["name"]) for it in objects if not str(it.get("type")).startswith("helm.sh")}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    with running("1.37") as (server, url):
        kubeconfig = tmp_path_factory.mktemp("kube") / "config"
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": url}}],
            "users": [{"name": "test", "user": {}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        }  # fmt: skip
        kubeconfig.write_text(yaml.safe_dump(config))
        yield Release(server, kubeconfig)


def test_it_is_installed_upgraded_rolled_back_and_uninstalled(release: Release) -> None:
    told = release.apply("install")
    assert "octavo generate --address 127.0.0.1:50051" in told
    made = {(it["kind"], it["metadata"]["name"]) for it in rendered("cpu") if "helm.sh/hook" not in json.dumps(it)}
    assert release.ids() == made
    key = release.object("Secret", "demo-resume-key")["data"]["resume.key"]
    assert len(base64.b64decode(key)) == 64

    longer = ["engine.drain.seconds=90", "engine.drain.terminationGracePeriodSeconds=110"]
    release.apply("upgrade", "gateway.replicas=3", *longer)
    assert release.object("Deployment", "demo-gateway")["spec"]["replicas"] == 3
    pod = release.object("StatefulSet", "demo-engine")["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 110
    # Streams that run during an upgrade can be resumed after it.
    assert release.object("Secret", "demo-resume-key")["data"]["resume.key"] == key

    release.run("rollback", "1", "--wait", "--timeout=60s")
    assert release.object("Deployment", "demo-gateway")["spec"]["replicas"] == 2
    assert release.object("Secret", "demo-resume-key")["data"]["resume.key"] == key
    history = json.loads(release.run("history", "--output=json"))
    assert [entry["status"] for entry in history] == ["superseded", "superseded", "deployed"]

    release.run("uninstall", "--wait", "--timeout=60s")
    assert release.ids() == {("PersistentVolumeClaim", "demo-model")}  # models are kept
