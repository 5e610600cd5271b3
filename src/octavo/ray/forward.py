"""Passes calls on to the gateway of a replica: gRPC as bytes, HTTP as it is.

Serve takes a call apart (request, RayServegRPCContext) and puts its answer together again. Of what a gateway answers,
Serve has no place for response headers, nor for trailers of a stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import grpc
from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

_OWN = {"application", "request_id", "multiplexed_model_id", "user-agent", "content-type", "te"}
_DETAILS = "grpc-status-details-bin"
_MAX_MESSAGE_BYTES = 64 << 20
_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_ATTEMPTS = 5
_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs do not know it


class Answer:
    """A response as bytes. Serve calls the one method of a message that this has."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def SerializeToString(self) -> bytes:  # noqa: N802 - named by protobuf
        """Return the bytes."""
        return self._data


class CallFailedError(Exception):
    """The gateway answered with a status, which is in Serve's context."""


class GrpcForward:
    """Forwards to `address`. It must be used on one event loop.

    A call that the gateway died of, or that found none because it is started again, is made again if nothing was
    answered yet. `context` of each method is Serve's RayServegRPCContext.
    """

    def __init__(self, address: str) -> None:
        # Without serializers, which the stubs insist on: bytes go through.
        self._channel: Any = grpc.aio.insecure_channel(address, options=_OPTIONS)

    async def unary(self, path: str, request: Message, context: Any) -> Answer:
        """Make a unary call; a failed one is an empty answer beside a status, with the gateway's details."""
        method = self._channel.unary_unary(path)
        for attempt in range(_ATTEMPTS):
            call: Any = method(request.SerializeToString(), metadata=_metadata(context), wait_for_ready=True)
            try:
                data = await call
                context.set_trailing_metadata(_pairs(await call.trailing_metadata()))
                return Answer(data)
            except grpc.aio.AioRpcError as error:
                if attempt + 1 < _ATTEMPTS and _is_broken(error):
                    continue
                _take_status(error, context)
                context.set_trailing_metadata(_pairs(error.trailing_metadata()))
                return Answer(b"")
            finally:
                call.cancel()
        raise AssertionError("the last attempt returns")

    async def stream(self, path: str, request: Message, context: Any) -> AsyncIterator[Answer]:
        """Make a call with a stream of responses. Raises CallFailedError."""
        method = self._channel.unary_stream(path)
        data = request.SerializeToString()
        make: Callable[[], Any] = lambda: method(data, metadata=_metadata(context), wait_for_ready=True)  # noqa: E731
        async for answer in _responses(make, context, _ATTEMPTS):
            yield answer

    async def duplex(self, path: str, requests: AsyncIterator[Message], context: Any) -> AsyncIterator[Answer]:
        """Make a call with streams both ways. Raises CallFailedError."""

        async def sent() -> AsyncIterator[bytes]:
            async for request in requests:
                yield request.SerializeToString()

        method = self._channel.stream_stream(path)
        make: Callable[[], Any] = lambda: method(sent(), metadata=_metadata(context), wait_for_ready=True)  # noqa: E731
        async for answer in _responses(make, context, attempts=1):  # what was read of the requests is gone
            yield answer


async def _responses(make: Callable[[], Any], context: Any, attempts: int) -> AsyncIterator[Answer]:
    num_sent = 0
    for attempt in range(attempts):
        call = make()
        try:
            while (data := await call.read()) is not _EOF:
                num_sent += 1
                yield Answer(data)
            return
        except grpc.aio.AioRpcError as error:
            if attempt + 1 < attempts and not num_sent and _is_broken(error):
                continue
            _take_status(error, context)
            raise CallFailedError(error.details()) from None
        finally:
            call.cancel()  # nothing, if it has ended


def _metadata(context: Any) -> list[tuple[str, str | bytes]]:
    """Return what the client sent, without what belongs to Serve or to the connection."""
    sent = context.invocation_metadata()
    return [(key, value) for key, value in sent if key not in _OWN and not key.startswith(("grpc-", ":"))]


def _pairs(metadata: Any) -> list[tuple[str, str | bytes]]:
    return [(key, value) for key, value in metadata or () if key == _DETAILS or not key.startswith("grpc-")]


def _is_broken(error: grpc.aio.AioRpcError) -> bool:
    """Return whether the connection broke: a gateway's own words have details."""
    has_details = any(key == _DETAILS for key, _ in _pairs(error.trailing_metadata()))
    return error.code() is grpc.StatusCode.UNAVAILABLE and not has_details


def _take_status(error: grpc.aio.AioRpcError, context: Any) -> None:
    context.set_code(error.code())
    context.set_details(error.details() or error.code().name)


_HOP_BY_HOP = {
    "connection", "content-length", "host", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer",
    "transfer-encoding", "upgrade",
}  # fmt: skip
_RETRY_S = 0.2
_REFUSED_S = 5.0  # a gateway that has just started has not found its engines yet


class HttpForward:
    """Forwards to `url`. It must be used on one event loop.

    restart_s  how long a request waits for a gateway that is being started again. One of which nothing was answered
               is sent again: nobody has seen a token of it.
    """

    def __init__(self, url: str, restart_s: float = 20.0) -> None:
        self._url = url
        self._restart_s = restart_s
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, request: Request) -> Response:
        """Return the gateway's answer, whose body goes on to be streamed. Raises aiohttp.ClientError."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0)
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._restart_s)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
        answer = await self._ask(self._session, request, await request.body())
        response = StreamingResponse(_body(answer), status_code=answer.status)
        # As they came: two of one name stay two.
        response.raw_headers = [
            (name.lower(), value) for name, value in answer.raw_headers if name.decode().lower() not in _HOP_BY_HOP
        ]
        return response

    async def _ask(self, session: aiohttp.ClientSession, request: Request, body: bytes) -> aiohttp.ClientResponse:
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        url = f"{self._url}{path}" + (f"?{request.url.query}" if request.url.query else "")
        headers = [(name, value) for name, value in request.headers.items() if name not in _HOP_BY_HOP]
        loop = asyncio.get_running_loop()
        started = loop.time()
        refused: float | None = None  # since when
        while True:
            try:
                answer = await session.request(request.method, url, data=body, headers=headers, allow_redirects=False)
                # 503 to a request for work: nobody took it.
                if answer.status != 503 or request.method != "POST":
                    return answer
                refused = loop.time() if refused is None else refused  # however long the gateway was away before
                if loop.time() > refused + _REFUSED_S:
                    return answer
                answer.close()
            except (aiohttp.ClientConnectionError, ConnectionError):
                if loop.time() > started + self._restart_s:
                    raise
            await asyncio.sleep(_RETRY_S)


async def _body(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Yield a body as it comes. A reader that is gone closes the connection, which ends the request."""
    try:
        async for chunk in answer.content.iter_any():
            yield chunk
    finally:
        answer.close()
