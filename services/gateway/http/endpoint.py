"""What every endpoint of the listener has in common: request id, body within limits, errors, disconnects."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, BinaryIO, Final, NoReturn, Protocol, TypeVar, cast

from starlette.datastructures import FormData, Headers, QueryParams
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.services.common.errors import Reason, ServingError
from octavo.services.common.interceptor import choose_request_id
from octavo.services.common.logging import current_request_id
from octavo.services.common.request_memory import Hold, RequestMemory
from octavo.services.gateway.authentication import Authenticator, caller
from octavo.services.gateway.http.errors import ErrorForm, HttpError, error_response, http_error_response, openai_error
from octavo.services.gateway.http.params import Ignored
from octavo.services.gateway.http.protocol import CERTIFICATE_NAMES
from octavo.services.gateway.offload.long_json import count_marks, loads

MAX_MARKS: Final = 1 << 21
"""Most structural characters of a body, those in its texts included: so many values take some 150 MB."""
MAX_NESTED: Final = 1 << 18
"""Most lists and objects, all of which the collector of cycles looks at, in one go."""
MAX_NAMES: Final = 1 << 19
"""Most fields of objects; colons in texts count."""
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object in a body. Raises MALFORMED_REQUEST. In a thread, if it is long."""
    if (num_marks := count_marks(data)) > MAX_MARKS:
        raise _malformed(f"it has {num_marks} brackets, braces, commas and colons; send at most {MAX_MARKS}")
    if (num_nested := data.count(b"[") + data.count(b"{")) > MAX_NESTED:
        raise _malformed(f"it has {num_nested} lists and objects; send at most {MAX_NESTED}")
    if (num_names := data.count(b":")) > MAX_NAMES:
        raise _malformed(f"it has {num_names} colons; send at most {MAX_NAMES}")
    try:
        body = loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise _malformed("it is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _malformed(str(error)) from None
    except ValueError:
        raise _malformed(f"it has a number of more than {sys.get_int_max_str_digits()} digits") from None
    if not isinstance(body, dict):
        raise _malformed("it must be a JSON object")
    if _SURROGATE.search(data):
        try:
            for piece in json.JSONEncoder(ensure_ascii=False).iterencode(body):
                piece.encode()
        except UnicodeEncodeError:
            raise _malformed("it has half of a surrogate pair in it; send whole characters") from None
    return body


def _refuse_constant(name: str) -> NoReturn:
    raise _malformed(f"{name} is not JSON")


def _malformed(why: str) -> ServingError:
    return ServingError(Reason.MALFORMED_REQUEST, f"the body is not what it should be: {why}")


T = TypeVar("T")
IGNORED_HEADER = "x-ignored-fields"
"""In an answer: the fields of the request that were ignored."""
_log = logging.getLogger(__name__)
_BODY_S = 120.0
_DISCARD_S = 5.0
_UPLOAD_S = 3600.0
_MAX_FIELDS = 16
_MAX_FIELD_BYTES = 64 * 1024
_MAX_SHORT_BYTES = 64 * 1024


class Sink(Protocol):
    """Where the bytes of a form's file are written, by threads, one call at a time."""

    def write(self, data: bytes, /) -> int:
        """Take more bytes. What it raises ends the request."""

    def seek(self, place: int, /) -> int:
        """Go back to the beginning: all bytes are there."""

    def close(self) -> None:
        """Close it: the form is done with."""


class _FormParser(MultiPartParser):
    """Writes the file of a form where it is to be, not to memory and a temporary file first."""

    file: Sink

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        if self._current_part.file is not None:
            self._current_part.file.file = cast(BinaryIO, self.file)  # no more of it is used


class HttpRequest:
    """One request. A handler returns a response, or sends one itself and returns None."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        max_body_bytes: int,
        memory: RequestMemory,
        *,
        refuses_unknown: bool = False,
    ) -> None:
        self.headers = Headers(scope=scope)
        self.path_params: dict[str, Any] = scope.get("path_params", {})
        self.query = QueryParams(scope.get("query_string", b""))
        self.request_id = choose_request_id(self.headers.get("x-request-id", ""))
        self.send = send
        self.ignored = Ignored(refuses=refuses_unknown)
        """The fields of the body that are ignored."""
        self.where = f"{scope['method']} {scope['path']}"
        self._receive = receive
        self._max_body_bytes = max_body_bytes
        self._memory = memory
        self._hold: Hold | None = None
        self._arrived = asyncio.get_running_loop().time()
        self._has_body = True  # which is not read to its end

    @property
    def extra_headers(self) -> dict[str, str]:
        """Further headers of the answer, once the body is read."""
        names = self.ignored.header
        return {IGNORED_HEADER: names} if names else {}

    async def json(self) -> dict[str, Any]:
        """Return the body, a short JSON object. Raises HttpError, ServingError, ClientDisconnect."""
        return parse_object(await self.body(_MAX_SHORT_BYTES))

    async def body(self, max_bytes: int = 0) -> bytes:
        """Return the body, which should be JSON, to be parsed where that may take long; 0: as long as any may be.

        Its memory is counted as it comes, and held until `release`, with as much again for what is made of it. Raises
        HttpError, ServingError, ClientDisconnect.
        """
        self._check_encoding()
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            message = f"the body must be application/json, not {kind or 'of no type'}; set the content-type header"
            raise HttpError(415, message, "unsupported_media_type")
        try:
            async with asyncio.timeout(_BODY_S):
                return await self._body(max_bytes or self._max_body_bytes)
        except TimeoutError:
            raise HttpError(408, "the body did not arrive in time", "timeout", {"connection": "close"}) from None

    def release(self) -> None:
        """Give back the memory of the body."""
        if self._hold is not None:
            self._hold.release()

    @property
    def announced_bytes(self) -> int:
        """The length of the body as the client gave it; 0 if it did not."""
        return int(self.headers.get("content-length", "0"))

    async def form(self, max_bytes: int, file: Sink) -> FormData:
        """Return the body, a form with at most one file, whose bytes are written to `file` as they come.

        Raises HttpError, ClientDisconnect, and what `file` raises.
        """
        self._check_encoding()
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "multipart/form-data":
            message = f"the body must be multipart/form-data, not {kind or 'of no type'}; set the content-type header"
            raise HttpError(415, message, "unsupported_media_type")
        parser = _FormParser(
            self.headers, self._pieces(max_bytes), max_files=1, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES
        )
        parser.file = file
        try:
            async with asyncio.timeout(_UPLOAD_S):
                return await parser.parse()
        except MultiPartException as error:
            raise HttpError(400, f"the form is not what it should be: {error.message}", "malformed_request") from None
        except TimeoutError:
            raise HttpError(408, "the body did not arrive in time", "timeout", {"connection": "close"}) from None

    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work`, once the body is read; cancel it and raise ClientDisconnect if the client goes away."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise ClientDisconnect
        finally:
            task.cancel()
            gone.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    def deadline(self) -> float | None:
        """Return when the answer must be complete, as a time of the event loop, or None."""
        value = self.headers.get("x-request-timeout-ms")
        if value is None:
            return None
        if not (value.isascii() and value.isdecimal() and 0 < len(value) < 12 and int(value) > 0):
            raise HttpError(400, "the header x-request-timeout-ms must be a number of milliseconds", "invalid_header")
        return self._arrived + int(value) / 1000

    async def in_time(self, work: Awaitable[T]) -> T:
        """Await `work` until the deadline. Raises GENERATION_TIMEOUT."""
        try:
            async with asyncio.timeout_at(self.deadline()) as limit:
                return await work
        except TimeoutError:
            if not limit.expired():
                raise
            message = "the time in the header x-request-timeout-ms is over; allow more, or ask for less"
            raise ServingError(Reason.GENERATION_TIMEOUT, message) from None

    def _check_encoding(self) -> None:
        """Refuse a body that is packed: how long it is could only be known by unpacking it."""
        encoding = self.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            message = f"the content-encoding {encoding[:64]!r} is not supported; send the body as it is"
            raise HttpError(415, message, "unsupported_media_type", {"accept-encoding": "identity"})

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _body(self, max_bytes: int) -> bytes:
        tenant = caller().tenant
        arriving = Hold(self._memory.arriving, tenant)
        pieces = []
        try:
            if self.announced_bytes <= max_bytes:
                self._memory.check(tenant, 2 * self.announced_bytes)
            async for piece in self._pieces(max_bytes):
                if self._has_body:
                    arriving.grow(len(piece))
                pieces.append(piece)
            self._hold = self._memory.hold(tenant, 2 * sum(map(len, pieces)))
        except ServingError:
            pieces.clear()
            arriving.release()
            await self.discard()
            raise
        finally:
            arriving.release()
        return b"".join(pieces)

    async def _pieces(self, max_bytes: int) -> AsyncGenerator[bytes, None]:
        if self.announced_bytes > max_bytes:
            raise await self._too_large(max_bytes)
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            piece = message.get("body", b"")
            size += len(piece)
            if size > max_bytes:
                raise await self._too_large(max_bytes)
            self._has_body = message.get("more_body", False)
            yield piece
            if not self._has_body:
                return

    async def _too_large(self, max_bytes: int) -> HttpError:
        await self.discard()
        message = f"the body is longer than {max_bytes} bytes"
        return HttpError(413, message, "request_too_large", {"connection": "close"})

    async def discard(self) -> None:
        """Discard, for a while, what still comes of a body that is refused: a client reads when it has written."""
        try:
            if "expect" not in self.headers:
                async with asyncio.timeout(_DISCARD_S):
                    while self._has_body:
                        self._has_body = (await self._receive()).get("more_body", False)
        except TimeoutError:
            pass  # it is told, even if it may not listen


Handler = Callable[[HttpRequest], Awaitable[Response | None]]


class Endpoint:
    """An ASGI application around a handler: the one place where an exception becomes an HTTP response."""

    def __init__(
        self,
        handler: Handler,
        max_body_bytes: int,
        authenticator: Authenticator | None,
        memory: RequestMemory,
        *,
        refuses_unknown: bool = False,
        error_form: ErrorForm = openai_error,
    ) -> None:
        """`authenticator` None: everybody may call. `memory`: what bodies may take."""
        self._error_form = error_form
        self._refuses_unknown = refuses_unknown
        self._handler = handler
        self._max_body_bytes = max_body_bytes
        self._authenticator = authenticator
        self._memory = memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = HttpRequest(
            scope, receive, send, self._max_body_bytes, self._memory, refuses_unknown=self._refuses_unknown
        )
        current_request_id.set(request.request_id)
        try:
            if self._authenticator is not None:
                names = scope.get(CERTIFICATE_NAMES, ())
                self._authenticator.enter(self._authenticator.identify(_credential(request.headers), names))
            response = await self._handler(request)
        except ClientDisconnect:
            return
        except HttpError as error:
            response = http_error_response(error, request.request_id, self._error_form)
        except ServingError as error:
            response = error_response(error, request.request_id, self._error_form)
        except Exception:
            response = error_response(internal_error(request), request.request_id, self._error_form)
        finally:
            request.release()
        if response is not None:
            response.headers.setdefault("x-request-id", request.request_id)
            response.headers.update(request.extra_headers)
            await response(scope, receive, send)


def _credential(headers: Headers) -> str:
    """Return the authorization header, or what stands for it: Anthropic's clients send a key in one of their own."""
    key = headers.get("x-api-key", "")
    return headers.get("authorization", f"Bearer {key}" if key else "")


def internal_error(request: HttpRequest) -> ServingError:
    """Return what a client is told about a bug; the log has the exception that is being handled."""
    _log.exception("%s of request %s failed", request.where, request.request_id)
    return ServingError(Reason.INTERNAL, "the server failed; its log has the details under this request id")
