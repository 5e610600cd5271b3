"""Break a running deployment in every way there is, and check that nothing is lost.

    python benchmarks/faults.py [--worker-kills 5] [--worker-hangs 2] [--scheduler-kills 5] [--scheduler-hangs 2]
        [--gateway-kills 5] [--rolling-restarts 1] [--vanishing-clients 500] [--streams 8] [--seed 0]

Two gateways behind Envoy, two schedulers that both gateways know, a CPU worker for each. Every fault strikes while
`--streams` streams run, greedy and sampled, with penalties, stop strings, minimum tokens, log probabilities and
resume windows. What must hold, for every stream: it ends well (P5), within its time (P4), with the tokens, the text
and the log probabilities of the run without faults (P1, P2); the client library checks that there is no gap, no
repeat and exactly one ending. After each scenario every block of KV cache is free (P3).

Prints a line for each scenario: how many streams, how many of them stalled how long, and what did not hold; exits
with 1 if anything did not. A stall is the longest time between two deltas of a stream: detection, re-queueing and
computing the output again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from fault_stack import Process, Stack

from octavo.inference.v1 import generation_pb2, generation_pb2_grpc
from octavo.services.cli import demo_model
from octavo.services.client import Client, OctavoError

STREAM_S = 120.0
CALLS_PER_S = 20
PROMPTS = (
    "Once upon a time there was a small village by the sea, and",
    "The three most important rules of cooking are",
    "Dear Sir or Madam, I write to you because",
    "In the year 2150 the first ship left for",
)
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.3},
    {"temperature": 0.8, "stop": ["\n\n\n", "zzz the end"], "min_new_tokens": 20},
    {"temperature": 0.7, "logprobs": 3, "resume_window_ms": 20_000},
    {"temperature": 1.0, "top_k": 50, "resume_window_ms": 20_000},
)


@dataclass
class Outcome:
    """What a stream brought. `stall_s`: longest time between two deltas."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    stall_s: float = 0.0
    num_resumed: int = 0
    error: str = ""

    @property
    def output(self) -> tuple[list[int], str, list[float]]:
        """What must not depend on faults."""
        return self.ids, self.text, self.logprobs


@dataclass
class Tally:
    """What a scenario showed."""

    outcomes: list[Outcome] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Load:
    """Streams to run, and what each of them makes without faults."""

    def __init__(self, address: str, num_streams: int, num_tokens: int, seed: int) -> None:
        self._client = Client(address, timeout_s=STREAM_S)
        self._num_tokens = num_tokens
        self._options = [
            {"prompt": PROMPTS[n % len(PROMPTS)], "seed": seed + n, **KINDS[n % len(KINDS)]} for n in range(num_streams)
        ]
        self._wanted: list[Outcome] = []
        self._progress = [0] * num_streams
        self._moved = asyncio.Event()

    async def close(self) -> None:
        """Disconnect."""
        await self._client.close()

    async def record(self) -> None:
        """Run every stream once without faults."""
        self._wanted = await asyncio.gather(*(self._stream(n) for n in range(len(self._options))))
        if failed := [outcome.error for outcome in self._wanted if outcome.error]:
            raise SystemExit(f"a stream failed without any fault: {failed[0]}")

    async def run(self, tally: Tally, after_tokens: int, fault: Callable[[], Awaitable[None]]) -> None:
        """Run all streams; let the fault happen when each has so many tokens; compare what they bring."""
        self._progress = [0] * len(self._options)
        streams = [asyncio.create_task(self._stream(n)) for n in range(len(self._options))]
        while min(self._progress) < after_tokens and not all(stream.done() for stream in streams):
            self._moved.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait(), 1)
        await fault()
        outcomes = await asyncio.gather(*streams)
        tally.outcomes += outcomes
        for number, (outcome, wanted) in enumerate(zip(outcomes, self._wanted, strict=True)):
            if outcome.error:
                tally.problems.append(f"stream {number}: {outcome.error}")
            elif outcome.output != wanted.output:
                same = next((n for n, (a, b) in enumerate(zip(outcome.ids, wanted.ids, strict=False)) if a != b), -1)
                tally.problems.append(f"stream {number}: another output; first other token {same}")

    async def _stream(self, number: int) -> Outcome:
        outcome = Outcome()
        last = time.monotonic()
        stream = self._client.stream(
            model="demo",
            max_new_tokens=self._num_tokens,
            ignore_end_of_sequence=True,
            return_token_ids=True,
            **self._options[number],
        )
        try:
            async for delta in stream:
                now = time.monotonic()
                if outcome.ids:
                    outcome.stall_s = max(outcome.stall_s, now - last)
                last = now
                outcome.ids += delta.token_ids
                outcome.text += delta.text
                outcome.logprobs += delta.logprobs.chosen
                self._progress[number] = len(outcome.ids)
                self._moved.set()
        except OctavoError as error:
            outcome.error = f"{error.code.name} {error}"
        outcome.num_resumed = stream.num_resumed
        self._progress[number] = self._num_tokens
        self._moved.set()
        return outcome


