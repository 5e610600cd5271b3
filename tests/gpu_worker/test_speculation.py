"""Tokens that are guessed and computed together are those that would have been computed one by one."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from octavo.gpu_worker.devices.cpu.device import CpuDevice
from octavo.gpu_worker.ops import Float32Array, StepInput
from octavo.gpu_worker.protocol import BLOCK_SIZE, FIRST_NO_TOKEN, NOT_FINITE_TOKEN
from octavo.gpu_worker.sampling.grammars import Grammars
from octavo.gpu_worker.steps.batch import Limits, Slots
from octavo.gpu_worker.steps.host_runner import HostRunner
from octavo.gpu_worker.steps.proposers import MOST_MATCHED, Repetition, Text
from octavo.gpu_worker.steps.runner import Guesses, Outcome
from octavo.gpu_worker.steps.speculation import MOST_TOKENS, Accuracy, Speculation, StepCost
from octavo.worker.v1 import worker_pb2

from .test_cpu_device import Shape, TinyModel

LIMITS = Limits(max_running=6, max_batch_tokens=64, max_blocks_per_sequence=12, num_blocks=100, vocab_size=128)
SAMPLES, FOLLOWS = 1, 2
ADAPTER_IDS = (1, 2)
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
    {"top_p": 1.0, "prompt_logprobs": 2, "needs_history": True},
]


OF_DRAFT = StepCost.of_draft


@pytest.fixture(autouse=True)
def drafts_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drafted must not depend on how fast this machine is."""
    monkeypatch.setattr(StepCost, "of_draft", lambda *_: 0.0)


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
    pending: int = 0
    num_accepted: int = 0
    num_empty: int = 0  # steps without a token for it
    is_open: bool = False
    logprobs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def due(self) -> int:
        return len(self.tokens) + self.pending - self.computed


class CountingDevice(CpuDevice):
    """Counts, and can spoil the logits of tokens at chosen positions."""

    num_forwards = 0
    most_tokens = 0
    last_position = 0
    spoiled_position = -1

    def forward(self, step: StepInput) -> Float32Array:
        self.num_forwards += 1
        self.most_tokens = max(self.most_tokens, len(step.token_ids))
        self.last_position = max(self.last_position, int(step.positions.max()))
        logits = super().forward(step).copy()  # of what is returned as it was, the device knows the best tokens
        logits[step.positions[step.logits_rows] == self.spoiled_position] = np.nan
        return logits


@dataclass
class InFlight:
    """A step whose outcome is not known yet: its rows, and those that get tokens with how many they compute."""

    outcome: Outcome
    sampled: list[tuple[Request, int]]


