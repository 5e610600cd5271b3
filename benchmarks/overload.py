"""Ask ten times what a deployment can do, for a minute, and see what it still does.

    python benchmarks/overload.py [--seconds 60] [--factor 10] [--tokens 32] [--deadline 5]

A gateway, a scheduler and a CPU worker; two tenants, whose weights are 1 and 3, ask for the same. First as many callers
as there are slots ask again and again, which gives the peak; then calls come at ten times that rate, whatever becomes
of them. What must hold:

- refusals take less than 50 ms (99th percentile, as the client sees it), and nothing fails but by being refused;
  the client, which makes all the calls, shares the machine: so what the gateway logs of them is shown as well
- tokens of answers in time are at least 90 % of the peak's
- what was admitted is answered by its deadline, or ended then (250 ms are allowed for)
- the tokens of the two tenants are 1:3 within 10 %
- the memory of gateway and scheduler at the end is at most 5 % above that after a quarter of the time

Prints these figures; exits with 1 if anything did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections import Counter
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
MAX_RUNNING = 8
MAX_WAITING = 64
REFUSED_REASONS = ("QUEUE_FULL", "DEADLINE_UNREACHABLE")
REFUSED = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)


@dataclass
class Figures:
    """What a phase showed. Times in seconds."""

    tokens: Counter[str] = field(default_factory=Counter)  # by tenant, of answers in time
    refusals: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)  # of admitted calls that ended without an answer
    in_gateway: list[float] = field(default_factory=list)  # refusals as the gateway's log has them
    failures: Counter[str] = field(default_factory=Counter)
    num_calls: int = 0


class Callers:
    """Calls of both tenants."""

    def __init__(self, address: str, keys: dict[str, str], num_tokens: int, deadline_s: float) -> None:
        self._channel = grpc.aio.insecure_channel(address, [("grpc.enable_retries", 0)])
        self._stub: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._keys = keys
        self._num_tokens = num_tokens
        self._deadline_s = deadline_s

    async def close(self) -> None:
        """Disconnect."""
        await self._channel.close()

    async def ready(self) -> None:
        """Return once a call is answered."""
        figures = Figures()
        while not figures.tokens:
            await self._channel.channel_ready()
            await self.call(next(iter(WEIGHTS)), figures)
            await asyncio.sleep(0.1)

    async def call(self, tenant: str, figures: Figures) -> None:
        """Make a call, whatever becomes of it."""
        generation = generation_pb2.Generation(model="demo", text=f"Once upon a time {figures.num_calls}")
        generation.stop.max_new_tokens = self._num_tokens
        generation.stop.ignore_end_of_sequence = True
        figures.num_calls += 1
        request = generation_pb2.GenerateRequest(generation=generation)
        metadata = (("authorization", f"Bearer {self._keys[tenant]}"),)
        started = time.monotonic()
        try:
            await self._stub.Generate(request, timeout=self._deadline_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            took_s = time.monotonic() - started
            if error.code() in REFUSED:
                figures.refusals.append(took_s)
            elif error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                figures.late.append(took_s)
            else:
                figures.failures[f"{error.code().name} {error.details()}"] += 1
        else:
            figures.tokens[tenant] += self._num_tokens

    async def peak(self, seconds: float) -> Figures:
        """Let as many callers as there are slots ask again and again."""
        figures, until = Figures(), time.monotonic() + seconds

        async def ask(tenant: str) -> None:
            while time.monotonic() < until:
                await self.call(tenant, figures)
                await asyncio.sleep(0.01)  # a refusal comes at once

        await asyncio.gather(*(ask(tenant) for tenant in WEIGHTS for _ in range(MAX_RUNNING)))
        return figures

    async def flood(self, calls_per_s: float, seconds: float, figures: Figures) -> None:
        """Make calls at a rate, of both tenants in turn."""
        running: set[asyncio.Task[None]] = set()
        begun = time.monotonic()
        for number in range(int(calls_per_s * seconds)):
            await asyncio.sleep(max(0.0, begun + number / calls_per_s - time.monotonic()))
            task = asyncio.create_task(self.call(list(WEIGHTS)[number % 2], figures))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)


def memory(process: Process) -> float:
    """Return what a process takes, in MiB."""
    return float(psutil.Process(process.pid).memory_info().rss / 2**20)


def refusals_logged(log: Path) -> list[float]:
    """Return how long the gateway had each call that it refused, from its log."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return [line["duration_ms"] / 1000 for line in lines if line.get("reason") in REFUSED_REASONS]


def milliseconds(seconds: list[float]) -> str:
    """Return the median and the 99th percentile of times."""
    times = sorted(seconds) or [0.0]
    return f"{1000 * times[len(times) // 2]:.1f} ms (median), {1000 * percentile(times):.1f} ms (99th percentile)"


