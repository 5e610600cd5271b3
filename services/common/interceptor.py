"""The one place where an exception becomes a gRPC status.

Wrap a server with ErrorInterceptor and its methods only raise: a ServingError becomes its status,
anything else becomes INTERNAL and one line in the log, and a request that does not parse becomes
INVALID_ARGUMENT instead of grpc.aio's INTERNAL.
"""

from __future__ import annotations

import inspect
import logging
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from octavo.services.common.errors import Reason, ServingError, status_text, trailers
from octavo.services.common.logging import current_request_id

_log = logging.getLogger(__name__)
_MAX_REQUEST_ID = 128
_NOT_ALLOWED = re.compile(r"[^A-Za-z0-9._:/@+=-]")

Authorize = Callable[[str, Any], None]
"""Called with a method's name and the context of a call before its handler; raises ServingError to refuse it."""


def request_id() -> str:
    """Return the id of the call that runs now: the client's x-request-id, cleaned, or a new one."""
    return current_request_id.get()


def choose_request_id(given: str) -> str:
    """Return the id that a client gave, cleaned, or a new one if nothing is left of it."""
    return _NOT_ALLOWED.sub("", given)[:_MAX_REQUEST_ID] or secrets.token_hex(12)


def _read_request_id(context: Any) -> str:
    values = (value for key, value in context.invocation_metadata() or () if key == "x-request-id")
    return choose_request_id(next((value for value in values if isinstance(value, str)), ""))


class _Malformed:
    """Stands for a request that does not parse, until there is a context to refuse it with."""


def _deferring(deserializer: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Return a deserializer that never raises; UTF-8 that is broken is a DecodeError as well."""

    def deserialize(data: bytes) -> Any:
        try:
            return deserializer(data)
        except (DecodeError, ValueError):
            return _Malformed()

    return deserialize


def _parsed(request: Any) -> Any:
    if isinstance(request, _Malformed):
        raise ServingError(
            Reason.MALFORMED_REQUEST,
            "the request is not a valid protobuf message of its type (strings must be UTF-8); "
            "build it with code generated from this server's protos",
        )
    return request


async def _parsed_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _parsed(request)


async def _abort(context: Any, error: ServingError) -> None:
    await context.abort(error.code, status_text(error), trailers(error, request_id()))


async def _guard(call: Callable[[], Awaitable[Any]], context: Any, method: str, authorize: Authorize | None) -> Any:
    """Run one call; make a status of what it raises. Cancellation and context.abort pass through."""
    current_request_id.set(_read_request_id(context))
    context.set_trailing_metadata((("x-request-id", request_id()),))
    try:
        if authorize is not None:
            authorize(method, context)
        return await call()
    except ServingError as error:
        _log.debug("%s of request %s: %s %s", method, request_id(), error.reason, error.message)
        await _abort(context, error)
    except aio.AbortError:
        raise
    except Exception:
        _log.exception("%s of request %s failed", method, request_id())
        message = "the server failed; its log has the details under this request id"
        await _abort(context, ServingError(Reason.INTERNAL, message))


def _unary(
    behavior: Callable[[Any, Any], Any], streaming_in: bool, method: str, authorize: Authorize | None
) -> Callable[[Any, Any], Any]:
    """Wrap a method that returns one response."""

    async def handle(request: Any, context: Any) -> Any:
        async def call() -> Any:
            return await behavior(_parsed_stream(request) if streaming_in else _parsed(request), context)

        return await _guard(call, context, method, authorize)

    return handle


def _streaming(
    behavior: Callable[[Any, Any], Any], streaming_in: bool, method: str, authorize: Authorize | None
) -> Callable[[Any, Any], Any]:
    """Wrap a method that writes responses, or yields them."""
    generator = inspect.isasyncgenfunction(behavior)

    async def handle(request: Any, context: Any) -> None:
        async def call() -> None:
            ready = _parsed_stream(request) if streaming_in else _parsed(request)
            if not generator:
                await behavior(ready, context)
                return
            async for response in behavior(ready, context):
                await context.write(response)

        await _guard(call, context, method, authorize)

    return handle


class ErrorInterceptor(aio.ServerInterceptor):  # type: ignore[type-arg]  # no generic at run time
    """See the module."""

    def __init__(self, authorize: Authorize | None = None) -> None:
        self._authorize = authorize
        self._wrapped: dict[str, tuple[Any, Any]] = {}  # by method: its handler, and the one made of it

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the method's handler, guarded; None stays None (gRPC answers UNIMPLEMENTED)."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        method = str(handler_call_details.method)
        known = self._wrapped.get(method)
        if known is None or known[0] is not handler:
            known = self._wrapped[method] = (handler, _guarded(handler, method, self._authorize))
        return known[1]


def _guarded(handler: Any, method: str, authorize: Authorize | None) -> Any:
    """Return a handler around another one, of the same kind."""
    make, behavior = {
        (False, False): (grpc.unary_unary_rpc_method_handler, handler.unary_unary),
        (False, True): (grpc.unary_stream_rpc_method_handler, handler.unary_stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, handler.stream_unary),
        (True, True): (grpc.stream_stream_rpc_method_handler, handler.stream_stream),
    }[handler.request_streaming, handler.response_streaming]
    wrap = _streaming if handler.response_streaming else _unary
    return make(
        wrap(behavior, handler.request_streaming, method, authorize),
        _deferring(handler.request_deserializer),
        handler.response_serializer,
    )
