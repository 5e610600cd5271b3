"""HTTP/1.1 connections with limits that uvicorn lacks: heads, pipelines, slow clients, number of connections."""

from __future__ import annotations

import asyncio
import json

import httptools
from starlette.types import Scope
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

CERTIFICATE_NAMES = "octavo.certificate_names"
"""In the scope of a request: the URI names of the verified client certificate."""

_MAX_HEAD_BYTES = 65_536
_MAX_URL_BYTES = 16_384
_HEAD_S = 30.0
_STALLED_S = 60.0
_REST_S = 30.0  # for the rest of a body whose request is answered already
_REFUSED_S = 2.0  # for the rest of what is refused: a connection that is closed before it is read loses the answer
_MAX_PIPELINED = 16  # requests that wait for the answers before theirs
_PIECE_BYTES = 4096  # parsed in one go: some 200 requests at most


class _Flow(FlowControl):
    """Reads nothing while what has come is not parsed."""

    has_unparsed = False

    def resume_reading(self) -> None:
        if not self.has_unparsed:
            super().resume_reading()


class LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse a connection above the limit; wait for the first request's head, but not for long."""
        # uvicorn's own check of the same setting counts requests, and answers with plain text.
        most, self.limit_concurrency = self.limit_concurrency, None
        self._head_bytes = 0
        self.url = b""
        self._head_timer: asyncio.TimerHandle | None = None
        self._stalled_timer: asyncio.TimerHandle | None = None
        self._rest_timer: asyncio.TimerHandle | None = None
        self._unparsed = memoryview(b"")
        self._is_refused = False  # nothing more is parsed
        self._is_body_only = False  # the parser was given a head of ours, for the body of a request that it dropped
        super().connection_made(transport)
        self.flow: _Flow = _Flow(transport)
        names = (transport.get_extra_info("peercert") or {}).get("subjectAltName", ())
        self._certificate_names = tuple(name for kind, name in names if kind == "URI")
        self._expect_head()
        if most is not None and len(self.connections) > most:
            self._refuse(b"503 Service Unavailable", "there are too many connections; try again later")
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._cancel_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came, as far as there is room for requests."""
        if self._is_refused:
            return
        self._unparsed = memoryview(bytes(self._unparsed) + data if self._unparsed else data)
        self._parse()

    def _parse(self) -> None:
        while self._unparsed and len(self.pipeline) < _MAX_PIPELINED and not self._is_over():
            piece, self._unparsed = self._unparsed[:_PIECE_BYTES], self._unparsed[_PIECE_BYTES:]
            self._parse_piece(piece)
        self.flow.has_unparsed = bool(self._unparsed)
        if self._unparsed:
            self.flow.pause_reading()

    def _parse_piece(self, data: memoryview) -> None:
        """Parse a piece; refuse a head that does not end."""
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._go_on_without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        if self._head_timer is not None and not self._is_over():
            self._head_bytes += len(data)
            if len(self.url) > _MAX_URL_BYTES:
                self._refuse_url()
            elif self._head_bytes > _MAX_HEAD_BYTES:
                message = f"path and headers are longer than {_MAX_HEAD_BYTES} bytes"
                self._refuse(b"431 Request Header Fields Too Large", message)

    def _go_on_without_upgrade(self, rest: memoryview) -> None:
        """Go on after a head that offers another protocol, such as h2c: the parser takes its body for that protocol."""
        headers = dict(self.headers)
        names = [name for name in (b"content-length", b"transfer-encoding") if name in headers]
        self.parser = httptools.HttpRequestParser(self)
        if names:
            self._is_body_only = True
            head = b"".join(b"%b: %b\r\n" % (name, headers[name]) for name in names)
            self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % head)
        else:
            super().on_message_complete()
        self._unparsed = memoryview(bytes(rest) + bytes(self._unparsed))

    def on_url(self, url: bytes) -> None:
        """Take a part of the path."""
        if not self._is_body_only:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        if not self._is_body_only:
            super().on_header(name, value)

    def on_message_begin(self) -> None:
        """Start to count a request's head."""
        if self._is_body_only:
            return
        super().on_message_begin()
        scope: Scope = self.scope  # type: ignore[assignment]  # ASGI lets servers add their own
        scope[CERTIFICATE_NAMES] = self._certificate_names
        self._head_bytes = 0
        self._expect_head()

    def on_headers_complete(self) -> None:
        """Go on with the request."""
        if self._is_body_only or self._is_refused:
            return
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        if len(self.url) > _MAX_URL_BYTES:
            self._refuse_url()
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of a request's body."""
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Go on: all of a request's body is there."""
        if self._is_refused or self.parser.should_upgrade():
            return  # it is not: see `_go_on_without_upgrade`
        self._is_body_only = False
        super().on_message_complete()
        if self._rest_timer is not None:
            self._rest_timer.cancel()
            self._rest_timer = None

    def on_response_complete(self) -> None:
        """Close the connection soon if the rest of a body does not come that nobody reads."""
        is_last = not self.pipeline  # else `cycle` is a request that waits for its turn
        super().on_response_complete()
        if is_last and self.cycle is not None and self.cycle.more_body and self._rest_timer is None:
            self._rest_timer = self.loop.call_later(_REST_S, self.transport.close)
        if self._unparsed and len(self.pipeline) < _MAX_PIPELINED:
            self._parse()
            self.flow.resume_reading()

    def pause_writing(self) -> None:
        """Give up on a client that reads nothing for a minute while there is something to read."""
        super().pause_writing()
        if self._stalled_timer is None:
            self._stalled_timer = self.loop.call_later(_STALLED_S, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on: the client reads again."""
        super().resume_writing()
        if self._stalled_timer is not None:
            self._stalled_timer.cancel()
            self._stalled_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP."""
        self._refuse(b"400 Bad Request", msg)

    def _refuse_url(self) -> None:
        self._refuse(b"414 URI Too Long", f"the path is longer than {_MAX_URL_BYTES} bytes; send it in the body")

    def _is_over(self) -> bool:
        return self._is_refused or self.transport.is_closing()

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(_HEAD_S, self.transport.close)

    def _refuse(self, status: bytes, message: str) -> None:
        """Answer without a request, and close."""
        kind = "server_error" if status.startswith(b"5") else "invalid_request_error"
        error = {"message": message, "type": kind, "param": None, "code": None}
        body = json.dumps({"error": error}).encode()
        head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (status, len(body)) + body)
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.close()  # an earlier answer is not to follow
            return
        # What still comes is read and dropped, until the client, which has its answer, closes the connection.
        self._is_refused = True
        self._unparsed = memoryview(b"")
        self.flow.has_unparsed = False
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._cancel_timers()
        self._rest_timer = self.loop.call_later(_REFUSED_S, self.transport.close)

    def _cancel_timers(self) -> None:
        for timer in (self._head_timer, self._stalled_timer, self._rest_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._stalled_timer = self._rest_timer = None
