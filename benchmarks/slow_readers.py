"""Clients that ask for a long output and read nothing for a while, over gRPC and over HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
from types import TracebackType
from typing import Any, Self

import grpc

from octavo.inference.v1 import generation_pb2, generation_pb2_grpc

NUM_TOKENS = 1500
NUM_LOGPROBS = 20  # so that the buffers on the way fill soon
RECEIVE_BYTES = 4096


class SlowReaders:
    """Some of each kind, asking from the start. `read_all` returns what is wrong with what they got in the end."""

    def __init__(self, grpc_address: str, http_port: int, num_each: int) -> None:
        self._channel = grpc.aio.insecure_channel(grpc_address, [("grpc.http2.lookahead_bytes", RECEIVE_BYTES)])
        self._http_port = http_port
        self._num_each = num_each
        self._calls: list[Any] = []
        self._sockets: list[socket.socket] = []

    async def __aenter__(self) -> Self:
        stub: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]
        generation = generation_pb2.Generation(model="demo", text="Once upon a time")
        generation.stop.max_new_tokens = NUM_TOKENS
        generation.stop.ignore_end_of_sequence = True
        generation.output.token_ids = True
        generation.output.logprobs = NUM_LOGPROBS
        request = generation_pb2.GenerateStreamRequest(generation=generation)
        self._calls = [stub.GenerateStream(request) for _ in range(self._num_each)]
        await asyncio.gather(*(call.read() for call in self._calls))
        body = {
            "model": "demo", "prompt": "Once upon a time", "max_tokens": NUM_TOKENS, "stream": True,
            "ignore_eos": True, "logprobs": 5, "return_token_ids": True,
        }  # fmt: skip
        text = json.dumps(body)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
        )
        loop = asyncio.get_running_loop()
        for _ in range(self._num_each):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
            client.setblocking(False)
            self._sockets.append(client)
            await loop.sock_connect(client, ("127.0.0.1", self._http_port))
            await loop.sock_sendall(client, f"{head}\r\nConnection: close\r\n\r\n{text}".encode())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for client in self._sockets:
            client.close()
        await self._channel.close()

    async def read_all(self) -> list[str]:
        """Read everything; return what is missing or doubled."""
        results = await asyncio.gather(
            *map(self._read_grpc, self._calls), *map(self._read_http, self._sockets), return_exceptions=True
        )
        return [f"slow reader: {result}" for result in results if result]

    async def _read_grpc(self, call: Any) -> str:
        num, completed = 0, False
        while (response := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            delta = response.event.delta
            if delta.token_ids:
                if delta.token_offset != num:
                    return f"gRPC: offset {delta.token_offset} after {num} tokens"
                num += len(delta.token_ids)
            completed = completed or response.event.HasField("completed")
        return "" if completed and num == NUM_TOKENS else f"gRPC: {num} tokens, {await call.code()}"

    async def _read_http(self, client: socket.socket) -> str:
        loop, data = asyncio.get_running_loop(), b""
        while part := await loop.sock_recv(client, 1 << 16):
            data += part
        events = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: {")]
        num = sum(len(choice.get("token_ids") or ()) for event in events for choice in json.loads(event)["choices"])
        whole = num == NUM_TOKENS and b"data: [DONE]" in data
        return "" if whole else f"HTTP: {num} tokens, ends with {data[-200:]!r}"
