"""`octavo serve MODEL`: everything that serves a model on one machine, as one command."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib
import os
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

from octavo.services.cli import addresses, deployment, model_source
from octavo.services.cli.display import Display, json_line, open_display
from octavo.services.cli.errors import CommandError
from octavo.services.cli.serve_config import PROCESSES, ServeConfig, passed_on
from octavo.services.cli.supervisor import Limits, Supervisor
from octavo.services.common import config as config_loader
from octavo.services.common import process
from octavo.services.common.config import is_exposed_address, settings_of
from octavo.services.common.output import QueuedWriter, descriptor_of

_RUN_PREFIX = "octavo-serve-"
_MAX_BASE_BYTES = 64  # the path of a Unix socket in a run directory has at most 107 bytes
_NEW_S = 60.0


@contextmanager
def run_directory() -> Iterator[Path]:
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


def write_secret(path: Path) -> None:
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


_POLL_S = 0.05
_PARENT_POLL_S = 0.5
_CLIENT_ADDRESS = "127.0.0.1:50051"  # where clients look for a server if they are not told
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}
# What is read from the environment and is no setting.
_OTHER_VARIABLES = {"log_format", "supervisor_pid", "no_native_build", "api_key"}


def main(argv: Sequence[str]) -> int:
    """Serve until stopped; `argv[0]` is the command's name. Return 0 after a stop by signal, 1 after a failure."""
    try:
        config, passed = config_loader.parse_with(
            ServeConfig,
            passed_on(),
            argv[1:],
            prog="octavo serve",
            description="Serves a model on this machine: starts gateway, scheduler and worker, restarts what dies, and "
            "stops all of it on Ctrl-C. Every option of these processes (`octavo worker --help` and so on) can be "
            "given here too, and is passed on.",
        )
        config = replace(config, passed=passed)
        deployment.check(config)
    except ValueError as error:
        print(f"octavo serve: {error}", file=sys.stderr)
        return 2
    process.set_name("octavo serve", argv[1:])
    # Until the supervisor takes signals over, a stop is an exception: what has been begun is cleaned up.
    signal.signal(signal.SIGTERM, _interrupt)
    started = time.monotonic()
    stdout = QueuedWriter(descriptor_of(sys.stdout))
    with open_display(config.log_format == "json") as display:
        output = _Output(display, stdout, config.log_format)
        for line in _unknown_variables(os.environ):
            output.say(f"warning: {line}")
        try:
            try:
                if config.scheduler_address:
                    (address,) = addresses.take_free(config.scheduler_address, 1)
                    config = replace(config, scheduler_address=address)
                listen = deployment.take_addresses(config)
                metrics = deployment.take_metrics_addresses(config, listen)
            except CommandError as error:
                output.say(str(error))
                model_source.find_here(config.model)  # if that is wrong too, it is told at once
                return 1
            if open_to_all := _open_to_all(config, listen):
                output.say(
                    f"warning: everybody who reaches {open_to_all} may use this server: --api-keys FILE lets only "
                    "holders of a key in (`octavo keys add` makes one)"
                )
            model = model_source.find(config.model, display.progress)
            with run_directory() as folder:
                write_secret(folder / deployment.RESUME_KEY)
                return asyncio.run(_supervise(config, model, listen, metrics, folder, display, output, started))
        except CommandError as error:
            output.say(str(error))
            if isinstance(error, model_source.NotServedError):
                output.say(_how_to_check(config))
            return 1
        finally:
            stdout.drain()


