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
from typing import TYPE_CHECKING

from octavo.gpu_worker.config import WorkerConfig

if TYPE_CHECKING:
    from octavo.gpu_worker.lifetime import Progress
    from octavo.gpu_worker.loading.loading import LoadedModel

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
    # Torch's threads wait for each other after each product. By default they compute meanwhile, for nothing, and where
    # other processes want the processors too, that is time in which the one that is waited for could have run.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Imported late: it takes a while, and a wrong flag should be told at once.
    import zmq

    from octavo.gpu_worker.devices import check_cuda, device_of_ranks
    from octavo.gpu_worker.errors import DeviceError, ModelError, RankError, SettingError, one_line
    from octavo.gpu_worker.lifetime import Progress
    from octavo.gpu_worker.loading.loading import device_of, load_for_device
    from octavo.gpu_worker.loading.sharding import Sharding

    if config.alive_file:  # of the process that was here before: this one has no model yet
        Path(config.alive_file).unlink(missing_ok=True)
    progress = Progress(config.progress_fd)
    sharding = Sharding(config.rank, config.world_size)
    status = 1
    try:
        # Once, and before the weights are read: what is missing is told at once, and not again.
        device = (
            device_of_ranks(config.device) if config.world_size > 1 else device_of(config.device, Path(config.model))
        )
        if device == "cuda":
            check_cuda()
        config = dataclasses.replace(config, device=device)
        loaded = load_for_device(config, progress.loaded, sharding)
        log.info("loaded %s: %s, version %s", config.model, loaded.architecture, loaded.model_version)
        status = _work(config, loaded, progress, stop)
    except (ModelError, DeviceError) as error:
        log.error("cannot load the model: %s", one_line(error))
    except RankError as error:
        log.error("the group cannot start: %s", error)
    except SettingError as error:
        log.error("%s", error)
    except zmq.ZMQError as error:
        endpoints = f"worker_endpoint {config.worker_endpoint!r}"
        if config.world_size > 1:
            endpoints += f" or rendezvous {config.rendezvous!r}"
        log.error("%s cannot be used: %s", endpoints, error)
    if config.world_size > 1:
        # The libraries' threads may wait for a rank that is gone: nothing of them is to be waited for.
        logging.shutdown()
        os._exit(status)
    return status


def _work(config: WorkerConfig, loaded: LoadedModel, progress: Progress, stop: threading.Event) -> int:
    """Serve with a loaded model, alone or as a rank; return the exit status. Raises RankError or zmq.ZMQError."""
    from octavo.gpu_worker.worker import Worker

    ranks = None
    if config.world_size > 1:  # needs torch, which a worker alone may do without
        from octavo.gpu_worker.distributed.follower import Follower
        from octavo.gpu_worker.distributed.ranks import Ranks

        if config.rank > 0:
            return Follower(config, loaded, stop).run()
        ranks = Ranks(config, loaded)
        if not ranks.connect(stop):
            return 0
    progress.emit("join", 0, 1)
    return Worker(config, config.worker_id or _new_worker_id(), loaded, progress, stop, ranks).run()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a worker with the flags given."""
    parser = argparse.ArgumentParser(prog="octavo worker", description="Run a worker: weights, KV cache, computing.")
    for field in dataclasses.fields(WorkerConfig):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(
                flag, default=field.default, action=argparse.BooleanOptionalAction, help=field.metadata["help"]
            )
            continue
        parser.add_argument(
            flag,
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
