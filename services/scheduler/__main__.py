"""Runs a scheduler process until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import sys

import grpc
import uvloop
import zmq
from grpc import aio

from octavo.admin.v1 import admin_pb2_grpc
from octavo.scheduler.v1 import scheduler_pb2_grpc
from octavo.services.common.config import load
from octavo.services.common.grpc_options import SMALL_MESSAGE_BYTES, public_server_options, server_options
from octavo.services.common.interceptor import ErrorInterceptor
from octavo.services.common.logging import setup
from octavo.services.common.operating import AdminKeys
from octavo.services.common.probes import ProbeServer
from octavo.services.common.request_memory import RequestMemory
from octavo.services.common.tls import listen, server_credentials
from octavo.services.scheduler.admin import AdminServicer
from octavo.services.scheduler.config import SchedulerConfig
from octavo.services.scheduler.engine import Engine
from octavo.services.scheduler.server import SchedulerServicer

log = logging.getLogger("octavo.scheduler")
_MAX_ADMIN_CALLS = 64  # at once, on one connection


async def serve(config: SchedulerConfig) -> int:
    """Serve until a signal; return the exit status."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    servers: list[aio.Server | ProbeServer] = []
    try:
        engine = Engine(config)
        engine.start()
        if config.health_address:
            servers.append(ProbeServer(config.health_address, lambda: engine.is_ready))
            await servers[-1].start()
        server = aio.server(interceptors=[ErrorInterceptor()], options=server_options())
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(SchedulerServicer(engine), server)  # type: ignore[no-untyped-call]
        tls = config.hop_tls
        credentials = None if tls is None else server_credentials(tls)
        servers.append(await _listen(server, config.scheduler_address, credentials))
        if config.admin_address:
            authorize = None if config.admin_keys is None else AdminKeys(config.admin_keys).authorize
            memory = RequestMemory(_MAX_ADMIN_CALLS * SMALL_MESSAGE_BYTES, SMALL_MESSAGE_BYTES)
            admin = aio.server(
                interceptors=[ErrorInterceptor(authorize, memory)],
                options=public_server_options(SMALL_MESSAGE_BYTES, _MAX_ADMIN_CALLS),
            )
            admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminServicer(engine, config), admin)  # type: ignore[no-untyped-call]
            servers.append(await _listen(admin, config.admin_address, credentials))
    except ValueError as error:
        log.error("%s", error)
        return 1
    except (OSError, RuntimeError, zmq.ZMQError) as error:
        log.error("cannot listen: %s; choose another address or stop what uses it", error)
        return 1
    gc.collect()
    gc.freeze()  # what lives as long as the process need not be looked at by the collector again
    log.info("scheduler %s: gateways at %s, workers at %s", engine.scheduler_id, *_addresses(config))
    engine.reports.ready()
    await stopping.wait()
    log.info("stopping; running requests have %.0f s", config.grace_s)
    await engine.stop()
    for each in reversed(servers):  # probes are answered to the end
        await each.stop(1.0)
    return 0


async def _listen(server: aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> aio.Server:
    """Bind and start a server; RuntimeError if the address is taken."""
    if listen(server, address, credentials) == 0 and not address.startswith("unix:"):
        raise RuntimeError(f"{address} cannot be bound")
    await server.start()
    return server


def _addresses(config: SchedulerConfig) -> tuple[str, str]:
    return config.scheduler_address, config.worker_endpoint


def run(config: SchedulerConfig) -> int:
    """Run a scheduler process; return its exit status."""
    with contextlib.suppress(KeyboardInterrupt):
        status: int = uvloop.run(serve(config))
        return status
    return 130


def main(argv: list[str] | None = None) -> int:
    """Run a scheduler with the flags given."""
    config = load(SchedulerConfig, sys.argv[1:] if argv is None else argv, prog="octavo scheduler")
    setup(config.log_level, "scheduler")
    return run(config)


if __name__ == "__main__":
    sys.exit(main())
