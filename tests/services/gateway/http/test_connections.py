"""What happens between a client and the listener: disconnects, limits, deadlines, stopping."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from octavo.common.v1 import common_pb2
from octavo.services.gateway.app import BindError, Gateway
from octavo.services.gateway.config import GatewayConfig
from octavo.services.gateway.http import generate, protocol

TEXT = "/v1/completions"
MAX_TOKENS = common_pb2.FINISH_REASON_MAX_TOKENS


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


def post(body: Any, *headers: str, path: str = TEXT) -> bytes:
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(data)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + data


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_cancels_its_request(harness: Any, url: str, stream: bool) -> None:
    _, writer = await connect(url)
    writer.write(post({"model": "tiny", "prompt": "x", "stream": stream}))
    submit = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(submit.handle, harness.ids("he"))

    writer.close()

    assert (await harness.scheduler.next("cancel")).handle == submit.handle
    await asyncio.wait_for(harness.gateway._calls.wait_idle(), 10)


async def test_a_client_that_goes_away_before_admission_cancels_its_request(harness: Any, url: str) -> None:
    _, writer = await connect(url)
    writer.write(post({"model": "tiny", "prompt": ["x", "y"], "stream": True}))
    handles = {(await harness.scheduler.next("submit")).handle for _ in range(2)}

    writer.close()

    assert {(await harness.scheduler.next("cancel")).handle for _ in range(2)} == handles


async def test_closing_a_stream_of_the_sdk_cancels_its_request(harness: Any, sdk: openai.AsyncOpenAI) -> None:
    opening = asyncio.ensure_future(sdk.completions.create(model="tiny", prompt="x", stream=True))
    submit = await harness.scheduler.next_admitted()
    stream = await opening

    await stream.close()

    assert (await harness.scheduler.next("cancel")).handle == submit.handle


async def test_a_client_that_does_not_read_is_cut_off(
    harness: Any, url: str, monkeypatch: pytest.MonkeyPatch, tools: Any
) -> None:
    monkeypatch.setattr(protocol, "_STALLED_S", 0.0)
    reader, writer = await connect(url)
    writer.write(post({"model": "tiny", "prompt": "x", "stream": True, "return_token_ids": True}))
    reading: Any = reader._transport  # type: ignore[attr-defined]
    reading.pause_reading()
    submit = await harness.scheduler.next_admitted()

    async def produce() -> None:  # until the sockets between them are full
        while harness.gateway.schedulers.streams:
            harness.scheduler.tokens(submit.handle, [9] * 20_000)
            await asyncio.sleep(0)

    await asyncio.wait_for(produce(), 30)

    assert (await harness.scheduler.next("cancel")).handle == submit.handle
    writer.close()


async def test_a_deadline_ends_a_request_and_reaches_the_scheduler(harness: Any, http: httpx.AsyncClient) -> None:
    headers = {"x-request-timeout-ms": "200"}
    call = asyncio.ensure_future(http.post(TEXT, json={"model": "tiny", "prompt": "x"}, headers=headers))
    submit = await harness.scheduler.next_admitted()
    response = await call
    wrong = await http.post(TEXT, json={"model": "tiny", "prompt": "x"}, headers={"x-request-timeout-ms": "soon"})

    assert 0 < submit.remaining_ms <= 200
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "generation_timeout"
    assert (await harness.scheduler.next("cancel")).handle == submit.handle
    assert wrong.status_code == 400


async def test_a_deadline_in_the_middle_of_a_stream_is_an_error_event(harness: Any, http: httpx.AsyncClient) -> None:
    headers = {"x-request-timeout-ms": "200"}
    body = {"model": "tiny", "prompt": "x", "stream": True}
    call = asyncio.ensure_future(http.post(TEXT, json=body, headers=headers))
    await harness.scheduler.next_admitted()
    response = await call

    assert response.status_code == 200
    assert '"generation_timeout"' in response.text
    assert "[DONE]" not in response.text


async def test_the_request_id_is_the_client_s_if_it_has_one(harness: Any, http: httpx.AsyncClient) -> None:
    headers = {"x-request-id": "mine 1", "x-session-id": "s", "x-model": "tiny"}
    call = asyncio.ensure_future(http.post(TEXT, json={"model": "tiny", "prompt": "x"}, headers=headers))
    submit = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(submit.handle, [9], finish=MAX_TOKENS)
    response = await call
    other = await http.post(TEXT, json={"model": "tiny", "prompt": "x"}, headers={"x-model": "little"})

    assert submit.request_id == response.headers["x-request-id"] == "mine1"
    assert response.json()["id"] == "cmpl-mine1"
    assert other.json()["error"]["param"] == "model"


async def test_a_body_that_is_too_long_is_a_413(config: GatewayConfig, scheduler: Any) -> None:
    gateway = Gateway(dataclasses.replace(config, http_max_body_bytes=100))
    await gateway.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway.http_port}") as http:
        announced = await http.post(TEXT, json={"prompt": "x" * 1_000_000})

        async def pieces() -> Any:
            for _ in range(10):
                yield b" " * 50

        chunked = await http.post(TEXT, content=pieces(), headers={"content-type": "application/json"})
    await gateway.stop(0)

    for response in (announced, chunked):
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"


async def test_a_head_that_does_not_end_is_refused(harness: Any, url: str) -> None:
    reader, writer = await connect(url)
    start = b"GET /health HTTP/1.1\r\na: "

    writer.write(start + b"x" * (65_537 - len(start)))

    assert (await reader.read()).startswith(b"HTTP/1.1 431 ")
    writer.close()


async def test_a_refusal_reaches_a_client_that_is_still_writing(harness: Any, url: str) -> None:
    """A socket that is closed with bytes in it resets the connection, and with it the answer."""
    reader, writer = await connect(url)

    for _ in range(64):
        writer.write(b"a: " + b"x" * 65_536)
        await writer.drain()
    answer = await reader.read()
    writer.close()

    assert answer.startswith(b"HTTP/1.1 400 ")

    reader, writer = await connect(url)
    writer.write(b"GET /health HTTP/1.1\r\n")
    for _ in range(64):
        writer.write(b"a: " + b"x" * 65_536)
        await writer.drain()
    answer = await reader.read()
    writer.close()

    assert answer.startswith(b"HTTP/1.1 431 ")


async def test_what_comes_after_a_refusal_is_dropped_and_the_connection_closed(
    harness: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "_REFUSED_S", 0.01)
    reader, writer = await connect(url)
    writer.write(b"GET /" + b"x" * 16_384 + b" HTTP/1.1\r\n\r\nGET /version HTTP/1.1\r\n\r\n")
    answer = await reader.read()

    async def ask_on() -> None:
        while True:
            writer.write(b"GET /version HTTP/1.1\r\n\r\n")
            await writer.drain()
            await asyncio.sleep(0)

    with pytest.raises(ConnectionError):
        await ask_on()
    assert answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("length", [16_385, 100_000])
async def test_a_path_that_is_too_long_is_refused(harness: Any, url: str, length: int) -> None:
    reader, writer = await connect(url)
    writer.write(b"GET /" + b"x" * (length - 1) + b" HTTP/1.1\r\n\r\n")
    answer = await reader.read()
    writer.close()

    assert answer.startswith(b"HTTP/1.1 414 ")
    assert "16384 bytes" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


async def test_a_stream_on_which_nothing_comes_is_kept_alive_by_comments(
    harness: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "_KEEP_ALIVE_S", 0.001)
    reader, writer = await connect(url)
    writer.write(post({"model": "tiny", "prompt": "x", "stream": True}, "connection: close"))
    submit = await harness.scheduler.next_admitted()
    for _ in range(2):
        await reader.readuntil(b": the request is being computed\n\n")
    harness.scheduler.tokens(submit.handle, harness.ids("hello"), finish=1)
    rest = await reader.read()
    writer.close()

    events = [line for line in rest.split(b"\n\n") if b"data: " in line]
    assert [b"hello" in event for event in events].count(True) == 1
    assert b"data: [DONE]" in events[-1]
    assert rest.endswith(b"0\r\n\r\n")


async def read_answer(reader: asyncio.StreamReader) -> bytes:
    """Return the head of an answer, and skip its body."""
    head = await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0]))
    return head


async def test_requests_that_are_sent_at_once_are_all_answered_and_few_of_them_are_kept(
    harness: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    start = protocol.LimitedProtocol._start_asgi_task

    def count(self: Any, *args: Any) -> None:
        kept.append(len(self.pipeline))
        start(self, *args)

    monkeypatch.setattr(protocol.LimitedProtocol, "_start_asgi_task", count)
    reader, writer = await connect(url)
    writer.write(b"GET /nowhere HTTP/1.1\r\n\r\n" * 5000)
    for _ in range(5000):
        assert (await read_answer(reader)).startswith(b"HTTP/1.1 404 ")
    writer.close()

    assert max(kept) < 200


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_client_that_offers_http_2_is_answered_in_http_1(harness: Any, url: str, is_chunked: bool) -> None:
    """As that of Java does by default, with each request on a new connection."""
    reader, writer = await connect(url)
    offer = (
        "connection: Upgrade, HTTP2-Settings",
        "upgrade: h2c",
        "http2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
    )
    head, _, body = post({"model": "tiny", "prompt": "x" * 10_000}, *offer, path="/tokenize").partition(b"\r\n\r\n")
    if is_chunked:
        head = head.replace(b"content-length: %d" % len(body), b"transfer-encoding: chunked")
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    get = "\r\n".join(["GET /version HTTP/1.1", *offer, "", ""]).encode()

    for request in (head + b"\r\n\r\n" + body, get, head + b"\r\n\r\n" + body, get):
        writer.write(request)
        answer = await read_answer(reader)
        assert answer.startswith(b"HTTP/1.1 200 "), answer
    writer.close()


async def test_what_is_not_http_is_refused_with_an_error_object(harness: Any, url: str) -> None:
    reader, writer = await connect(url)
    writer.write(b"\x16\x03\x01 nonsense\r\n\r\n")
    answer = await reader.read()
    writer.close()

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert "error" in json.loads(answer.partition(b"\r\n\r\n")[2])


async def test_connections_that_send_nothing_are_closed(
    harness: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "_HEAD_S", 0.01)
    reader, writer = await connect(url)
    writer.write(b"GET /heal")

    assert await reader.read() == b""
    writer.close()


async def test_there_are_so_many_connections_and_no_more(config: GatewayConfig, scheduler: Any) -> None:
    gateway = Gateway(dataclasses.replace(config, http_max_connections=1))
    await gateway.start()
    url = f"http://127.0.0.1:{gateway.http_port}"
    async with httpx.AsyncClient(base_url=url) as http:
        first = await http.get("/version")
        reader, writer = await connect(url)
        refused = await reader.read()
        again = await http.get("/version")
    writer.close()
    await gateway.stop(0)

    assert refused.startswith(b"HTTP/1.1 503 ")
    assert first.status_code == again.status_code == 200


async def test_a_stop_lets_running_requests_end_and_refuses_new_ones(
    harness: Any, http: httpx.AsyncClient, url: str, tools: Any
) -> None:
    body = {"model": "tiny", "prompt": "x"}
    streaming = asyncio.ensure_future(http.post(TEXT, json={**body, "stream": True}))
    stream_submit = await harness.scheduler.next_admitted()
    whole = asyncio.ensure_future(http.post(TEXT, json=body))
    whole_submit = await harness.scheduler.next_admitted()

    stopping = asyncio.ensure_future(harness.gateway.stop(20))
    await tools.until(lambda: harness.gateway._calls.draining)
    refused = await http.post(TEXT, json=body)
    health = await http.get("/health")
    for submit in (stream_submit, whole_submit):
        harness.scheduler.tokens(submit.handle, harness.ids("bye"), finish=MAX_TOKENS)
    stream_answer, whole_answer = await streaming, await whole
    await stopping

    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert refused.headers["retry-after"] == "1"
    assert health.status_code == 503
    assert stream_answer.text.endswith("data: [DONE]\n\n")
    assert whole_answer.json()["choices"][0]["text"] == "bye"
    with pytest.raises(httpx.ConnectError):
        await httpx.AsyncClient(base_url=url).get("/health")


async def test_a_stream_that_outlives_the_grace_ends_with_an_error(harness: Any, http: httpx.AsyncClient) -> None:
    call = asyncio.ensure_future(http.post(TEXT, json={"model": "tiny", "prompt": "x", "stream": True}))
    await harness.scheduler.next_admitted()

    await harness.gateway.stop(0)

    assert '"stream_interrupted"' in (await call).text


async def test_a_busy_port_is_an_error_and_not_shared(harness: Any, config: GatewayConfig) -> None:
    busy = dataclasses.replace(config, http_address=f"127.0.0.1:{harness.gateway.http_port}", admin_address="")

    with pytest.raises(BindError, match="in use"):
        Gateway(busy)


@pytest.mark.parametrize("address", ["unix:/tmp/x", "8000", "host:"])
def test_a_wrong_http_address_names_its_flag(address: str) -> None:
    with pytest.raises(ValueError, match="--http-address must be host:port"):
        GatewayConfig(model=Path("m"), http_address=address)


async def test_pages_of_other_origins_are_let_in_only_if_configured(
    config: GatewayConfig, scheduler: Any, http: httpx.AsyncClient
) -> None:
    gateway = Gateway(dataclasses.replace(config, http_cors_origins=("https://a.example",)))
    await gateway.start()
    origin = {"origin": "https://a.example"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway.http_port}") as open_http:
        allowed = await open_http.get("/version", headers=origin)
        other = await open_http.get("/version", headers={"origin": "https://b.example"})
    await gateway.stop(0)
    closed = await http.get("/version", headers=origin)

    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in closed.headers
