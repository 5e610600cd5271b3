"""Structured output of a whole deployment: whether answers validate, and what new and hostile constraints cost.

    python -m benchmarks.structured_output [schemas] [hostile] [first-token]     (default: all three)
    python -m benchmarks.structured_output guesses --model MODEL

`octavo serve demo --device cpu` answers

- `schemas`: over 300 schemas (`benchmarks/schemas.py`), one answer for each at temperature 1. What ends by itself must
  be valid for the package jsonschema, formats included
- `hostile`: nearly 200 hostile schemas, expressions and grammars, one after another, while four streams go on. Each
  must be refused or answered (16 tokens) in less than a second. Printed beside the time between the streams' tokens
  while an ordinary constraint is in the place of each, in turns, before and after it: what these two differ by is
  chance. `--rounds` says how often, each with a new deployment, because one remembers what it has tried out
- `guesses`: schemas of typical size, one stream, greedily, in turns with and without guessed tokens, which must not
  change any token: tokens per second of both
- `first-token`: new schemas of typical size, in turns with requests without one: time to the first token of both

Exits with 1 if an answer does not validate or a hostile constraint takes more than a second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from decimal import Decimal
from typing import Any

import jsonschema

from benchmarks import schemas
from octavo.services.client import Client, OctavoError

PROMPT = "Here is one JSON document, as short as can be:\n"
STOP = 1  # FINISH_REASON_STOP
MAX_S = 1.0


async def check_schemas(
    client: Client, all_schemas: Iterable[schemas.Schema], max_new_tokens: int = 96
) -> Counter[str]:
    """Let each schema be answered, 32 at once; return how many ended in which way. Raises what jsonschema raises."""
    counts: Counter[str] = Counter()
    left = enumerate(all_schemas)

    async def work() -> None:
        for seed, schema in left:
            counts[await _check(client, schema, seed, max_new_tokens)] += 1

    await asyncio.gather(*(work() for _ in range(32)))
    return counts


async def _check(client: Client, schema: schemas.Schema, seed: int, max_new_tokens: int) -> str:
    try:
        reply = await client.generate(
            PROMPT, json_schema=json.dumps(schema), temperature=1.0, seed=seed, max_new_tokens=max_new_tokens
        )
    except OctavoError as error:
        if error.reason != "INVALID_CONSTRAINT":
            raise
        return "refused"
    (candidate,) = reply.response.candidates
    if candidate.finished.finish_reason != STOP:
        return "cut"
    # As decimals, because a float need not be a multiple of 0.01 where its digits say that it is.
    exact, answer = (json.loads(text, parse_float=Decimal) for text in (json.dumps(schema), candidate.text))
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(exact, format_checker=checker).validate(answer)
    return "valid"


class Streams:
    """Streams that go on without end, and the times between their tokens."""

    def __init__(self, client: Client, count: int) -> None:
        self._client = client
        self.gaps: list[float] = []
        self._has_new = asyncio.Event()
        self._tasks = [asyncio.create_task(self._read(seed)) for seed in range(count)]

    async def _read(self, seed: int) -> None:
        while True:
            stream = self._client.stream(
                "Once upon a time", temperature=1.0, seed=seed, max_new_tokens=400, ignore_end_of_sequence=True
            )
            before = None
            async for _ in stream:
                now = time.perf_counter()
                if before is not None:
                    self.gaps.append(now - before)
                    self._has_new.set()
                before = now

    async def until(self, count: int) -> None:
        """Wait for so many times."""
        while len(self.gaps) < count:
            self._has_new.clear()
            await self._has_new.wait()

    async def close(self) -> None:
        """End them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _ask(client: Client, kind: str, value: Any) -> tuple[str, float]:
    began = time.perf_counter()
    try:
        given: Any = json.loads(value) if kind == "choices" else value
        await client.generate(PROMPT, max_new_tokens=16, temperature=1.0, seed=1, **{kind: given})
        what = "answered"
    except OctavoError as error:
        what = error.reason or error.code.name
    except ValueError:
        what = "no message holds it"
    return what, time.perf_counter() - began


