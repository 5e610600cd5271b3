"""Passes gRPC calls on to the gateway of a replica, as bytes.

Serve takes a call apart (request, RayServegRPCContext) and puts its answer together again. Of what a gateway answers,
Serve has no place for response headers, nor for trailers of a stream.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.message import Message

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
