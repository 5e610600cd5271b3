"""Break a running deployment in every way there is, and check that nothing is lost.

    python benchmarks/faults.py [--worker-kills 5] [--worker-hangs 2] [--scheduler-kills 5] [--scheduler-hangs 2]
        [--gateway-kills 5] [--partitions 2] [--rolling-restarts 1] [--vanishing-clients 500]
        [--schedulers 2] [--streams 8] [--tokens 64] [--faults-per-stream 1] [--seed 0] [--results FILE]

Two gateways behind Envoy, schedulers that both gateways know, a CPU worker for each. Every fault strikes while
`--streams` streams run, greedy and sampled, with penalties, stop strings, minimum tokens, log probabilities and
resume windows. What must hold, for every stream: it ends well (P5), within its time (P4), with the tokens, the text
and the log probabilities of the run without faults (P1, P2); the client library checks that there is no gap, no
repeat and exactly one ending. After each scenario every block of KV cache is free (P3).

Prints a line for each scenario and exits with 1 if anything did not hold. A stall is the longest time between two
deltas of a stream around a fault; detection is the time from the fault until the scheduler has given the worker up;
restart is the time from starting a process again, or from noticing that one is frozen, until everything is up;
replay is how long a stream that goes on from its middle takes to its first delta when all do so at once, without a
fault: what computing it again costs. All
are median / 99th percentile / maximum. With `--results` the runs add up: each line of that file is what one invocation
showed of one scenario, and the table is of the whole file.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from fault_load import Load, Tally
from fault_stack import Process, Relay, Stack

from octavo.inference.v1 import generation_pb2, generation_pb2_grpc
from octavo.services.cli import demo_model

CALLS_PER_S = 20
CUT_S = 6.0
MIN_FROZEN_S = 3.0  # a gateway gives a scheduler up after two
FAULTS = {
    "worker-kills": 5,
    "worker-hangs": 2,
    "scheduler-kills": 5,
    "scheduler-hangs": 2,
    "gateway-kills": 5,
    "partitions": 2,
    "rolling-restarts": 1,
    "vanishing-clients": 500,
}
SETTINGS = {"schedulers": 2, "streams": 8, "tokens": 64, "faults-per-stream": 1, "seed": 0, "fault-seed": 0}


class Faults:
    """The scenarios."""

    def __init__(self, stack: Stack, load: Load, rng: random.Random, faults_per_stream: int) -> None:
        self._stack = stack
        self._load = load
        self._rng = rng
        self._faults_per_stream = faults_per_stream

    async def kills(self, victims: list[Process], count: int) -> Tally:
        """Kill a process at a random token, and start it again at once."""
        tally = Tally()

        async def fault() -> None:
            victim = self._rng.choice(victims)
            killed_at = time.monotonic()
            await victim.kill()
            started_at = time.monotonic()
            await victim.start()
            await self._detect(victim, killed_at, tally)
            await self._stack.ready()
            tally.restarts.append(time.monotonic() - started_at)

        for done in range(0, count, self._faults_per_stream):
            await self._strike(tally, min(count - done, self._faults_per_stream), fault)
        return tally

    async def hangs(self, victims: list[Process], count: int) -> Tally:
        """Freeze a process at a random token until others have noticed, and a little longer."""
        tally = Tally()

        async def fault() -> None:
            victim = self._rng.choice(victims)
            frozen_at = time.monotonic()
            victim.send(signal.SIGSTOP)
            await self._detect(victim, frozen_at, tally)
            noticed_at = time.monotonic()
            await asyncio.sleep(self._rng.random() * 2 + (0 if victim in self._stack.workers else MIN_FROZEN_S))
            victim.send(signal.SIGCONT)
            await self._stack.ready()
            tally.restarts.append(time.monotonic() - noticed_at)

        for done in range(0, count, self._faults_per_stream):
            await self._strike(tally, min(count - done, self._faults_per_stream), fault)
        return tally

    async def partitions(self, relays: list[Relay], count: int) -> Tally:
        """Cut the way to a scheduler or to its worker for a while."""
        tally = Tally()
        for _ in range(count):
            relay = self._rng.choice(relays)

            async def fault(relay: Relay = relay) -> None:
                relay.cut()
                await asyncio.sleep(CUT_S)
                relay.heal()

            await self._strike(tally, 1, fault)
        return tally

    async def _detect(self, victim: Process, since: float, tally: Tally) -> None:
        """Note how long it took until a worker was given up by its scheduler."""
        if victim not in self._stack.workers:
            return
        scheduler = self._stack.schedulers[self._stack.workers.index(victim)]
        try:
            tally.detections.append(await scheduler.reported(since, timeout_s=30) - since)
        except TimeoutError:
            tally.problems.append(f"{victim.name} was not given up")

    async def _strike(self, tally: Tally, count: int, fault: Callable[[], Awaitable[None]]) -> None:
        """Let a fault happen so many times while the streams run, each at a random token."""
        most = max(2, self._load.num_tokens * (2 if count > 1 else 1) // (3 if count > 1 else 2))
        await self._load.run(tally, [self._rng.randrange(1, most) for _ in range(count)], fault)
        await self._settle(tally)

    async def _settle(self, tally: Tally) -> None:
        """Wait until everything is up again and nothing is left of the streams."""
        try:
            await self._stack.ready()
            await self._stack.idle()
        except TimeoutError:
            tally.problems.append("blocks are not free, or a process does not come back")

    async def rolling_restarts(self, count: int) -> Tally:
        """Restart one gateway after the other, with streams running and new calls coming, as an upgrade does."""
        tally = Tally()
        for _ in range(count):
            calls = asyncio.create_task(_steady_calls(self._stack.address))

            async def restart() -> None:
                for gateway in self._stack.gateways:
                    gateway.send(signal.SIGTERM)
                    if status := await gateway.wait():
                        tally.problems.append(f"{gateway.name} ended with status {status}")
                    await gateway.start()
                    await self._stack.ready()

            restarting = asyncio.create_task(restart())
            while not restarting.done():  # a batch of streams after the other
                await self._load.run(tally, [1], _nothing)
            await restarting
            calls.cancel()
            made, failed = await calls
            tally.notes.append(f"{made} new calls, {len(failed)} failed")
            tally.problems += failed
            await self._settle(tally)
        return tally

    async def vanishing_clients(self, count: int) -> Tally:
        """Let many clients vanish in the middle of their streams."""
        tally = Tally()
        command = [sys.executable, __file__, "--vanish", self._stack.address, "--vanishing-clients", str(count)]
        clients = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert clients.stdout is not None
        if not await clients.stdout.readline():
            tally.problems.append("the clients ended before they had their streams")
        clients.kill()
        await clients.wait()
        seconds = await self._stack.idle()
        tally.notes.append(f"{count} clients: all blocks free after {seconds:.2f} s")
        return tally


async def _nothing() -> None:
    """Let the streams run."""


async def _steady_calls(address: str) -> tuple[int, list[str]]:
    """Start short calls at a steady rate until cancelled; return how many, and what failed. Nothing is retried here."""
    running: list[asyncio.Task[str]] = []
    async with grpc.aio.insecure_channel(address, [("grpc.enable_retries", 0)]) as channel:
        stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        generation = generation_pb2.Generation(model="demo", text="Hello")
        generation.stop.max_new_tokens = 3

        async def call() -> str:
            try:
                await stub.Generate(generation_pb2.GenerateRequest(generation=generation), timeout=30)
            except grpc.aio.AioRpcError as error:
                return f"a new call failed: {error.code().name} {error.details()}"
            return ""

        due = time.monotonic()
        try:
            while True:
                running.append(asyncio.create_task(call()))
                due += 1 / CALLS_PER_S
                await asyncio.sleep(max(0.0, due - time.monotonic()))
        except asyncio.CancelledError:
            failures = await asyncio.gather(*running)
    return len(running), [failure for failure in failures if failure]


async def vanish(address: str, count: int) -> None:
    """Open streams, say so when each has its first event, and wait to be killed."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        generation = generation_pb2.Generation(model="demo", text="Once upon a time")
        generation.stop.max_new_tokens = 2000
        generation.stop.ignore_end_of_sequence = True
        request = generation_pb2.GenerateStreamRequest(generation=generation)
        calls = [stub.GenerateStream(request) for _ in range(count)]
        await asyncio.gather(*(call.read() for call in calls))
        print("all run", flush=True)
        await asyncio.Event().wait()