def percentile(times: list[float]) -> float:
    """Return the 99th percentile."""
    return sorted(times)[int(0.99 * len(times))] if times else 0.0


async def run(args: argparse.Namespace) -> int:
    """Run both phases; return the exit status."""
    model = demo_model.fetch(demo_model.cache_dir(), lambda *_: None)
    with tempfile.TemporaryDirectory(prefix="octavo-overload-") as name:
        folder, address = Path(name), f"127.0.0.1:{free_port()}"
        made = {tenant: make_key(tenant) for tenant in WEIGHTS}
        (folder / "keys.yaml").write_text(yaml.safe_dump([entry for _, entry in made.values()]))

        def octavo(kind: str, *options: str) -> Process:
            return Process(kind, [sys.executable, "-P", "-m", "octavo.services.cli", kind, *options], folder)

        scheduler = octavo(
            "scheduler", f"--scheduler-address=unix:{folder}/s", f"--worker-endpoint=ipc://{folder}/w",
            f"--max-running={MAX_RUNNING}", f"--max-waiting={MAX_WAITING}",
            f"--tenant-weights={','.join(f'{tenant}={weight:g}' for tenant, weight in WEIGHTS.items())}",
        )  # fmt: skip
        worker = octavo(
            "worker", f"--model={model}", f"--worker-endpoint=ipc://{folder}/w", "--worker-id=w", "--device=cpu",
            "--num-threads=1", "--kv-cache-memory=256MiB",
        )  # fmt: skip
        gateway = octavo(
            "gateway", str(model), "--model-name=demo", f"--grpc-address={address}", "--http-address=",
            f"--scheduler-addresses=unix:{folder}/s", f"--api-keys={folder}/keys.yaml",
        )  # fmt: skip
        callers = Callers(address, {tenant: key for tenant, (key, _) in made.items()}, args.tokens, args.deadline)
        try:
            for process in (scheduler, worker, gateway):
                await process.start()
            async with asyncio.timeout(120):
                await callers.ready()
            peak = await callers.peak(args.seconds / 4)
            peak_rate = sum(peak.tokens.values()) / (args.seconds / 4)
            rate = args.factor * peak_rate / args.tokens
            flooded = Figures()
            flood = asyncio.create_task(callers.flood(rate, args.seconds, flooded))
            await asyncio.wait({flood}, timeout=args.seconds / 4)
            before = {process.name: memory(process) for process in (gateway, scheduler)}
            begun = time.monotonic() - args.seconds / 4
            await flood
            seconds = time.monotonic() - begun
            after = {process.name: memory(process) for process in (gateway, scheduler)}
        finally:
            await callers.close()
            for process in (scheduler, worker, gateway):
                with contextlib.suppress(AssertionError):  # not started
                    await process.kill()
        flooded.in_gateway = refusals_logged(gateway.log)
    return report(args, peak_rate, rate, seconds, flooded, before, after)


def report(
    args: argparse.Namespace,
    peak_rate: float,
    rate: float,
    seconds: float,
    flooded: Figures,
    before: dict[str, float],
    after: dict[str, float],
) -> int:
    """Print the figures; return the exit status."""
    goodput = sum(flooded.tokens.values()) / seconds
    share = flooded.tokens["three"] / max(1, flooded.tokens["one"])
    late = max(flooded.late, default=0.0)
    checks = {
        f"refused {len(flooded.refusals)} of {flooded.num_calls} calls at {rate:.0f} calls/s; after "
        f"{milliseconds(flooded.refusals)}; of that in the gateway {milliseconds(flooded.in_gateway)}": (
            percentile(flooded.refusals) < 0.05
        ),
        f"goodput {goodput:.0f} tokens/s, peak {peak_rate:.0f}: {100 * goodput / peak_rate:.0f} %": goodput
        >= 0.9 * peak_rate,
        f"{len(flooded.late)} admitted calls ended at their deadline, the last after {late:.2f} s of "
        f"{args.deadline:g}": late < args.deadline + 0.25,
        f"tokens of the tenants 1:{share:.2f}": 2.7 <= share <= 3.3,
        **{
            f"memory of the {name}: {before[name]:.0f} MiB, then {after[name]:.0f} MiB": after[name]
            <= 1.05 * before[name]
            for name in before
        },
        f"other failures: {dict(flooded.failures) or 'none'}": not flooded.failures,
    }
    for text, holds in checks.items():
        print(f"{'ok  ' if holds else 'FAIL'} {text}")
    return int(not all(checks.values()))


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--factor", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--deadline", type=float, default=5.0)
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