class Planner:
    """Plans steps like a scheduler: the next one before what came of the one before is known, if `ahead`.

    No sequence has blocks ahead, so that a step may find none for its next token.
    """

    def __init__(
        self,
        speculative_tokens: int,
        max_len: int = LIMITS.max_blocks_per_sequence * BLOCK_SIZE,
        ahead: bool = False,
        lookahead: int = 0,
        rows_at_once: int = MOST_TOKENS,
        grammars: Grammars | None = None,
        model: TinyModel | None = None,
    ) -> None:
        sizes = (LIMITS.max_running, LIMITS.max_blocks_per_sequence)
        self.device = CountingDevice(
            model or TinyModel(Shape(), seed=3), LIMITS.max_batch_tokens, *sizes, num_threads=2
        )
        make: Callable[..., Speculation] | None = None
        if speculative_tokens:
            make = functools.partial(
                Speculation,
                LIMITS.max_running,
                max_len,
                speculative_tokens,
                LIMITS.max_batch_tokens,
                rows_at_once,
            )
        self.runner = HostRunner(self.device, *sizes, LIMITS.vocab_size, grammars, speculation=make)
        self.runner.allocate_kv(LIMITS.num_blocks)
        self.slots = Slots(LIMITS, ADAPTER_IDS)
        self.free_blocks = list(range(1, LIMITS.num_blocks))
        self.freed: list[int] = []
        self.step_id = 0
        self.guesses: list[Guesses] = []
        self.in_flight: deque[InFlight] = deque()
        self.ahead = ahead
        self.lookahead = lookahead

    def close(self, request: Request) -> None:
        self.settle()
        self.freed.append(request.slot)
        self.free_blocks += request.blocks
        request.blocks, request.computed, request.is_open = [], 0, False

    def step(self, rows: list[tuple[Request, int]]) -> None:
        """Compute so many tokens of each request."""
        self.step_id += 1
        opened, tables, counts, blocks, flags, tokens = [], [], [], [], [], []
        for request, count in rows:
            if not request.is_open:
                settings = dict(request.settings)
                if settings.pop("needs_history", False):
                    settings["history_token_ids"] = column(request.tokens)
                opened.append(
                    worker_pb2.SamplingUpdate(slot=request.slot, prompt_length=request.num_prompt, **settings)
                )
                request.is_open = True
            end = min(request.computed + count + self.lookahead, LIMITS.max_blocks_per_sequence * BLOCK_SIZE)
            new = -(-end // BLOCK_SIZE) - len(request.blocks)
            if new > 0:
                taken, self.free_blocks = self.free_blocks[:new], self.free_blocks[new:]
                request.blocks += taken
                tables.append(request.slot)
                counts.append(new)
                blocks += taken
            samples = count == request.due
            follows = samples and request.pending > 0
            flags.append(SAMPLES * samples + FOLLOWS * follows)
            tokens += request.tokens[request.computed : request.computed + count]
        plan = worker_pb2.StepPlan(
            step_id=self.step_id,
            num_sequences=len(rows),
            num_tokens=sum(count for _, count in rows),
            slot_indexes=column([request.slot for request, _ in rows]),
            query_lengths=column([count for _, count in rows]),
            context_lengths=column([request.computed for request, _ in rows]),
            token_ids=column(tokens),
            block_table_rows=column(tables),
            block_table_counts=column(counts),
            block_ids=column(blocks),
            freed_slots=column(self.freed),
            sampling_updates=opened,
            row_flags=bytes(flags),
        )
        self.freed = []
        sampled = [row for row, flag in zip(rows, flags, strict=True) if flag & SAMPLES]
        for request, count in rows:
            request.computed += count
        for request, _ in sampled:
            request.pending += 1
        checked = self.slots.apply(plan)
        assert not checked.refused
        outcome = self.runner.start(checked).wait()
        self.guesses += outcome.guesses
        self.in_flight.append(InFlight(outcome, sampled))
        while len(self.in_flight) > self.ahead:
            self._digest(self.in_flight.popleft())

    def settle(self) -> None:
        while self.in_flight:
            self._digest(self.in_flight.popleft())

    def _digest(self, step: InFlight) -> None:
        outcome = step.outcome
        counts = [1] * len(step.sampled) if outcome.token_counts is None else outcome.token_counts.tolist()
        assert max(counts, default=0) <= self.runner.max_row_tokens
        token_ids = iter(outcome.sampled.token_ids.tolist())
        rows = zip(step.sampled, counts, strict=True)
        num_drawn = sum(count for (request, _), count in rows if "logprobs" in request.settings)
        num_prompts = len(outcome.sampled.logprobs) - num_drawn
        logprobs = iter(outcome.sampled.logprobs[num_prompts:].tolist())
        for (request, length), count in zip(step.sampled, counts, strict=True):
            assert count == 1 or (length == 1 and len(request.tokens) + count <= len(request.blocks) * BLOCK_SIZE + 1)
            request.tokens += [next(token_ids) for _ in range(count)]
            request.pending -= 1
            request.computed += count - 1
            request.num_accepted += max(count - 1, 0)
            request.num_empty += count == 0
            if "logprobs" in request.settings:
                request.logprobs += [next(logprobs) for _ in range(count)]
        assert next(token_ids, None) is None
        assert next(logprobs, None) is None


def run(planner: Planner, request: Request, length: int) -> None:
    """Let a request's output grow to `length` or more, alone."""
    while len(request.output) < length:
        planner.step([(request, request.due)])


def one_stream(
    speculative_tokens: int,
    settings: dict[str, Any] = GREEDY,
    length: int = 120,
    prompt: tuple[int, ...] = PROMPT,
    ahead: bool = False,
) -> tuple[Planner, Request]:
    planner, request = Planner(speculative_tokens, ahead=ahead), Request(2, settings, list(prompt))
    run(planner, request, length)
    return planner, request


@functools.cache
def expected_output(settings: int, prompt: tuple[int, ...] = PROMPT) -> list[int]:
    """What a request with (PLAIN + OTHERS)[settings] makes alone, without guesses: as much as there is room for."""
    length = LIMITS.max_blocks_per_sequence * BLOCK_SIZE - len(prompt)
    return one_stream(0, (PLAIN + OTHERS)[settings], length, prompt)[1].output


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("settings", range(len(PLAIN)), ids=["greedy", "top-p", "top-k"])
def test_one_stream_has_the_same_tokens_in_fewer_passes(settings: int, ahead: bool) -> None:
    planner, request = one_stream(7, PLAIN[settings], ahead=ahead)

    assert request.output == expected_output(settings)[: len(request.output)]
    planner.settle()
    assert planner.device.num_forwards < len(request.output)
    assert request.num_accepted == len(request.output) - planner.device.num_forwards


def test_a_row_has_no_token_while_there_is_no_block_for_it() -> None:
    planner, request = one_stream(15, length=170, ahead=True)

    assert request.num_empty > 0
    assert request.output == expected_output(0)[: len(request.output)]

    planner, request = Planner(15, ahead=True, lookahead=30), Request(2, GREEDY, list(PROMPT))
    run(planner, request, 140)
    assert request.num_empty == 0


@pytest.mark.parametrize("seed", range(24))
def test_many_streams_have_the_same_tokens(seed: int) -> None:
    """Requests come, pause, are put aside and end at random."""
    rng = np.random.default_rng(seed)
    planner = Planner(int(rng.choice([1, 7, 15])), ahead=bool(seed % 2), lookahead=int(rng.choice([0, 0, 16])))
    running: dict[int, tuple[Request, int]] = {}  # by slot: the request and how long it gets
    most = int(rng.integers(1, LIMITS.max_running + 1))
    num_ended = 0
    for _ in range(250):
        free = [slot for slot in range(most) if slot not in running]
        if free and rng.random() < 0.2:
            kind = int(rng.integers(len(PLAIN))) if rng.random() < 0.7 else int(rng.integers(len(PLAIN + OTHERS)))
            prompt = rng.integers(0, 12, 1 + rng.integers(3) * 15).tolist()
            request = Request(int(rng.choice(free)), (PLAIN + OTHERS)[kind], prompt)
            running[request.slot] = request, int(rng.integers(1, 100))
        rows, budget = [], LIMITS.max_batch_tokens - LIMITS.max_running
        for slot, (request, length) in sorted(running.items()):
            event = rng.random()
            if len(request.output) >= length:
                planner.close(request)
                del running[slot]
                kind = (PLAIN + OTHERS).index(request.settings)
                expected = expected_output(kind, tuple(request.tokens[: request.num_prompt]))
                assert request.output == expected[: len(request.output)]
                num_ended += 1
            elif event < 0.02 and not request.settings.get("logprobs") and "needs_history" not in request.settings:
                planner.close(request)  # computed again later
            elif event < 0.9:
                count = min(request.due, budget, int(rng.integers(1, 30)))
                budget -= count
                if count and request.computed + count < LIMITS.max_blocks_per_sequence * BLOCK_SIZE:
                    rows.append((request, count))
        if rows:
            planner.step(rows)
    assert num_ended > 0
    assert planner.device.most_tokens <= LIMITS.max_batch_tokens


def test_log_probabilities_of_a_row_beside_guesses_are_its_own() -> None:
    outputs = []
    for speculative_tokens in (0, 7):
        planner = Planner(speculative_tokens)
        first, second = Request(0, GREEDY, list(PROMPT)), Request(1, GREEDY | {"logprobs": 2}, list(PROMPT))
        planner.step([(first, 5), (second, 5)])
        for _ in range(40):
            planner.step([(first, 1), (second, 1)])
        outputs.append((second.output, second.logprobs))
        for request in (first, second):
            assert (request.num_accepted > 0) == (speculative_tokens > 0)

    assert len(outputs[0][0]) == 41 < len(outputs[1][0]) == len(outputs[1][1])
    for without, guessed_for in zip(*outputs, strict=True):
        assert guessed_for[:41] == without


def six_streams(rows_at_once: int = MOST_TOKENS) -> Planner:
    planner = Planner(15, lookahead=30, rows_at_once=rows_at_once)
    requests = [Request(slot, GREEDY, [1, 2, 3, 1, 2]) for slot in range(LIMITS.max_running)]
    planner.step([(request, 5) for request in requests])
    planner.device.most_tokens = 0
    for _ in range(40):
        planner.step([(request, 1) for request in requests])
    return planner


@pytest.mark.parametrize(("rows_at_once", "most_tokens"), [(4, MOST_TOKENS), (MOST_TOKENS, MOST_TOKENS), (16, 16)])
def test_a_step_with_drafts_has_no_more_tokens_than_the_kernels_take_at_once(
    rows_at_once: int, most_tokens: int
) -> None:
    assert six_streams(rows_at_once).device.most_tokens == most_tokens


def test_drafts_that_cost_more_than_they_bring_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    # All chances are below 1, and five others wait for a draft token.
    monkeypatch.setattr(StepCost, "of_draft", lambda *_: 1 / 11)
    assert six_streams().device.most_tokens == LIMITS.max_running


def test_a_row_that_is_not_finite_is_found_at_its_place() -> None:
    for position in range(70, 90):  # some of them are guessed
        planner, request = one_stream(7, length=40)
        planner.device.spoiled_position = position
        while request.tokens[-1] < FIRST_NO_TOKEN:
            planner.step([(request, 1)])

        assert request.tokens[-1] == NOT_FINITE_TOKEN
        assert len(request.tokens) - 1 == position + 1
        assert request.output[:-1] == expected_output(0)[: len(request.output) - 1]


def test_what_is_planned_after_a_row_that_was_not_finite_changes_no_other_row() -> None:
    planner, first = one_stream(7, length=40)
    planner.ahead = True
    second = Request(3, PLAIN[1], list(PROMPT))
    planner.step([(second, 5)])
    planner.device.spoiled_position = len(first.tokens) - 1
    for _ in range(3):
        planner.step([(first, 1), (second, 1)])
    planner.settle()
    planner.device.spoiled_position = -1
    run(planner, second, 60)

    assert NOT_FINITE_TOKEN in first.tokens
    assert second.output == expected_output(1)[: len(second.output)]


def test_a_sequence_that_is_put_aside_goes_on_where_it_was() -> None:
    for length in range(70, 90):
        planner, request = one_stream(7, length=length)
        planner.close(request)
        planner.step([(request, 50)])
        planner.step([(request, len(request.tokens) - 51)])
        run(planner, request, 120)

        assert request.output == expected_output(0)[: len(request.output)]


def test_nothing_is_computed_beyond_the_longest_context() -> None:
    planner, request = Planner(7, max_len=71, ahead=True, lookahead=30), Request(0, GREEDY, [1])
    run(planner, request, 71)
    for _ in range(3):
        planner.step([(request, 1)])

    assert planner.device.most_tokens > 4, "it guessed"
    assert planner.device.last_position == 70
    assert len(request.output) == 71
    assert request.num_empty > 0


def test_what_is_in_the_cache_is_known_to_those_that_start_there() -> None:
    planner, first = one_stream(7, length=1, prompt=(1, 5, 7, *range(20, 33), 2))
    second = Request(3, GREEDY, [*first.tokens[:16], 1, 5], blocks=first.blocks[:1], computed=16)
    planner.slots._num_blocks[3] = 0  # what a plan would say of cached blocks: they are sent again
    second.blocks = []
    planner.free_blocks = [first.blocks[0], *planner.free_blocks]
    planner.device.most_tokens = 0
    planner.step([(second, 2)])
    planner.step([(second, 1)])
    assert planner.device.most_tokens == 2, "the rows of prompts have no guesses"

    third = Request(4, GREEDY, [*first.tokens[:16], 1, 5], computed=17)
    planner.free_blocks = [first.blocks[0], second.blocks[1], *planner.free_blocks]
    planner.device.most_tokens = 0
    planner.step([(third, 1)])
    assert planner.device.most_tokens > 2, "1, 5 stood in what another one computed"


def test_a_token_that_is_sent_counts_and_not_the_one_that_was_drawn() -> None:
    outputs = []
    for speculative_tokens in (0, 7):
        planner, request = Planner(speculative_tokens), Request(2, GREEDY, [5, 9, 7, 1, 5])
        for length in range(1, 80, 13):
            run(planner, request, length)
            del request.tokens[request.num_prompt + length :]
            request.tokens[-1], request.computed = 9, len(request.tokens) - 1
            planner.device.most_tokens = 0
            planner.step([(request, 1)])
            if length == 1 and speculative_tokens:
                assert planner.device.most_tokens > 1, "the prompt says what follows 5 and 9"
        outputs.append(request.output[:80])

    assert outputs[0][: len(outputs[1])] == outputs[1][: len(outputs[0])]


@pytest.mark.parametrize(
    ("history", "length", "match", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], 2, 2, [3, 4]),
        ([1, 2, 3, 1, 2, 4, 1, 2], 1, 2, [4]),  # the last place
        ([1, 2, 3, 4, 1, 2], 6, 2, [3, 4, 1, 2, 3, 4]),  # and on, as if repeated
        ([7, 7, 7], 3, 2, [7, 7, 7]),
        ([9, 1, 2, 3, 5, 9, 1, 2], 1, 3, [3]),
        ([1, 2, 3, 2], 2, 1, [3, 2]),  # one token alone
        ([8, *range(20), 8, *range(20)], 1, MOST_MATCHED, [8]),
        ([1, 2, 3], 0, 0, []),
        ([1], 0, 0, []),
    ],
)
def test_a_draft_is_what_followed_the_last_tokens(
    history: list[int], length: int, match: int, expected: list[int]
) -> None:
    for known in range(1, len(history) + 1):
        text = Text(history[:known])
        for token_id in history[known:]:
            text.extend([token_id])
        assert text.match == match
        assert len(text) == len(history)
        if match:
            assert text.draft(length) == expected


