"""What a grammar allows next, where it has come to, and what happens when that is not known in time."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from octavo.gpu_worker.errors import ModelError, PlanError
from octavo.gpu_worker.ops import Draw, Float32Array, Int32Array, UInt32Array
from octavo.gpu_worker.protocol import NOT_READY_TOKEN, NOTHING_ALLOWED_TOKEN, TOO_COMPLEX_TOKEN
from octavo.gpu_worker.sampling import grammars as grammars_module
from octavo.gpu_worker.sampling.draw import best_tokens, draw_tokens
from octavo.gpu_worker.sampling.forced import ForcedTexts
from octavo.gpu_worker.sampling.grammars import GrammarAutomaton, Grammars
from octavo.gpu_worker.sampling.sampler import Sampler
from octavo.gpu_worker.sampling.settings import SamplingSettings, read_sampling_update
from octavo.gpu_worker.sampling.vocabulary import Vocabulary
from octavo.worker.v1 import worker_pb2

WORDS = [b'{"', b'":', b"true", b"false", b"null", b"ye", b"yes", b"maybe", b'"name', b"  "]
TOKENS = [bytes([byte]) for byte in range(256)] + WORDS + [b"<stop>"]
STOP = len(TOKENS) - 1
VOCABULARY = Vocabulary(TOKENS, [STOP])
HEADER = '%llguidance {"no_forcing": true}\n'
SIZE = len(TOKENS)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(lambda: VOCABULARY, SIZE, patience_s=None)


def settings_of(rule: str, output: bytes = b"", **fields: Any) -> SamplingSettings:
    """Settings with a grammar, after a prompt of three tokens."""
    history = np.array([1, 2, 3, *output], "<u4").tobytes()
    update = worker_pb2.SamplingUpdate(
        **{
            "top_p": 1.0,
            "grammar": HEADER + rule,
            "history_token_ids": history,
            "prompt_length": 3,
            "end_of_sequence_ids": np.array([STOP], "<u4").tobytes(),
            **fields,
        }
    )
    return read_sampling_update(update, SIZE)


def allowed(automaton: GrammarAutomaton) -> set[bytes]:
    automaton.ready.result()
    bits = np.unpackbits(automaton.allowed.view(np.uint8), bitorder="little")[:SIZE]
    return {TOKENS[token_id] for token_id in np.flatnonzero(bits)}


def take(automaton: GrammarAutomaton, text: bytes) -> None:
    for byte in text:
        automaton.ready.result()
        automaton.advance(byte)


def test_tokens_are_allowed_that_begin_or_go_on_with_a_match(grammars: Grammars) -> None:
    automaton = grammars.open(settings_of('start: "yes" | "no"'))

    assert allowed(automaton) == {b"y", b"ye", b"yes", b"n"}
    take(automaton, b"y")
    assert allowed(automaton) == {b"e"}


def test_the_end_is_allowed_exactly_where_the_grammar_accepts(grammars: Grammars) -> None:
    automaton = grammars.open(settings_of("start: /[0-9]{1,2}/"))

    assert b"<stop>" not in allowed(automaton)
    take(automaton, b"4")
    assert b"<stop>" in allowed(automaton)
    assert not automaton.is_complete
    take(automaton, b"2")
    assert allowed(automaton) == {b"<stop>"}
    assert automaton.is_complete


def test_after_the_end_only_the_end_comes(grammars: Grammars) -> None:
    automaton = grammars.open(settings_of("start: /[0-9]+/"))
    take(automaton, b"4")

    automaton.ready.result()
    automaton.advance(STOP)

    assert allowed(automaton) == {b"<stop>"}


@pytest.mark.parametrize("length", range(10))
def test_an_automaton_rebuilt_from_history_allows_what_the_first_one_did(grammars: Grammars, length: int) -> None:
    rule = "start: %json " + json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}})
    text = b'{"a": 417}'
    first = grammars.open(settings_of(rule))
    take(first, text[:length])

    again = grammars.open(settings_of(rule, text[:length]))

    assert allowed(again) == allowed(first)


def test_a_history_that_has_ended_stays_ended(grammars: Grammars) -> None:
    output = np.array([1, 2, 3, ord("4"), STOP, STOP], "<u4").tobytes()
    automaton = grammars.open(settings_of("start: /[0-9]+/", history_token_ids=output))

    assert allowed(automaton) == {b"<stop>"}


def test_a_history_that_does_not_match_leaves_nothing(grammars: Grammars) -> None:
    automaton = grammars.open(settings_of('start: "yes"', b"no"))

    automaton.ready.result()
    assert automaton.refusal == NOTHING_ALLOWED_TOKEN


def test_allowed_token_ids_and_the_grammar_both_hold(grammars: Grammars) -> None:
    only = np.array([ord("y"), STOP], "<u4").tobytes()
    automaton = grammars.open(settings_of('start: "yes" | "no"', allowed_token_ids=only))

    assert allowed(automaton) == {b"y"}
    take(automaton, b"y")
    automaton.ready.result()
    assert automaton.refusal == NOTHING_ALLOWED_TOKEN


def test_what_is_no_grammar_gives_no_token_and_raises_nothing(grammars: Grammars) -> None:
    automaton = grammars.open(settings_of("start: ("))

    automaton.ready.result()
    assert automaton.refusal == NOTHING_ALLOWED_TOKEN


def test_a_grammar_that_takes_too_much_time_is_given_up(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars_module, "_CREDIT_S", 0.02)
    automaton = grammars.open(settings_of('start: e\ne: e e e e | e e e | e e | "a" | ""'))

    for _ in range(200):
        automaton.ready.result()
        if automaton.refusal:
            break
        automaton.advance(ord("a"))

    assert automaton.refusal == TOO_COMPLEX_TOKEN


def test_the_tokenizer_has_the_priority_of_a_step_because_the_library_keeps_the_interpreter_meanwhile() -> None:
    seen = []

    def read() -> Vocabulary:
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        raise ModelError("tokenizer.json: no decoder")

    assert not Grammars(read, SIZE).prepare()  # so that the scheduler is told that there are none
    assert seen == [os.getpriority(os.PRIO_PROCESS, os.getpid())]


def test_a_vocabulary_that_cannot_be_read_gives_no_token_and_raises_nothing() -> None:
    def read() -> Vocabulary:
        raise ModelError("tokenizer.json: no decoder")

    automaton = Grammars(read, SIZE, None).open(settings_of('start: "a"'))

    automaton.ready.result()
    assert automaton.refusal == NOTHING_ALLOWED_TOKEN


# -- in the sampler --------------------------------------------------------------------------------


class Drawer:
    """Draws and masks in plain numpy."""

    def argmax(self, logits: Float32Array) -> Int32Array:
        return best_tokens(logits)

    def draw(self, logits: Float32Array, draws: list[Draw]) -> Int32Array:
        return draw_tokens(logits, draws)

    def mask(self, row: Float32Array, allowed: UInt32Array) -> None:
        bits = np.unpackbits(allowed.view(np.uint8), count=len(row), bitorder="little")
        row[bits == 0] = -np.inf


class Gate:
    """Holds the threads of grammars where they would begin or advance."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        find: Callable[..., None] = GrammarAutomaton._find_allowed

        def held(automaton: GrammarAutomaton, matcher: Any) -> None:
            assert self.open.wait(60)
            find(automaton, matcher)

        monkeypatch.setattr(GrammarAutomaton, "_find_allowed", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def logits_for(*best: bytes) -> Float32Array:
    """One row for each: the logit of that token is the highest, and falls with the id for all others."""
    logits = np.tile(-np.arange(SIZE, dtype=np.float32), (len(best), 1))
    for row, token in enumerate(best):
        logits[row, TOKENS.index(token)] = 10
    return logits


def step(sampler: Sampler, best: bytes, position: int, follows: bool = True) -> int:
    return steps(sampler, [0], [best], position, [follows])[0]


def steps(sampler: Sampler, slots: list[int], best: list[bytes], position: int, follows: list[bool]) -> list[int]:
    at: npt.NDArray[np.int32] = np.full(len(slots), position, np.int32)
    sampled = sampler.sample(logits_for(*best), np.array(slots, np.int32), at, np.array(follows))
    return [int(token_id) for token_id in sampled.token_ids]


def test_the_sampler_draws_what_the_grammar_allows_though_others_are_likelier(grammars: Grammars) -> None:
    sampler = Sampler(Drawer(), SIZE, 4, grammars)
    sampler.open_slot(0, settings_of('start: "yes" | "no"'))

    tokens = [step(sampler, b"maybe", position) for position in range(3, 6)]

    assert [TOKENS[token] for token in tokens] == [b"n", b"o", b"<stop>"]


def test_log_probabilities_are_those_without_the_grammar(grammars: Grammars) -> None:
    sampler = Sampler(Drawer(), SIZE, 4, grammars)
    sampler.open_slot(0, settings_of('start: "yes"', logprobs=1))

    sampled = sampler.sample(logits_for(b"maybe"), np.zeros(1, np.int32), np.full(1, 3, np.int32))

    assert TOKENS[sampled.candidate_token_ids[0]] == b"maybe"
    assert sampled.ranks[0] > 1


def test_a_minimum_length_yields_to_a_grammar_that_has_nothing_more_to_say(grammars: Grammars) -> None:
    sampler = Sampler(Drawer(), SIZE, 4, grammars)
    banned = np.array([STOP], "<u4").tobytes()
    sampler.open_slot(0, settings_of("start: /[0-9]{1,2}/", banned_until_min_token_ids=banned, min_new_tokens=4))

    tokens = [step(sampler, b"<stop>", position) for position in range(3, 7)]

    assert [TOKENS[token] for token in tokens] == [b"0", b"0", b"<stop>", b"<stop>"]


def test_a_late_mask_holds_up_its_own_row_only(gate: Gate) -> None:
    sampler = Sampler(Drawer(), SIZE, 4, Grammars(lambda: VOCABULARY, SIZE, patience_s=0.0))
    sampler.open_slot(0, settings_of('start: "yes"'))
    sampler.open_slot(1, read_sampling_update(worker_pb2.SamplingUpdate(top_p=1.0, prompt_length=3), SIZE))

    tokens = steps(sampler, [0, 1], [b"maybe", b"maybe"], 3, [False, False])

    assert tokens == [NOT_READY_TOKEN, TOKENS.index(b"maybe")]


def test_rows_after_a_late_one_are_late_until_it_is_computed_again(gate: Gate) -> None:
    sampler = Sampler(Drawer(), SIZE, 4, Grammars(lambda: VOCABULARY, SIZE, patience_s=0.0))
    sampler.open_slot(0, settings_of('start: "yes"'))
    assert step(sampler, b"maybe", 3, follows=False) == NOT_READY_TOKEN
    slot = sampler._slots[0]
    assert slot is not None
    assert slot.automaton is not None
    gate.open.set()
    slot.automaton.ready.result()

    follower = step(sampler, b"maybe", 4)
    again = step(sampler, b"maybe", 3, follows=False)

    assert follower == NOT_READY_TOKEN
    assert TOKENS[again] == b"y"


def opened_with(workers: ThreadPoolExecutor, rule: str, output: bytes = b"") -> tuple[GrammarAutomaton, CountedCopies]:
    """An automaton whose masks are made by `workers`, and its matcher."""
    tokenizer = LLTokenizer(TokenizerWrapper(grammars_module._Tokens(VOCABULARY)))
    matcher: Any = CountedCopies(LLMatcher(tokenizer, HEADER + rule, log_level=0))
    automaton = GrammarAutomaton(settings_of(rule), SIZE, workers, workers)
    automaton.begin(matcher, list(output), ForcedTexts(tokenizer, SIZE))
    automaton.ready.set_result(None)
    return automaton, matcher


class CountedCopies:
    """A matcher that counts how often it is copied: each takes as long as the output is long."""

    num_copies = 0

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def __getattr__(self, name: str) -> Any:
        return getattr(self._matcher, name)

    def deep_copy(self) -> LLMatcher:
        self.num_copies += 1
        return self._matcher.deep_copy()


def test_a_guess_that_takes_long_holds_up_no_step_and_changes_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread gets nowhere until the next token was drawn without it."""
    monkeypatch.setattr(grammars_module, "_PROPOSAL_S", 0.0)
    with ThreadPoolExecutor(1) as workers:
        automaton, _ = opened_with(workers, 'start: ("yes no " /[a-c]/ " ")+')
        for byte in b"yes no b yes no ":
            goes_on = threading.Event()
            workers.submit(goes_on.wait)
            guess = automaton.propose(8)
            automaton.advance(byte)
            goes_on.set()
            assert guess is None
            automaton.ready.result()
        assert allowed(automaton) == {b"a", b"b", b"c"}


def test_all_right_guesses_of_a_step_wait_no_longer_than_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    timeouts: list[float] = []

    def wait_in_vain(_: object, timeout: float) -> None:
        timeouts.append(timeout)
        threading.Event().wait(timeout)

    monkeypatch.setattr(grammars_module, "wait", wait_in_vain)
    hasty = Grammars(lambda: VOCABULARY, SIZE, patience_s=0.01)
    with ThreadPoolExecutor(1) as workers:
        late = [GrammarAutomaton(settings_of('start: "yes"'), SIZE, workers, workers) for _ in range(2)]
        waited_s = 0.0
        for _ in range(5):  # one token after another
            waited_s = hasty.are_ready([*late], waited_s)
    assert sum(timeouts) < 2 * 0.01
    assert waited_s >= 0.01


def test_guesses_and_their_checks_do_not_copy_what_grows_with_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars_module, "_PROPOSAL_S", 60.0)
    text = b"yes no b yes no c " * 20
    with ThreadPoolExecutor(2) as workers:
        automaton, matcher = opened_with(workers, 'start: ("yes no " /[a-c]/ " ")+')
        num_guessed = 0
        for place, byte in enumerate(text):
            guess = automaton.propose(8)
            if guess is not None:
                assert (text + text)[place:].startswith(b"".join(TOKENS[token_id] for token_id in guess.token_ids))
                num_guessed += 1
            assert automaton.num_allowed(list(text[place : place + 5] + b"!")) == len(text[place : place + 5])
            automaton.advance(byte)
            automaton.ready.result()
        assert num_guessed > len(text) // 2
        assert matcher.num_copies == 1


def test_a_worker_without_grammars_refuses_a_plan_with_one() -> None:
    with pytest.raises(PlanError, match="grammar"):
        Sampler(Drawer(), SIZE, 4).open_slot(0, settings_of('start: "yes"'))
