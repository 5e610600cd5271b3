"""How a benchmark talks to a server: Octavo's gRPC API, or the OpenAI completions API of any server."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

import aiohttp

from octavo.services.bench.outcomes import Outcome
from octavo.services.bench.workloads import Prompt
from octavo.services.client import Client, OctavoError

_REQUEST_TIMEOUT_S = 3600.0


class Transport(Protocol):
    """Sends one prompt, greedy and without an early end, and notes when its output comes."""

    async def generate(self, prompt: Prompt) -> Outcome:
        """Return what the request came to; failures are noted, not raised."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class GrpcTransport:
    """Octavo's own API. The client is closed with it."""

    OPTIONS: ClassVar[Mapping[str, Any]] = {"timeout_s": _REQUEST_TIMEOUT_S}
    """Those of the client."""

    def __init__(self, client: Client, model: str = "") -> None:
        self._client = client
        self._model = model

    @classmethod
    def client(cls, address: str) -> Client:
        """Return a client of a server without keys and TLS."""
        return Client(address, **cls.OPTIONS)

    async def generate(self, prompt: Prompt) -> Outcome:
        """See Transport."""
        outcome = Outcome(time.monotonic())
        stream = self._client.stream(
            prompt.text,
            model=self._model,
            max_new_tokens=prompt.max_tokens,
            temperature=0.0,
            ignore_end_of_sequence=True,
        )
        try:
            async for delta in stream:
                if delta.token_count:
                    outcome.arrivals.append(time.monotonic())
        except OctavoError as error:
            outcome.error = error.reason or error.code.name
        if stream.completed is not None:
            outcome.prompt_tokens = stream.completed.usage.prompt_tokens
            outcome.output_tokens = stream.completed.usage.output_tokens
        outcome.ended_at = time.monotonic()
        return outcome

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._client.close()


class OpenAITransport:
    """POST /v1/completions with server-sent events; `extra` is added to each body.

    url  of the server, without /v1, for example http://127.0.0.1:8000
    tls  for https; None: the system's authorities
    """

    def __init__(
        self,
        url: str,
        model: str,
        extra: Mapping[str, Any] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._headers = dict(headers or {})
        self._tls: ssl.SSLContext | bool = True if tls is None else tls
        self._url = f"{url.rstrip('/')}/v1/completions"
        self._body = {"model": model, "temperature": 0, "stream": True, "ignore_eos": True}
        self._body |= {"stream_options": {"include_usage": True}, **(extra or {})}
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        # A connection for each request: some servers close idle ones in the middle of the next request.
        connector = aiohttp.TCPConnector(limit=0, force_close=True, ssl=self._tls)
        timeout = aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT_S)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, read_bufsize=1 << 20, headers=self._headers
        )
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._session.close()

    async def generate(self, prompt: Prompt) -> Outcome:
        """See Transport."""
        outcome = Outcome(time.monotonic())
        body = {**self._body, "prompt": prompt.text, "max_tokens": prompt.max_tokens}
        try:
            async with self._session.post(self._url, json=body) as response:
                if response.status != 200:
                    outcome.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                else:
                    await _read_events(response.content, outcome)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            outcome.error = f"{type(error).__name__}: {error}"
        outcome.ended_at = time.monotonic()
        return outcome


async def _read_events(content: aiohttp.StreamReader, outcome: Outcome) -> None:
    async for line in content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if event.get("error"):
            outcome.error = str(event["error"])[:200]
            return
        # Some servers send a last choice without output: it is no token.
        if any(choice.get("text") for choice in event.get("choices") or ()):
            outcome.arrivals.append(time.monotonic())
        if usage := event.get("usage"):
            outcome.prompt_tokens = usage["prompt_tokens"]
            outcome.output_tokens = usage["completion_tokens"]
