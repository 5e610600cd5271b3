"""Sends the requests of a batch to a server's OpenAI-compatible API."""

from __future__ import annotations

import secrets
import ssl
from types import TracebackType
from typing import Any, Self

import aiohttp

from octavo.services.batch.lines import Line
from octavo.services.batch.results import Answer
from octavo.services.batch.runner import TryAgain, final

_TOTAL_S = 24 * 3600.0
_CONNECT_S = 10.0


class HttpSender:
    """A Sender, as a context.

    url  of the server, without /v1
    key  sent as `authorization: Bearer KEY`
    tls  for https; None: the system's authorities
    """

    def __init__(self, url: str, key: str = "", tls: ssl.SSLContext | None = None) -> None:
        self._tls: ssl.SSLContext | bool = True if tls is None else tls
        self._url = url.rstrip("/")
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._run_id = secrets.token_hex(6)
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=_TOTAL_S, sock_connect=_CONNECT_S)
        connector = aiohttp.TCPConnector(limit=0, ssl=self._tls)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, headers=self._headers)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._session.close()

    async def only_model(self) -> str:
        """Return the name of the server's model, the first if there are several. Raises aiohttp.ClientError."""
        async with self._session.get(f"{self._url}/v1/models", raise_for_status=True) as response:
            return str((await response.json())["data"][0]["id"])

    async def __call__(self, line: Line) -> Answer:
        """See Sender."""
        request_id = f"batch-{self._run_id}-{line.index}"
        headers = {"x-request-id": request_id}
        try:
            async with self._session.post(self._url + line.url, json=line.body, headers=headers) as response:
                answer = Answer(response.status, request_id, await _object(response))
                retry_after = response.headers.get("retry-after", "")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            failed = Answer(0, request_id, {"code": "connection_error", "message": f"{type(error).__name__}: {error}"})
            raise TryAgain(failed, blameless=True) from None
        return final(answer, retry_after)


async def _object(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """Return the body, made an object if it is something else."""
    try:
        value = await response.json(content_type=None)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    # A proxy's page need not be in the alphabet that it says.
    return {"error": {"message": (await response.text(errors="replace"))[:1000], "code": "no_json"}}
