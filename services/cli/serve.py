"""`octavo serve MODEL`: everything that serves a model on one machine, as one command."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.gpu_worker import quantization
from octavo.services.cli import addresses, model_source
from octavo.services.cli.child import ChildSpec
from octavo.services.cli.display import Display, json_line, open_display
from octavo.services.cli.errors import CommandError
from octavo.services.cli.one_process import LOG_FORMAT, SUPERVISOR_PID
from octavo.services.cli.supervisor import Limits, Supervisor
from octavo.services.common import config as config_loader
from octavo.services.common import process
from octavo.services.gateway.output_formats import NONE, REASONING_FORMATS, TOOL_CALL_FORMATS

_LISTENING = "listening"
_PROCESSES = "processes"
_OBSERVING = "observing"
_SCHEDULING = "scheduling"
_SECURITY = "security"
_VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
_RUN_PREFIX = "octavo-serve-"
_MAX_BASE_BYTES = 64  # the path of a Unix socket in a run directory has at most 107 bytes
_RESUME_KEY = "resume.key"
_NEW_S = 60.0
_POLL_S = 0.05
_PARENT_POLL_S = 0.5


@dataclass(frozen=True)
class ServeConfig:
    """Settings of `octavo serve`. None leaves a value to the process that it belongs to."""

    model: str = field(
        metadata={"positional": True, "help": "a folder, a .gguf file, a hub id such as org/name, demo or demo-embed"}
    )
    model_name: str = field(default="", metadata={"help": "the name that clients use; by default made from MODEL"})
    device: str = field(
        default="auto",
        metadata={"help": "what computes", "choices": ("auto", "cuda", "cpu", "reference"), "metavar": "DEVICE"},
    )
    kv_cache_memory: int | None = field(
        default=None,
        metadata={"kind": "bytes", "help": "memory for the KV cache of each worker, such as 2GiB"},
    )
    kv_cache_dtype: str = field(
        default="auto",
        metadata={
            "help": "type of the KV cache on a GPU; auto: that of the weights",
            "choices": ("auto", "fp8"),
            "metavar": "TYPE",
        },
    )
    quantization: str = field(
        default="none",
        metadata={
            "help": "quantise the weights of linear layers while they are loaded; none: keep them as they are",
            "choices": quantization.QUANTIZATIONS,
            "metavar": "SCHEME",
        },
    )
    max_model_len: int | None = field(
        default=None, metadata={"help": "most tokens of prompt and output together; by default what the model allows"}
    )

    packed_cache: bool = field(
        default=True,
        metadata={"help": "keep weights on disk as the CPU kernels read them, which makes the next start faster"},
    )

    grpc_address: str = field(
        default="127.0.0.1:50051",
        metadata={
            "group": _LISTENING,
            "help": "where the first gateway listens; further ones take the ports after it. Port 0: any free port",
        },
    )
    http_address: str = field(
        default="127.0.0.1:8000",
        metadata={
            "group": _LISTENING,
            "help": "where the first gateway listens for the OpenAI-compatible API; further ones take the ports after "
            "it. Empty: nowhere",
        },
    )
    http_cors_origins: tuple[str, ...] = field(
        default=(),
        metadata={"group": _LISTENING, "help": "origins whose web pages may call the HTTP API, * for all; empty: none"},
    )
    ui: bool = field(
        default=False, metadata={"group": _LISTENING, "help": "serve a page to chat with the model over HTTP, at /ui"}
    )
    tool_call_format: str = field(
        default="auto",
        metadata={
            "group": _LISTENING,
            "help": "how the model writes tool calls; auto: as its chat template says, none: they stay text",
            "choices": ("auto", NONE, *TOOL_CALL_FORMATS),
            "metavar": "FORMAT",
        },
    )
    reasoning_format: str = field(
        default="auto",
        metadata={
            "group": _LISTENING,
            "help": "what is around the model's reasoning; auto: as its chat template says, none: it stays text",
            "choices": ("auto", NONE, *REASONING_FORMATS),
            "metavar": "FORMAT",
        },
    )
    reflection: bool = field(
        default=True, metadata={"group": _LISTENING, "help": "let tools such as grpcurl ask for the API's description"}
    )

    api_keys: Path | None = field(
        default=None,
        metadata={"group": _SECURITY, "help": "file of API keys, made by `octavo keys add`: every call needs one"},
    )
    tls_certificate: Path | None = field(
        default=None, metadata={"group": _SECURITY, "help": "PEM chain for gRPC and HTTP; without it they are plain"}
    )
    tls_key: Path | None = field(default=None, metadata={"group": _SECURITY, "help": "its key"})
    tls_client_ca: Path | None = field(
        default=None,
        metadata={"group": _SECURITY, "help": "PEM authorities: clients need a certificate of theirs"},
    )

    gateways: int = field(default=1, metadata={"group": _PROCESSES, "help": "how many gateway processes"})
    schedulers: int = field(
        default=1,
        metadata={"group": _PROCESSES, "help": "how many scheduler processes, each with workers of its own"},
    )
    workers: int = field(
        default=1,
        metadata={"group": _PROCESSES, "help": "how many workers for each scheduler, each with the whole model"},
    )
    tensor_parallel: int = field(
        default=1,
        metadata={
            "group": _PROCESSES,
            "help": "over how many processes, each with a GPU, the model of a worker is split; not for device cpu",
        },
    )
    startup_timeout_s: float = field(
        default=1800.0, metadata={"group": _PROCESSES, "help": "give up if not ready after this time"}
    )
    grace_s: float = field(
        default=30.0, metadata={"group": _PROCESSES, "help": "how long running requests may take after Ctrl-C"}
    )

    max_running: int | None = field(default=None, metadata={"group": _SCHEDULING, "help": "most sequences in a step"})
    max_waiting: int | None = field(
        default=None, metadata={"group": _SCHEDULING, "help": "most requests in the queue; more are refused"}
    )
    max_batch_tokens: int | None = field(default=None, metadata={"group": _SCHEDULING, "help": "most tokens in a step"})
    max_prefill_tokens: int | None = field(
        default=None, metadata={"group": _SCHEDULING, "help": "most prompt tokens in a step that also decodes"}
    )

    metrics_address: str = field(
        default="",
        metadata={
            "group": _OBSERVING,
            "help": "where the first gateway serves /metrics for Prometheus; the other processes take the ports after "
            "it: gateways, schedulers, workers. Empty: nowhere",
        },
    )
    otlp_endpoint: str = field(
        default="",
        metadata={
            "group": _OBSERVING,
            "help": "collector of OpenTelemetry traces (OTLP over gRPC), such as http://127.0.0.1:4317; empty: none",
            "metavar": "URL",
        },
    )

    log_level: str = field(
        default="warning",
        metadata={
            "group": "logging",
            "help": "least severe messages of the processes to show",
            "choices": ("debug", "info", "warning", "error"),
            "metavar": "LEVEL",
        },
    )
    log_format: str = field(
        default="text",
        metadata={"group": "logging", "help": "how to show them", "choices": ("text", "json"), "metavar": "FORMAT"},
    )

    parent_pid: int = field(
        default=0, metadata={"hidden": True, "help": "stop when this process is no longer the parent; 0: never"}
    )

    def __post_init__(self) -> None:
        for name in ("gateways", "schedulers", "workers", "tensor_parallel"):
            if not 1 <= getattr(self, name) <= 64:
                raise ValueError(f"--{name.replace('_', '-')} must be from 1 to 64, not {getattr(self, name)}")
        if self.tensor_parallel > 1 and self.device == "cpu":
            raise ValueError("--tensor-parallel is not for device cpu, which uses all cores in one process")
        if problem := quantization.problem(self.quantization, self.device, self.tensor_parallel):
            raise ValueError(problem)
        for name in ("max_model_len", "max_running", "max_waiting", "max_batch_tokens", "max_prefill_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.kv_cache_memory is not None and self.kv_cache_memory < 1:
            raise ValueError(f"--kv-cache-memory must be positive, not {self.kv_cache_memory}")
        if self.grace_s < 0 or self.startup_timeout_s <= 0:
            raise ValueError("--grace-s must not be negative and --startup-timeout-s must be positive")


def main(argv: Sequence[str]) -> int:
    """Serve until stopped; `argv[0]` is the command's name. Return 0 after a stop by signal, 1 after a failure."""
    config = config_loader.load(
        ServeConfig,
        argv[1:],
        prog="octavo serve",
        description="Serves a model on this machine: starts gateway, scheduler and worker, restarts what dies, and "
        "stops all of it on Ctrl-C. Every option of these processes (`octavo worker --help` and so on) can be given in "
        "the environment too.",
    )
    process.set_name("octavo serve", argv[1:])
    # Until the supervisor takes signals over, a stop is an exception: what has been begun is cleaned up.
    signal.signal(signal.SIGTERM, _interrupt)
    started = time.monotonic()
    with open_display(config.log_format == "json") as display:
        try:
            listen = _take_addresses(config)
            metrics = _take_metrics_addresses(config, listen)
            model = model_source.find(config.model, display.progress)
            with _run_directory() as folder:
                _write_secret(folder / _RESUME_KEY)
                return asyncio.run(_supervise(config, model, listen, metrics, folder, display, started))
        except CommandError as error:
            display.line(f"octavo serve: {error}")
            return 1


