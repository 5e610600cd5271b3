"""The ingress of the Serve application: a gateway below one replica, which finds the engines by itself."""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from starlette.requests import Request
from starlette.responses import Response

from octavo.inference.v1 import embedding_pb2, generation_pb2, load_pb2, model_pb2, tokenizer_pb2
from octavo.ray.forward import Answer, GrpcForward, HttpForward
from octavo.services.offline.local_server import LocalServer

_log = logging.getLogger(__name__)
_FOLLOW_S = 1.0
_ASK_S = 5.0
_HEALTH_S = 5.0
_SERVICES = (embedding_pb2, generation_pb2, load_pb2, model_pb2, tokenizer_pb2)


class Gateway:
    """A replica. Its gateway is a child of `octavo serve --schedulers 0`, which starts it again if it dies.

    An engine that dies costs no request: the gateway lets what ran there go on at another one, with the same tokens.

    engines  handle of the engines' deployment
    secret   that all gateways sign resume tokens with
    model    and `flags`: as for Engine
    """

    def __init__(self, engines: Any, secret: str, model: str, flags: Sequence[str] = ()) -> None:
        """Return once there is an engine. Raises LocalServerError."""
        self._folder = tempfile.TemporaryDirectory(prefix="octavo-ray-")
        addresses, key = Path(self._folder.name) / "engines", Path(self._folder.name) / "resume.key"
        key.write_text(secret)  # the folder is its user's alone
        addresses.touch()
        self._stop = threading.Event()
        following = threading.Thread(target=_follow, args=(engines, addresses, self._stop), daemon=True)
        following.start()
        own = ["--schedulers=0", f"--scheduler-addresses=file:{addresses}", f"--resume-key-file={key}"]
        self._server = LocalServer(model, [*flags, *own], verbose=True)
        self._server.__enter__()
        self._http = HttpForward(self._server.url)
        self._grpc: GrpcForward | None = None

    async def __call__(self, request: Request) -> Response:
        """Answer an HTTP request."""
        return await self._http(request)

    @property
    def forward(self) -> GrpcForward:
        """What passes gRPC calls on; made on the event loop that it is used on."""
        if self._grpc is None:
            self._grpc = GrpcForward(self._server.address)
        return self._grpc

    async def check_health(self) -> None:
        """Raise if the gateway does not answer. Engines that are down are no reason to replace a gateway."""
        if not self._server.is_running:
            raise RuntimeError("octavo serve has ended")
        async with grpc.aio.insecure_channel(self._server.address) as channel:
            question = health_pb2.HealthCheckRequest(service="octavo.inference.v1.ModelService")
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(question, timeout=_HEALTH_S, wait_for_ready=True)
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise RuntimeError("the gateway does not serve")

    async def __del__(self) -> None:
        """Stop. Serve calls this when it removes the replica, once its requests have ended."""
        self._stop.set()
        await asyncio.to_thread(self._server.close)
        self._folder.cleanup()


def _follow(engines: Any, path: Path, stop: threading.Event) -> None:
    """Write the engines' addresses to a file, whenever they change, until told to stop."""
    known: list[str] | None = None
    while not stop.wait(_FOLLOW_S):
        try:
            # One that does not answer is left out: a gateway keeps to an engine as long as it is connected to it.
            answers = engines.broadcast("address").results(timeout_s=_ASK_S, return_exceptions=True)
        except Exception as error:  # Ray has many words for it, and one is that no engine runs yet: asked again
            _log.warning("cannot ask for the engines' addresses: %s: %s", type(error).__name__, error)
            continue
        found = sorted(answer for answer in answers if isinstance(answer, str))
        if found != known:
            partial = path.with_suffix(".new")
            partial.write_text("".join(f"{address}\n" for address in found))
            os.replace(partial, path)
            known = found


def _add_method(method: MethodDescriptor) -> None:
    """Give Gateway the method that Serve calls for an RPC: it goes by the RPC's name alone."""
    path = f"/{method.containing_service.full_name}/{method.name}"

    async def unary(self: Gateway, request: Message, grpc_context: Any) -> Answer:
        return await self.forward.unary(path, request, grpc_context)

    async def stream(self: Gateway, request: Message, grpc_context: Any) -> AsyncIterator[Answer]:
        async for answer in self.forward.stream(path, request, grpc_context):
            yield answer

    async def duplex(self: Gateway, request: AsyncIterator[Message], grpc_context: Any) -> AsyncIterator[Answer]:
        async for answer in self.forward.duplex(path, request, grpc_context):
            yield answer

    function: Any = duplex if method.client_streaming else stream if method.server_streaming else unary
    function.__name__, function.__qualname__ = method.name, f"Gateway.{method.name}"
    assert not hasattr(Gateway, method.name), f"two RPCs are called {method.name}"
    setattr(Gateway, method.name, function)


for _file in _SERVICES:
    for _service in _file.DESCRIPTOR.services_by_name.values():
        for _method in _service.methods:
            _add_method(_method)
