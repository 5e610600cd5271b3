"""Runs the pods of rendered manifests on this machine, as a kubelet does: what is rendered is what is started.

Command lines, environment, init containers, probes, preStop, signals and restarts are the manifests'. Two
things are this machine's: a pod's volumes are folders, which stand in its command lines where the mounts would be, and
its address is one of the loopback network. Names of Services are in a hosts file that only these processes see.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from octavo.kernels.cpu.build import cache_folder

Object = dict[str, Any]
_PROBE_RATE = 10  # probes are made so much more often than they say: their counts hold, the test need not wait
_OCTAVO = [sys.executable, "-P", "-m", "octavo.services.cli"]


def private_hosts(hosts: Path) -> list[str]:
    """Return what begins a command line so that it sees `hosts` as /etc/hosts."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    script = 'mount --bind "$0" /etc/hosts && exec "$@"'
    return ["unshare", *user, "--mount", "--propagation", "private", "sh", "-c", script, str(hosts)]


def why_not() -> str:
    """Return why pods cannot be run here, or nothing."""
    if shutil.which("unshare") is None:
        return "unshare is not installed (util-linux)"
    done = subprocess.run([*private_hosts(Path("/etc/hosts")), "true"], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"no mount namespace can be made here: {done.stderr.strip()}"


class Cluster:
    """The pods that run, and the names of the Services that find them."""

    def __init__(self, folder: Path, objects: Sequence[Object]) -> None:
        self.folder = folder
        self.hosts = folder / "hosts"
        self.hosts.write_text("127.0.0.1 localhost\n")
        self.pods: dict[str, Pod] = {}
        self._objects = objects
        # All pods listen at the same ports, and so may those of another test that runs now.
        network = f"127.{random.randrange(16, 250)}.{random.randrange(1, 250)}"
        self._addresses = (f"{network}.{number}" for number in range(2, 250))

    def new_address(self) -> str:
        return next(self._addresses)

    def secret(self, name: str) -> dict[str, bytes]:
        ids = {(each["kind"], each["metadata"]["name"]): each for each in self._objects}
        return {key: base64.b64decode(value) for key, value in ids["Secret", name]["data"].items()}

    def config_map(self, name: str) -> dict[str, str]:
        ids = {(each["kind"], each["metadata"]["name"]): each for each in self._objects}
        data: dict[str, str] = ids["ConfigMap", name]["data"]
        return data

    def update_names(self) -> None:
        """Write which addresses each Service has now. In place: the file is mounted."""
        lines = ["127.0.0.1 localhost"]
        for service in (each for each in self._objects if each["kind"] == "Service"):
            name = f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc"
            selector = service["spec"]["selector"].items()
            unready_too = service["spec"].get("publishNotReadyAddresses")
            found = [pod for pod in self.pods.values() if selector <= pod.labels.items() and (pod.ready or unready_too)]
            lines += [f"{pod.address} {name}" for pod in found]
        self.hosts.write_text("\n".join(lines) + "\n")

    async def start(self, name: str, template: Object) -> Pod:
        """Start a pod; it gets ready by and by."""
        pod = self.pods[name] = Pod(self, name, template)
        await pod.start()
        return pod

    async def end(self) -> None:
        """Leave no process behind."""
        for pod in list(self.pods.values()):
            await pod.kill()


class Container:
    """One container of a pod: its process, restarted whenever it ends, until the pod goes."""

    def __init__(self, pod: Pod, spec: Object) -> None:
        self.spec = spec
        self.name = spec["name"]
        self.started = False
        self.ready = False
        self.restarts = -1
        self.exit_status: int | None = None
        self.process: asyncio.subprocess.Process | None = None
        self._pod = pod
        self._log = pod.folder / f"{self.name}.log"
        mounts = {mount["mountPath"]: pod.volumes[mount["name"]] for mount in spec["volumeMounts"]}
        paths = "|".join(sorted(map(re.escape, mounts), key=len, reverse=True))
        self._mounts = re.compile(rf"(?<![\w.-])({paths})(?=/|$)")
        self._folders = mounts

    @property
    def log(self) -> str:
        return self._log.read_text()

    def here(self, text: str) -> str:
        """Return a word of the manifest as it is on this machine."""
        text = re.sub(r"\$\((\w+)\)", lambda match: self._environment()[match[1]], text)
        text = self._mounts.sub(lambda match: str(self._folders[match[0]]), text)
        return text.replace("0.0.0.0", self._pod.address)

    def _environment(self) -> dict[str, str]:
        values = {}
        for each in self.spec.get("env", ()):
            source = each.get("valueFrom", {})
            if "value" in each:
                values[each["name"]] = self._mounts.sub(lambda match: str(self._folders[match[0]]), each["value"])
            elif "fieldRef" in source:
                values[each["name"]] = {"metadata.name": self._pod.name}[source["fieldRef"]["fieldPath"]]
            else:
                assert source["resourceFieldRef"]["resource"] == "limits.cpu"
                values[each["name"]] = str(math.ceil(float(self.spec["resources"]["limits"]["cpu"])))
        return values

    def command(self, words: Sequence[str]) -> list[str]:
        assert words[0] == "octavo"
        return [*private_hosts(self._pod.cluster.hosts), *_OCTAVO, *map(self.here, words[1:])]

    async def run_once(self) -> int:
        """Start the process and wait for its end."""
        with self._log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self.command([*self.spec["command"], *self.spec["args"]]),
                stdout=log, stderr=log, env={**os.environ, **self._environment()},
            )  # fmt: skip
        try:
            self.exit_status = await self.process.wait()
        finally:
            if self.process.returncode is None:  # whoever waited was cancelled
                self.send(signal.SIGKILL)
        return self.exit_status

    async def keep(self) -> None:
        """Run it again and again, and probe it, until the pod goes."""
        while not self._pod.going:
            self.restarts += 1
            self.started = self.ready = False
            probing = asyncio.create_task(self._probe())
            try:
                await self.run_once()
            finally:
                probing.cancel()
            self.ready = False
            self._pod.on_change()

    async def _probe(self) -> None:
        startup = self.spec["startupProbe"]
        await asyncio.sleep(startup.get("initialDelaySeconds", 0) / _PROBE_RATE)
        failed_at = time.monotonic() + startup["failureThreshold"] * startup["periodSeconds"]
        while not await self._asks_well(startup):
            if time.monotonic() > failed_at:
                return self.send(signal.SIGKILL)
            await asyncio.sleep(max(startup["periodSeconds"] / _PROBE_RATE, 0.2 if "grpc" in startup else 1.0))
        self.started = True
        await asyncio.gather(self._watch_liveness(), self._watch_readiness())
        return None

    async def _watch_readiness(self) -> None:
        probe = self.spec.get("readinessProbe")
        if probe is None:
            self.ready = True
            self._pod.on_change()
            return
        well_at = float("-inf")
        while True:
            if await self._asks_well(probe):
                well_at = time.monotonic()
            self.ready = time.monotonic() - well_at < probe["failureThreshold"] * probe["periodSeconds"]
            self._pod.on_change()
            await asyncio.sleep(probe["periodSeconds"] / _PROBE_RATE)

    async def _watch_liveness(self) -> None:
        probe = self.spec["livenessProbe"]
        failures = 0
        while failures < probe["failureThreshold"]:
            await asyncio.sleep(probe["periodSeconds"])
            failures = 0 if await self._asks_well(probe) else failures + 1
        self.send(signal.SIGKILL)

    async def _asks_well(self, probe: Object) -> bool:
        """Make a probe as it is rendered, with patience for a machine that is busy."""
        if "exec" in probe:
            quiet = asyncio.subprocess.DEVNULL
            asking = await asyncio.create_subprocess_exec(
                *self.command(probe["exec"]["command"]), stdout=quiet, stderr=quiet
            )
            return await asking.wait() == 0
        return await self.says(probe["grpc"]["service"])

    async def says(self, service: str) -> bool:
        """Whether the process says that it is SERVING, as its rendered probe asks."""
        port = self.spec["readinessProbe"]["grpc"]["port"]
        async with grpc.aio.insecure_channel(f"{self._pod.address}:{port}") as channel:
            try:
                stub = health_pb2_grpc.HealthStub(channel)
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            except grpc.aio.AioRpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def stop(self) -> None:
        """Do what its preStop says, then tell it to stop."""
        pause = self.spec.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        await asyncio.sleep(pause)
        self.send(signal.SIGTERM)


