"""Whatever a request's settings are, its tokens are the same with guesses as without, and are guessed right."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import numpy as np
import pytest

from octavo.gpu_worker.sampling.grammars import Grammars
from octavo.gpu_worker.sampling.vocabulary import Vocabulary
from octavo.gpu_worker.steps.speculation import StepCost

from .test_adapters import AdaptedModel, make_adapter
from .test_cpu_device import Shape
from .test_speculation import ADAPTER_IDS, BLOCK_SIZE, LIMITS, Planner, Request, column

WORDS = [b'{"', b'":', b"name", b'", ', b' "', b"street", b'"}', b'": "', b"ame", b"st", b"reet", b"yes", b"no"]
TOKENS = [bytes([code]) for code in range(32, 127)] + WORDS
TOKENS += [b""] * (LIMITS.vocab_size - 1 - len(TOKENS)) + [b"<stop>"]
STOP = LIMITS.vocab_size - 1
HEADER = '%llguidance {"no_forcing": true}\n'
SCHEMA = """{"type": "object", "additionalProperties": false, "required": ["name", "street", "items"],
"properties": {"name": {"enum": ["yes", "no"]}, "street": {"type": "string", "maxLength": 9},
"items": {"type": "array", "minItems": 2, "maxItems": 3, "items": {"type": "object",
"properties": {"name": {"enum": ["yes", "no"]}}, "required": ["name"], "additionalProperties": false}}},
"x-guidance": {"whitespace_pattern": " ?"}}"""
RULES = (f"start: %json {SCHEMA}", 'start: ("name: " /[a-c]{1,3}/ "; street? ")+', "start: /(yes|no|street){30}/")
NUM_BATCHES = int(os.environ.get("OCTAVO_TEST_BATCHES", "60"))  # of six requests


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(lambda: Vocabulary(TOKENS, [STOP]), LIMITS.vocab_size, patience_s=None)


@pytest.fixture(autouse=True)
def drafts_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepCost, "of_draft", lambda *_: 0.0)


def drawn_settings(rng: np.random.Generator) -> dict[str, Any]:
    """Draw settings of all kinds; each kind is left out more often than not."""
    chosen: dict[str, Any] = {"top_p": 1.0, "needs_history": True}
    maybe = {
        "temperature": float(rng.choice([0.1, 0.4, 0.8, 1.5])),
        "top_p": float(rng.uniform(0.3, 1)),
        "top_k": int(rng.integers(1, 20)),
        "min_p": float(rng.uniform(0, 0.3)),
        "seed": int(rng.integers(1 << 60)),
        "candidate_index": int(rng.integers(1, 8)),
        "logprobs": int(rng.integers(0, 4)),
        "presence_penalty": float(rng.uniform(-2, 1)),
        "frequency_penalty": float(rng.uniform(-2, 1)),
        "repetition_penalty": float(rng.uniform(0.8, 1.3)),
        "grammar": HEADER + str(rng.choice(RULES)),
        "min_new_tokens": int(rng.integers(1, 40)),
        "bias_token_ids": column([40, 41, 42]),
        "adapter_id": int(rng.choice(ADAPTER_IDS)),
        "sampling": {"bad_words_token_ids": [{"ids": [4]}, *({"ids": [first, 9]} for first in range(12))]},
    }
    chosen |= {name: value for name, value in maybe.items() if rng.random() < 0.35}
    if "logprobs" in chosen:
        chosen["chosen_logprob"] = True
    if "bias_token_ids" in chosen:
        chosen["bias_values"] = rng.uniform(-5, 5, 3).astype("<f4").tobytes()
    if "min_new_tokens" in chosen:
        chosen["banned_until_min_token_ids"] = column([STOP])
    if "grammar" in chosen:
        chosen["end_of_sequence_ids"] = column([STOP])
    return chosen


def outputs_of(planner: Planner, settings: list[dict[str, Any]], length: int, preempts: bool) -> list[Request]:
    """Run requests together until each has so many tokens; some may lose their blocks, and their slot, on the way."""
    requests = [Request(slot, each, [5, 9, 5, 9, 7, slot]) for slot, each in enumerate(settings)]
    for slot, request in enumerate(requests):
        if preempts and slot % 2:
            while len(request.output) < length // 2:
                planner.step([(request, request.due)])
            planner.close(request)  # as if the worker had been lost
    most = LIMITS.max_batch_tokens // len(requests)
    while rows := [(request, min(request.due, most)) for request in requests if len(request.output) < length]:
        planner.step(rows)
    planner.settle()
    return requests


def make_planner(num_guesses: int, grammars: Grammars, **options: Any) -> Planner:
    planner = Planner(num_guesses, grammars=grammars, model=AdaptedModel(Shape(), 3), **options)
    for adapter_id in ADAPTER_IDS:
        pairs = make_adapter(planner.device, adapter_id, 4)
        planner.device.set_adapter(adapter_id, planner.device.pack_adapter(pairs))
    return planner


@pytest.mark.parametrize("preempts", [False, True])
def test_tokens_are_the_same_with_all_settings(grammars: Grammars, preempts: bool) -> None:
    """In batches, next to others, planned ahead or not, and where a sequence goes on after its slot was lost."""
    rng = np.random.default_rng(11 + preempts)
    num_accepted: Counter[str] = Counter()
    plain = make_planner(0, grammars)
    for batch in range(NUM_BATCHES // 2):
        settings = [drawn_settings(rng) for _ in range(int(rng.integers(1, LIMITS.max_running + 1)))]
        length = int(rng.integers(20, 4 * BLOCK_SIZE))
        guessing = make_planner(int(rng.choice([1, 7, 15])), grammars, ahead=bool(batch % 2), lookahead=16)
        expected = outputs_of(plain, settings, length, preempts=False)
        found = outputs_of(guessing, settings, length, preempts)
        for one, other in zip(expected, found, strict=True):
            assert other.output[:length] == one.output[:length], one.settings
            assert preempts or other.logprobs[:length] == one.logprobs[:length], one.settings
            num_accepted.update(dict.fromkeys(one.settings, other.num_accepted))
            plain.close(one)
    assert all(num_accepted[name] for name in drawn_settings(np.random.default_rng(0))), num_accepted
    for name in (
        "grammar",
        "frequency_penalty",
        "logprobs",
        "adapter_id",
        "candidate_index",
        "bias_token_ids",
        "sampling",
    ):
        assert num_accepted[name] > 0, name


def test_what_a_grammar_forces_takes_few_steps(grammars: Grammars) -> None:
    settings = {
        "top_p": 1.0,
        "needs_history": True,
        "grammar": HEADER + RULES[0],
        "end_of_sequence_ids": column([STOP]),
    }
    num_forwards, counts = [], []
    for num_guesses in (0, 15):
        planner = make_planner(num_guesses, grammars, lookahead=16)
        for slot in range(3):  # what usually follows is learned
            request = Request(slot, settings, [5, 9, 7])
            planner.device.num_forwards = 0
            while STOP not in request.output:
                planner.step([(request, request.due)])
        num_forwards.append(planner.device.num_forwards)
        counts.append(Counter(guesses.proposer for guesses in planner.guesses if guesses.accepted))
        drafted = [guesses.drafted for guesses in planner.guesses]
        assert sum(drafted) >= sum(guesses.accepted for guesses in planner.guesses)
        assert all(guesses.drafted > 0 for guesses in planner.guesses)
    assert num_forwards[1] * 2 < num_forwards[0], num_forwards
    assert not counts[0]
    assert counts[1]["grammar"] > 0
