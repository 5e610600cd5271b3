"""Ask several times what a deployment can do, with deadlines, and see what it still does.

    python benchmarks/overload.py [--factors 1.2,2,4,10] [--deadlines 1.25,1.5,2,4,8] [--seconds 30] [--mixed]

A gateway, a scheduler with its default limits, and a CPU worker; the client, which makes all calls, shares the machine.
First `--callers` of them ask again and again without a deadline: that is the peak, and how long a call takes then.
After that calls come at a multiple of the peak's rate, whatever becomes of them, each with a deadline of so many times
what a call of the peak took. Two tenants, whose weights are 1 and 3, ask for the same; `--mixed` draws the lengths of
prompts and outputs, and a call's deadline is then so many times what calls of its length took in the peak.
For each pair of factor and deadline a line says:

- goodput: tokens of answers that came by their deadline, in parts of the peak (at least 0.9; 0.8 with the shortest)
- late: calls that were admitted and not answered by their deadline, in parts of the admitted (at most 0.02)
- refused: calls, the 99th percentile of the time that took, and the tenants' tokens, which should be 1:3

Then how soon a single call is as fast as before again (within 5 s), and whether the memory of gateway and scheduler
grew by more than 5 % since the last line of the first deadline, when as many calls as ever had been open at once.
Exits with 1 if anything did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import yaml
from fault_stack import Process, free_port

from octavo.inference.v1 import generation_pb2, generation_pb2_grpc
from octavo.services.cli import demo_model
from octavo.services.common.api_keys import make_key

WEIGHTS = {"one": 1.0, "three": 3.0}
REFUSED = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
WORDS = (
    "a",
    "cat",
    "sat",
    "on",
    "the",
    "mat",
    "and",
    "saw",
    "sun",
    "come",
    "up",
    "over",
    "hill",
    "while",
    "dog",
    "ran",
)
MOST_OPEN = 4000  # calls at once: what a client of one process can hold


@dataclass
class Figures:
    """What a phase showed. Times in seconds."""

    tokens: Counter[str] = field(default_factory=Counter)  # by tenant, of answers in time
    took: list[float] = field(default_factory=list)  # of answers in time
    took_by_length: dict[int, list[float]] = field(default_factory=dict)  # by tokens of the output
    refusals: list[float] = field(default_factory=list)
    num_late: int = 0  # admitted, and not answered in time
    failures: Counter[str] = field(default_factory=Counter)
    num_calls: int = 0

    @property
    def late_part(self) -> float:
        """Of the admitted calls."""
        return self.num_late / max(1, self.num_late + len(self.took))


class Callers:
    """Calls of both tenants."""

    def __init__(self, address: str, keys: dict[str, str], num_tokens: int, is_mixed: bool) -> None:
        self._channel = grpc.aio.insecure_channel(address, [("grpc.enable_retries", 0)])
        self._stub: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._keys = keys
        self._num_tokens = num_tokens
        self._is_mixed = is_mixed
        self._rng = random.Random(1)

    async def close(self) -> None:
        """Disconnect."""
        await self._channel.close()

    def _generation(self) -> generation_pb2.Generation:
        rng = self._rng
        num_words, num_tokens = 24, self._num_tokens
        if self._is_mixed:
            num_words, num_tokens = (
                rng.choice((8, 24, 96, 384)),
                rng.choice((16, 64, 128, 256)) * self._num_tokens // 128,
            )
        text = " ".join(rng.choice(WORDS) for _ in range(num_words))
        generation = generation_pb2.Generation(model="demo", text=text)
        generation.stop.max_new_tokens = max(num_tokens, 1)
        generation.stop.ignore_end_of_sequence = True
        return generation

    async def call(self, tenant: str, figures: Figures, deadlines_s: Mapping[int, float] | None = None) -> None:
        """Make a call, whatever becomes of it; `deadlines_s` is by tokens of the output."""
        generation = self._generation()
        deadline_s = deadlines_s[generation.stop.max_new_tokens] if deadlines_s else None
        figures.num_calls += 1
        request = generation_pb2.GenerateRequest(generation=generation)
        metadata = (("authorization", f"Bearer {self._keys[tenant]}"),)
        started = time.monotonic()
        try:
            await self._stub.Generate(request, timeout=deadline_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() in REFUSED:
                figures.refusals.append(time.monotonic() - started)
            elif error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                figures.num_late += 1
            else:
                figures.failures[f"{error.code().name} {error.details()}"] += 1
        else:
            figures.took.append(time.monotonic() - started)
            figures.took_by_length.setdefault(generation.stop.max_new_tokens, []).append(figures.took[-1])
            figures.tokens[tenant] += generation.stop.max_new_tokens

    async def ready(self) -> None:
        """Return once a call is answered."""
        figures = Figures()
        while not figures.tokens:
            await self._channel.channel_ready()
            await self.call("one", figures)
            await asyncio.sleep(0.1)

    async def peak(self, num_callers: int, seconds: float) -> Figures:
        """Let so many callers ask again and again; the first round does not count."""
        figures, warm_up = Figures(), Figures()
        begun = time.monotonic()

        async def ask(tenant: str) -> None:
            await self.call(tenant, warm_up)
            num_calls = 0
            while time.monotonic() < begun + seconds or num_calls < 2:
                await self.call(tenant, figures)
                num_calls += 1

        await asyncio.gather(*(ask(list(WEIGHTS)[number % 2]) for number in range(num_callers)))
        return figures

    async def flood(self, calls_per_s: float, seconds: float, deadlines_s: Mapping[int, float]) -> Figures:
        """Make calls at a rate, of both tenants in turn; return when all have ended."""
        figures = Figures()
        running: set[asyncio.Task[None]] = set()
        begun = time.monotonic()
        for number in range(int(calls_per_s * seconds)):
            await asyncio.sleep(max(0.0, begun + number / calls_per_s - time.monotonic()))
            if len(running) < MOST_OPEN:
                task = asyncio.create_task(self.call(list(WEIGHTS)[number % 2], figures, deadlines_s))
                running.add(task)
                task.add_done_callback(running.discard)
        await asyncio.gather(*running)
        return figures

    async def recovery_s(self, usual_s: float) -> float:
        """Return after how long a single call takes at most one and a half times as long as it usually does."""
        begun = time.monotonic()
        while time.monotonic() < begun + 30:
            figures = Figures()
            await self.call("one", figures)
            if figures.took and figures.took[0] <= 1.5 * usual_s:
                break
        return time.monotonic() - begun - usual_s


def memory(process: Process) -> float:
    """Return what a process takes, in MiB."""
    return float(psutil.Process(process.pid).memory_info().rss / 2**20)


def percentile(times: list[float], part: float) -> float:
    """Return a percentile; 0 of nothing."""
    return sorted(times)[int(part * len(times))] if times else 0.0


async def run(args: argparse.Namespace) -> int:
    """Run all phases; return the exit status."""
    model = demo_model.fetch(demo_model.cache_dir(), lambda *_: None)
    with tempfile.TemporaryDirectory(prefix="octavo-overload-") as name:
        folder, address = Path(name), f"127.0.0.1:{free_port()}"
        made = {tenant: make_key(tenant) for tenant in WEIGHTS}
        (folder / "keys.yaml").write_text(yaml.safe_dump([entry for _, entry in made.values()]))

        def octavo(kind: str, *options: str) -> Process:
            return Process(kind, [sys.executable, "-P", "-m", "octavo.services.cli", kind, *options], folder)

        scheduler = octavo(
            "scheduler", f"--scheduler-address=unix:{folder}/s", f"--worker-endpoint=ipc://{folder}/w",
            f"--tenant-weights={','.join(f'{tenant}={weight:g}' for tenant, weight in WEIGHTS.items())}",
        )  # fmt: skip
        worker = octavo(
            "worker", f"--model={model}", f"--worker-endpoint=ipc://{folder}/w", "--worker-id=w", "--device=cpu",
            "--kv-cache-memory=2GiB",
        )  # fmt: skip
        gateway = octavo(
            "gateway", str(model), "--model-name=demo", f"--grpc-address={address}", "--http-address=",
            f"--scheduler-addresses=unix:{folder}/s", f"--api-keys={folder}/keys.yaml",
        )  # fmt: skip
        callers = Callers(address, {tenant: key for tenant, (key, _) in made.items()}, args.tokens, args.mixed)
        processes = scheduler, worker, gateway
        try:
            for process in processes:
                await process.start()
            async with asyncio.timeout(120):
                await callers.ready()
            return await measure(args, callers, scheduler, gateway)
        finally:
            await callers.close()
            for process in processes:
                with contextlib.suppress(AssertionError):  # not started
                    await process.kill()


async def measure(args: argparse.Namespace, callers: Callers, scheduler: Process, gateway: Process) -> int:
    """Measure and print; return the exit status."""
    alone = Figures()
    for _ in range(3):
        await callers.call("one", alone)
    peak = await callers.peak(args.callers, args.peak_seconds)
    took_s = sum(peak.took) / len(peak.took)
    peak_rate = args.callers * sum(peak.tokens.values()) / len(peak.took) / took_s
    calls_per_s = args.callers / took_s
    print(
        f"peak: {args.callers} callers, {peak_rate:.0f} tokens/s, {took_s:.2f} s a call, {calls_per_s:.1f} calls/s",
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    before: dict[str, float] = {}
    is_well = True
    for deadline in args.deadlines:
        for factor in args.factors:
            deadlines_s = {length: deadline * sum(took) / len(took) for length, took in peak.took_by_length.items()}
            figures = await callers.flood(factor * calls_per_s, args.seconds, deadlines_s)
            recovery_s = await callers.recovery_s(percentile(alone.took, 0.5))
            goodput = sum(figures.tokens.values()) / args.seconds / peak_rate
            share = figures.tokens["three"] / max(1, figures.tokens["one"])
            least = 0.8 if deadline == min(args.deadlines) else 0.9
            holds = goodput >= least and figures.late_part <= 0.02 and recovery_s <= 5 and not figures.failures
            is_well &= holds
            rows.append({
                "factor": factor, "deadline": deadline, "goodput": goodput, "late": figures.late_part,
                "num_late": figures.num_late, "in_time": len(figures.took), "refused": len(figures.refusals),
                "calls": figures.num_calls, "refusal_p99_s": percentile(figures.refusals, 0.99), "share": share,
                "recovery_s": recovery_s,
            })  # fmt: skip
            print(describe(deadline, factor, goodput, share, max(recovery_s, 0.0), figures, holds), flush=True)
        before = before or {process.name: memory(process) for process in (gateway, scheduler)}
    for process in (gateway, scheduler):
        now = memory(process)
        holds = now <= 1.05 * before[process.name] + 2
        is_well &= holds
        verdict = "ok  " if holds else "FAIL"
        print(f"{verdict} memory of the {process.name}: {before[process.name]:.0f} MiB, then {now:.0f} MiB")
    if args.json:
        args.json.write_text(json.dumps({"peak_tokens_per_s": peak_rate, "call_s": took_s, "rows": rows}, indent=1))
    return int(not is_well)


def describe(
    deadline: float, factor: float, goodput: float, share: float, recovery_s: float, figures: Figures, holds: bool
) -> str:
    """Return the line of one flood."""
    num_admitted = figures.num_late + len(figures.took)
    median_ms, p99_ms = (1000 * percentile(figures.refusals, part) for part in (0.5, 0.99))
    others = f", other failures {dict(figures.failures)}" if figures.failures else ""
    return (
        f"{'ok  ' if holds else 'FAIL'} deadline {deadline:4g} x, {factor:4g} times the peak: goodput {goodput:.2f}, "
        f"late {figures.num_late} of {num_admitted} ({100 * figures.late_part:.1f} %), "
        f"refused {len(figures.refusals)} of {figures.num_calls} in {median_ms:.1f} ms (p99 {p99_ms:.0f}), "
        f"tenants 1:{share:.2f}, recovered in {recovery_s:.1f} s{others}"
    )


def numbers(text: str) -> list[float]:
    """Return the numbers of a list."""
    return [float(number) for number in text.split(",")]


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--factors", type=numbers, default=[1.2, 2, 4, 10], help="times the peak's rate")
    parser.add_argument("--deadlines", type=numbers, default=[1.25, 1.5, 2, 4, 8], help="times a call of the peak")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each flood")
    parser.add_argument("--peak-seconds", type=float, default=20.0)
    parser.add_argument("--callers", type=int, default=64, help="of the peak")
    parser.add_argument("--tokens", type=int, default=128, help="of an output")
    parser.add_argument("--mixed", action="store_true", help="draw the lengths")
    parser.add_argument("--json", type=Path, help="where the figures go as well")
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