def report(name: str, count: int, tally: Tally) -> None:
    """Print one line of the table, and what did not hold."""
    columns = [f"{tally.num_streams}", f"{tally.num_tokens}", f"{tally.num_resumed}"]
    columns += [_figures(tally.detections), _figures(tally.restarts), _figures(tally.replays), _figures(tally.stalls)]
    verdict = "ok" if not tally.problems else f"{len(tally.problems)} PROBLEMS"
    print(f"| {name}, {count} x | {' | '.join(columns)} | {'; '.join([verdict, *tally.notes[-3:]])} |", flush=True)
    for problem in tally.problems[:20]:
        print(f"    {problem}", flush=True)


def _figures(seconds: list[float]) -> str:
    """Return median, 99th percentile and maximum."""
    if not seconds:
        return "-"
    ordered = sorted(seconds)
    places = (len(ordered) // 2, min(len(ordered) - 1, int(0.99 * len(ordered))), len(ordered) - 1)
    return " / ".join(f"{ordered[place]:.2f}" if ordered[-1] >= 0.2 else f"{ordered[place]:.3f}" for place in places)


def add_up(results: Path, name: str, count: int, tally: Tally) -> tuple[int, Tally]:
    """Append what a scenario showed to a file; return what the whole file shows of that scenario."""
    with results.open("a") as file:
        file.write(json.dumps({"name": name, "count": count, "tally": dataclasses.asdict(tally)}) + "\n")
    total, num = Tally(), 0
    for row in map(json.loads, results.read_text().splitlines()):
        if row["name"] == name:
            num += row["count"]
            for key, value in row["tally"].items():
                setattr(total, key, getattr(total, key) + value)
    return num, total


async def run(args: argparse.Namespace) -> int:
    """Run what was asked for; return the exit status."""
    model = demo_model.fetch(demo_model.cache_dir(), lambda *_: None)
    failed = False
    async with Stack(model, args.kv_cache_memory, args.schedulers, has_relays=args.partitions > 0) as stack:
        load = Load(stack.address, args.streams, args.tokens, args.seed)
        try:
            await load.record()
            replays = await load.replay()
            faults = Faults(stack, load, random.Random(args.fault_seed), args.faults_per_stream)
            alone = ", the only one" if args.schedulers == 1 else ""
            relays = stack.gateway_relays + stack.worker_relays
            scenarios: list[tuple[str, int, Callable[[int], Awaitable[Tally]]]] = [
                (f"worker killed{alone}", args.worker_kills, lambda n: faults.kills(stack.workers, n)),
                (f"worker hangs{alone}", args.worker_hangs, lambda n: faults.hangs(stack.workers, n)),
                (f"scheduler killed{alone}", args.scheduler_kills, lambda n: faults.kills(stack.schedulers, n)),
                (f"scheduler hangs{alone}", args.scheduler_hangs, lambda n: faults.hangs(stack.schedulers, n)),
                ("gateway killed", args.gateway_kills, lambda n: faults.kills(stack.gateways, n)),
                ("network cut for 6 s", args.partitions, lambda n: faults.partitions(relays, n)),
                ("gateways restart in turn", args.rolling_restarts, faults.rolling_restarts),
                ("clients vanish", args.vanishing_clients, faults.vanishing_clients),
            ]
            print(
                "| fault | streams | tokens | resumed | detection (s) | restart (s) | replay (s) | stall (s) | result |"
            )
            print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
            for name, count, scenario in scenarios:
                if count:
                    tally = await scenario(count)
                    tally.replays = replays
                    failed = failed or bool(tally.problems)
                    total = add_up(args.results, name, count, tally) if args.results else (count, tally)
                    report(name, *total)
            if failed and args.show_logs:
                for process in stack.all:
                    print(f"--- {process.name}\n{process.log.read_text()[-3000:]}")
        finally:
            await load.close()
    return int(failed)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, count in FAULTS.items():
        parser.add_argument(f"--{name}", type=int, help=f"default: {count}, or none with --only")
    for name, value in SETTINGS.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--kv-cache-memory", default="256MiB")
    parser.add_argument("--only", action="store_true", help="no faults but those that are asked for")
    parser.add_argument("--results", type=Path, help="add up all runs in this file")
    parser.add_argument("--show-logs", action="store_true", help="print the ends of the processes' logs on a failure")
    parser.add_argument("--vanish", metavar="ADDRESS", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name, count in FAULTS.items():
        attribute = name.replace("-", "_")
        if getattr(args, attribute) is None:
            setattr(args, attribute, 0 if args.only else count)
    if args.vanish:
        asyncio.run(vanish(args.vanish, args.vanishing_clients))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever stops this stops all that it started
    return asyncio.run(run(args))


if __name__ == "__main__":
    sys.exit(main())
