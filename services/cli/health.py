"""`octavo health`: what probes and `helm test` run. Every question that is set must have a good answer."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.services.cli import server_options
from octavo.services.cli.server_options import DEFAULT_ADDRESS, ServerConfig

if TYPE_CHECKING:
    import grpc

_PROMPT = "The capital of France is"
_PACKAGES = {"grpc_health": "grpcio-health-checking", "grpc_reflection": "grpcio-reflection"}
_REFLECTION = "grpc.reflection.v1alpha.ServerReflection"


@dataclass(frozen=True, kw_only=True)
class HealthConfig(ServerConfig):
    """Settings of `octavo health`."""

    address: str = field(
        default="",
        metadata={
            "group": "server",
            "help": "a gateway, or any process's --health-address: host:port or unix:PATH; without this and "
            f"--alive-file it is {DEFAULT_ADDRESS}",
        },
    )
    alive_file: Path | None = field(
        default=None, metadata={"help": "a worker's --alive-file: it must be younger than --max-age"}
    )
    max_age_s: float = field(default=60.0, metadata={"help": "how old that file may be"})
    service: str = field(default="", metadata={"help": "which service must be SERVING there; empty: all of it"})
    reflection: bool = field(default=False, metadata={"help": "reflection must be answered as well"})
    generate: int = field(default=0, metadata={"help": "stream so many tokens as well; 0: none"})
    model: str = field(default="", metadata={"help": "of which model; not needed if there is one", "metavar": "NAME"})
    timeout_s: float = field(default=10.0, metadata={"help": "how long all of it may take"})

    def __post_init__(self) -> None:
        if self.alive_file is None and not self.address:
            object.__setattr__(self, "address", DEFAULT_ADDRESS)
        super().__post_init__()
        if self.timeout_s <= 0 or self.max_age_s <= 0:
            raise ValueError("--timeout-s and --max-age-s must be positive")
        if self.generate < 0:
            raise ValueError("--generate must not be negative")


class _UnwellError(Exception):
    """An answer was not good; the message says which."""


def main(argv: Sequence[str]) -> int:
    """Ask; `argv[0]` is the command's name. Return 1, with one line on stderr, unless all is well."""
    config = server_options.load(
        HealthConfig, argv[1:], prog="octavo health", description="Asks a process whether it is well."
    )
    try:
        if config.alive_file is not None:
            _check_alive(config.alive_file, config.max_age_s)
        if config.address:
            for module, package in _PACKAGES.items():
                if importlib.util.find_spec(module) is None and (module != "grpc_reflection" or config.reflection):
                    raise _UnwellError(f"{package} is missing: pip install {package}")
            asyncio.run(_check(config))
            print(f"{config.address}: {config.service or 'the server'} is SERVING")
    except (_UnwellError, OSError) as error:
        print(f"octavo health: {error}", file=sys.stderr)
        return 1
    return 0


def _check_alive(path: Path, max_age_s: float) -> None:
    try:
        age_s = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        raise _UnwellError(f"there is no {path} yet: the model is being loaded") from None
    if age_s > max_age_s:
        raise _UnwellError(f"{path} was touched {age_s:.0f} s ago: the worker hangs")


async def _check(config: HealthConfig) -> None:
    import grpc

    try:
        async with asyncio.timeout(config.timeout_s):
            await _check_serving(config)
            if config.generate:
                await _check_generating(config)
    except TimeoutError:
        raise _UnwellError(f"{config.address} took longer than {config.timeout_s:g} s") from None
    except grpc.aio.AioRpcError as error:
        from octavo.services.client.errors import from_rpc_error

        raise _UnwellError(config.explain(from_rpc_error(error))) from None


async def _check_serving(config: HealthConfig) -> None:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    credentials = config.channel_credentials()
    if credentials is None:
        connecting = grpc.aio.insecure_channel(config.target)
    else:
        connecting = grpc.aio.secure_channel(config.target, credentials)
    async with connecting as channel:
        request = health_pb2.HealthCheckRequest(service=config.service)
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=config.timeout_s)
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
            raise _UnwellError(f"{config.address}: {config.service or 'the server'} is {name}")
        if config.reflection:
            await _check_reflection(channel, config.token())


async def _check_reflection(channel: grpc.aio.Channel, token: str) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    metadata = (("authorization", f"Bearer {token}"),) if token else None
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=metadata
    )
    async for answer in call:
        if _REFLECTION in (service.name for service in answer.list_services_response.service):
            return
    raise _UnwellError("reflection lists no services")


async def _check_generating(config: HealthConfig) -> None:
    from octavo.services.client import OctavoError

    num_tokens = 0
    try:
        async with config.client() as client:
            async for delta in client.stream(
                _PROMPT,
                model=config.model,
                max_new_tokens=config.generate,
                min_new_tokens=config.generate,
                temperature=0,
                return_token_ids=True,
            ):
                num_tokens += len(delta.token_ids)
    except OctavoError as error:
        raise _UnwellError(f"{config.address}: no stream: {config.explain(error)}") from None
    if num_tokens != config.generate:
        raise _UnwellError(f"{config.address}: the stream had {num_tokens} tokens, not {config.generate}")
    print(f"{num_tokens} tokens from {config.address}")
