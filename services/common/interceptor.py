"""The one place where a request becomes a message, and an exception a gRPC status.

Wrap a server with ErrorInterceptor and its methods only raise: a ServingError becomes its status,
anything else becomes INTERNAL and one line in the log, and a request that does not parse becomes
INVALID_ARGUMENT instead of grpc.aio's INTERNAL.

gRPC is told that every method takes a stream of bytes: for a method with one request it would receive and parse that
before anybody is asked whether the caller may call.
"""

from __future__ import annotations

import inspect
import logging
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from octavo.services.common.errors import Reason, ServingError, status_text, trailers
from octavo.services.common.logging import current_request_id
from octavo.services.common.request_memory import Hold, RequestMemory
from octavo.services.common.wire_scan import WireScanner, malformed

_log = logging.getLogger(__name__)
_MAX_REQUEST_ID = 128
_NOT_ALLOWED = re.compile(r"[^A-Za-z0-9._:/@+=-]")

_RECEIVE_S = 120.0  # for the only request of a call
_STREAM_WAIT_S = 600.0  # for memory: running items of a batch give it back as they end
# What a generated servicer sets before it raises NotImplementedError: a bug does not.
_UNIMPLEMENTED = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNIMPLEMENTED.value[0])  # gRPC gives one or other
_EOF: Any = aio.EOF  # type: ignore[attr-defined]  # the stubs do not know it

Authorize = Callable[[str, Any], str]
"""Called with a method's name and the context of a call before its request is received; returns the tenant.

Raises ServingError to refuse the call.
"""

_request_hold: ContextVar[Hold | None] = ContextVar("request_hold", default=None)


def request_id() -> str:
    """Return the id of the call that runs now: the client's x-request-id, cleaned, or a new one."""
    return current_request_id.get()


def choose_request_id(given: str) -> str:
    """Return the id that a client gave, cleaned, or a new one if nothing is left of it."""
    return _NOT_ALLOWED.sub("", given)[:_MAX_REQUEST_ID] or secrets.token_hex(12)


def _read_request_id(context: Any) -> str:
    values = (value for key, value in context.invocation_metadata() or () if key == "x-request-id")
    return choose_request_id(next((value for value in values if isinstance(value, str)), ""))


class _Inbox:
    """Receives the requests of one method's calls."""

    def __init__(self, parse: Callable[[bytes], Any], memory: RequestMemory | None) -> None:
        """`parse` is a generated class's FromString. `memory` None: the callers are our own processes."""
        self._parse = parse
        self._memory = memory
        self._scanner = None if memory is None else WireScanner(parse.__self__.DESCRIPTOR)  # type: ignore[attr-defined]

    @asynccontextmanager
    async def one(self, context: Any, tenant: str) -> AsyncIterator[Any]:
        """Receive the only request of a call; its memory is held until the end of the block. Raises ServingError."""
        data = await self._receive(context, tenant, _RECEIVE_S)
        if data is _EOF:
            raise malformed()
        if self._memory is None or self._scanner is None:
            yield self._parsed(data)
            return
        hold = self._memory.hold(tenant, self._scanner.scan(data).memory_bytes)
        try:
            request = self._parsed(data)
            del data
            yield request
        finally:
            hold.release()

    async def all(self, context: Any, tenant: str) -> AsyncGenerator[Any, None]:
        """Receive request after request. The memory of each is held until the next one, or as `hold_request` says."""
        while (data := await self._receive(context, tenant, None)) is not _EOF:
            if self._memory is None or self._scanner is None:
                yield self._parsed(data)
                continue
            hold = await self._memory.hold_within(tenant, self._scanner.scan(data).memory_bytes, _STREAM_WAIT_S)
            _request_hold.set(hold)
            try:
                request = self._parsed(data)
                del data
                yield request
                del request
            finally:
                if not hold.is_taken:
                    hold.release()

    async def _receive(self, context: Any, tenant: str, seconds: float | None) -> Any:
        if self._memory is None:
            return await context.read()
        return await self._memory.receiving.receive(context, tenant, seconds)

    def _parsed(self, data: bytes) -> Any:
        try:
            return self._parse(data)
        except (DecodeError, ValueError):  # UTF-8 that is broken is a ValueError
            raise malformed() from None


def hold_request() -> Hold | None:
    """Return the memory of the request that a stream gave last: it is the caller's now to release."""
    hold = _request_hold.get()
    if hold is not None:
        hold.is_taken = True
    return hold


async def _abort(context: Any, error: ServingError) -> None:
    await context.abort(error.code, status_text(error), trailers(error, request_id()))


async def _guard(call: Callable[[str], Awaitable[Any]], context: Any, method: str, authorize: Authorize | None) -> Any:
    """Run one call for its tenant; make a status of what it raises. Cancellation and context.abort pass through."""
    current_request_id.set(_read_request_id(context))
    context.set_trailing_metadata((("x-request-id", request_id()),))
    try:
        return await call("" if authorize is None else authorize(method, context))
    except ServingError as error:
        _log.debug("%s of request %s: %s %s", method, request_id(), error.reason, error.message)
        error.__traceback__ = error.__context__ = None  # its frames hold the request
        await _abort(context, error)
    except aio.AbortError:
        raise
    except Exception as error:
        if isinstance(error, NotImplementedError) and context.code() in _UNIMPLEMENTED:
            message = f"{method} is not implemented here"
            code = grpc.StatusCode.UNIMPLEMENTED
            await _abort(context, ServingError(Reason.FEATURE_DISABLED, message, code=code))
        _log.exception("%s of request %s failed", method, request_id())
        message = "the server failed; its log has the details under this request id"
        await _abort(context, ServingError(Reason.INTERNAL, message))


class ErrorInterceptor(aio.ServerInterceptor):  # type: ignore[type-arg]  # no generic at run time
    """See the module."""

    def __init__(self, authorize: Authorize | None = None, memory: RequestMemory | None = None) -> None:
        """`memory` bounds what requests may take; None: the callers are our own processes, whose messages are right."""
        self._authorize = authorize
        self._memory = memory
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
            known = self._wrapped[method] = (handler, _guarded(handler, method, self._authorize, self._memory))
        return known[1]


def _guarded(handler: Any, method: str, authorize: Authorize | None, memory: RequestMemory | None) -> Any:
    """Return a handler around another one, which takes bytes and asks before it receives any."""
    behavior = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    generator = inspect.isasyncgenfunction(behavior)
    inbox = _Inbox(handler.request_deserializer, memory)

    async def answer(requests: Any, context: Any) -> Any:
        if not generator:
            return await behavior(requests, context)
        async for response in behavior(requests, context):
            await context.write(response)
        return None

    async def handle(_: Any, context: Any) -> Any:
        async def call(tenant: str) -> Any:
            if handler.request_streaming:
                return await answer(inbox.all(context, tenant), context)
            async with inbox.one(context, tenant) as request:
                return await answer(request, context)

        return await _guard(call, context, method, authorize)

    make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
    return make(handle, None, handler.response_serializer)
