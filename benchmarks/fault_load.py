"""The streams that run while `faults.py` breaks things, and what they bring compared with a run without faults."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from octavo.services.client import Client, OctavoError
from octavo.services.client.stream import Stream

STREAM_S = 240.0
SHOWN_GAP_S = 0.02
PROMPTS = (
    "Once upon a time there was a small village by the sea, and",
    "The three most important rules of cooking are",
    "Dear Sir or Madam, I write to you because",
    "In the year 2150 the first ship left for",
)
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.3},
    {"temperature": 0.8, "stop": ["\n\n\n", "zzz the end"], "min_new_tokens": 20},
    {"temperature": 0.7, "logprobs": 3, "resume_window_ms": 20_000},
    {"temperature": 1.0, "top_k": 50, "resume_window_ms": 20_000},
)


@dataclass
class Outcome:
    """What a stream brought. `gaps`: when it brought nothing for a while, monotonic seconds."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    num_resumed: int = 0
    error: str = ""

    @property
    def output(self) -> tuple[list[int], str, list[float]]:
        """What must not depend on faults."""
        return self.ids, self.text, self.logprobs

    def stall_s(self, begin: float = 0.0, end: float = float("inf")) -> float:
        """Return the longest time between two deltas that fell at least partly between two times."""
        return max((until - since for since, until in self.gaps if until > begin and since < end), default=0.0)


@dataclass
class Tally:
    """What a scenario showed. In seconds: stalls and replays of streams, detections and restarts of faults."""

    num_streams: int = 0
    num_tokens: int = 0
    num_resumed: int = 0
    stalls: list[float] = field(default_factory=list)
    detections: list[float] = field(default_factory=list)
    restarts: list[float] = field(default_factory=list)
    replays: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Load:
    """Streams to run, and what each of them makes without faults."""

    def __init__(self, address: str, num_streams: int, num_tokens: int, seed: int) -> None:
        self._client = Client(address, timeout_s=STREAM_S)
        self.num_tokens = num_tokens
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

    async def replay(self) -> list[float]:
        """Go on with all streams at once from their middles; return the seconds that each took to its first delta.

        This is what computing lost output again costs here and now, without any fault.
        """
        return await asyncio.gather(*(self._replay(n) for n in range(len(self._options))))

    async def _replay(self, number: int) -> float:
        started = time.monotonic()
        ids = self._wanted[number].ids
        options = {"continue_output": ids[: len(ids) // 2], **self._options[number]}
        async with self._open(options) as stream:
            async for _ in stream:
                break
        return time.monotonic() - started

    async def run(
        self, tally: Tally, after_tokens: Sequence[int], fault: Callable[[], Awaitable[None]], has_stalls: bool = True
    ) -> None:
        """Run all streams; let the fault happen whenever each has so many tokens; compare what they bring."""
        self._progress = [0] * len(self._options)
        streams = [asyncio.create_task(self._stream(n)) for n in range(len(self._options))]
        times = []
        for count in sorted(after_tokens):
            while min(self._progress) < count and not all(stream.done() for stream in streams):
                self._moved.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._moved.wait(), 1)
            times.append(time.monotonic())
            await fault()
        outcomes = await asyncio.gather(*streams)
        tally.num_streams += len(outcomes)
        tally.num_tokens += sum(len(outcome.ids) for outcome in outcomes)
        tally.num_resumed += sum(outcome.num_resumed > 0 for outcome in outcomes)
        for begin, end in zip(times, [*times[1:], float("inf")], strict=True) if has_stalls else ():
            tally.stalls += [outcome.stall_s(begin, end) for outcome in outcomes]
        for number, (outcome, wanted) in enumerate(zip(outcomes, self._wanted, strict=True)):
            if outcome.error:
                tally.problems.append(f"stream {number}: {outcome.error}")
            elif outcome.output != wanted.output:
                same = next((n for n, (a, b) in enumerate(zip(outcome.ids, wanted.ids, strict=False)) if a != b), -1)
                tally.problems.append(f"stream {number}: another output; first other token {same}")

    def _open(self, options: dict[str, Any]) -> Stream:
        fixed = {"model": "demo", "max_new_tokens": self.num_tokens, "ignore_end_of_sequence": True}
        return self._client.stream(return_token_ids=True, **fixed, **options)

    async def _stream(self, number: int) -> Outcome:
        outcome = Outcome()
        last = time.monotonic()
        stream = self._open(self._options[number])
        try:
            async for delta in stream:
                now = time.monotonic()
                if outcome.ids and now - last > SHOWN_GAP_S:
                    outcome.gaps.append((last, now))
                last = now
                outcome.ids += delta.token_ids
                outcome.text += delta.text
                outcome.logprobs += delta.logprobs.chosen
                self._progress[number] = len(outcome.ids)
                self._moved.set()
        except OctavoError as error:
            outcome.error = f"{error.code.name} {error}"
        outcome.num_resumed = stream.num_resumed
        self._progress[number] = self.num_tokens
        self._moved.set()
        return outcome
