"""What metrics cost a server at 32 streams: python benchmarks/metrics_cost.py [--model demo] [--rounds 12].

Two deployments on the CPU device: A records nothing, B records everything and is scraped every five seconds,
which is three times as often as usual. They get the same prompts in turn; a round is A B B A, so that what drifts
evenly cancels out, and gives one ratio of the two. Printed are the geometric mean of the rounds' ratios with its 95 %
confidence interval (Student's t over their logarithms), and as a control the same of each round's second A to its
first: an interval of B / A that is no further from 1 than the control's says that nothing was found.
Before that the scheduler's core is measured alone, in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from array import array
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.bench.server import Server
from octavo.services.cli import addresses
from octavo.services.client import Client
from octavo.services.scheduler.config import SchedulerConfig
from octavo.services.scheduler.core.effects import SendPlan
from octavo.services.scheduler.core.metrics import SchedulerMetrics
from octavo.services.scheduler.core.scheduler import Scheduler
from octavo.services.scheduler.groups.worker_group import GroupLimits
from octavo.services.telemetry import catalog
from octavo.services.telemetry.exposition import METRICS_PATH, MetricsServer
from octavo.services.telemetry.store import Store
from octavo.worker.v1 import worker_pb2

SCRAPE_S = 5.0
STEPS = 200
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
        scraping = asyncio.create_task(scrape(urls))
        rounds = []
        for number in range(options.rounds):
            first = await measure(a, client_a, options.streams, options.tokens)
            observed = [await measure(b, client_b, options.streams, options.tokens) for _ in range(2)]
            second = await measure(a, client_a, options.streams, options.tokens)
            rounds.append((first, second, *observed))
            print(
                f"round {number}: tokens/s A {first[0]:.0f}, B {observed[0][0]:.0f}, B {observed[1][0]:.0f}, "
                f"A {second[0]:.0f}; CPU ms a token A {first[1]:.3f}, B {observed[0][1]:.3f}, "
                f"B {observed[1][1]:.3f}, A {second[1]:.3f}",
                flush=True,
            )
        scraping.cancel()
        await asyncio.gather(scraping, return_exceptions=True)
    for which, what in enumerate(("throughput", "processor time a token")):
        ratios = [(b1[which] + b2[which]) / (a1[which] + a2[which]) for a1, a2, b1, b2 in rounds]
        control = [a2[which] / a1[which] for a1, a2, _, _ in rounds]
        print(f"{what}, {len(rounds)} rounds: B / A {interval(ratios)}; control, A / A {interval(control)}")


def interval(ratios: Sequence[float]) -> str:
    """Return the geometric mean of ratios and its 95 % confidence interval, in words."""
    logs = [math.log(ratio) for ratio in ratios]
    degrees = len(logs) - 1
    # Student's t from the normal quantile (Cornish and Fisher): right to a thousandth from five degrees on.
    z = statistics.NormalDist().inv_cdf(0.975)
    t = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    mean, half = statistics.fmean(logs), t * statistics.stdev(logs) / math.sqrt(len(logs))
    return f"{math.exp(mean):.4f} ({math.exp(mean - half):.4f} to {math.exp(mean + half):.4f})"


def measure_recording(streams: int, rounds: int) -> None:
    """Print the processor time of a scheduler's step without and with metrics, in turn, and of a scrape."""
    stores = [Store((*catalog.COMMON, *catalog.SCHEDULER), enabled=enabled) for enabled in (False, True)]
    cores = [core_with(store, streams) for store in stores]
    plans: list[deque[worker_pb2.StepPlan]] = [deque(), deque()]
    spent: list[list[float]] = [[], []]
    for number in range(rounds):
        for which in (0, 1):
            started = time.thread_time()
            for step in range(STEPS):
                run_step(cores[which], plans[which], float(number * STEPS + step))
            spent[which].append(1e6 * (time.thread_time() - started) / STEPS)
    with contextlib.closing(MetricsServer("127.0.0.1:0", {METRICS_PATH: stores[1]})) as server:
        started = time.process_time()
        for _ in range(20):
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{METRICS_PATH}") as answer:
                answer.read()
        scrape_ms = 1000 * (time.process_time() - started) / 20
    plain, recorded = (statistics.median(each) for each in spent)
    extra = statistics.median(b - a for a, b in zip(*spent, strict=True))
    print(
        f"{streams} streams: plan and digest a step {plain:.1f} us without metrics, {recorded:.1f} us with; difference"
    )
    print(
        f"  {extra:.1f} us, which is {extra / 20_000:.3%} of a step of 20 ms; a scrape takes {scrape_ms:.1f} ms, "
        "its client included"
    )


def core_with(store: Store, streams: int) -> Scheduler:
    """Return a scheduler with so many running sequences that do not end."""
    core = Scheduler(SchedulerConfig(), now=0.0, metrics=SchedulerMetrics(store))
    core.worker_joined("worker", 1, GroupLimits(streams * 4096 + 1, 1 << 20), now=0.0)
    for handle in range(1, streams + 1):
        prompt = [handle] * 64
        submit = scheduler_pb2.Submit(handle=handle, prompt_token_ids=prompt, stop={"max_new_tokens": 60_000})
        core.submit("gateway", submit, now=0.0)
    return core


def run_step(core: Scheduler, plans: deque[worker_pb2.StepPlan], now: float) -> None:
    """Plan, and answer the oldest plan."""
    core.schedule(now)
    plans.extend(effect.plan for effect in core.take_effects() if isinstance(effect, SendPlan))
    plan = plans.popleft()
    tokens = array("I", [7] * sum(flags & 1 for flags in plan.row_flags)).tobytes()
    result = worker_pb2.StepResult(
        step_id=plan.step_id, slot_indexes=plan.slot_indexes, token_ids=tokens, forward_us=19_000, sample_us=500
    )
    core.step_done("worker", result, now)
    core.take_effects()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--recording-only", action="store_true", help="the scheduler's core alone: takes seconds")
    options = parser.parse_args()
    measure_recording(options.streams, 20)
    if not options.recording_only:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever stops this stops all that it started
        asyncio.run(run(options))


if __name__ == "__main__":
    main()