class Pod:
    """A pod with its containers and volumes."""

    def __init__(self, cluster: Cluster, name: str, template: Object) -> None:
        self.cluster = cluster
        self.name = name
        self.address = cluster.new_address()
        self.labels = template["metadata"]["labels"]
        self.going = False
        self.folder = cluster.folder / name
        self.folder.mkdir()
        self._spec = template["spec"]
        self.volumes = {each["name"]: self._volume(each) for each in self._spec["volumes"]}
        self.containers = {each["name"]: Container(self, each) for each in self._spec["containers"]}
        self._keepers: list[asyncio.Task[None]] = []

    def _volume(self, volume: Object) -> Path:
        if "persistentVolumeClaim" in volume:
            folder = self.cluster.folder / volume["persistentVolumeClaim"]["claimName"]
            folder.mkdir(exist_ok=True)
            return folder
        folder = self.folder / volume["name"]
        folder.mkdir()
        for key, value in self.cluster.secret(volume["secret"]["secretName"]).items() if "secret" in volume else ():
            (folder / key).write_bytes(value)
        for key, text in self.cluster.config_map(volume["configMap"]["name"]).items() if "configMap" in volume else ():
            (folder / key).write_text(text)
        if volume["name"] == "cache":
            (folder / "octavo").symlink_to(cache_folder())  # an image has the compiled kernels
        return folder

    @property
    def ready(self) -> bool:
        return not self.going and all(each.started and each.ready for each in self.containers.values())

    @property
    def restarts(self) -> int:
        return sum(each.restarts for each in self.containers.values())

    def on_change(self) -> None:
        self.cluster.update_names()

    async def run_to_end(self) -> int:
        """Run a pod that ends by itself, with one container; return its exit status."""
        (container,) = self.containers.values()
        return await container.run_once()

    async def start(self) -> None:
        for spec in self._spec.get("initContainers", ()):
            first = Container(self, spec)
            assert await first.run_once() == 0, first.log
        self.cluster.update_names()
        self._keepers = [asyncio.create_task(each.keep()) for each in self.containers.values()]

    async def until_ready(self, timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.ready:
            assert time.monotonic() < deadline, {name: each.log[-3000:] for name, each in self.containers.items()}
            await asyncio.sleep(0.05)

    async def delete(self) -> dict[str, int | None]:
        """Stop all containers at once, kill what is left after the grace period; return the exit statuses."""
        self.going = True
        self.cluster.update_names()
        for container in self.containers.values():
            container.exit_status = None
        await asyncio.gather(*(each.stop() for each in self.containers.values()))
        await asyncio.wait(self._keepers, timeout=self._spec["terminationGracePeriodSeconds"])
        await self.kill()
        return {name: each.exit_status for name, each in self.containers.items()}

    async def kill(self) -> None:
        self.going = True
        for container in self.containers.values():
            if container.process is not None and container.process.returncode is None:
                container.send(signal.SIGKILL)
        await asyncio.gather(*self._keepers, return_exceptions=True)
        self.cluster.pods.pop(self.name, None)
        self.cluster.update_names()
