"""`octavo gateway`, `octavo scheduler` and `octavo worker`: one process each, in the foreground."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from octavo.services.common import config as config_loader
from octavo.services.common import logging as log_setup
from octavo.services.common import process

SUPERVISOR_PID = "OCTAVO_SUPERVISOR_PID"  # set by `octavo serve` for its children
LOG_FORMAT = "OCTAVO_LOG_FORMAT"


@dataclass(frozen=True)
class _Kind:
    package: str
    config: str
    extra: str
    description: str


_KINDS = {
    "gateway": _Kind(
        "octavo.services.gateway", "GatewayConfig", "gateway", "Runs one gateway: the public API, text in and out."
    ),
    "scheduler": _Kind(
        "octavo.services.scheduler",
        "SchedulerConfig",
        "scheduler",
        "Runs one scheduler: the queue, the rules and every block of KV cache.",
    ),
    "worker": _Kind(
        "octavo.gpu_worker", "WorkerConfig", "worker", "Runs one worker: the weights, the KV cache and the kernels."
    ),
}


def main(argv: Sequence[str]) -> int:
    """Run the process named by `argv[0]` with the options after it, until it ends."""
    name, options = argv[0], list(argv[1:])
    process.set_name(f"octavo {name}", options)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else each handshake of a stranger is a line in the log
    with contextlib.suppress(RuntimeError, io.UnsupportedOperation):  # without a stderr, or one that is no file
        # For one that hangs: `kill -USR1` has it say where.
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    # Removed, so that whatever this process starts does not take it for itself.
    if supervisor := os.environ.pop(SUPERVISOR_PID, ""):
        process.die_with_parent(int(supervisor))
    kind = _KINDS[name]
    try:
        config_class: type[Any] = getattr(importlib.import_module(f"{kind.package}.config"), kind.config)
        config = config_loader.load(config_class, options, prog=f"octavo {name}", description=kind.description)
        fmt = os.environ.get(LOG_FORMAT, "auto")
        log_setup.setup(config.log_level, name, fmt=cast(log_setup.Format, fmt))
        if getattr(config, "local_ranks", 1) > 1:
            from octavo.services.cli import ranks

            return ranks.run(config, {SUPERVISOR_PID: str(os.getpid())})
        # Its libraries are imported here or, if they are slow, once it runs.
        status: int = importlib.import_module(f"{kind.package}.__main__").run(config)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "octavo":
            raise
        print(f"octavo {name}: {error.name} is not installed: pip install 'octavo[{kind.extra}]'", file=sys.stderr)
        return 1
    return status
