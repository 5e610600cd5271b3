"""Rows whose output must match a grammar get the tokens of the reference device, beside rows without one."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from driver import VOCABULARY, Driver, Sequence, column, cuda_engine, load, reference_engine
from guard import guarded
from test_tokens import GREEDY, SEEDED, check_equal

from octavo.gpu_worker.devices.cuda.runner import CudaRunner
from octavo.gpu_worker.ops import Model
from octavo.gpu_worker.protocol import NOT_READY_TOKEN, NOTHING_ALLOWED_TOKEN
from octavo.gpu_worker.sampling.grammars import Grammars
from octavo.gpu_worker.sampling.vocabulary import Vocabulary

TOKENS = [bytes([byte]) for byte in range(256)] + [b"token%d" % index for index in range(256, VOCABULARY - 1)]
STOP = VOCABULARY - 1
TOKENS.append(b"<stop>")
PENALTIES = {"repetition_penalty": 1.4, "frequency_penalty": 0.3, "presence_penalty": 0.4}
LISTED = {"bias_token_ids": column(ord("b"), ord("x")), "bias_values": column(3, 50, dtype="<f4")}
BANNED = {"banned_until_min_token_ids": column(STOP), "min_new_tokens": 6}


def constrained(rule: str, **settings: Any) -> dict[str, Any]:
    grammar = f'%llguidance {{"no_forcing": true}}\nstart: {rule}'
    return {"grammar": grammar, "end_of_sequence_ids": column(STOP), **settings}


SETTINGS: list[dict[str, Any]] = [
    constrained("/[a-f]*/", **SEEDED, **PENALTIES, logprobs=2),
    {**SEEDED, **PENALTIES},
    constrained("/[0-9a-z]{1,3}/", **BANNED, **LISTED),
    constrained("/[a-z ]+/", **SEEDED, top_k=5, top_p=0.9, chosen_logprob=True),
    GREEDY,
    constrained('"ab" | "yes"', frequency_penalty=1.5, allowed_token_ids=column(*range(ord("b"), 319), STOP)),
    constrained("/[^a]+/", **SEEDED, min_p=0.1, **LISTED),
]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(lambda: Vocabulary(TOKENS, [STOP]), VOCABULARY, patience_s=None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=1)


def test_constrained_rows_get_the_tokens_of_the_reference_beside_others(
    model: Model, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = Driver(cuda_engine(model, grammars=grammars), seed=5)
    with guarded(monkeypatch):
        found = cuda.run(SETTINGS, num_steps=16)

    expected = Driver(reference_engine(model, grammars), seed=5).run(SETTINGS, num_steps=16)

    check_equal(found, expected)
    tokens = np.concatenate([np.frombuffer(result.token_ids, "<u4") for result in found])
    assert STOP in tokens
    assert (tokens < STOP).sum() > 25


def test_rows_with_bad_words_get_the_tokens_of_the_reference_with_and_without_grammars(
    model: Model, grammars: Grammars
) -> None:
    greedy = Driver(reference_engine(model), seed=5).run([GREEDY], num_steps=6)
    drawn = [int(token_id) for result in greedy for token_id in np.frombuffer(result.token_ids, "<u4")]
    words = [[drawn[0], drawn[1]], [drawn[2]], [ord("a"), ord("b")]]
    sampling = {"bad_words_token_ids": [{"ids": ids} for ids in words]}

    def settings(**others: Any) -> list[dict[str, Any]]:
        return [{**GREEDY, "sampling": sampling}, {**SEEDED, "sampling": sampling, "logprobs": 1}, others]

    alone = [Driver(cuda_engine(model), seed=5), Driver(reference_engine(model), seed=5)]
    check_equal(*(driver.run(settings(**GREEDY), num_steps=6) for driver in alone))
    beside = [Driver(cuda_engine(model, grammars=grammars), seed=5), Driver(reference_engine(model, grammars), seed=5)]
    check_equal(*(driver.run(settings(**constrained("/[ab]+/"), sampling=sampling), num_steps=6) for driver in beside))


def test_a_row_of_which_nothing_is_allowed_gets_no_token_and_its_neighbour_gets_one(
    model: Model, grammars: Grammars
) -> None:
    driver = Driver(cuda_engine(model, grammars=grammars), seed=0)
    settings = constrained('"no"', allowed_token_ids=column(ord("y")))
    nothing, good = Sequence([5, 6], settings, 2), Sequence([7], constrained('"no"'), 1)
    for sequence in (nothing, good):
        driver.open(sequence)
    driver.step([(nothing, 2), (good, 1)])
    driver.collect_all()

    assert nothing.tokens[2:] == [NOTHING_ALLOWED_TOKEN]
    assert good.tokens[1:] == [ord("n")]


def test_a_preempted_output_goes_on_within_its_grammar_while_plans_are_in_flight(
    model: Model, grammars: Grammars
) -> None:
    driver = Driver(cuda_engine(model, grammars=grammars), seed=0)
    settings = constrained("/(ab?c)+/", **SEEDED, **PENALTIES)
    sequences = [Sequence([5, 6, 7], settings, 3), Sequence([8, 9], GREEDY, 2), Sequence([4], settings, 1)]
    for sequence in sequences:
        driver.open(sequence)
    driver.step([(sequence, len(sequence.tokens)) for sequence in sequences])
    for _ in range(4):
        driver.step([(sequence, 1) for sequence in sequences])
    driver.collect_all()
    driver.close(sequences[0])
    driver.open(sequences[0])
    driver.step([(sequences[0], 8), *((sequence, 1) for sequence in sequences[1:])])
    for _ in range(4):
        driver.step([(sequence, 1) for sequence in sequences])
    driver.collect_all()

    for sequence in (sequences[0], sequences[2]):
        output = bytes(token for token in sequence.tokens[sequence.num_prompt :] if token != STOP)
        assert re.fullmatch(rb"(ab?c)*(ab?)?", output), output
        assert b"a" in output


class Gate:
    """A vocabulary that is read when the gate is opened: until then no mask is ready."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def read(self) -> Vocabulary:
        assert self.opened.wait(60)
        return Vocabulary(TOKENS, [STOP])


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