def test_drafts_are_as_long_as_they_are_likely_to_be_right() -> None:
    accuracy, long = Accuracy(Repetition.priors), [min(kind, MOST_MATCHED) for kind in range(8, 23)]
    for _ in range(200):
        accuracy.learn([2, 3, 4, 5], num_right=0)
        accuracy.learn([8, 9, 10, 11], num_right=4)

    assert accuracy.chances([2, 3, 4], 0.05) == []
    assert len(accuracy.chances(long, 0.7)) >= 4
    assert len(accuracy.chances(long[:3], 0.0)) == 3
    chances = accuracy.chances(long, 0.1)
    assert chances == sorted(chances, reverse=True)
    assert len(accuracy.chances(long, 0.1, factor=0.2)) < len(chances)


def test_what_a_draft_token_costs_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepCost, "of_draft", OF_DRAFT)
    cost, rng = StepCost(8), np.random.default_rng(1)
    before = cost.of_draft(8)
    for per_token in (0.1, 1.0):
        for _ in range(400):
            num_drafts = int(rng.integers(0, 12))
            cost.learn(8, num_drafts, 8.0 + per_token * num_drafts + rng.normal(0, 0.3))
        assert cost.of_draft(8) == pytest.approx(per_token / 8, rel=0.4)
    assert cost.of_draft(1) == StepCost(8).of_draft(1), "of another number of rows nothing is known"
    cost.learn(8, 6, 1e6)  # it was interrupted
    assert cost.of_draft(8) < 2 / 8
    for _ in range(400):
        cost.learn(8, 0, 8.0)
    assert cost.of_draft(8) == pytest.approx(before, rel=0.3), "all alike: they tell nothing"


