"""Tokens a gateway streams over HTTP per second of its CPU: python benchmarks/http_stream.py [--model PATH].

The same three processes as in gateway_stream.py, with the OpenAI-compatible listener in place of gRPC.
The client counts events and reads nothing of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import uvloop
from gateway_stream import make_model, run_scheduler

from octavo.services.cli.addresses import split, take_free


async def read_stream(port: int, num_tokens: int) -> int:
    """Read one stream; return its events."""
    body = json.dumps({"model": "bench", "prompt": "Hello", "max_tokens": num_tokens, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    events = 0
    while data := await reader.read(65_536):
        events += data.count(b'"text":"')
    writer.close()
    return events


async def wait_healthy(port: int) -> None:
    """Return once the gateway serves."""
    async with asyncio.timeout(30):
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.1)
                continue
            writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            status = await reader.readline()
            writer.close()
            if b" 200 " in status:
                return
            await asyncio.sleep(0.1)


async def run_client(port: int, gateway: psutil.Process, options: argparse.Namespace) -> None:
    """Read all streams, once to warm up and once measured; print the result."""
    await wait_healthy(port)
    for num_tokens in (20, options.tokens):
        await asyncio.sleep(1)  # the gateway's CPU settles
        before, started = gateway.cpu_times(), time.perf_counter()
        events = sum(await asyncio.gather(*(read_stream(port, num_tokens) for _ in range(options.streams))))
        passed, after = time.perf_counter() - started, gateway.cpu_times()
    cpu_s = after.user + after.system - before.user - before.system
    tokens = options.streams * options.tokens
    print(
        f"{options.streams} streams, step {options.step_ms:g} ms: {tokens} tokens in {events} events, {passed:.2f} s; "
        f"gateway CPU {cpu_s:.2f} s = {1e6 * cpu_s / tokens:.1f} us a token, {1e6 * cpu_s / events:.1f} us an event; "
        f"{tokens / cpu_s:.0f} tokens per CPU second"
    )


def main() -> None:
    """Run the three processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder with a tokenizer.json; default: a small one made here")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=500, help="of each stream")
    parser.add_argument("--step-ms", type=float, default=20.0, help="time between steps; 0: as fast as possible")
    parser.add_argument("--scheduler-at", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.scheduler_at:
        uvloop.run(run_scheduler(options.scheduler_at, options.model, options.streams, options.step_ms / 1000))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or make_model(Path(folder))
        hop, port = f"unix:{folder}/scheduler.sock", split(take_free("127.0.0.1:0", 1)[0])[1]
        same = ["--streams", str(options.streams), "--step-ms", str(options.step_ms), "--model", str(model)]
        scheduler = subprocess.Popen([sys.executable, __file__, "--scheduler-at", hop, *same])
        addresses = ["--grpc-address", f"unix:{folder}/gateway.sock", "--http-address", f"127.0.0.1:{port}"]
        names = ["--scheduler-addresses", hop, "--model-name", "bench", "--log-level", "warning"]
        gateway = subprocess.Popen([sys.executable, "-m", "octavo.services.gateway", str(model), *addresses, *names])
        try:
            uvloop.run(run_client(port, psutil.Process(gateway.pid), options))
        finally:
            for process in (gateway, scheduler):
                process.kill()
                process.wait()


if __name__ == "__main__":
    main()
