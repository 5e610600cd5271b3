"""What every pod of the chart keeps to, whatever the values: security, processes, drain, memory."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from octavo.gpu_worker.config import WorkerConfig
from octavo.services.cli.health import HealthConfig
from octavo.services.cli.model import ModelConfig
from octavo.services.common import config as config_loader
from octavo.services.gateway.config import GatewayConfig
from octavo.services.scheduler.config import SchedulerConfig

from .chart import SETS, VERSIONS, Object, containers, find, pod_specs, rendered

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
        assert context["runAsUser"] > 0, title
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
        if not title.startswith("cpu"):
            assert re.search(r"@sha256:[0-9a-f]{64}$", container["image"]), title


@pytest.mark.parametrize(("workers", "ranks"), [(1, 1), (2, 1), (8, 1), (4, 2), (8, 8)])
def test_each_worker_has_a_gpu_and_nobody_else_has_one(workers: int, ranks: int) -> None:
    SETS[f"gpus-{workers}-{ranks}"] = (
        SETS["gpu"][0],
        [*SETS["gpu"][1], f"engine.workers={workers}", f"engine.tensorParallel={ranks}"],
    )
    objects = rendered(f"gpus-{workers}-{ranks}")
    del SETS[f"gpus-{workers}-{ranks}"]
    engine = find(objects, "StatefulSet", "demo-engine")["spec"]["template"]
    gpus = {each["name"]: each["resources"]["limits"].get("nvidia.com/gpu", 0) for each in containers(engine)}
    assert gpus == {"verify-model": 0, "scheduler": 0} | {f"worker-{number}": 1 for number in range(workers)}
    lines = [container["args"] for container in containers(engine) if container["name"].startswith("worker-")]
    parsed = [config_loader.parse(WorkerConfig, line[1:], prog="worker", environ={}) for line in lines]
    assert len({config.worker_id for config in parsed}) == workers
    assert len({config.alive_file for config in parsed}) == workers
    if ranks > 1:
        groups: dict[tuple[str, str], list[int]] = {}
        for config in parsed:
            groups.setdefault((config.group_id, config.rendezvous), []).append(config.rank)
        assert list(groups.values()) == [list(range(ranks))] * (workers // ranks)


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
