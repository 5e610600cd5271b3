"""The gateway process: python -m octavo.services.gateway MODEL [options]."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from octavo.services.common import logging as logs
from octavo.services.common.config import load
from octavo.services.common.process import Reports
from octavo.services.gateway.app import BindError, Gateway
from octavo.services.gateway.config import GatewayConfig
from octavo.services.gateway.schedulers.resume_token import KeyFileError
from octavo.services.gateway.tokenization.model_files import ModelError

# How long a thread with long work may compute before the event loop gets the GIL: a call asks for it a dozen times.
_SWITCH_S = 0.0005
_log = logging.getLogger(__name__)


async def serve(config: GatewayConfig, on_ready: Callable[[], None] | None = None) -> int:
    """Run a gateway until SIGTERM or SIGINT; return the process's exit status.

    `on_ready` is called once calls are taken; the schedulers may not be there yet.
    """
    try:
        gateway = Gateway(config)
    except (ModelError, BindError, KeyFileError, ValueError) as error:
        _log.error("%s", error)
        return 1
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        await gateway.start()
    except ModelError as error:
        _log.error("%s", error)
        return 1
    gc.collect()
    sys.setswitchinterval(_SWITCH_S)
    gc.freeze()  # what lives as long as the process need not be looked at by the collector again
    also = f" and http://{config.http_address}" if config.http_address else ""
    _log.info("gateway ready on %s%s, model %s", config.grpc_address, also, config.served_name)
    reports = Reports(config.progress_fd)
    reports.ready()
    if on_ready is not None:
        on_ready()
    crashed = asyncio.create_task(gateway.schedulers.wait_crashed())
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((crashed, stopped), return_when=asyncio.FIRST_COMPLETED)
        if crashed.done():
            crashed.result()
        _log.info("stopping; running calls have %g s", config.grace_s)
        reports.draining(gateway.num_requests, config.grace_s)
        await gateway.stop(config.grace_s)
    finally:
        crashed.cancel()
        stopped.cancel()
    return 0


def run(config: GatewayConfig, on_ready: Callable[[], None] | None = None) -> int:
    """Run a gateway in this process, on an event loop of its own; return the exit status."""
    # The tokenizer's library has threads of its own, one for each core unless this says otherwise when it starts them.
    os.environ["RAYON_NUM_THREADS"] = str(config.tokenizer_threads)
    return _run(serve(config, on_ready))


def _run(main: Coroutine[Any, Any, int]) -> int:
    if sys.platform == "win32":
        return asyncio.run(main)
    import uvloop  # not available on Windows

    result: int = uvloop.run(main)
    return result


def main() -> int:
    """Run the command line."""
    config = load(GatewayConfig, sys.argv[1:], prog="octavo-gateway", description="Serve the public APIs.")
    logs.setup(config.log_level, "gateway")
    return run(config)


if __name__ == "__main__":
    sys.exit(main())
