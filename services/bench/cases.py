"""The cases of a benchmark: what is sent, and when."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from octavo.services.bench import workloads
from octavo.services.bench.outcomes import Objective, Outcome, Run, summarise
from octavo.services.bench.transports import Transport
from octavo.services.bench.workloads import Prompt

CASES = "cN (closed loop of N streams), rN (N requests a second), offline, prefill, prefix"
_WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Plan:
    """What the cases have in common.

    requests    of a case with a load that is kept up; 0: four for each stream, at least eight
    max_tokens  output of each request; 0: what the workload says
    prompts     a file of prompts; None: the workload `chat`
    """

    requests: int = 0
    max_tokens: int = 128
    seed: int = 0
    prompts: Path | None = None
    objective: Objective = field(default_factory=Objective)


async def run_case(case: str, repeat: int, transport: Transport, plan: Plan, cpu: Callable[[], float]) -> Run:
    """Run a case once: warm up, then measure. `cpu` returns the processor seconds used so far.

    Each repeat draws other prompts, so that no prefix cache answers it. Raises ValueError for an
    unknown case.
    """
    prompts, warm_up, width = work(case, repeat, plan)
    await _together(transport, warm_up)
    cpu_before, started = cpu(), time.monotonic()
    if case.startswith("r"):
        outcomes = await _poisson(transport, prompts, float(case[1:]), random.Random(f"{plan.seed}/{repeat}"))
    elif is_closed_loop(case):
        outcomes = await _closed_loop(transport, prompts, width)
    else:
        outcomes = await _together(transport, prompts)
    seconds = time.monotonic() - started
    return summarise(case, outcomes, seconds, cpu() - cpu_before, plan.objective)


def work(case: str, repeat: int, plan: Plan) -> tuple[list[Prompt], list[Prompt], int]:
    """Return what a repeat of a case sends, what it sends to warm up, and how many streams it keeps busy.

    Raises ValueError for an unknown case.
    """
    seed = f"{plan.seed}/{case}/{repeat}"
    prompts, width = _prompts(case, seed, plan), _width(case)
    return prompts, _warm_up(prompts[: min(width, 32)], seed), width


def is_closed_loop(case: str) -> bool:
    """Whether a case keeps streams busy, each of which sends its next prompt when it has its answer."""
    return case == "prefill" or case.startswith("c")


def check_case(case: str) -> None:
    """Raise ValueError if there is no such case."""
    if case not in ("offline", "prefill", "prefix") and not re.fullmatch(r"c[1-9]\d{0,3}|r\d{1,4}(\.\d+)?", case):
        raise ValueError(f"unknown case {case!r}; there are {CASES}")
    if case.startswith("r") and not float(case[1:]) > 0:
        raise ValueError(f"case {case!r}: the rate must be positive")


def _prompts(case: str, seed: str, plan: Plan) -> list[Prompt]:
    check_case(case)
    if case == "prefill":
        return workloads.prefill(plan.requests or 4, seed)
    if case == "prefix":
        return workloads.shared_prefix(seed)
    count = plan.requests or (64 if case == "offline" else max(8, 4 * _width(case)))
    if plan.prompts is not None:
        return workloads.chat(count, seed, plan.max_tokens, plan.prompts)
    return workloads.chat(count, seed, plan.max_tokens)


def _width(case: str) -> int:
    """Return how many streams a case keeps busy at once, for as far as that is known."""
    return int(case[1:]) if case.startswith("c") else 1 if case == "prefill" else 16


def _warm_up(prompts: Sequence[Prompt], seed: str) -> list[Prompt]:
    """Return short requests that touch the same paths and leave no prefix that the measurement uses."""
    return [
        Prompt(f"Warm-up {seed} {number}. {prompt.text}", min(prompt.max_tokens, _WARM_UP_TOKENS))
        for number, prompt in enumerate(prompts)
    ]


async def _together(transport: Transport, prompts: Sequence[Prompt]) -> list[Outcome]:
    return await asyncio.gather(*(transport.generate(prompt) for prompt in prompts))


async def _closed_loop(transport: Transport, prompts: Sequence[Prompt], streams: int) -> list[Outcome]:
    """Keep `streams` requests going until all prompts are done."""
    left = iter(prompts)
    outcomes: list[Outcome] = []

    async def one_stream() -> None:
        outcomes.extend([await transport.generate(prompt) for prompt in left])

    await asyncio.gather(*(one_stream() for _ in range(streams)))
    return outcomes


async def _poisson(transport: Transport, prompts: Sequence[Prompt], per_s: float, rng: random.Random) -> list[Outcome]:
    """Send requests at random times, `per_s` a second on average, whatever the server does."""
    at = time.monotonic()
    tasks = []
    for prompt in prompts:
        at += rng.expovariate(per_s)
        await asyncio.sleep(at - time.monotonic())
        tasks.append(asyncio.create_task(transport.generate(prompt)))
    return list(await asyncio.gather(*tasks))