@dataclass(frozen=True)
class Listen:
    """Where one gateway listens; `http` is empty for nowhere."""

    grpc: str
    http: str


def _take_addresses(config: ServeConfig) -> list[Listen]:
    """Return the addresses of each gateway, all free now. Raises CommandError."""
    grpc = addresses.take_free(config.grpc_address, config.gateways)
    if not config.http_address:
        return [Listen(address, "") for address in grpc]
    http = addresses.take_free(config.http_address, config.gateways)
    if both := set(grpc) & set(http):
        raise CommandError(f"{min(both)} is wanted for both gRPC and HTTP: choose ports that are further apart")
    return [Listen(*pair) for pair in zip(grpc, http, strict=True)]


def _take_metrics_addresses(config: ServeConfig, listen: Sequence[Listen]) -> list[str]:
    """Return an address for each gateway, scheduler and worker, in this order; none if there are to be none."""
    if not config.metrics_address:
        return []
    count = config.gateways + config.schedulers * (1 + config.workers)
    metrics = addresses.take_free(config.metrics_address, count)
    if both := set(metrics) & {address for where in listen for address in (where.grpc, where.http)}:
        raise CommandError(f"{min(both)} is wanted for both metrics and an API: choose ports that are further apart")
    return metrics


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def _run_directory() -> Iterator[Path]:
    """Give a folder for sockets that only this user can enter; remove it at the end.

    It is locked while it is in use, so that a later start can remove what a killed one left.
    """
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if not os.path.isdir(base) or not os.access(base, os.W_OK) or len(base) > _MAX_BASE_BYTES:
        base = tempfile.gettempdir() if len(tempfile.gettempdir()) <= _MAX_BASE_BYTES else "/tmp"  # noqa: S108
    for left in Path(base).glob(f"{_RUN_PREFIX}*"):
        _remove_if_left(left)
    try:
        folder = Path(tempfile.mkdtemp(prefix=_RUN_PREFIX, dir=base))
    except OSError as error:
        raise CommandError(f"cannot make a folder for sockets in {base}: {error.strerror}") from None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _write_secret(path: Path) -> None:
    """Make a file with a new secret that only this user can read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


def _remove_if_left(folder: Path) -> None:
    """Remove a run directory of ours that no process holds; a new one may not be locked yet."""
    with contextlib.suppress(OSError):
        about = folder.lstat()
        if about.st_uid != os.getuid() or time.time() - about.st_mtime < _NEW_S:
            return
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def child_specs(
    config: ServeConfig,
    model: model_source.Model,
    listen: Sequence[Listen],
    folder: Path,
    metrics: Sequence[str] = (),
) -> list[ChildSpec]:
    """Return the processes to run: the schedulers, workers for each, and a gateway for each entry of `listen`.

    metrics  where they serve metrics: gateways, schedulers, workers; empty for nowhere
    """
    names = ["scheduler"] if config.schedulers == 1 else [f"scheduler-{index}" for index in range(config.schedulers)]
    scheduler_addresses = [f"unix:{folder}/{name}.sock" for name in names]
    worker_endpoints = [f"ipc://{folder}/{name}-workers.sock" for name in names]
    num_workers = config.schedulers * config.workers
    observed = [f"gateway-{index}" for index in range(len(listen))] + names
    observed += [f"worker-{index}" for index in range(num_workers)]
    metrics_addresses = dict(zip(observed, metrics, strict=True)) if metrics else {}
    command = (sys.executable, "-P", "-m", "octavo.services.cli")
    environment = {SUPERVISOR_PID: str(os.getpid()), LOG_FORMAT: config.log_format, "PYTHONUNBUFFERED": "1"}

    def spec(
        name: str,
        stop_order: int,
        values: Mapping[str, object],
        *arguments: str,
        progress: str = "",
        unit: str = "",
        extra: Mapping[str, str] | None = None,
    ) -> ChildSpec:
        kind = name.split("-")[0]
        # Given in any case: a variable in the environment would name one port to several processes. Of the ranks of a
        # worker the first one speaks for all.
        address = metrics_addresses.get(name.removesuffix(".0"), "")
        observing = {"metrics_address": address, "otlp_endpoint": config.otlp_endpoint, "log_level": config.log_level}
        options = config_loader.flags({**values, **observing})
        started = (*command, kind, *arguments, *options)
        return ChildSpec(name, started, stop_order, {**environment, **(extra or {})}, progress, unit)

    scheduler = {
        "model_name": model.name,
        "admin_address": "",  # one variable in the environment would name the same port to several processes
        "max_running": config.max_running,
        "max_waiting": config.max_waiting,
        "max_batch_tokens": config.max_batch_tokens,
        "max_prefill_tokens": config.max_prefill_tokens,
        "grace_s": config.grace_s,
    }
    num_processes = num_workers * config.tensor_parallel
    worker = {
        "model": str(model.path),
        "device": config.device,
        "kv_cache_memory": config.kv_cache_memory,
        "kv_cache_dtype": config.kv_cache_dtype,
        "quantization": config.quantization,
        "max_model_len": config.max_model_len,
        "packed_cache": config.packed_cache,
        # By default a worker takes every core: several of them would only wait for each other.
        "num_threads": max(1, _num_cores() // num_processes) if num_processes > 1 else None,
    }
    gateway = {
        "model_name": model.name,
        "scheduler_addresses": tuple(scheduler_addresses),
        "resume_key_file": str(folder / _RESUME_KEY),
        "admin_address": "",
        "max_model_len": config.max_model_len,
        "http_cors_origins": config.http_cors_origins,
        "ui": config.ui,
        "tool_call_format": config.tool_call_format,
        "reasoning_format": config.reasoning_format,
        "reflection": config.reflection,
        "grace_s": config.grace_s,
        "api_keys": config.api_keys,
        "tls_certificate": config.tls_certificate,
        "tls_key": config.tls_key,
        "tls_client_ca": config.tls_client_ca,
    }
    specs = []
    for name, address, endpoint in zip(names, scheduler_addresses, worker_endpoints, strict=True):
        own = {"scheduler_id": name, "scheduler_address": address, "worker_endpoint": endpoint}
        specs.append(spec(name, 1, {**scheduler, **own}, progress="--progress-fd"))
    for index in range(num_workers):
        name = f"worker-{index}"
        own = {"worker_id": name, "worker_endpoint": worker_endpoints[index // config.workers]}
        if config.tensor_parallel == 1:
            specs.append(spec(name, 2, {**worker, **own}, progress="--progress-fd"))
            continue
        for rank in range(config.tensor_parallel):
            ranks = {"rank": rank, "world_size": config.tensor_parallel, "rendezvous": f"ipc://{folder}/{name}.sock"}
            progress = "--progress-fd" if rank == 0 else ""
            visible = _visible_gpu(index * config.tensor_parallel + rank, os.environ)
            specs.append(
                spec(f"{name}.{rank}", 2, {**worker, **own, **ranks}, progress=progress, unit=name, extra=visible)
            )
    for index, where in enumerate(listen):
        name = f"gateway-{index}"
        own = {
            "gateway_id": name,
            "grpc_address": where.grpc,
            "http_address": where.http,
            "local_address": _local_address(folder, index),
        }
        specs.append(spec(name, 0, {**gateway, **own}, str(model.path)))
    return specs


def _local_address(folder: Path, index: int) -> str:
    """Return where a gateway can be asked whether it serves, whatever clients need to be let in."""
    return f"unix:{folder}/gateway-{index}.sock"


def _visible_gpu(index: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Return what shows a process the `index`th of the GPUs that this one may use, and no other."""
    visible = environ.get(_VISIBLE_GPUS)
    gpus = visible.split(",") if visible else []
    # One too many is the process's to report: without a GPU, as on the reference device, it is no fault.
    return {_VISIBLE_GPUS: str(index) if visible is None else gpus[index] if index < len(gpus) else ""}


