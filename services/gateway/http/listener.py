"""Listens for HTTP on the gateway's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Generator

import uvicorn
from starlette.types import ASGIApp

from octavo.services.common.files import version_of
from octavo.services.common.tls_files import TlsFiles
from octavo.services.gateway.http.protocol import LimitedProtocol

_log = logging.getLogger(__name__)
_BACKLOG = 2048
_LOOK_S = 2.0
_LAST_WRITES_S = 2  # for responses that are complete when the listener stops


class HttpListener:
    """A socket that is bound at once, and served between `start` and `stop`."""

    def __init__(
        self, address: str, app: ASGIApp, max_connections: int, keep_alive_s: int, tls: TlsFiles | None = None
    ) -> None:
        """`address` is host:port. Raises OSError if it cannot be listened on, or the files of `tls` cannot be used."""
        self._socket = _bind(address)
        self.port: int = self._socket.getsockname()[1]
        """The port that is listened on."""
        self._server = _Server(
            uvicorn.Config(
                app,
                http=LimitedProtocol,
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                log_level="error",  # at "warning" each broken request is a line
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=_BACKLOG,
                limit_concurrency=max_connections,
                timeout_keep_alive=keep_alive_s,
                timeout_graceful_shutdown=_LAST_WRITES_S,
                ssl_certfile=None if tls is None else tls.certificate,
                ssl_keyfile=None if tls is None else tls.key,
                ssl_ca_certs=None if tls is None or tls.ca is None else str(tls.ca),
                ssl_cert_reqs=ssl.CERT_NONE if tls is None or tls.ca is None else ssl.CERT_REQUIRED,
            )
        )
        self._tls = tls
        self._context: ssl.SSLContext | None = None
        self._following: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take requests."""
        self._task = asyncio.create_task(self._server.serve([self._socket]))
        serving = asyncio.create_task(self._server.serving.wait())
        await asyncio.wait((self._task, serving), return_when=asyncio.FIRST_COMPLETED)
        serving.cancel()
        if self._task.done():
            self._task.result()
        if self._tls is not None and self._server.config.ssl is not None:
            self._context = self._server.config.ssl
            self._context.sni_callback = self._use_context  # called for each connection, whatever name it asks for
            _forget_sessions(self._context)
            self._following = asyncio.create_task(self._follow_files(self._tls))

    async def stop(self) -> None:
        """Close idle connections and let responses end that have nothing to wait for; then cut the rest off."""
        if self._task is None:
            self._socket.close()
            return
        if self._following is not None:
            self._following.cancel()
        self._server.should_exit = True
        await self._task

    async def _follow_files(self, tls: TlsFiles) -> None:
        """Give new connections the certificate and the authorities on disk, for as long as the listener runs."""
        version = _version(tls)
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                if (now := _version(tls)) != version:
                    self._context = _make_context(tls)
                    version = now
            except (OSError, ssl.SSLError) as error:  # half replaced: the next turn sees all of it
                _log.warning("%s was not read again: %s", tls.certificate, error)

    def _use_context(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        """Give a connection that begins the files as they are now: the socket keeps the context it was made with."""
        del name
        if self._context is not None and context is not self._context:
            connection.context = self._context


class _Server(uvicorn.Server):
    """Leaves signals to the process, and says when it serves."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.serving = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.serving.set()


def _make_context(tls: TlsFiles) -> ssl.SSLContext:
    """Return what uvicorn makes at the start. Raises OSError, ssl.SSLError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.certificate, tls.key)
    if tls.ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(tls.ca)
    _forget_sessions(context)
    return context


def _forget_sessions(context: ssl.SSLContext) -> None:
    """Check each connection's certificate: one that resumes a session is not asked for it again."""
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0


def _version(tls: TlsFiles) -> tuple[object, ...]:
    return tuple(version_of(path) for path in (tls.certificate, tls.key, tls.ca) if path is not None)


def _bind(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    family, kind, protocol, _, where = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # An old connection that is still closing does not matter; another listener makes this fail.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(_BACKLOG)  # at once, so that nobody else can bind it before `start`
    except OSError:
        listener.close()
        raise
    return listener
