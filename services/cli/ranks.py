"""Runs the ranks of a worker that are on this machine: a process for each, each with a GPU of its own.

They live and end together: when one ends, the others are stopped, and this process ends with its status, for whoever
started it to start all of them again.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from octavo.services.common import config as config_loader

if TYPE_CHECKING:
    from octavo.gpu_worker.config import WorkerConfig

_CLI = "octavo.services.cli"
_VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
_GRACE_S = 10.0  # for the others, once one has ended


def run(config: WorkerConfig, environment: Mapping[str, str]) -> int:
    """Run them until one ends or this process is told to stop; return the exit status."""
    return asyncio.run(_run(config, {**os.environ, **environment}))


def command(config: WorkerConfig, local: int) -> tuple[str, ...]:
    """Return the command line of one of them."""
    rank = config.node_rank * config.local_ranks + local
    own = replace(
        config,
        rank=rank,
        local_ranks=1,
        node_rank=0,
        num_threads=max(1, config.num_threads // config.local_ranks) if config.num_threads else 0,
        # The first of all speaks for all.
        metrics_address=config.metrics_address if rank == 0 else "",
        alive_file=config.alive_file if local == 0 else "",
    )
    # All of them: what the environment says was read, and is not to be read again.
    values = {field.name: getattr(own, field.name) for field in fields(own)}
    return (sys.executable, "-P", "-m", _CLI, "worker", *config_loader.flags(values))


async def _run(config: WorkerConfig, environ: Mapping[str, str]) -> int:
    processes: list[asyncio.subprocess.Process] = []
    stopping = asyncio.Event()

    def stop() -> None:
        stopping.set()
        for process in processes:
            if process.returncode is None:
                process.terminate()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    for local in range(config.local_ranks):
        if not stopping.is_set():
            environment = {**environ, **visible_gpu(local, environ)}
            processes.append(await asyncio.create_subprocess_exec(*command(config, local), env=environment))
    if stopping.is_set():
        stop()  # those that were being started
    waits = {asyncio.create_task(process.wait()): process for process in processes}
    if not waits:
        return 0
    done, others = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    if not stopping.is_set():  # else they were told: a second signal could find one that is about to end well
        stop()
    if others:
        _, hanging = await asyncio.wait(others, timeout=_GRACE_S)
        for wait in hanging:
            waits[wait].kill()
        await asyncio.wait(others)
    statuses = [wait.result() for wait in (*done, *others)]
    first = next((status for status in statuses if status), 0)
    return first if first >= 0 else 128 - first


def visible_gpu(index: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Return what shows a process the `index`th of the GPUs that this one may use, and no other."""
    visible = environ.get(_VISIBLE_GPUS)
    gpus = visible.split(",") if visible else []
    # One too many is the process's to report: without a GPU, as on the reference device, it is no fault.
    return {_VISIBLE_GPUS: str(index) if visible is None else gpus[index] if index < len(gpus) else ""}