def _num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


async def _supervise(
    config: ServeConfig,
    model: model_source.Model,
    listen: Sequence[Listen],
    metrics: Sequence[str],
    folder: Path,
    display: Display,
    started: float,
) -> int:
    output = _Output(display, config.log_format)
    device = "" if config.device == "auto" else config.device

    def on_progress(name: str, event: Mapping[str, object]) -> None:
        nonlocal device
        device = str(event.get("device") or device)
        done, total = event.get("done"), event.get("total")
        match event.get("phase"):
            case "load" if isinstance(done, int) and isinstance(total, int) and total > 0:
                display.progress(f"{name} loads {model.name}", done, total)
            case "join":  # from here on it joins the scheduler and prepares its device
                display.progress(f"{name} prepares", 0, 1)
            case "fenced":  # a scheduler gave a worker up
                supervisor.doubt(str(event.get("worker_id")))
            case "ready":
                supervisor.trust(name)
                display.progress(f"{name} prepares", 1, 1)
                if supervisor.ready:
                    output.say(f"{name} is ready again")

    def on_ready() -> None:
        display.close()
        on = f" on {device}" if device else ""
        http = (
            f", http{'s' if config.tls_certificate else ''} {' '.join(where.http for where in listen)}"
            if config.http_address
            else ""
        )
        with contextlib.suppress(OSError):
            print(
                f"ready in {time.monotonic() - started:.1f} s: {model.name}{on}, "
                f"grpc {' '.join(where.grpc for where in listen)}{http}"
                f"{', metrics ' if metrics else ''}{' '.join(metrics)} (Ctrl-C stops)",
                flush=True,
            )

    supervisor = Supervisor(
        child_specs(config, model, listen, folder, metrics),
        # The processes end running requests themselves after grace_s: they get a little longer to end.
        Limits(start_s=config.startup_timeout_s, grace_s=config.grace_s + 5),
        is_ready=lambda: _all_serving([_local_address(folder, index) for index in range(len(listen))]),
        on_ready=on_ready,
        say=output.say,
        on_line=output.child_line,
        on_progress=on_progress,
    )
    watching = asyncio.create_task(_stop_without(config.parent_pid)) if config.parent_pid else None
    try:
        return await supervisor.run()
    finally:
        if watching is not None:
            watching.cancel()


