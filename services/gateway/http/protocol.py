"""HTTP/1.1 connections with limits that uvicorn does not have: heads, slow clients, number of connections."""

from __future__ import annotations

import asyncio
import json

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

CERTIFICATE_NAMES = "octavo.certificate_names"
"""In the scope of a request: the URI names of the verified client certificate."""

_MAX_HEAD_BYTES = 65_536
_HEAD_S = 30.0
_STALLED_S = 60.0
_REST_S = 5.0  # for the rest of a body whose request is answered already


class LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse a connection above the limit; wait for the first request's head, but not for long."""
        # uvicorn's own check of the same setting counts requests, and answers with plain text.
        most, self.limit_concurrency = self.limit_concurrency, None
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._stalled_timer: asyncio.TimerHandle | None = None
        self._rest_timer: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        names = (transport.get_extra_info("peercert") or {}).get("subjectAltName", ())
        self._certificate_names = tuple(name for kind, name in names if kind == "URI")
        self._expect_head()
        if most is not None and len(self.connections) > most:
            self._refuse(b"503 Service Unavailable", "there are too many connections; try again later")

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._cancel_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came; refuse a head that does not end."""
        super().data_received(data)
        if self._head_timer is not None and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES:
                message = f"path and headers are longer than {_MAX_HEAD_BYTES} bytes"
                self._refuse(b"431 Request Header Fields Too Large", message)

    def on_message_begin(self) -> None:
        """Start to count a request's head."""
        super().on_message_begin()
        scope: Scope = self.scope  # type: ignore[assignment]  # ASGI lets servers add their own
        scope[CERTIFICATE_NAMES] = self._certificate_names
        self._head_bytes = 0
        self._expect_head()

    def on_headers_complete(self) -> None:
        """Go on with the request."""
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Go on: all of a request's body is there."""
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
        self.transport.close()

    def _cancel_timers(self) -> None:
        for timer in (self._head_timer, self._stalled_timer, self._rest_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._stalled_timer = self._rest_timer = None
