"""A release's life with the real Helm, against a stand-in for the API server."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from octavo.services.scheduler.config import Quota
from octavo.services.scheduler.queueing.tenants import Tenants, parse_tenants

from .api_server import ApiServer, immutable_changes, running
from .chart import CHART, Object, helm, rendered, set_flags


class Release:
    """Release `demo` of the chart, with values-cpu.yaml."""

    def __init__(self, server: ApiServer, kubeconfig: Path) -> None:
        self.server = server
        self._kubeconfig = kubeconfig

    def run(self, command: str, *arguments: str) -> str:
        done = helm(command, "demo", *arguments, "--namespace=llm", f"--kubeconfig={self._kubeconfig}")
        assert done.returncode == 0, done.stderr
        return done.stdout

    def apply(self, command: str, *values: str, chart: Path = CHART) -> str:
        done = self.try_to(command, *values, chart=chart)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def try_to(self, command: str, *values: str, chart: Path = CHART) -> subprocess.CompletedProcess[str]:
        flags = ["--wait", "--timeout=60s", "--disable-openapi-validation", f"--values={CHART / 'values-cpu.yaml'}"]
        where = ["--namespace=llm", f"--kubeconfig={self._kubeconfig}"]
        return helm(command, "demo", str(chart), *flags, *where, *set_flags(values))

    def object(self, kind: str, name: str) -> Object:
        (found,) = (it for it in self.server.objects.values() if it["kind"] == kind and it["metadata"]["name"] == name)
        return found

    def ids(self) -> set[tuple[str, str]]:
        """What is installed, Helm's own records apart."""
        objects = self.server.objects.values()
        return {(it["kind"], it["metadata"]["name"]) for it in objects if not str(it.get("type")).startswith("helm.sh")}


@pytest.fixture
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


def test_a_new_version_of_the_chart_alone_rolls_nothing(release: Release, tmp_path: Path) -> None:
    """A roll of engines is a load of the model for each."""
    release.apply("install", "commonLabels.team=a")
    before = {key: release.object(*key)["spec"]["template"] for key in WORKLOADS}
    jobs = [each for each in release.ids() if each[0] == "Job"]
    newer = Path(shutil.copytree(CHART, tmp_path / "octavo"))
    about = newer / "Chart.yaml"
    about.write_text(about.read_text().replace("\nversion: 0.", "\nversion: 9."))

    release.apply("upgrade", "commonLabels.team=b", chart=newer)

    assert {key: release.object(*key)["spec"]["template"] for key in WORKLOADS} == before
    assert [each for each in release.ids() if each[0] == "Job"] == jobs
    assert release.object(*WORKLOADS[0])["metadata"]["labels"]["helm.sh/chart"].startswith("octavo-9.")


WORKLOADS = [("Deployment", "demo-gateway"), ("StatefulSet", "demo-engine")]
SCALED = [
    "gateway.autoscaling.enabled=true", "engine.autoscaling.enabled=true", "monitoring.enabled=true",
    "engine.autoscaling.prometheusAddress=http://prometheus:9090", "monitoring.operator=false",
    'networkPolicy.monitoring=[{"podSelector":{}}]',
]  # fmt: skip


def test_to_switch_autoscaling_on_or_off_takes_no_pod_away(release: Release) -> None:
    release.apply("install", "gateway.replicas=5", "engine.replicas=20")

    release.apply("upgrade", *SCALED)
    assert [release.object(*key)["spec"]["replicas"] for key in WORKLOADS] == [5, 20]

    release.object(*WORKLOADS[1])["spec"]["replicas"] = 31  # as the autoscaler does
    release.apply("upgrade", *SCALED, "engine.drain.seconds=50")
    assert [release.object(*key)["spec"]["replicas"] for key in WORKLOADS] == [5, 31]


def test_a_quota_that_changes_changes_a_file_and_no_pod(release: Release) -> None:
    release.apply("install", "tenants.named.acme.maxRequests=3")
    before = [release.object(*key)["spec"] for key in WORKLOADS]

    release.apply("upgrade", "tenants.named.acme.maxRequests=1", "tenants.default.tokensPerSecond=2000000")

    assert [release.object(*key)["spec"] for key in WORKLOADS] == before
    text = release.object("ConfigMap", "demo-tenants")["data"]["tenants.yaml"]
    base = Tenants(Quota(), {}, {})
    tenants = parse_tenants(text.encode(), base)
    assert (tenants.default, tenants.quotas) == (Quota(0, 2e6), {"acme": Quota(1, 2e6)})


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ([], ['model.claim.accessModes=["ReadWriteMany"]'], "name another claim in model.claim.name"),
        (["model.claim.storageClassName=a"], ["model.claim.storageClassName=b"], "name another claim"),
        ([], ["engine.cache.kind=claim"], "delete statefulset demo-engine --cascade=orphan"),
        (["engine.cache.kind=claim"], ["engine.cache.kind=claim", "engine.cache.size=3Gi"], "--cascade=orphan"),
    ],
)
def test_what_a_cluster_cannot_change_is_refused_with_the_way_out(
    release: Release, before: list[str], after: list[str], said: str
) -> None:
    release.apply("install", *before)
    objects = json.dumps(sorted(release.ids()))

    done = release.try_to("upgrade", *after)

    assert done.returncode != 0
    assert said in done.stderr
    assert "immutable" not in done.stderr, "it was sent to the server"
    assert json.dumps(sorted(release.ids())) == objects
    release.apply("upgrade", *before, "gateway.replicas=3")  # nothing was left half done


@pytest.mark.parametrize(
    "change",
    [
        "model.fetch.resources.limits.memory=8Gi", "securityContext.runAsUser=1000", "images.pullPolicy=Always",
        "images.registry=registry.test", "engine.rollout.partition=1", "model.claim.size=2Gi",
        "gateway.service.type=NodePort", "admin.keysSecret=operators",
    ],
)  # fmt: skip
def test_what_people_change_can_be_changed(release: Release, change: str) -> None:
    release.apply("install")
    release.apply("upgrade", change)
    release.run("rollback", "1", "--wait", "--timeout=60s")


def test_the_stand_in_refuses_what_a_server_does(release: Release) -> None:
    release.apply("install", "gateway.replicas=1")
    job = next(it for it in release.server.objects.values() if it["kind"] == "Job")
    job["spec"]["template"]["spec"]["restartPolicy"] = "OnFailure"  # as if the chart had rendered that before

    done = release.try_to("upgrade", "gateway.replicas=2")

    assert "field is immutable" in done.stderr


@pytest.mark.parametrize("name", ["cpu", "gpu", "ranks-over-nodes"])
def test_the_objects_of_the_release_before_can_become_those_of_this_one(name: str) -> None:
    """released/ has what the last release rendered of sets of values: copied from golden/ when one is made."""
    old = [
        each for each in yaml.safe_load_all((Path(__file__).parent / "released" / f"{name}.yaml").read_text()) if each
    ]
    new = {(each["kind"], each["metadata"]["name"]): each for each in rendered(name)}
    kept = [each for each in old if (each["kind"], each["metadata"]["name"]) in new]
    assert {"Deployment", "Service", "NetworkPolicy"} <= {each["kind"] for each in kept}
    for each in kept:
        after = new[each["kind"], each["metadata"]["name"]]
        assert immutable_changes(each["kind"], each, after) == [], each["metadata"]["name"]
    gone = {each["kind"] for each in old if (each["kind"], each["metadata"]["name"]) not in new}
    assert gone <= {"Job", "ServiceAccount"}, "a model, a Secret or a Service would be deleted"
