"""Tokens that are computed before their step are those that would have been computed in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from octavo.gpu_worker.batch import Limits, Slots
from octavo.gpu_worker.devices.cpu import CpuDevice
from octavo.gpu_worker.host_runner import HostRunner
from octavo.gpu_worker.ops import Float32Array, StepInput
from octavo.gpu_worker.protocol import BLOCK_SIZE, FIRST_NO_TOKEN, NOT_FINITE_TOKEN
from octavo.gpu_worker.speculation import MOST_SEQUENCES, MOST_TOKENS, Speculation, draft
from octavo.worker.v1 import worker_pb2

from .test_cpu_device import Shape, TinyModel

LIMITS = Limits(max_running=6, max_batch_tokens=64, max_blocks_per_sequence=12, num_blocks=100, vocab_size=128)
SAMPLES, FOLLOWS = 1, 2
PROMPT = (5, 9, 5, 9, 7)
GREEDY = {"top_p": 1.0}
PLAIN = [
    GREEDY,
    {"top_p": 0.9, "temperature": 0.3, "seed": 5},
    {"top_p": 1.0, "temperature": 0.5, "top_k": 3, "seed": 9},
]
OTHERS = [
    {"top_p": 1.0, "frequency_penalty": 0.7, "needs_history": True},
    {"top_p": 1.0, "temperature": 0.4, "seed": 2, "logprobs": 2},
    {"top_p": 1.0, "banned_until_min_token_ids": np.arange(20, dtype="<u4").tobytes(), "min_new_tokens": 9},
]


def column(values: list[int]) -> bytes:
    return np.array(values, "<u4").tobytes()


@dataclass
class Request:
    """A sequence as a scheduler keeps it."""

    slot: int
    settings: dict[str, Any]
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    num_prompt: int = 0
    computed: int = 0
    num_accepted: int = 0
    is_open: bool = False
    has_token: bool = False  # in its slot
    logprobs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]


class CountingDevice(CpuDevice):
    """Counts, and can spoil the logits of tokens at chosen positions."""

    num_forwards = 0
    most_tokens = 0
    last_position = 0
    last_start = 0  # of a row
    spoiled_position = -1

    def forward(self, step: StepInput) -> Float32Array:
        self.num_forwards += 1
        self.most_tokens = max(self.most_tokens, len(step.token_ids))
        self.last_position = max(self.last_position, int(step.positions.max()))
        self.last_start = max(self.last_start, int(step.positions[step.query_start_loc[:-1]].max()))
        logits = super().forward(step)
        logits[step.positions[step.logits_rows] == self.spoiled_position] = np.nan
        return logits


class Planner:
    """Plans steps like a scheduler, of which the runner is told nothing but the plans."""

    def __init__(self, speculative_tokens: int, max_len: int = LIMITS.max_blocks_per_sequence * BLOCK_SIZE) -> None:
        sizes = (LIMITS.max_running, LIMITS.max_blocks_per_sequence)
        self.device = CountingDevice(TinyModel(Shape(), seed=3), LIMITS.max_batch_tokens, *sizes, num_threads=2)
        self.device.allocate_kv(LIMITS.num_blocks)
        make: Callable[[], Speculation] | None = None
        if speculative_tokens:
            make = functools.partial(
                Speculation, LIMITS.max_running, max_len, speculative_tokens, LIMITS.max_batch_tokens
            )
        self.runner = HostRunner(self.device, *sizes, LIMITS.vocab_size, speculation=make)
        self.slots = Slots(LIMITS)
        self.free_blocks = list(range(1, LIMITS.num_blocks))
        self.freed: list[int] = []
        self.step_id = 0

    def close(self, request: Request) -> None:
        self.freed.append(request.slot)
        self.free_blocks += request.blocks
        request.blocks, request.computed, request.is_open, request.has_token = [], 0, False, False

    def step(self, rows: list[tuple[Request, int, bool]]) -> None:
        """Compute (request, number of tokens, whether the last of them is sent though the runner knows it)."""
        self.step_id += 1
        opened, tables, counts, blocks, flags, tokens = [], [], [], [], [], []
        for request, count, is_sent in rows:
            if not request.is_open:
                settings = dict(request.settings)
                if settings.pop("needs_history", False):
                    settings["history_token_ids"] = column(request.tokens)
                opened.append(
                    worker_pb2.SamplingUpdate(slot=request.slot, prompt_length=request.num_prompt, **settings)
                )
                request.is_open = True
            new = -(-(request.computed + count) // BLOCK_SIZE) - len(request.blocks)
            if new > 0:
                taken, self.free_blocks = self.free_blocks[:new], self.free_blocks[new:]
                request.blocks += taken
                tables.append(request.slot)
                counts.append(new)
                blocks += taken
            samples = request.computed + count == len(request.tokens)
            follows = samples and request.has_token and not is_sent
            flags.append(SAMPLES * samples + FOLLOWS * follows)
            tokens += request.tokens[request.computed : request.computed + count - follows]
        plan = worker_pb2.StepPlan(
            step_id=self.step_id,
            num_sequences=len(rows),
            num_tokens=sum(count for _, count, _ in rows),
            slot_indexes=column([request.slot for request, _, _ in rows]),
            query_lengths=column([count for _, count, _ in rows]),
            context_lengths=column([request.computed for request, _, _ in rows]),
            token_ids=column(tokens),
            block_table_rows=column(tables),
            block_table_counts=column(counts),
            block_ids=column(blocks),
            freed_slots=column(self.freed),
            sampling_updates=opened,
            row_flags=bytes(flags),
        )
        self.freed = []
        outcome = self.runner.start(self.slots.apply(plan)).wait()
        sampled = [request for (request, _, _), flag in zip(rows, flags, strict=True) if flag & SAMPLES]
        token_ids = outcome.sampled.token_ids.tolist()
        accepted = outcome.is_accepted or bytes(len(sampled))
        logprobs = iter(outcome.sampled.logprobs.tolist())
        for request, count, _ in rows:
            request.computed += count
        for request, token_id, is_accepted in zip(sampled, token_ids, accepted, strict=True):
            request.tokens.append(token_id)
            request.has_token = True
            request.num_accepted += is_accepted
            if request.settings.get("logprobs"):
                request.logprobs.append(next(logprobs))


def run(planner: Planner, request: Request, length: int) -> None:
    """Let a request's output grow to `length`, alone."""
    while len(request.output) < length:
        planner.step([(request, len(request.tokens) - request.computed, False)])


