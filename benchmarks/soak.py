"""Serve many mixed streams for a long time, with random cancels and deadlines, and check what must hold.

    python benchmarks/soak.py [--minutes 10] [--streams 64] [--seed 0] [--model demo] [--device cpu]

Each stream takes a random row of services/bench/workloads/chat.jsonl, sampled or greedy, and one in five is
cancelled at a random token, one in ten has a deadline that it cannot meet. What must hold:

- no error but DEADLINE_EXCEEDED (or its refusal, DEADLINE_UNREACHABLE) on streams with a deadline
- no gap, no repeat, one ending: the client library checks each stream
- at the end every KV block is free and nothing runs or waits
- the memory of all processes is flat: last tenth of the time against the second tenth, within
  5 % (8 MiB in a process so small that 5 % is less)

Prints one line a minute, then a summary; exits with 1 if anything did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from octavo.services.cli.addresses import take_free
from octavo.services.client import Client, OctavoError

WORKLOAD = Path(__file__).resolve().parent.parent / "services" / "bench" / "workloads" / "chat.jsonl"
EXPECTED_WITH_DEADLINE = {"QUEUE_TIMEOUT", "GENERATION_TIMEOUT", "DEADLINE_UNREACHABLE"}


@dataclass
class Tally:
    """What happened so far."""

    endings: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    problems: list[str] = field(default_factory=list)
    memory: list[tuple[float, dict[str, float]]] = field(default_factory=list)  # seconds, MiB by process


async def one_stream(client: Client, rng: random.Random, row: dict[str, object], tally: Tally) -> None:
    """Run one request to its end, whichever way that is."""
    fate = rng.random()
    cancel_after = rng.randrange(1, 60) if fate < 0.2 else None
    timeout_s = rng.uniform(0.05, 3.0) if fate > 0.9 else None
    greedy = rng.random() < 0.5
    stream = client.stream(
        messages=row["messages"],  # type: ignore[arg-type]
        max_new_tokens=min(int(row["max_tokens"]), 512),  # type: ignore[call-overload]
        temperature=0.0 if greedy else 0.8,
        top_p=1.0 if greedy else 0.95,
        seed=rng.randrange(1 << 32),
        ignore_end_of_sequence=rng.random() < 0.5,
        timeout_s=timeout_s,
    )
    tokens = 0
    try:
        async for delta in stream:
            tokens += delta.token_count
            if cancel_after is not None and tokens >= cancel_after:
                stream.cancel()
        if stream.completed is not None:
            tally.endings["completed"] += 1
        else:
            tally.endings["cancelled"] += 1
            if cancel_after is None:
                tally.problems.append(f"{stream.request_id} ended without Completed")
    except OctavoError as error:
        name = error.reason or error.code.name
        deadline = error.code.name == "DEADLINE_EXCEEDED" or error.reason in EXPECTED_WITH_DEADLINE
        tally.endings[name] += 1
        if timeout_s is None or not deadline:
            tally.problems.append(f"{stream.request_id}: {error}")
    tally.tokens += tokens


async def load(client: Client, options: argparse.Namespace, rows: list[dict[str, object]], tally: Tally) -> None:
    """Keep the streams busy until time is up."""
    end = time.monotonic() + 60 * options.minutes

    async def worker(number: int) -> None:
        rng = random.Random(f"{options.seed}/{number}")
        while time.monotonic() < end:
            await one_stream(client, rng, rng.choice(rows), tally)

    await asyncio.gather(*[worker(number) for number in range(options.streams)])


def memory_mib(server: psutil.Process) -> dict[str, float]:
    """Memory that each process has for itself, by name: shared libraries would follow other processes' starts."""
    found: dict[str, float] = {}
    for process in [server, *server.children(recursive=True)]:
        words = process.cmdline()
        name = words[words.index("octavo") + 1] if "octavo" in words[:-1] else process.name()
        found[name] = found.get(name, 0.0) + process.memory_full_info().uss / 2**20
    return found


async def watch(server: psutil.Process, tally: Tally, started: float) -> None:
    """Note memory every two seconds and print a line every minute."""
    next_line = 60.0
    while True:
        seconds = time.monotonic() - started
        tally.memory.append((seconds, memory_mib(server)))
        if seconds >= next_line:
            next_line += 60
            parts = ", ".join(f"{name} {mib:.0f}" for name, mib in sorted(tally.memory[-1][1].items()))
            print(f"{seconds:5.0f} s  {tally.tokens:7d} tokens  {dict(tally.endings)}  MiB: {parts}", flush=True)
        await asyncio.sleep(2)


def check_memory(tally: Tally) -> dict[str, float]:
    """Return the growth of each process between the second and the last tenth, as a ratio."""
    total = tally.memory[-1][0]
    early = [mib for seconds, mib in tally.memory if 0.1 * total <= seconds < 0.2 * total]
    late = [mib for seconds, mib in tally.memory if seconds >= 0.9 * total]
    growth = {}
    for name in late[-1] if late else ():
        before = statistics.median(mib.get(name, 0.0) for mib in early)
        growth[name] = statistics.median(mib.get(name, 0.0) for mib in late) / before if before else 1.0
        if growth[name] > 1.05 and before * (growth[name] - 1) > 8:
            tally.problems.append(f"{name} grew by {100 * growth[name] - 100:.1f} %")
    return growth


async def check_empty(client: Client, tally: Tally) -> None:
    """Wait for cancelled work to be gone, then check that nothing is left."""
    for _ in range(100):
        (state,) = await client.load()
        if not state.running and not state.waiting and state.kv_blocks_free == state.kv_blocks_total:
            return
        await asyncio.sleep(0.1)
    tally.problems.append(f"not empty at the end: {state}")


async def run(options: argparse.Namespace, address: str, server: psutil.Process) -> Tally:
    """Load the server at `address` and check it."""
    rows = [json.loads(line) for line in WORKLOAD.read_text().splitlines()]
    tally = Tally()
    started = time.monotonic()
    async with Client(address) as client:
        watching = asyncio.create_task(watch(server, tally, started))
        await load(client, options, rows, tally)
        watching.cancel()
        await check_empty(client, tally)
    seconds = time.monotonic() - started
    growth = check_memory(tally)
    print(f"{options.streams} streams, {seconds:.0f} s, {tally.tokens} tokens ({tally.tokens / seconds:.0f} tokens/s)")
    print(f"endings: {dict(tally.endings)}")
    print("memory, last tenth against second tenth:", {name: round(ratio, 3) for name, ratio in growth.items()})
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    (address,) = take_free("127.0.0.1:0", 1)
    command = [sys.executable, "-m", "octavo.services.cli", "serve", options.model, "--grpc-address", address]
    command += ["--http-address", "", "--device", options.device]
    serving = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert serving.stdout is not None
    for line in serving.stdout:
        print(line.rstrip())
        if "ready" in line:
            break
    try:
        tally = asyncio.run(run(options, address, psutil.Process(serving.pid)))
    finally:
        serving.send_signal(signal.SIGINT)
        status = serving.wait(60)
    if status != 0:
        tally.problems.append(f"octavo serve ended with status {status}")
    for problem in tally.problems[:20]:
        print("PROBLEM:", problem)
    print("everything held" if not tally.problems else f"{len(tally.problems)} problems")
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
