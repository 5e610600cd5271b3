"""Passes HTTP requests on to the gateway of a replica, as they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

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
        while True:
            try:
                answer = await session.request(request.method, url, data=body, headers=headers, allow_redirects=False)
                # 503 to a request for work: nobody took it.
                if answer.status != 503 or request.method != "POST" or loop.time() > started + _REFUSED_S:
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