async def _stop_without(parent_pid: int) -> None:
    """Stop this process, as a signal does, once the one that started it is gone."""
    while os.getppid() == parent_pid:  # noqa: ASYNC110 - the system tells nobody but the parent
        await asyncio.sleep(_PARENT_POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)


async def _all_serving(targets: Sequence[str]) -> None:
    """Return once every gateway says that it serves."""
    # Imported while the children start: they take longer.
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from octavo.services.common.grpc_options import hop_channel_options

    async def wait_for(target: str) -> None:
        async with grpc.aio.insecure_channel(target, options=hop_channel_options()) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=1)
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                await asyncio.sleep(_POLL_S)

    await asyncio.gather(*(wait_for(target) for target in targets))


class _Output:
    """Shows what the children and the supervisor say. A stderr that is gone stops nobody."""

    def __init__(self, display: Display, log_format: str) -> None:
        self._display = display
        self._json = log_format == "json"

    def say(self, text: str) -> None:
        """Show a line of the supervisor's own."""
        self._show(json_line(text) if self._json else f"octavo serve: {text}")

    def child_line(self, name: str, text: str) -> None:
        """Show a child's line under its name."""
        if not self._json:
            self._show(f"{name:<9} | {text}")
        elif text.startswith("{"):
            self._show(text)
        else:
            self._show(json_line(text, name))

    def _show(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._display.line(text)
