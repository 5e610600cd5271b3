"""Send malformed and hostile requests to a deployment, and check that it stays as it was.

    python benchmarks/hostile.py [--requests 100000] [--concurrency 64] [--seed 0]

`octavo serve demo` gets, in turn and at once: protobuf messages of every method with bits flipped, cut off, doubled or
replaced by noise; messages with the right tags and as many empty messages or list items as fit; HTTP/1.1 with wrong
request lines, heads, lengths, chunks, encodings and JSON; and HTTP/2 by hand: wrong prefaces, frames of wrong lengths
and types, broken header blocks, floods of SETTINGS, PING and CONTINUATION, streams that are reset at once, windows
that overflow. What must hold:

- all processes are those that were started
- the memory of the gateway and of the scheduler at the end is at most 5 % above that after the first tenth
- 64 at once of the messages that would be largest when parsed raise the gateway's memory by at most 400 MiB
- a proper request gets the same tokens as before, and every KV block is free

Prints how many of each kind were sent and how they were answered; exits with 1 if anything did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import grpc
import psutil
from fault_stack import free_port

from octavo.inference.v1 import generation_pb2, load_pb2, model_pb2, tokenizer_pb2
from octavo.services.client import Client

MAX_GROWTH = 1.05
MAX_SWELLING_MIB = 400
ANSWER_S = 10.0
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
GENERATION = generation_pb2.Generation(
    model="demo", text="Once upon", sampling={"temperature": 0.5}, stop={"max_new_tokens": 1}
)
MESSAGES = {
    "GenerationService/Generate": generation_pb2.GenerateRequest(generation=GENERATION),
    "GenerationService/CancelGeneration": generation_pb2.CancelGenerationRequest(request_id="nobody"),
    "TokenizerService/Tokenize": tokenizer_pb2.TokenizeRequest(model="demo", texts=["Once"]),
    "ModelService/GetModel": model_pb2.GetModelRequest(name="demo"),
    "LoadService/GetLoad": load_pb2.GetLoadRequest(),
}
BODY = json.dumps({"model": "demo", "prompt": "x", "max_tokens": 1}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return a message that is wrong in some way, or at least may be."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.randbytes(rng.randrange(1, 300))
    if kind == 1:
        return data[: rng.randrange(len(data) + 1)]
    if kind == 2:
        at = rng.randrange(len(data) + 1)
        return data[:at] + rng.randbytes(rng.randrange(1, 20)) + data[at:]
    if kind == 3:
        return data * rng.randrange(2, 50)
    changed = bytearray(data or b"\0")
    for _ in range(rng.randrange(1, 8)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def field(number: int, payload: bytes) -> bytes:
    """Return a field with bytes, a string or a message in it."""
    head = bytearray()
    for value in (number << 3 | 2, len(payload)):
        while value > 127:
            head.append(value & 127 | 128)
            value >>= 7
        head.append(value)
    return bytes(head) + payload


def swollen(method: str, size: int) -> bytes:
    """Return a message of about `size` bytes that becomes as large as can be when it is parsed."""
    empty = b"\x0a\x00"
    if method.startswith("GenerationService/Generate"):
        chats = (empty * (size // 2), field(1, b"\x12\x00" * 200) * (size // 404))  # messages; messages with parts
        return field(1, field(5, chats[size % 2]))
    if method == "TokenizerService/Tokenize":
        return field(1, b"demo") + b"\x12\x00" * (size // 2)
    return empty * (size // 2)


SWOLLEN = (*MESSAGES, "GenerationService/GenerateStream", "TokenizerService/Detokenize", "EmbeddingService/Embed")


def hostile_http1(rng: random.Random) -> bytes:
    """Return what a client should not send over HTTP/1.1."""
    length = b"Content-Length: %d\r\n" % len(BODY)
    choices = (
        lambda: rng.randbytes(rng.randrange(1, 2000)) + b"\r\n\r\n",
        lambda: b"GET " + b"/" * rng.randrange(1, 20_000) + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        lambda: HEAD + b"X: " + b"y" * rng.randrange(1, 70_000) + b"\r\n" + length + b"\r\n" + BODY,
        lambda: HEAD + b"".join(b"A%d: b\r\n" % n for n in range(rng.randrange(1, 500))) + b"\r\n",
        lambda: HEAD + b"Content-Length: -5\r\n\r\n" + BODY,
        lambda: HEAD + b"Content-Length: 99999999999999999999\r\n\r\n" + BODY,
        lambda: HEAD + length + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + BODY,
        lambda: HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + rng.randbytes(20) + b"\r\n",
        lambda: HEAD + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\n" + BODY,
        lambda: HEAD + length + b"\r\n" + mutated(BODY, rng),
        lambda: HEAD + b"Content-Length: 40000\r\n\r\n" + b"[" * 40_000,
        lambda: HEAD + length + b"\r\n" + BODY[: rng.randrange(len(BODY))],
        lambda: b"POST /v1/completions HTTP/9.9\r\n\r\n",
        lambda: b"GET /%00%ff/../../etc/passwd HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n\r\n",
    )
    return rng.choice(choices)()


def frame(kind: int, flags: int, stream: int, payload: bytes, length: int | None = None) -> bytes:
    """Return an HTTP/2 frame; `length` is what it says its payload has, if that is a lie."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size & 0xFFFFFF)[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def hostile_http2(rng: random.Random) -> bytes:
    """Return what a client should not send over HTTP/2."""
    settings = frame(4, 0, 0, b"")
    # Static table: POST, http, and literal path and authority.
    headers = b"\x83\x86\x44\x0a/a.B/Method" + b"\x41\x01x"
    streams = range(1, 2 * rng.randrange(2, 60), 2)
    choices = (
        lambda: rng.randbytes(rng.randrange(1, 500)),
        lambda: PREFACE[: rng.randrange(len(PREFACE))] + rng.randbytes(30),
        lambda: PREFACE + settings * rng.randrange(1, 300),
        lambda: PREFACE + settings + frame(6, 0, 0, b"12345678") * rng.randrange(1, 300),
        lambda: PREFACE + settings + frame(6, 0, 0, b"123"),
        lambda: PREFACE + settings + frame(1, 4, 1, rng.randbytes(rng.randrange(1, 200))),
        lambda: PREFACE + settings + frame(1, 0, 1, headers) + frame(9, 0, 1, b"\x40\x01a\x01b" * 100) * 50,
        lambda: PREFACE + settings + b"".join(frame(1, 5, n, headers) + frame(3, 0, n, bytes(4)) for n in streams),
        lambda: PREFACE + settings + frame(8, 0, 0, struct.pack(">I", 0x7FFFFFFF)) * 3,
        lambda: PREFACE + settings + frame(8, 0, 0, bytes(4)),
        lambda: PREFACE + settings + frame(0, 1, 7, b"nobody asked"),
        lambda: PREFACE + settings + frame(rng.randrange(256), rng.randrange(256), rng.randrange(9), rng.randbytes(9)),
        lambda: PREFACE + settings + frame(0, 0, 1, b"", length=0xFFFFFF),
        lambda: PREFACE + frame(4, 0, 0, struct.pack(">HI", 4, 0xFFFFFFFF) + struct.pack(">HI", 5, 1)),
        lambda: (
            PREFACE + settings + frame(1, 4, 1, headers) + frame(0, 1, 1, b"\1\xff\xff\xff\xff") + frame(7, 0, 0, b"")
        ),
    )
    return rng.choice(choices)()