def test_a_late_mask_gives_no_token_counts_none_and_holds_up_no_other_row(model: Model, gate: Gate) -> None:
    engine = cuda_engine(model, grammars=Grammars(gate.read, VOCABULARY, patience_s=0.0))
    assert isinstance(engine.runner, CudaRunner)
    driver = Driver(engine, seed=0)
    late, other = Sequence([5, 6], constrained('"yes"', presence_penalty=1.0), 2), Sequence([7, 8], GREEDY, 2)
    for sequence in (late, other):
        driver.open(sequence)
    driver.step([(late, 2), (other, 2)])
    driver.step([(late, 1), (other, 1)])  # planned before the first result
    driver.collect_all()
    assert late.tokens[2:] == [NOT_READY_TOKEN] * 2
    assert max(other.tokens[2:]) < VOCABULARY
    assert not engine.runner._sampler.counts[late.slot].any()

    gate.opened.set()
    for automaton in engine.runner._sampler._automata.values():
        automaton.ready.result()
    del late.tokens[2:]
    late.num_computed = 1
    driver.step([(late, 1), (other, 1)])
    driver.collect_all()

    assert late.tokens[2:] == [ord("y")]


def test_only_slots_with_a_grammar_are_remembered(model: Model, grammars: Grammars) -> None:
    driver = Driver(cuda_engine(model, grammars=grammars), seed=0)
    assert isinstance(driver.engine.runner, CudaRunner)
    automata = driver.engine.runner._sampler._automata
    one, two = Sequence([5], constrained('"a"'), 1), Sequence([6], GREEDY, 1)
    for sequence in (one, two):
        driver.open(sequence)
    driver.step([(one, 1), (two, 1)])
    assert list(automata) == [one.slot]

    driver.collect_all()
    driver.close(one)
    driver.step([(two, 1)])

    assert not automata