class Hostile:
    """What hostile constraints came to, and the times between other streams' tokens beside them and ordinary ones."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.times: list[tuple[float, str]] = []
        self.gaps: dict[str, list[float]] = {"ordinary": [], "hostile": [], "ordinary, again": []}

    async def measure(self, client: Client) -> None:
        """Send all hostile constraints to a new deployment."""
        streams = Streams(client, 4)
        await asyncio.sleep(2)
        for number, (kind, value) in enumerate(schemas.hostile()):
            before, after = (("regex", f"[a-z]{{1,{first + number}}}") for first in (100, 1000))
            for which, constraint in zip(self.gaps, (before, (kind, value), after), strict=True):
                streams.gaps.clear()
                what, took = await _ask(client, *constraint)
                await streams.until(16)  # as much of each, however soon it ends
                self.gaps[which] += streams.gaps
                if which == "hostile":
                    self.counts[what] += 1
                    self.times.append((took, f"{kind} {value[:60]!r}"))
        await streams.close()

    def report(self) -> bool:
        """Print it; return whether each took less than a second."""
        times = sorted(self.times, reverse=True)
        print(f"hostile constraints: {len(times)}: {dict(self.counts)}")
        print(f"  longest {times[0][0] * 1e3:.0f} ms: {times[0][1]}; median {times[len(times) // 2][0] * 1e3:.0f} ms")
        for took, what in times:
            if took > MAX_S:
                print(f"  {took:.2f} s: {what}")
        for which, each in self.gaps.items():
            print(f"  other streams' time between tokens beside {which} constraints: {_percentiles(each)}")
        first, hostile, second = (_p99(each) for each in self.gaps.values())
        ordinary = _p99(self.gaps["ordinary"] + self.gaps["ordinary, again"])
        print(
            f"  99th percentile beside hostile ones: {hostile / ordinary - 1:+.1%}; by chance {second / first - 1:+.1%}"
        )
        return times[0][0] < MAX_S


async def measure_first_token(client: Client, count: int = 60) -> None:
    """Print the time to the first token of new schemas, and of the same requests without one."""
    rng = random.Random(1)
    times: dict[str, list[float]] = {"without a schema": [], "with a new schema": []}
    for number in range(-3, count):
        schema = {**schemas.typical(rng), "title": f"new {number}"}
        for which in times:
            constraint: Any = {"json_schema": schema} if which == "with a new schema" else {}
            began = time.perf_counter()
            stream = client.stream(f"{number}. {PROMPT}", max_new_tokens=2, temperature=1.0, seed=1, **constraint)
            arrivals = [time.perf_counter() - began async for _ in stream]
            if number >= 0:
                times[which].append(arrivals[0])
    for which, each in times.items():
        print(f"time to first token {which}: {_percentiles(each)}")
    delays = [late - early for early, late in zip(*times.values(), strict=True)]
    print(f"  delay by a new schema: {_percentiles(delays)}")


async def measure_guesses(model: str, count: int = 24) -> bool:
    """Print the tokens per second of answers with a schema with and without guesses; return whether they are equal."""
    rng = random.Random(1)
    seconds, tokens, accepted, num_equal = [0.0, 0.0], 0, 0, 0
    async with _serving(model) as guessing, _serving(model, "--speculative-tokens=0") as plain:
        for number in range(-2, count):
            text = json.dumps(schemas.typical(rng))
            prompt = f"A JSON schema: {text}\nA document that is valid under it:\n"
            texts = []
            for which, client in enumerate((guessing, plain)):
                began = time.perf_counter()
                reply = await client.generate(prompt, json_schema=text, temperature=0.0, max_new_tokens=160)
                took = time.perf_counter() - began
                texts.append(reply.response.candidates[0].text)
                if number >= 0:
                    seconds[which] += took
                    tokens += reply.response.completed.usage.output_tokens * which
                    accepted += reply.response.completed.usage.speculative_accepted_tokens
            num_equal += number >= 0 and texts[0] == texts[1]
    print(f"{count} answers with a schema at one stream, {tokens} tokens, {num_equal} answers equal")
    print(f"  tokens/s with guesses {tokens / seconds[0]:.1f}, without {tokens / seconds[1]:.1f}: ", end="")
    print(f"{seconds[1] / seconds[0]:.2f} times as fast; {accepted / tokens:.0%} of tokens were guessed")
    return num_equal == count


def _percentiles(seconds: list[float]) -> str:
    ordered = sorted(each * 1e3 for each in seconds)
    middle = statistics.median(ordered)
    return f"mean {statistics.fmean(ordered):.1f}, median {middle:.1f}, p99 {_p99(ordered):.1f} ms of {len(ordered)}"


def _p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


@contextlib.asynccontextmanager
async def _serving(model: str = "demo", *flags: str) -> AsyncIterator[Client]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "octavo.services.cli", "serve", model, "--device=cpu", "--log-level=error"]
    command += [f"--grpc-address=127.0.0.1:{port}", "--http-address=", *flags]
    silent = asyncio.subprocess.DEVNULL
    server = await asyncio.create_subprocess_exec(*command, stdout=silent, stderr=silent)
    client = Client(f"127.0.0.1:{port}", timeout_s=120)
    try:
        async with asyncio.timeout(120):
            while True:
                with contextlib.suppress(Exception):  # it is starting
                    await client.generate("Once", max_new_tokens=1, regex="a")
                    break
                await asyncio.sleep(0.1)
        yield client
    finally:
        await client.close()
        server.send_signal(signal.SIGINT)
        await asyncio.wait_for(server.wait(), 60)


async def run(parts: list[str], num_drawn: int, num_rounds: int, model: str) -> int:
    """Run the parts; return the exit status."""
    if "guesses" in parts and not await measure_guesses(model):
        return 1
    async with contextlib.AsyncExitStack() as stack:
        if {"first-token", "schemas"} & set(parts):
            client = await stack.enter_async_context(_serving())
        if "first-token" in parts:
            await measure_first_token(client)
        if "schemas" in parts:
            began = time.perf_counter()
            counts = await check_schemas(client, schemas.everything(num_drawn))
            print(f"schemas: {dict(counts)}, in {time.perf_counter() - began:.0f} s")
    if "hostile" not in parts:
        return 0
    hostile = Hostile()
    for _ in range(num_rounds):
        async with _serving() as client:
            await hostile.measure(client)
    return int(not hostile.report())


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", default=["first-token", "schemas", "hostile"])
    parser.add_argument("--drawn", type=int, default=300, help="schemas that are drawn, beside those that are given")
    parser.add_argument("--rounds", type=int, default=1, help="how often hostile constraints are sent")
    parser.add_argument("--model", default="demo", help="what answers in the part `guesses`")
    given = parser.parse_args()
    return asyncio.run(run(given.parts, given.drawn, given.rounds, given.model))


if __name__ == "__main__":
    sys.exit(main())
