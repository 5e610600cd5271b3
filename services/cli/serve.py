"""`octavo serve MODEL`: everything that serves a model on one machine, as one command."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from octavo.services.cli import addresses, model_source
from octavo.services.cli.deployment import (
    RESUME_KEY,
    Listen,
    asked_addresses,
    child_specs,
    take_addresses,
    take_metrics_addresses,
)
from octavo.services.cli.display import Display, json_line, open_display
from octavo.services.cli.errors import CommandError
from octavo.services.cli.run_directory import run_directory, write_secret
from octavo.services.cli.serve_config import ServeConfig
from octavo.services.cli.supervisor import Limits, Supervisor
from octavo.services.common import config as config_loader
from octavo.services.common import process

_POLL_S = 0.05
_PARENT_POLL_S = 0.5


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
            if config.scheduler_address:
                (address,) = addresses.take_free(config.scheduler_address, 1)
                config = replace(config, scheduler_address=address)
            listen = take_addresses(config)
            metrics = take_metrics_addresses(config, listen)
            model = model_source.find(config.model, display.progress)
            with run_directory() as folder:
                write_secret(folder / RESUME_KEY)
                return asyncio.run(_supervise(config, model, listen, metrics, folder, display, started))
        except CommandError as error:
            display.line(f"octavo serve: {error}")
            return 1


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


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
        where = {
            "grpc": [each.grpc for each in listen],
            f"http{'s' if config.tls_certificate else ''}": [each.http for each in listen if each.http],
            "scheduler": [config.scheduler_address] if config.scheduler_address else [],
            "metrics": metrics,
        }
        places = "".join(f", {name} {' '.join(found)}" for name, found in where.items() if found)
        with contextlib.suppress(OSError):
            print(
                f"ready in {time.monotonic() - started:.1f} s: {model.name}{on}{places} (Ctrl-C stops)",
                flush=True,
            )

    supervisor = Supervisor(
        child_specs(config, model, listen, folder, metrics),
        # The processes end running requests themselves after grace_s: they get a little longer to end.
        Limits(start_s=config.startup_timeout_s, grace_s=config.grace_s + 5),
        is_ready=lambda: _all_serving(asked_addresses(config, folder)),
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
