"""A client that does not read over HTTP: its stream is paused, its blocks are free, and it goes on when it reads."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from .stack import Stack, until_idle

NUM_OUTPUTS, NUM_TOKENS = 3, 1500  # with 20 alternatives each: more bytes than a kernel keeps for a connection
BODY = {
    "prompt": "Once upon a time", "max_tokens": NUM_TOKENS, "seed": 5, "temperature": 0.8, "ignore_eos": True,
    "n": NUM_OUTPUTS, "stream": True, "logprobs": 20, "return_token_ids": True,
}  # fmt: skip


class Reader:
    """A request over a socket that the kernel buffers little of."""

    def __init__(self, stack: Stack) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.connect(("127.0.0.1", stack.http_port))
        self._socket.setblocking(False)
        self._data = b""

    async def ask(self, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
        head += "Content-Type: application/json\r\n\r\n"
        await asyncio.get_running_loop().sock_sendall(self._socket, head.encode() + content)

    async def events(self) -> list[dict[str, Any]]:
        """Read to the end; return the events."""
        while not self._data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            data = await asyncio.get_running_loop().sock_recv(self._socket, 1 << 16)
            assert data, self._data[-500:]
            self._data += data
        self._socket.close()
        body = unchunked(self._data.partition(b"\r\n\r\n")[2]).decode()
        events = body.split("\n\n")[:-2]
        # Comments say that the request is being computed, while there is nothing new.
        return [json.loads(event.removeprefix("data: ")) for event in events if not event.startswith(":")]


def unchunked(data: bytes) -> bytes:
    """Return what is in the chunks of a body."""
    body = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        body, data = body + data[: int(size, 16)], data[int(size, 16) + 2 :]
    return body


def outputs(events: list[dict[str, Any]]) -> list[tuple[list[int], str]]:
    """Return the token ids and the text of each output of a stream."""
    found: list[tuple[list[int], str]] = [([], "")] * NUM_OUTPUTS
    for choice in (choice for event in events for choice in event["choices"]):
        ids, text = found[choice["index"]]
        found[choice["index"]] = [*ids, *(choice.get("token_ids") or ())], text + choice["text"]
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_an_http_client_that_does_not_read_is_paused_and_gets_everything_later(smollm2: Path) -> None:
    stack = Stack(smollm2, "--device", "cpu", "--kv-cache-memory", "256MiB")
    try:
        async with stack.client() as client:
            (model,) = await client.models()
            body = {**BODY, "model": model.name}
            (before,) = await client.load()
            slow, attentive = Reader(stack), Reader(stack)
            await slow.ask(body)
            await attentive.ask(body)
            expected = outputs(await attentive.events())
            assert [len(ids) for ids, _ in expected] == [NUM_TOKENS] * NUM_OUTPUTS
            await until_idle(client)  # though one is not through: its request was taken from the scheduler
            (after,) = await client.load()
            assert after.output_tokens - before.output_tokens < 2 * NUM_OUTPUTS * NUM_TOKENS
            events = await slow.events()
            assert outputs(events) == expected
            await until_idle(client)
    finally:
        stack.kill()