def one_stream(
    speculative_tokens: int, settings: dict[str, Any] = GREEDY, length: int = 120, prompt: tuple[int, ...] = PROMPT
) -> tuple[Planner, Request]:
    planner, request = Planner(speculative_tokens), Request(2, settings, list(prompt))
    run(planner, request, length)
    return planner, request


@pytest.mark.parametrize("settings", PLAIN, ids=["greedy", "top-p", "top-k"])
def test_one_stream_has_the_same_tokens_in_fewer_passes(settings: dict[str, Any]) -> None:
    alone, expected = one_stream(0, settings)
    ahead, request = one_stream(7, settings)

    assert request.output == expected.output
    assert ahead.device.num_forwards < alone.device.num_forwards == len(expected.output)
    assert request.num_accepted == len(request.output) - ahead.device.num_forwards
    assert expected.num_accepted == 0


def many_streams(speculative_tokens: int, seed: int) -> tuple[Planner, list[Request]]:
    """Requests that come, pause, are put aside and end at random, but always in the same way for a seed."""
    rng = np.random.default_rng(seed)
    planner = Planner(speculative_tokens)
    requests: list[Request] = []
    running: dict[int, tuple[Request, int]] = {}  # by slot: the request and how long it runs
    most = (1, 2, 3, LIMITS.max_running)[seed % 4]
    for _ in range(220):
        free = [slot for slot in range(most) if slot not in running]
        if free and rng.random() < 0.2:
            others = OTHERS if rng.random() < 0.3 else PLAIN
            prompt = rng.integers(0, 12, rng.integers(1, 40)).tolist()
            request = Request(int(rng.choice(free)), others[rng.integers(len(others))], prompt)
            running[request.slot] = request, int(rng.integers(1, 100))
            requests.append(request)
        rows, budget = [], LIMITS.max_batch_tokens - LIMITS.max_running
        for slot, (request, length) in sorted(running.items()):
            event = rng.random()
            if len(request.output) >= length:
                planner.close(request)
                del running[slot]
            elif event < 0.02 and not request.settings.get("logprobs"):  # put aside: computed again later
                planner.close(request)
            elif event < 0.9:
                due = len(request.tokens) - request.computed
                count = min(due, budget, int(rng.integers(1, 30)))
                budget -= count
                if count:
                    rows.append((request, count, rng.random() < 0.1))
        if rows:
            planner.step(rows)
    return planner, requests