class Faults:
    """The scenarios."""

    def __init__(self, stack: Stack, load: Load, rng: random.Random, num_tokens: int) -> None:
        self._stack = stack
        self._load = load
        self._rng = rng
        self._num_tokens = num_tokens

    async def kills(self, victims: list[Process], count: int) -> Tally:
        """Kill a process at a random token, and start it again at once."""
        tally = Tally()
        for _ in range(count):
            victim = self._rng.choice(victims)

            async def fault(victim: Process = victim) -> None:
                await victim.kill()
                await victim.start()

            await self._strike(tally, fault)
        return tally

    async def hangs(self, victims: list[Process], count: int) -> Tally:
        """Freeze a process until the streams have ended without it, then let it go on."""
        tally = Tally()
        for _ in range(count):
            victim = self._rng.choice(victims)

            async def fault(victim: Process = victim) -> None:
                victim.send(signal.SIGSTOP)

            try:
                await self._strike(tally, fault, wait_ready=False)
            finally:
                victim.send(signal.SIGCONT)
            await self._settle(tally)
        return tally

    async def _strike(self, tally: Tally, fault: Callable[[], Awaitable[None]], wait_ready: bool = True) -> None:
        await self._load.run(tally, self._rng.randrange(1, self._num_tokens // 2), fault)
        if wait_ready:
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
                await self._load.run(tally, 1, _nothing)
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


def report(name: str, tally: Tally) -> None:
    """Print one line of the table, and what did not hold."""
    stalls = sorted(outcome.stall_s for outcome in tally.outcomes)
    resumed = sum(outcome.num_resumed > 0 for outcome in tally.outcomes)
    middle, last = (stalls[len(stalls) // 2], stalls[-1]) if stalls else (0.0, 0.0)
    verdict = "ok" if not tally.problems else f"{len(tally.problems)} PROBLEMS"
    num_tokens = sum(len(outcome.ids) for outcome in tally.outcomes)
    figures = f"{len(stalls):5} | {num_tokens:7} | {resumed:7} | {middle:6.2f} | {last:6.2f}"
    print(f"| {name:28} | {figures} | {'; '.join([verdict, *tally.notes])} |", flush=True)
    for problem in tally.problems[:20]:
        print(f"    {problem}", flush=True)


async def run(args: argparse.Namespace) -> int:
    """Run what was asked for; return the exit status."""
    model = demo_model.fetch(demo_model.cache_dir(), lambda *_: None)
    failed = False
    async with Stack(model, args.kv_cache_memory) as stack:
        load = Load(stack.address, args.streams, args.tokens, args.seed)
        try:
            await load.record()
            faults = Faults(stack, load, random.Random(args.seed), args.tokens)
            scenarios: list[tuple[str, int, Awaitable[Tally]]] = [
                ("worker killed", args.worker_kills, faults.kills(stack.workers, args.worker_kills)),
                ("worker hangs", args.worker_hangs, faults.hangs(stack.workers, args.worker_hangs)),
                ("scheduler killed", args.scheduler_kills, faults.kills(stack.schedulers, args.scheduler_kills)),
                ("scheduler hangs", args.scheduler_hangs, faults.hangs(stack.schedulers, args.scheduler_hangs)),
                ("gateway killed", args.gateway_kills, faults.kills(stack.gateways, args.gateway_kills)),
                ("gateways restart in turn", args.rolling_restarts, faults.rolling_restarts(args.rolling_restarts)),
                ("clients vanish", args.vanishing_clients, faults.vanishing_clients(args.vanishing_clients)),
            ]
            print("| fault | streams | tokens | resumed | stall p50 (s) | stall max (s) | result |")
            print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
            for name, count, scenario in scenarios:
                tally = await scenario
                if count:
                    report(f"{name}, {count} x" if name != "clients vanish" else name, tally)
                failed = failed or bool(tally.problems)
            if failed and args.show_logs:
                for process in stack.all:
                    print(f"--- {process.name}\n{process.log.read_text()[-3000:]}")
        finally:
            await load.close()
    return int(failed)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, count in (
        ("worker-kills", 5),
        ("worker-hangs", 2),
        ("scheduler-kills", 5),
        ("scheduler-hangs", 2),
        ("gateway-kills", 5),
        ("rolling-restarts", 1),
        ("vanishing-clients", 500),
        ("streams", 8),
        ("tokens", 64),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--kv-cache-memory", default="256MiB")
    parser.add_argument("--show-logs", action="store_true", help="print the ends of the processes' logs on a failure")
    parser.add_argument("--vanish", metavar="ADDRESS", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.vanish:
        asyncio.run(vanish(args.vanish, args.vanishing_clients))
        return 0
    return asyncio.run(run(args))


if __name__ == "__main__":
    sys.exit(main())
