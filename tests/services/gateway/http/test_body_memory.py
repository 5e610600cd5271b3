"""Bodies are counted while they come, and for as long as their request runs: nobody takes the memory."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from grpc import aio

from octavo.common.v1 import common_pb2
from octavo.services.common.api_keys import make_key
from octavo.services.gateway.app import Gateway
from octavo.services.gateway.config import GatewayConfig
from octavo.services.gateway.http import protocol

TEXT = "/v1/completions"
MAX_TOKENS = common_pb2.FINISH_REASON_MAX_TOKENS
HEAD = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture
async def small(config: GatewayConfig, scheduler: Any, tools: Any) -> AsyncIterator[Any]:
    """A harness whose gateway has 2,000 bytes for requests."""
    gateway = Gateway(dataclasses.replace(config, request_memory_bytes=2000))
    await gateway.start()
    async with aio.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:
        harness = tools.Harness(gateway, scheduler, channel, tools.make_tokenizer())
        await harness.connected()
        yield harness
    await gateway.stop(0)


def body(size: int) -> bytes:
    """A request whose body has so many bytes."""
    start = json.dumps({"model": "tiny", "prompt": "x"}).encode()
    return start + b" " * (size - len(start))


async def test_a_running_request_holds_the_memory_of_its_body_until_it_ends(small: Any) -> None:
    url = f"http://127.0.0.1:{small.gateway.http_port}"
    kind = {"content-type": "application/json"}
    async with httpx.AsyncClient(base_url=url, timeout=20) as http:
        for _ in range(2):  # the end of the first makes room for the second
            running = asyncio.ensure_future(http.post(TEXT, content=body(600), headers=kind))
            submit = await small.scheduler.next_admitted()

            refused = await http.post(TEXT, content=body(600), headers=kind)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert "retry-after" in refused.headers

            small.scheduler.tokens(submit.handle, [9], finish=MAX_TOKENS)
            assert (await running).status_code == 200
        assert (await http.post(TEXT, content=b"{", headers=kind)).status_code == 400
        assert (await http.post("/tokenize", content=body(600), headers=kind)).status_code == 200

    assert small.gateway.request_memory.held_bytes == 0


async def test_bodies_that_come_slowly_are_in_nobody_s_way_but_each_other_s(small: Any, tools: Any) -> None:
    memory = small.gateway.request_memory.arriving
    port = small.gateway.http_port
    _, slow = await asyncio.open_connection("127.0.0.1", port)
    slow.write(f"{HEAD}transfer-encoding: chunked\r\n\r\n76c\r\n".encode() + b" " * 1900 + b"\r\n")
    await tools.until(lambda: memory.held_bytes == 1900)

    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{HEAD}transfer-encoding: chunked\r\n\r\n96\r\n".encode() + b" " * 150 + b"\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 429 ")
    writer.close()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
        kind = {"content-type": "application/json"}
        assert (await http.post("/tokenize", content=body(600), headers=kind)).status_code == 200

    slow.close()
    await tools.until(lambda: memory.held_bytes == 0)


async def test_what_does_not_fit_is_not_received(small: Any) -> None:
    hold = small.gateway.request_memory.hold("", 1900)
    reader, writer = await asyncio.open_connection("127.0.0.1", small.gateway.http_port)
    writer.write(f"{HEAD}expect: 100-continue\r\ncontent-length: 150\r\n\r\n".encode())

    assert (await reader.readline()).startswith(b"HTTP/1.1 429 ")  # without a byte of its body
    hold.release()
    writer.close()


async def test_one_body_alone_always_fits(small: Any) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{small.gateway.http_port}", timeout=20) as http:
        kind = {"content-type": "application/json"}
        assert (await http.post("/tokenize", content=body(900_000), headers=kind)).status_code == 200


async def test_a_stranger_is_refused_before_a_byte_of_the_body_is_there(config: GatewayConfig, tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(yaml.safe_dump([make_key("acme")[1]]))
    gateway = Gateway(dataclasses.replace(config, api_keys=keys))
    await gateway.start()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port)
        writer.write(f"{HEAD}content-length: {16 << 20}\r\n\r\n".encode())
        assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")
        assert gateway.request_memory.held_bytes == 0
        writer.close()
    finally:
        await gateway.stop(0)


async def test_the_rest_of_a_body_that_is_refused_does_not_keep_the_connection(
    harness: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "_REST_S", 0.05)
    reader, writer = await asyncio.open_connection("127.0.0.1", harness.gateway.http_port)
    writer.write(b"POST /nowhere HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 404 ")

    async def trickle() -> None:
        while not reader.at_eof():
            writer.write(b"1\r\n \r\n")
            await asyncio.sleep(0.01)

    trickling = asyncio.create_task(trickle())
    await asyncio.wait_for(reader.read(), 10)
    trickling.cancel()
    writer.close()


async def test_a_connection_goes_on_when_the_rest_of_a_refused_body_has_come(harness: Any) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", harness.gateway.http_port)
    for _ in range(2):
        writer.write(b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 404 ")
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0]))
    writer.close()