def guessed(speculation: Speculation, slot: int, block: int) -> list[int]:
    """What is guessed after token 1, which stands behind a full block."""
    return speculation._repetition._text(slot, BLOCK_SIZE, 1, np.array([block, block + 1], np.int32)).draft(1)


def test_guesses_are_made_from_a_copied_block_as_from_the_first_one() -> None:
    speculation = Speculation(4, 64, 4, 16, MOST_TOKENS, 8)
    speculation._repetition._cached_token_ids[3] = [1, 5, *range(20, 34)]
    speculation._repetition._cached_token_ids[6] = [1, 9, *range(20, 34)]

    speculation.copy_blocks(np.array([[3, 6]], np.int32))

    assert guessed(speculation, 0, 3) == guessed(speculation, 1, 6) == [5]


@pytest.mark.parametrize("changes", [{"freed_slots": [2]}, {"opened_slots": [2]}])
def test_guesses_are_not_made_from_what_was_in_the_slot_before(changes: dict[str, list[int]]) -> None:
    speculation = Speculation(4, 64, 4, 16, MOST_TOKENS, 8)
    for number, following in enumerate((5, 9)):
        if number:
            freed, opened = np.array(changes.get("freed_slots", []), np.int32), changes.get("opened_slots", [])
            step: Any = SimpleNamespace(freed_slots=freed, opened_slots=opened)
            speculation.forget(step)
        speculation._repetition._cached_token_ids[3] = [1, following, *range(20, 34)]

        assert guessed(speculation, 2, 3) == [following]
