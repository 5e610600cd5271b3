"""What metrics cost a server at 32 streams: python benchmarks/metrics_cost.py [--model demo] [--rounds 8].

Two deployments on the CPU device: A records nothing, B records everything and is scraped every second,
which is fifteen times as often as usual. They get the same prompts in turn, A B A B; each round is one pair.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from octavo.services.bench.server import Server
from octavo.services.cli import addresses
from octavo.services.client import Client

SCRAPE_S = 1.0
PROMPT = "Write a long story about number"


@asynccontextmanager
async def deployment(model: str, with_metrics: bool) -> AsyncIterator[tuple[Server, Client, list[str]]]:
    """Give a server, a client, and the URLs of its metrics."""
    grpc, http, *metrics = addresses.take_free("127.0.0.1:0", 2)
    command = [sys.executable, "-m", "octavo.services.cli", "serve", model, "--device", "cpu"]
    command += ["--grpc-address", grpc, "--http-address", http]
    with tempfile.NamedTemporaryFile() as log:
        if with_metrics:
            command += ["--metrics-address", "127.0.0.1:0"]
        async with Server(command, f"http://{http}/health", Path(log.name)) as server, Client(grpc) as client:
            if with_metrics:
                metrics = [f"http://{each}/metrics" for each in await printed_addresses(Path(log.name))]
            yield server, client, metrics


async def printed_addresses(log: Path) -> list[str]:
    """Return where a server serves its metrics, once it has printed that."""
    while "metrics " not in (text := await asyncio.to_thread(log.read_text)):  # noqa: ASYNC110 - it is a file
        await asyncio.sleep(0.05)
    return text.partition("metrics ")[2].partition(" (")[0].split()


async def scrape(urls: list[str]) -> None:
    """Scrape until cancelled."""
    async with aiohttp.ClientSession() as session:
        while True:
            for url in urls:
                async with session.get(url) as answer:
                    await answer.read()
            await asyncio.sleep(SCRAPE_S)


async def measure(server: Server, client: Client, streams: int, tokens: int) -> tuple[float, float]:
    """Return tokens per second, and milliseconds of processor time a token, of so many streams at once."""

    async def one(number: int) -> int:
        stream = client.stream(f"{PROMPT} {number}", max_new_tokens=tokens, temperature=0, ignore_end_of_sequence=True)
        return sum([delta.token_count async for delta in stream])

    cpu_s, started = server.cpu_seconds(), time.perf_counter()
    made = sum(await asyncio.gather(*(one(number) for number in range(streams))))
    seconds = time.perf_counter() - started
    assert made == streams * tokens, made
    return made / seconds, 1000 * (server.cpu_seconds() - cpu_s) / made


async def run(options: argparse.Namespace) -> None:
    """Measure in turn, and print."""
    async with (
        deployment(options.model, False) as (a, client_a, _),
        deployment(options.model, True) as (b, client_b, urls),
    ):
        for server, client in ((a, client_a), (b, client_b)):  # prompts into both caches
            await measure(server, client, options.streams, 8)
        rows = []
        for number in range(options.rounds):
            plain = await measure(a, client_a, options.streams, options.tokens)
            scraping = asyncio.create_task(scrape(urls))
            observed = await measure(b, client_b, options.streams, options.tokens)
            scraping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await scraping
            rows.append((*plain, *observed))
            print(
                f"round {number}: A {plain[0]:.0f} tokens/s, {plain[1]:.3f} CPU ms a token; "
                f"B {observed[0]:.0f}, {observed[1]:.3f}",
                flush=True,
            )
    throughput = [b / a for a, _, b, _ in rows]
    cpu = [b / a for _, a, _, b in rows]
    print(
        f"B / A, median of {len(rows)} pairs: throughput {statistics.median(throughput):.4f}, "
        f"processor time a token {statistics.median(cpu):.4f}"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
