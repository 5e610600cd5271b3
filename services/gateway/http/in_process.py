"""Sends the requests of a batch through the listener's own endpoints, without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Scope

from octavo.services.batch.lines import Line
from octavo.services.batch.results import Answer
from octavo.services.batch.runner import final
from octavo.services.common.api_keys import Caller
from octavo.services.gateway.authentication import Authenticator


class InProcessSender:
    """A Sender. The requests are made in the name of `tenant`.

    endpoints  by path: what answers, without asking for a credential
    name       the batch, as it begins its requests' ids
    """

    def __init__(self, endpoints: Mapping[str, ASGIApp], authenticator: Authenticator, tenant: str, name: str) -> None:
        self._endpoints = endpoints
        self._authenticator = authenticator
        self._tenant = tenant
        self._name = name

    async def __call__(self, line: Line) -> Answer:
        """See Sender."""
        self._authenticator.enter(Caller(self._tenant))  # it stays in this request's task
        request_id = f"{self._name}-{line.index}"
        exchange = _Exchange(line.url, line.body, request_id)
        await self._endpoints[line.url](exchange.scope, exchange.receive, exchange.send)
        answer = Answer(exchange.status, request_id, json.loads(exchange.body))
        return final(answer, exchange.headers.get("retry-after", ""))


class _Exchange:
    """One request and its response, as ASGI messages."""

    def __init__(self, path: str, body: Mapping[str, Any], request_id: str) -> None:
        headers = ((b"content-type", b"application/json"), (b"x-request-id", request_id.encode()))
        self.scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "query_string": b"",
            "headers": headers,
        }
        self._request = json.dumps(body).encode()
        self._is_sent = False
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""

    async def receive(self) -> Message:
        if self._is_sent:
            await asyncio.Event().wait()  # its client never goes away
        self._is_sent = True
        return {"type": "http.request", "body": self._request, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message.get("body", b"")
