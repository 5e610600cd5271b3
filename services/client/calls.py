"""Calls over one or several addresses: which one is next, and when a call may be tried again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import grpc

from octavo.inference.v1 import (
    embedding_pb2_grpc,
    generation_pb2_grpc,
    load_pb2_grpc,
    model_pb2_grpc,
    tokenizer_pb2_grpc,
)
from octavo.services.client.errors import ClientClosedError, OctavoError, from_rpc_error

T = TypeVar("T")

_ATTEMPTS = 7  # over two and a half seconds
_ATTEMPTS_TO_COME_BACK = 14  # over nine seconds: on a busy machine a gateway that died takes four to be back
_BACKOFF_S = (0.05, 1.0)
_AVOID_S = 1.0
_MAX_MESSAGE_BYTES = 64 << 20
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
    ("grpc.enable_retries", 0),  # calls are tried again here, with another address if there is one
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # A long prefill sends nothing: pings notice a dead connection, and keep proxies from cutting a live one.
    ("grpc.keepalive_time_ms", 30_000),
    # A new client does not wait for what an old one of this process has given up.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


_first_pid: int | None = None  # of the process that used gRPC first; a fork inherits the number


def check_not_forked() -> None:
    """Raise RuntimeError in a child that was forked after its parent used gRPC: its calls would wait for ever."""
    global _first_pid
    _first_pid = _first_pid or os.getpid()
    if _first_pid != os.getpid():
        raise RuntimeError(
            "this process was forked from one that has used an Octavo client, and gRPC does not survive that: "
            'start processes with multiprocessing.get_context("spawn"), or make the first client in the child'
        )


class Endpoint:
    """One address, with a stub for each service."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None) -> None:
        self.channel = (
            grpc.aio.insecure_channel(address, options=_OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options=_OPTIONS)
        )
        # Generated stubs have no types.
        self.generation: Any = generation_pb2_grpc.GenerationServiceStub(self.channel)  # type: ignore[no-untyped-call]
        self.models: Any = model_pb2_grpc.ModelServiceStub(self.channel)  # type: ignore[no-untyped-call]
        self.tokenizer: Any = tokenizer_pb2_grpc.TokenizerServiceStub(self.channel)  # type: ignore[no-untyped-call]
        self.embedding: Any = embedding_pb2_grpc.EmbeddingServiceStub(self.channel)  # type: ignore[no-untyped-call]
        self.load: Any = load_pb2_grpc.LoadServiceStub(self.channel)  # type: ignore[no-untyped-call]
        self.failed_at = float("-inf")
        self.has_answered = False


class Endpoints:
    """All addresses of a client, taken in turn; one that failed a moment ago is passed over."""

    def __init__(self, addresses: Sequence[str], credentials: grpc.ChannelCredentials | None) -> None:
        if not addresses:
            raise ValueError("give at least one address")
        check_not_forked()
        self._closed = asyncio.Event()
        self._all = [Endpoint(address, credentials) for address in addresses]
        self._next = 0

    async def close(self) -> None:
        """Close all connections; calls that still run, and those that wait to be tried again, end."""
        self._closed.set()
        await asyncio.gather(*(endpoint.channel.close(None) for endpoint in self._all))

    def pick(self) -> Endpoint:
        """Return whose turn it is. Raises ClientClosedError."""
        if self._closed.is_set():
            raise ClientClosedError
        now = asyncio.get_running_loop().time()
        for _ in self._all:
            endpoint = self._all[self._next % len(self._all)]
            self._next += 1
            if now - endpoint.failed_at > _AVOID_S:
                return endpoint
        return min(self._all, key=lambda endpoint: endpoint.failed_at)

    def check_open(self) -> None:
        """Raise ClientClosedError if a call was cancelled because of `close`, and not with the caller's task."""
        task = asyncio.current_task()
        if self._closed.is_set() and not (task and task.cancelling()):
            raise ClientClosedError from None

    async def call(
        self,
        make: Callable[[Endpoint], Awaitable[T]],
        deadline: float | None,
        on_retry: Callable[[OctavoError], None] | None = None,
    ) -> T:
        """Run `make` until it succeeds, fails for good, or has failed often. Raises OctavoError.

        It is tried again if no server took it, and the request was not admitted: at once where another address is left,
        else after the time that the server named, or a growing one. An address that has answered before is given
        longer to answer at all. `deadline` is a time of the event loop; `on_retry` is told of failures but the last.
        """
        attempt = 0
        while True:
            endpoint = self.pick()
            try:
                answer = await make(endpoint)
                endpoint.has_answered = True
                return answer
            except asyncio.CancelledError:
                self.check_open()
                raise
            except OctavoError as error:
                is_away = endpoint.has_answered and not error.reason
                attempts = max(_ATTEMPTS_TO_COME_BACK if is_away else _ATTEMPTS, len(self._all) + 1)
                if not error.was_not_taken or error.admitted or attempt + 1 >= attempts:
                    raise
                endpoint.failed_at = asyncio.get_running_loop().time()
                if on_retry is not None:
                    on_retry(error)
                if attempt + 1 >= len(self._all):
                    await self.pause(attempt, error, deadline)
                attempt += 1

    async def pause(self, attempt: int, error: OctavoError, deadline: float | None) -> None:
        """Wait before the next attempt. Raises `error` if the deadline comes first, ClientClosedError at `close`."""
        least, longest = _BACKOFF_S
        seconds = max(error.retry_after or 0.0, min(least * 2**attempt, longest) * random.uniform(0.8, 1.2))
        if deadline is not None and asyncio.get_running_loop().time() + seconds >= deadline:
            raise error
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closed.wait()
            raise ClientClosedError


async def unary(call: Any, timeout_s: float | None = None) -> Any:
    """Return the answer of a call. Raises OctavoError."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, timeout_s) from None


async def first_of(call: Any, timeout_s: float | None = None) -> tuple[Any, Any]:
    """Return a stream with its first message, None if it has none. Raises OctavoError, and cancels then."""
    try:
        first = await call.read()
        return call, None if first is grpc.aio.EOF else first  # type: ignore[attr-defined]  # not in the stubs
    except grpc.aio.AioRpcError as error:
        failure = from_rpc_error(error, timeout_s)
        # Headers of the server's own mean that the request was admitted. grpc.aio loses headers that come together with
        # the status; no status that a gateway sends after them invites another attempt, so only a connection that
        # breaks in that moment is mistaken for one that never took the request.
        failure.admitted = "x-request-id" in dict(await call.initial_metadata() or ())
        raise failure from None
    except BaseException:
        call.cancel()
        raise