@pytest.mark.parametrize("seed", range(12))
def test_many_streams_have_the_same_tokens(seed: int) -> None:
    _, expected = many_streams(0, seed)
    planner, requests = many_streams(7, seed)

    for request, other in zip(requests, expected, strict=True):
        assert request.output == other.output
        assert request.logprobs == other.logprobs
    assert planner.device.most_tokens <= LIMITS.max_batch_tokens


def test_a_step_of_many_rows_is_computed_as_it_is_planned() -> None:
    planner = Planner(15)
    requests = [Request(slot, GREEDY, [1]) for slot in range(MOST_SEQUENCES + 1)]
    for _ in range(60):
        planner.step([(request, 1, False) for request in requests])
    assert planner.device.most_tokens == len(requests)

    for _ in range(60):
        planner.step([(request, 1, False) for request in requests[:-1]])
    assert planner.device.most_tokens == MOST_TOKENS


def test_a_row_that_is_not_finite_is_found_at_its_place() -> None:
    _, expected = one_stream(0)
    for position in range(70, 90):  # some of them are computed ahead
        planner, request = one_stream(7, length=40)
        planner.device.spoiled_position = position
        while request.tokens[-1] < FIRST_NO_TOKEN:
            planner.step([(request, 1, False)])

        assert request.tokens[-1] == NOT_FINITE_TOKEN
        assert len(request.tokens) - 1 == position + 1
        assert request.output[:-1] == expected.output[: len(request.output) - 1]


def test_a_sequence_that_is_put_aside_is_ahead_no_more() -> None:
    _, expected = one_stream(0)
    for length in range(70, 90):  # at some of them it is ahead
        planner, request = one_stream(7, length=length)
        planner.close(request)
        planner.step([(request, 50, False)])
        planner.step([(request, len(request.tokens) - 51, False)])
        run(planner, request, 120)

        assert request.output == expected.output


def test_a_row_that_is_not_finite_waits_while_another_is_computed() -> None:
    for position in range(70, 90):  # at some of them the first one is ahead
        planner, first = one_stream(7, length=40)
        second = Request(3, PLAIN[1], list(PROMPT))
        run(planner, second, 3)
        planner.device.spoiled_position = position
        while first.tokens[-1] < FIRST_NO_TOKEN:
            planner.step([(first, 1, False), (second, 1, False)])

        assert len(first.tokens) - 1 == position + 1
        assert planner.device.last_start <= position, "there is no token to go on from"


def test_nothing_is_computed_beyond_the_longest_context() -> None:
    planner, request = Planner(7, max_len=71), Request(0, GREEDY, [1])
    run(planner, request, 70)

    assert planner.device.most_tokens > 4, "it was ahead"
    assert planner.device.last_position == 70


def test_a_slot_knows_no_tokens_of_whom_it_was_before() -> None:
    planner, first = one_stream(7, length=1, prompt=(1, 5, 7, *range(20, 32), 1))
    planner.close(first)
    second = Request(2, GREEDY, [*first.tokens[:16], 5], computed=16)  # as if the others were in the cache
    planner.device.most_tokens = 0
    planner.step([(second, 1, False)])

    assert planner.device.most_tokens == 1, "1, 5 stood in what was never sent for this one"


def test_a_token_that_is_sent_counts_and_not_the_one_that_was_drawn() -> None:
    outputs = []
    for speculative_tokens in (0, 7):
        planner, request = one_stream(speculative_tokens, length=1, prompt=(5, 9, 7, 1, 5))
        planner.device.most_tokens = 0
        for i in range(60):
            request.tokens[-1] = 9 if i % 5 == 0 else request.tokens[-1]
            planner.step([(request, 1, i % 5 == 0)])
            if i == 0 and speculative_tokens:
                assert planner.device.most_tokens == 4, "the prompt says what follows 5 and 9"
        outputs.append(request.output)

    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("history", "length", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], 2, [3, 4]),
        ([1, 2, 3, 1, 2, 4, 1, 2], 1, [4]),  # the last place
        ([1, 2, 3, 4, 1, 2], 6, [3, 4, 1, 2, 3, 4]),  # and on, as if repeated
        ([7, 7, 7], 3, [7, 7, 7]),
        ([1, 2, 3, 2], 3, []),
        ([1, 2], 3, []),
        ([], 3, []),
        ([1, 2, 3, 4, 1, 2], 0, []),
        ([1, 2, 3, -1, -1, 1, 2], 4, [3]),  # what was never sent is not known
        ([-1, -1, -1, -1], 2, []),
    ],
)
def test_a_draft_is_what_followed_the_last_two_tokens(history: list[int], length: int, expected: list[int]) -> None:
    assert draft(np.array(history, np.int32), length) == expected
