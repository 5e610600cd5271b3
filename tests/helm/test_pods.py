"""What every pod of the chart keeps to, whatever the values: security, processes, drain, memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from octavo.gpu_worker.config import WorkerConfig
from octavo.services.cli.health import HealthConfig
from octavo.services.cli.model import ModelConfig
from octavo.services.common import config as config_loader
from octavo.services.gateway.config import GatewayConfig
from octavo.services.scheduler.config import SchedulerConfig

from . import kubernetes
from .chart import SETS, VERSIONS, Object, containers, find, pod_specs, rendered, rendered_with

CONFIGS = {
    "gateway": GatewayConfig,
    "scheduler": SchedulerConfig,
    "worker": WorkerConfig,
    "health": HealthConfig,
    "model": ModelConfig,
}
GRACE = "terminationGracePeriodSeconds"


def all_containers() -> Iterator[tuple[str, Object, Object]]:
    """Each container with a title and its pod, of every set and of the oldest and newest Kubernetes."""
    for name in SETS:
        for version in (VERSIONS[0], VERSIONS[-1]):
            for title, pod in pod_specs(rendered(name, version)):
                for container in containers(pod):
                    yield f"{name} {version} {title} {container['name']}", pod, container


def test_every_command_line_is_one_that_the_process_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pathlib.Path.is_file", lambda _: True)  # certificates are mounted in the cluster
    seen = set()
    for title, _, container in all_containers():
        assert container["command"] == ["octavo"], title
        kind, *arguments = [re.sub(r"\$\((?:NODE_NUMBER)\)", "0", argument) for argument in container["args"]]
        config_loader.parse(CONFIGS[kind], arguments, prog=title, environ={})
        probe = container.get("livenessProbe", {}).get("exec", {}).get("command")
        if probe:
            assert probe[:2] == ["octavo", "health"]
            config_loader.parse(HealthConfig, probe[2:], prog=title, environ={})
        seen.add(kind)
    assert seen == set(CONFIGS)


def test_every_pod_is_restricted_as_pod_security_standards_say() -> None:
    for title, pod, container in all_containers():
        spec, context = pod["spec"], container["securityContext"]
        for sharing in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"):
            assert not spec.get(sharing), title
        assert spec["securityContext"]["runAsNonRoot"], title
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, title
        assert context["allowPrivilegeEscalation"] is False, title
        assert context["privileged"] is False, title
        assert context["capabilities"] == {"drop": ["ALL"]}, title
        assert context["runAsNonRoot"], title
        assert context.get("runAsUser", 1) > 0, title
        allowed = {
            "configMap",
            "csi",
            "downwardAPI",
            "emptyDir",
            "image",
            "persistentVolumeClaim",
            "projected",
            "secret",
        }
        for volume in spec.get("volumes", []):
            assert set(volume) - {"name"} <= allowed, title
        assert not any("hostPort" in port for port in container.get("ports", ())), title
        # Not asked for by the standard:
        assert context["readOnlyRootFilesystem"], title
        assert spec["automountServiceAccountToken"] is False, title
        # A Service called octavo-... would otherwise set variables that the processes read as settings.
        assert spec["enableServiceLinks"] is False, title


def test_every_container_says_what_it_needs_and_where_it_writes() -> None:
    for title, pod, container in all_containers():
        for kind in ("requests", "limits"):
            assert {"cpu", "memory"} <= container["resources"][kind].keys(), title
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        claims = (
            {"cache"} if "emptyDir" not in str([v for v in pod["spec"]["volumes"] if v["name"] == "cache"]) else set()
        )
        mounts = container["volumeMounts"]
        assert {mount["name"] for mount in mounts} <= volumes | claims, title
        assert len({mount["mountPath"] for mount in mounts}) == len(mounts), title
        if container["name"] != "fetch":
            assert all(mount.get("readOnly") for mount in mounts if mount["name"] == "model"), title


def test_every_image_is_a_digest_unless_tags_are_accepted() -> None:
    for title, _, container in all_containers():
        if title.split()[0] not in ("default", "cpu"):
            assert re.search(r"@sha256:[0-9a-f]{64}$", container["image"]), title


@pytest.mark.parametrize(("workers", "gpus"), [(1, 1), (2, 1), (8, 1), (1, 4), (2, 8)])
def test_each_worker_has_its_gpus_and_nobody_else_has_one(workers: int, gpus: int) -> None:
    """All GPUs that share a copy of the model are in one container: others cannot reach each other by NVLink."""
    split = [f"engine.worker.gpus={gpus}", f"engine.tensorParallel={gpus}"]
    engine = find(rendered_with("gpu", f"engine.workers={workers}", *split), "StatefulSet", "demo-engine")
    pod = engine["spec"]["template"]
    found = {each["name"]: each["resources"]["limits"].get("nvidia.com/gpu", 0) for each in containers(pod)}
    assert found == {"verify-model": 0, "scheduler": 0} | {f"worker-{number}": gpus for number in range(workers)}
    lines = [container["args"] for container in containers(pod) if container["name"].startswith("worker-")]
    parsed = [config_loader.parse(WorkerConfig, line[1:], prog="worker", environ={}) for line in lines]
    assert len({config.worker_id for config in parsed}) == workers
    assert len({config.alive_file for config in parsed}) == workers
    assert {(config.world_size, config.local_ranks, config.node_rank) for config in parsed} == {(gpus, gpus, 0)}
    assert gpus == 1 or len({config.rendezvous for config in parsed}) == workers


def test_a_model_over_nodes_has_a_rank_for_each_gpu_of_each_node() -> None:
    leader, worker = (pod for title, pod in pod_specs(rendered("ranks-over-nodes")) if "LeaderWorkerSet" in title)
    for pod in (leader, worker):
        line = next(each["args"] for each in containers(pod) if each["name"] == "worker-0")
        configs = [
            config_loader.parse(
                WorkerConfig, [word.replace("$(NODE_NUMBER)", str(node)) for word in line[1:]], prog="w", environ={}
            )
            for node in range(4)
        ]
        assert [(each.world_size, each.local_ranks, each.node_rank) for each in configs] == [
            (8, 2, node) for node in range(4)
        ]


def test_weights_that_are_packed_fit_the_volume_beside_what_else_is_kept_there() -> None:
    for size, limit in (("10Gi", 8 << 30), ("2Gi", int(1.6 * 2**30)), ("500M", 400_000_000)):
        engine = find(rendered_with("cpu", f"engine.cache.size={size}"), "StatefulSet", "demo-engine")
        (worker,) = (each for each in containers(engine["spec"]["template"]) if each["name"] == "worker-0")
        config = config_loader.parse(WorkerConfig, worker["args"][1:], prog="worker", environ={})
        assert config.packed_cache_limit == limit


def test_threads_follow_the_limit_of_processors_where_there_is_one() -> None:
    for values, there in (([], True), (["engine.worker.resources.limits.cpu=null"], False)):
        engine = find(rendered_with("cpu", *values), "StatefulSet", "demo-engine")
        (worker,) = (each for each in containers(engine["spec"]["template"]) if each["name"] == "worker-0")
        assert any(each["name"] == "OCTAVO_NUM_THREADS" for each in worker["env"]) == there


@pytest.mark.parametrize(
    ("values", "user"),
    [
        (["platform=openshift"], None),
        (["securityContext.runAsUser=null", "securityContext.runAsGroup=null"], None),
        (["securityContext.runAsUser=1000"], 1000),
        (["platform=kubernetes"], 65532),
    ],
)
def test_users_are_the_namespaces_where_the_platform_chooses_them(values: list[str], user: int | None) -> None:
    for title, pod in pod_specs(rendered_with("cpu", *values)):
        contexts = [pod["spec"]["securityContext"], *(each["securityContext"] for each in containers(pod))]
        assert {context.get("runAsUser") for context in contexts} == {user}, title
        assert all(context["runAsNonRoot"] for context in contexts), title


def test_what_values_add_is_in_every_pod_they_name() -> None:
    objects = rendered("most")
    for title, pod in pod_specs(objects):
        kind, name = title.split()
        if kind == "Pod":
            continue
        assert {"name": "more", "emptyDir": {}} in pod["spec"]["volumes"], title
        for container in containers(pod):
            if container["name"] != "verify-model":
                assert {"name": "A", "value": "b"} in container["env"], title
                assert container["envFrom"] == [{"secretRef": {"name": "proxy"}}], title
                assert {"name": "more", "mountPath": "/more"} in container["volumeMounts"], title
            image = container["image"]
            assert image.startswith("registry.test/mine/octavo-"), title
        if name == "demo-gateway":
            assert pod["spec"]["schedulerName"] == "mine"
            assert pod["metadata"]["labels"]["a"] == "b"
    assert find(objects, "Service", "demo-gateway")["spec"]["externalTrafficPolicy"] == "Local"
    assert find(objects, "ConfigMap", "demo-x")
    (token,) = (each for each in fetch_environment(objects) if each["name"] == "HF_TOKEN")
    assert token["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "token"}


def test_gpus_can_be_claimed() -> None:
    claims = [{"name": "gpu", "resourceClaimTemplateName": "gpus"}]
    values = [f"engine.podSpec.resourceClaims={json.dumps(claims, separators=(',', ':'))}", "engine.worker.gpus=0"]
    objects = rendered_with("gpu", *values, 'engine.worker.resources.claims=[{"name":"gpu"}]')
    engine = find(objects, "StatefulSet", "demo-engine")
    kubernetes.check(engine, VERSIONS[-1])
    pod = engine["spec"]["template"]["spec"]
    assert pod["resourceClaims"] == claims
    claimed = {each["name"]: each["resources"].get("claims") for each in pod["containers"]}
    assert claimed == {"scheduler": None, "worker-0": [{"name": "gpu"}], "worker-1": [{"name": "gpu"}]}


def fetch_environment(objects: list[Object]) -> list[Object]:
    (job,) = (each for each in objects if each["kind"] == "Job")
    environment: list[Object] = job["spec"]["template"]["spec"]["containers"][0]["env"]
    return environment


def test_files_and_batches_lie_on_their_claim() -> None:
    pod = find(rendered("most"), "Deployment", "demo-gateway")["spec"]["template"]
    gateway = containers(pod)[-1]
    (folder,) = (each.split("=")[1] for each in gateway["args"] if each.startswith("--batch-dir="))
    (mount,) = (each["name"] for each in gateway["volumeMounts"] if each["mountPath"] == folder)
    (volume,) = (each for each in pod["spec"]["volumes"] if each["name"] == mount)
    assert volume["persistentVolumeClaim"] == {"claimName": "files"}


@pytest.mark.parametrize("name", SETS)
def test_memory_holds_the_volumes_that_lie_in_it(name: str) -> None:
    units = {"Mi": 2**20, "Gi": 2**30}
    for title, pod in pod_specs(rendered(name)):
        in_memory = [
            volume["emptyDir"]["sizeLimit"]
            for volume in pod["spec"]["volumes"]
            if volume.get("emptyDir", {}).get("medium") == "Memory"
        ]
        total = sum(int(size[:-2]) * units[size[-2:]] for size in in_memory)
        for container in containers(pod):
            if container["name"].startswith("worker-"):
                limit = container["resources"]["limits"]["memory"]
                assert int(limit[:-2]) * units[limit[-2:]] > 2 * total, f"{title} {container['name']}"


@pytest.mark.parametrize("name", SETS)
def test_every_pod_has_time_to_drain(name: str) -> None:
    for title, pod in pod_specs(rendered(name)):
        grace = pod["spec"].get(GRACE)
        for container in containers(pod):
            arguments = dict(each[2:].split("=", 1) for each in container["args"] if "=" in each)
            stop = container.get("lifecycle", {}).get("preStop", {})
            pause = stop.get("sleep", {}).get("seconds", 0)
            if "grace-s" in arguments:
                assert grace >= pause + int(arguments["grace-s"][:-1]) + 10, title
            if "drain-s" in arguments:  # told to stop together with its scheduler, and outlives it
                assert grace - 5 == int(arguments["drain-s"][:-1]), title


def test_waiting_before_the_stop_is_an_action_from_kubernetes_1_30_on() -> None:
    for version, expected in (("1.29", {"exec": {"command": ["sleep", "5"]}}), ("1.30", {"sleep": {"seconds": 5}})):
        gateway = find(rendered("cpu", version), "Deployment", "demo-gateway")["spec"]["template"]
        assert containers(gateway)[-1]["lifecycle"]["preStop"] == expected


@pytest.mark.parametrize("name", SETS)
def test_probes_ask_the_plain_port_and_no_probe_depends_on_a_peer_but_readiness(name: str) -> None:
    for title, pod in pod_specs(rendered(name)):
        for container in containers(pod):
            if container["name"] in ("gateway", "scheduler"):
                for kind in ("startup", "liveness", "readiness"):
                    assert container[f"{kind}Probe"]["grpc"] == {"port": 50055, "service": kind}, title
                assert any(each.startswith("--health-address=") for each in container["args"])
            elif container["name"].startswith("worker-"):
                assert "readinessProbe" not in container, title
                for kind in ("startup", "liveness"):
                    probe = container[f"{kind}Probe"]["exec"]["command"]
                    assert not any(each.startswith("--address") for each in probe), title
                    file = next(each.split("=")[1] for each in probe if each.startswith("--alive-file="))
                    assert f"--alive-file={file}" in container["args"], title


def test_a_container_that_restarts_takes_no_other_pod_of_its_group_with_it() -> None:
    """What the others hold, such as the scheduler's requests, outlives a worker."""
    groups = [each for name in SETS for each in rendered(name, VERSIONS[-1]) if each["kind"] == "LeaderWorkerSet"]
    assert groups
    assert {group["spec"]["leaderWorkerTemplate"]["restartPolicy"] for group in groups} == {"None"}