class Attack:
    """Sends everything, and counts the answers."""

    def __init__(self, grpc_port: int, http_port: int, rng: random.Random) -> None:
        self._grpc_port = grpc_port
        self._http_port = http_port
        self._rng = rng
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}", [("grpc.max_send_message_length", -1)])
        self.answers: Counter[str] = Counter()

    async def close(self) -> None:
        """Disconnect."""
        await self._channel.close()

    async def one(self) -> None:
        """Send one of some kind."""
        draw = self._rng.random()
        if draw < 0.6:
            await self._protobuf()
        elif draw < 0.8:
            self.answers[f"HTTP/1.1: {await self._raw(self._http_port, hostile_http1(self._rng))}"] += 1
        else:
            self.answers[f"HTTP/2: {await self._raw(self._grpc_port, hostile_http2(self._rng))}"] += 1

    async def _protobuf(self) -> None:
        if self._rng.random() < 0.02:
            method = self._rng.choice(SWOLLEN)
            await self.call(method, swollen(method, self._rng.randrange(1000, 9 << 20)), "swollen protobuf")
            return
        method = self._rng.choice(list(MESSAGES))
        await self.call(method, mutated(MESSAGES[method].SerializeToString(), self._rng), "protobuf")

    async def call(self, method: str, data: bytes, kind: str, timeout_s: float = ANSWER_S) -> None:
        """Call a method, which may have one response or several."""
        call = self._channel.unary_unary(f"/octavo.inference.v1.{method}")
        try:
            await call(data, timeout=timeout_s)
            self.answers[f"{kind}: OK"] += 1
        except grpc.aio.AioRpcError as error:
            self.answers[f"{kind}: {error.code().name}"] += 1

    async def _raw(self, port: int, data: bytes) -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(data)
            writer.write_eof()
            async with asyncio.timeout(ANSWER_S):
                first = await reader.read(64)
            if first.startswith(b"HTTP/1.1 "):
                return first[9:12].decode()
            return "frames" if first else "closed"
        except TimeoutError:
            return "no answer"
        except OSError:
            return "reset"
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def run(args: argparse.Namespace) -> int:
    """Run everything; return the exit status."""
    grpc_port, http_port = free_port(), free_port()
    command = [sys.executable, "-m", "octavo.services.cli", "serve", "demo", "--device=cpu", "--log-level=error"]
    command += [f"--grpc-address=127.0.0.1:{grpc_port}", f"--http-address=127.0.0.1:{http_port}"]
    silent = asyncio.subprocess.DEVNULL
    server = await asyncio.create_subprocess_exec(*command, stdout=silent, stderr=silent)
    client = Client(f"127.0.0.1:{grpc_port}", timeout_s=120)
    attack = Attack(grpc_port, http_port, random.Random(args.seed))
    problems = []
    try:
        wanted = await _answer(client)
        processes = psutil.Process(server.pid).children(recursive=True)
        problems += await _swell(attack, processes)
        await _repeat(attack.one, args.requests // 10, args.concurrency)
        before = _memory(processes)
        started = time.monotonic()
        await _repeat(attack.one, args.requests - args.requests // 10, args.concurrency)
        seconds = time.monotonic() - started
        if await _answer(client) != wanted:
            problems.append("the next proper request got other tokens")
        if psutil.Process(server.pid).children(recursive=True) != processes:
            problems.append("a process was replaced")
        else:
            after = _memory(processes)
            for name in ("gateway", "scheduler"):
                print(f"{name}: {before[name]:.0f} MiB after a tenth, {after[name]:.0f} MiB at the end")
                if after[name] > MAX_GROWTH * before[name]:
                    problems.append(f"the memory of the {name} grew")
        async with asyncio.timeout(30):
            while any(load.kv_blocks_free != load.kv_blocks_total for load in await client.load()):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    finally:
        await attack.close()
        await client.close()
        server.send_signal(signal.SIGINT)
        await asyncio.wait_for(server.wait(), 60)
    print(f"{args.requests} requests, {args.requests * 0.9 / seconds:.0f} a second")
    for kind, count in sorted(attack.answers.items()):
        print(f"  {kind}: {count}")
    print("ok" if not problems else "; ".join(problems))
    return int(bool(problems))


async def _swell(attack: Attack, processes: list[psutil.Process]) -> list[str]:
    """Send what would be largest when parsed, one and then 64 at once; return what was wrong."""
    problems = []
    for size in (8_000_000, 8_000_001, 24_000_000):
        for count in (1, 64):
            data, method = swollen("GenerationService/Generate", size), "GenerationService/Generate"
            before = peak = _memory(processes)["gateway"]
            calls = [asyncio.ensure_future(attack.call(method, data, "swollen protobuf", 60)) for _ in range(count)]
            while not all(call.done() for call in calls):
                await asyncio.wait(calls, timeout=0.01)
                peak = max(peak, _memory(processes)["gateway"])
            after = _memory(processes)["gateway"]
            print(f"{count} x {size / 1e6:.0f} MB swollen: {before:.0f} MiB before, peak {peak:.0f}, {after:.0f} after")
            if peak > before + MAX_SWELLING_MIB:
                problems.append(f"{count} swollen messages raised the memory of the gateway by {peak - before:.0f} MiB")
    return problems


async def _answer(client: Client) -> list[int]:
    ids: list[int] = []
    async with asyncio.timeout(120):
        while not ids:
            with contextlib.suppress(Exception):  # it is starting
                stream = client.stream(prompt="Once upon", max_new_tokens=16, temperature=0, return_token_ids=True)
                ids = [token async for delta in stream for token in delta.token_ids]
    return ids


async def _repeat(one: Callable[[], Awaitable[None]], count: int, concurrency: int) -> None:
    """Do something so many times, so many at once."""
    left = iter(range(count))

    async def work() -> None:
        for _ in left:
            await one()

    await asyncio.gather(*(work() for _ in range(concurrency)))


def _memory(processes: list[psutil.Process]) -> dict[str, float]:
    """Return MiB by the second word of the command line: `octavo gateway ...`."""
    return {process.cmdline()[1]: process.memory_info().rss / 2**20 for process in processes}


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
