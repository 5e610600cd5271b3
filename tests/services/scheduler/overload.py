"""Overload on a virtual clock: the real core, a fake worker whose steps take time, and tenants that ask too much."""

from __future__ import annotations

import math
import random
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .simulation import Stream, World, expected_output

FIXED_S, TOKEN_S = 0.02, 0.0005  # of a step


Call = tuple[float, "Asking", int, int]
"""When it is made, who makes it, and the lengths of prompt and output."""


@dataclass
class Asking:
    """What a tenant asks for: calls a second, lengths, the deadline of each call in seconds, from when on."""

    tenant: str
    calls_per_s: float
    prompt: Callable[[random.Random], int] = lambda _: 10
    output: Callable[[random.Random], int] = lambda _: 32
    deadline_s: float = 5.0
    begins_s: float = 0.0
    limit: int = 0  # on the output that calls are made with; 0: exactly what they will produce
    seed: int = 1

    def calls(self, until_s: float) -> Iterator[Call]:
        """Yield the calls before a time."""
        rng = random.Random(f"{self.tenant} {self.seed}")
        time = self.begins_s
        while time < until_s:
            yield time, self, self.prompt(rng), self.output(rng)
            time += rng.expovariate(self.calls_per_s)


@dataclass
class Outcome:
    """By tenant: calls made, refused and late, those in time, and their tokens, prompts included."""

    calls: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    late: Counter[str] = field(default_factory=Counter)
    in_time: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    output_tokens: int = 0
    calls_by_length: Counter[int] = field(default_factory=Counter)  # of the output
    in_time_by_length: Counter[int] = field(default_factory=Counter)
    longest_queue: int = 0

    @property
    def part_late(self) -> float:
        """Of the calls admitted."""
        return self.late.total() / max(1, self.late.total() + self.in_time.total())


def calls_at(calls: deque[Call]) -> float:
    """Return when the next call is made; never, if there is none."""
    return calls[0][0] if calls else math.inf


class Overload(World):
    """A world whose steps take as long as their tokens need, and in which outputs end of themselves."""

    def __init__(
        self,
        num_blocks: int = 400,
        fixed_s: float = FIXED_S,
        token_s: float = TOKEN_S,
        context_s: float = 0.0,
        refusal_s: float = 0.0,
        slowness: Callable[[float], float] = lambda _: 1.0,
        **settings: object,
    ) -> None:
        """Let a step take `fixed_s`, `token_s` for each token, and `context_s` for each that those attend to.

        refusal_s  what a refusal takes of the machine's time
        slowness   how many times as long steps take, by the seconds since the start
        """
        super().__init__(num_blocks=num_blocks, check=False, **settings)  # type: ignore[arg-type]
        self.fixed_s, self.token_s, self.context_s, self.slowness = fixed_s, token_s, context_s, slowness
        self.refusal_s = refusal_s
        self.rng = random.Random(7)
        self.started_at = self.now
        self.step_began_at = self.now

    @property
    def step_ends_at(self) -> float:
        """When the step that runs is through."""
        plan = self.queues["group-0"][0]
        step_s = self.fixed_s + self.token_s * plan.num_tokens
        if self.context_s:
            step_s += self.context_s * sum(array("I", plan.context_lengths))
        return self.step_began_at + step_s * self.slowness(self.step_began_at - self.started_at)

    def advance(self) -> None:
        """Let the step end that runs."""
        self.now = self.step_began_at = self.step_ends_at
        self.answer("group-0")

    def submit(self, *args: Any, **fields: Any) -> Stream:
        """Submit a request; if nothing ran, its first step begins now."""
        if not self.queues["group-0"]:
            self.step_began_at = self.now
        stream = super().submit(*args, **fields)
        if stream.rejected is not None:
            self.step_began_at += self.refusal_s
        return stream

    def run_calls(self, askers: list[Asking], seconds: float, measured_from_s: float = 0.0) -> Outcome:
        """Let all ask for so long, and everything end; what was asked before `measured_from_s` is not counted."""
        calls = deque(sorted((call for asker in askers for call in asker.calls(seconds)), key=lambda call: call[0]))
        outcome = Outcome()
        asked: list[tuple[Asking, Stream, int]] = []
        while calls or self.queues["group-0"]:
            if not self.queues["group-0"] or self.started_at + calls_at(calls) <= self.step_ends_at:
                at, asker, num_prompt_tokens, num_output_tokens = calls.popleft()
                self.now = max(self.now, self.started_at + at)
                stream = self.ask(asker, num_prompt_tokens, num_output_tokens)
                if at >= measured_from_s:
                    asked.append((asker, stream, num_output_tokens))
            else:
                self.advance()
            outcome.longest_queue = max(outcome.longest_queue, self.core.load(self.now).waiting)
        for asker, stream, num_output_tokens in asked:
            outcome.calls[asker.tenant] += 1
            outcome.calls_by_length[num_output_tokens] += 1
            if stream.rejected is not None:
                outcome.refused[asker.tenant] += 1
            elif stream.failed is not None:
                outcome.late[asker.tenant] += 1
            else:
                outcome.in_time[asker.tenant] += 1
                outcome.tokens[asker.tenant] += len(stream.submit.prompt_token_ids) + num_output_tokens
                outcome.output_tokens += num_output_tokens
                outcome.in_time_by_length[num_output_tokens] += 1
        return outcome

    def run_closed_loop(
        self, num_callers: int, seconds: float, prompt: Callable[[], int], output: Callable[[], int]
    ) -> tuple[float, float]:
        """Let callers ask again and again; return output tokens a second, and seconds a call."""
        open_calls: list[tuple[Stream, float, int]] = []
        tokens, took = 0, []
        while self.now - self.started_at < seconds:
            while len(open_calls) < num_callers:
                length = output()
                ids = [self.rng.randrange(10, 40_000) for _ in range(prompt())]
                open_calls.append((self.submit(ids, max_new_tokens=length), self.now, length))
            self.advance()
            for call in [call for call in open_calls if call[0].ended]:
                open_calls.remove(call)
                tokens += call[2]
                took.append(self.now - call[1])
        return tokens / seconds, sum(took) / len(took)

    def ask(self, asker: Asking, num_prompt_tokens: int, num_output_tokens: int) -> Stream:
        """Make a call whose output will have `num_output_tokens` tokens, whatever it allows."""
        prompt = [self.rng.randrange(10, 40_000) for _ in range(num_prompt_tokens)]
        ends: list[int] = []
        if asker.limit:
            ends = [expected_output(prompt, num_output_tokens)[-1]]
        return self.submit(
            prompt, max_new_tokens=asker.limit or num_output_tokens, tenant=asker.tenant,
            remaining_ms=int(1000 * asker.deadline_s), end_of_sequence_ids=ends,
        )  # fmt: skip
