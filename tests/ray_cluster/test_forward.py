"""What is passed on to a gateway that is started again."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from aiohttp import web
from starlette.requests import Request

from octavo.ray import forward


def post() -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
    return Request(scope, receive)


async def test_a_gateway_that_was_away_for_long_has_its_time_to_find_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_REFUSED_S", 0.5)
    monkeypatch.setattr(forward, "_RETRY_S", 0.01)
    statuses = iter([503, 503, 200])

    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=next(statuses))

    application = web.Application()
    application.router.add_post("/v1/completions", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    passing = forward.HttpForward(f"http://127.0.0.1:{port}")
    answered = asyncio.ensure_future(passing(post()))
    away = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(1, away.set_result, None)  # longer than it may refuse
    await away
    await web.TCPSite(runner, "127.0.0.1", port).start()

    assert (await answered).status_code == 200
    await runner.cleanup()
