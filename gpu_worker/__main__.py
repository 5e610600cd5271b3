"""Runs a worker process until SIGTERM, SIGINT or the scheduler's word."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from octavo.gpu_worker.config import WorkerConfig

log = logging.getLogger("octavo.worker")

_BYTE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def run(config: WorkerConfig) -> int:
    """Run a worker in this process, from its main thread; return the exit status.

    Logging is the caller's to set up.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with contextlib.suppress(OSError):  # for people who look at `ps`; not every system has it
        Path("/proc/self/comm").write_text("octavo worker")
    # Imported late: torch takes seconds, and a wrong flag should be told at once.
    import torch
    import zmq

    from octavo.gpu_worker.errors import ModelError
    from octavo.gpu_worker.loading import load_model
    from octavo.gpu_worker.progress import Progress
    from octavo.gpu_worker.worker import Worker
    from octavo.kernels.cpu.library import available_cores

    torch.set_num_threads(config.num_threads or available_cores())
    progress = Progress(config.progress_fd)
    try:
        loaded = load_model(Path(config.model), config.dtype, config.max_model_len, progress.loaded)
        log.info("loaded %s: %s, version %s", config.model, loaded.architecture, loaded.model_version)
        progress.emit("join", 0, 1)
        worker = Worker(config, config.worker_id or _new_worker_id(), loaded, progress, stop)
    except ModelError as error:
        log.error("cannot load the model: %s", error)
        return 1
    except zmq.ZMQError as error:
        log.error("worker_endpoint %r cannot be used: %s", config.worker_endpoint, error)
        return 1
    return worker.run()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a worker with the flags given."""
    parser = argparse.ArgumentParser(prog="octavo worker", description="Run a worker: weights, KV cache, computing.")
    for field in dataclasses.fields(WorkerConfig):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            default=field.default,
            type=_bytes if field.metadata.get("kind") == "bytes" else type(field.default),
            choices=field.metadata.get("choices"),
            metavar=field.metadata.get("metavar"),
            help=argparse.SUPPRESS if field.metadata.get("hidden") else field.metadata["help"],
        )
    try:
        config = WorkerConfig(**vars(parser.parse_args(argv)))
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    return run(config)


def _bytes(text: str) -> int:
    """Read a size like 512MiB, 2GB or 4096."""
    number = text.rstrip("BbKkMmGgIi")
    unit = text[len(number) :].lower().removesuffix("b")
    if unit not in _BYTE_UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 512MiB")
    return int(float(number) * _BYTE_UNITS[unit])


def _new_worker_id() -> str:
    """Return a name that no other process has."""
    return f"worker-{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(2)}"


if __name__ == "__main__":
    sys.exit(main())