def _unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Return a line for each OCTAVO_ variable that nothing reads."""
    from octavo.services.cli.__main__ import COMMANDS

    configs: list[type[Any]] = [ServeConfig, *PROCESSES.values()]
    known = {name for config in configs for setting in settings_of(config) for name in setting.names}
    known |= _OTHER_VARIABLES
    if not config_loader.unknown_variables(known, environ):
        return []
    for name in {module for module, _ in COMMANDS.values()}:  # only now: it takes a while
        with contextlib.suppress(ModuleNotFoundError):
            for each in vars(importlib.import_module(name)).values():
                if is_dataclass(each) and isinstance(each, type) and each.__name__.endswith("Config"):
                    known |= {name for setting in settings_of(each) for name in setting.names}
    return config_loader.unknown_variables(known, environ)


def _open_to_all(config: ServeConfig, listen: Sequence[deployment.Listen]) -> str:
    """Return an address that other machines reach and that asks nobody who they are; empty if there is none."""
    gateway = {"jwt_jwks", "certificate_tenants"}
    asks = config.api_keys or config.tls_client_ca or any(config.passed.get(name) for name in gateway)
    if asks or any(os.environ.get(f"OCTAVO_{name.upper()}") for name in gateway):
        return ""
    open_ones = (address for where in listen for address in (where.grpc, where.http) if is_exposed_address(address))
    return next(open_ones, "")


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


async def _supervise(
    config: ServeConfig,
    model: model_source.Model,
    listen: Sequence[deployment.Listen],
    metrics: Sequence[str],
    folder: Path,
    display: Display,
    output: _Output,
    started: float,
) -> int:
    device = "" if config.device == "auto" else config.device
    were_ready: set[str] = set()

    def on_progress(name: str, event: Mapping[str, object]) -> None:
        nonlocal device
        device = str(event.get("device") or device)
        done, total = event.get("done"), event.get("total")
        match event.get("phase"):
            case "load" if isinstance(done, int) and isinstance(total, int) and total > 0:
                display.progress(f"{name} loads {model.name}", done, total)
            case "join":  # from here on it joins the scheduler and prepares its device
                display.progress(f"{name} prepares", 0, 1)
                supervisor.joins(name)
            case "fenced":  # a scheduler gave a worker up
                supervisor.doubt(str(event.get("worker_id")))
            case "draining" if num_requests := event.get("requests"):
                requests = "1 request" if num_requests == 1 else f"{num_requests} requests"
                output.say(f"{name} waits up to {event.get('seconds'):g} s for {requests}")
            case "ready":
                supervisor.trust(name)
                if name.startswith("worker"):
                    display.progress(f"{name} prepares", 1, 1)
                if supervisor.ready and name in were_ready:
                    output.say(f"{name} is ready again")
                were_ready.add(name)

    def on_ready() -> None:
        display.close()
        is_slow = device == "reference" and config.device == "auto"
        on = f" on {device}{' (SLOW)' if is_slow else ''}" if device else ""
        where = {
            "grpc": [each.grpc for each in listen],
            f"http{'s' if config.tls_certificate else ''}": [each.http for each in listen if each.http],
            "scheduler": [config.scheduler_address] if config.scheduler_address else [],
            "metrics": metrics,
        }
        places = "".join(f", {name} {' '.join(found)}" for name, found in where.items() if found)
        output.result(f"ready in {time.monotonic() - started:.1f} s: {model.name}{on}{places} (Ctrl-C stops)")
        for line in _what_to_try(config, model, listen):
            output.result(f"    {line}")

    supervisor = Supervisor(
        deployment.child_specs(config, model, listen, folder, metrics),
        # The processes end running requests themselves after grace_s: they get a little longer to end.
        Limits(start_s=config.startup_timeout_s, grace_s=config.grace_s + 5),
        is_ready=lambda: _all_serving(deployment.asked_addresses(config, folder)),
        on_ready=on_ready,
        say=output.say,
        on_line=output.child_line,
        on_progress=on_progress,
    )
    watching = asyncio.create_task(_stop_without(config.parent_pid)) if config.parent_pid else None
    try:
        status = await supervisor.run()
        if status and not supervisor.ready:
            output.say(_how_to_check(config))
        return status
    finally:
        if watching is not None:
            watching.cancel()


def _what_to_try(config: ServeConfig, model: model_source.Model, listen: Sequence[deployment.Listen]) -> list[str]:
    """Return what somebody who has not done this before may want next."""
    if not listen:
        return []
    grpc, http = (_for_this_machine(address) for address in (listen[0].grpc, listen[0].http))
    url = f"http{'s' if config.tls_certificate else ''}://{http}"
    lines = []
    if http and config.ui:
        lines.append(f"a page to chat:  {url}/ui")
    if http:
        lines.append(f"OpenAI base_url: {url}/v1")
    if model_source.writes_text(model.path) and not config.tls_certificate:
        key = "OCTAVO_API_KEY=... " if config.api_keys else ""
        where = "" if grpc == _CLIENT_ADDRESS else f" --address {grpc}"
        lines.append(f"in a terminal:   {key}octavo chat{where}")
    elif http:
        key = " -H 'authorization: Bearer KEY'" if config.api_keys else ""
        lines.append(f"in a terminal:   curl {url}/v1/models{key}")
    return lines


def _how_to_check(config: ServeConfig) -> str:
    """Return where somebody whose model was refused finds out more."""
    command = ["octavo", "model", "check", config.model]
    for name in ("device", "quantization"):
        if (value := getattr(config, name)) not in ("auto", "none"):
            command += [f"--{name}", value]
    return f"`{shlex.join(command)}` says whether this model is served here, and why not"


def _for_this_machine(address: str) -> str:
    """Return how this machine reaches an address: one for all interfaces is none to connect to."""
    host, colon, port = address.rpartition(":")
    return f"{_LOOPBACK.get(host, host)}{colon}{port}"


async def _stop_without(parent_pid: int) -> None:
    """Stop this process, as a signal does, once the one that started it is gone."""
    while os.getppid() == parent_pid:  # noqa: ASYNC110 - the system tells nobody but the parent
        await asyncio.sleep(_PARENT_POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)


async def _all_serving(targets: Sequence[str]) -> None:
    """Return once every process says that it serves."""
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
    """Shows what the children and the supervisor say, without waiting for whoever reads it."""

    def __init__(self, display: Display, stdout: QueuedWriter, log_format: str) -> None:
        self._display = display
        self._stdout = stdout
        self._json = log_format == "json"

    def say(self, text: str) -> None:
        """Show a line of the supervisor's own."""
        self._display.line(json_line(text) if self._json else f"octavo serve: {text}")

    def child_line(self, name: str, text: str) -> None:
        """Show a child's line under its name."""
        if not self._json:
            self._display.line(f"{name:<9} | {text}")
        elif text.startswith("{"):
            self._display.line(text)
        else:
            self._display.line(json_line(text, name))

    def result(self, text: str) -> None:
        """Print a line on stdout."""
        if self._stdout.isatty() and os.isatty(descriptor_of(sys.stderr)):
            self._display.line(text)  # on the same screen, where it must not overtake the end of a bar
        else:
            self._stdout.write(text + "\n")
