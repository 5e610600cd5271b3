"""Masks, biases, minimum length, penalties and log probabilities, against plain statements of the rules."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from octavo.gpu_worker.errors import PlanError
from octavo.gpu_worker.ops import Draw, Float32Array, Int32Array, UInt32Array
from octavo.gpu_worker.protocol import NOTHING_ALLOWED_TOKEN
from octavo.gpu_worker.sampling.draw import best_tokens, draw_tokens
from octavo.gpu_worker.sampling.grammars import WordFilter
from octavo.gpu_worker.sampling.sampler import Sampled, Sampler
from octavo.gpu_worker.sampling.settings import read_sampling_update
from octavo.worker.v1 import worker_pb2

VOCABULARY = 50
NOT_FINITE = 0xFFFFFFFF


class Drawer:
    """Draws like the reference device and keeps what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Float32Array, list[Draw]]] = []

    def argmax(self, logits: Float32Array) -> Int32Array:
        return best_tokens(logits)

    def draw(self, logits: Float32Array, draws: list[Draw]) -> Int32Array:
        self.calls.append((logits.copy(), draws))
        return draw_tokens(logits, draws)

    def mask(self, row: Float32Array, allowed: UInt32Array) -> None:
        row[np.unpackbits(allowed.view(np.uint8), bitorder="little")[: len(row)] == 0] = -np.inf


def column(*values: float, dtype: str = "<u4") -> bytes:
    return np.array(values, dtype).tobytes()


def sampler_with(*updates: dict[str, Any]) -> tuple[Sampler, Drawer]:
    drawer = Drawer()
    sampler = Sampler(drawer, VOCABULARY, 8)
    for slot, update in enumerate(updates):
        sampler.open_slot(slot, read_sampling_update(worker_pb2.SamplingUpdate(**{"top_p": 1.0, **update}), VOCABULARY))
    return sampler, drawer


def logits_of(seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def sample(sampler: Sampler, logits: torch.Tensor, positions: list[int] | None = None) -> Sampled:
    count = len(logits)
    return sampler.sample(
        logits.numpy().copy(), np.arange(count, dtype=np.int32), np.array(positions or [10] * count, np.int32)
    )


def test_greedy_rows_alone_need_no_draw_and_take_the_lowest_of_equal_best() -> None:
    sampler, drawer = sampler_with({}, {})
    logits = logits_of(rows=2)
    logits[1, 7] = logits[1, 30] = 100.0

    token_ids = sample(sampler, logits).token_ids

    assert token_ids.tolist() == [int(logits[0].argmax()), 7]
    assert drawer.calls == []


def test_where_all_take_the_best_it_is_known_without_the_rest() -> None:
    sampler, drawer = sampler_with({}, {}, {"temperature": 0.5}, {"chosen_logprob": True})
    logits = logits_of(rows=3)
    logits[1] = torch.nan
    slots = [np.array(each, np.int32) for each in ([0, 1, 0], [0, 2], [0, 3])]
    at = np.full(3, 10, np.int32)

    best = sampler.sample(logits.numpy(), slots[0], at)

    assert drawer.calls == []
    assert best.token_ids.tolist() == [int(logits[0].argmax()), NOT_FINITE, int(logits[2].argmax())]
    assert len(best.logprobs) == 0
    assert sampler.sample(logits[::2].numpy(), slots[1], at[:2]).token_ids[0] == best.token_ids[0]
    assert len(drawer.calls) == 1
    assert len(sampler.sample(logits[:2].numpy(), slots[2], at[:2]).logprobs) == 1


def test_rows_that_are_drawn_from_their_logits_as_they_are_share_one_draw() -> None:
    sampler, drawer = sampler_with({"temperature": 0.8, "seed": 1}, {}, {"temperature": 0.8, "seed": 2, "top_k": 5})
    logits = logits_of(rows=3)

    result = sample(sampler, logits, [10, 11, 12])

    ((drawn, draws),) = drawer.calls
    assert torch.equal(torch.from_numpy(drawn), logits)
    assert [(each.temperature, each.seed, each.position) for each in draws] == [
        (pytest.approx(0.8), 1, 10), (0.0, 0, 11), (pytest.approx(0.8), 2, 12),
    ]  # fmt: skip
    assert result.token_ids.tolist() == draw_tokens(drawn, draws).tolist()
    assert len(result.logprobs) == 0


def test_a_row_that_is_not_finite_is_not_drawn_beside_one_that_is() -> None:
    sampler, drawer = sampler_with({"temperature": 0.8, "seed": 1}, {"temperature": 0.8, "seed": 2})
    logits = logits_of(rows=2)
    alone = sample(sampler_with({}, {"temperature": 0.8, "seed": 2})[0], logits)
    logits[0, 7] = torch.inf

    result = sample(sampler, logits)

    assert result.token_ids.tolist() == [NOT_FINITE, alone.token_ids[1]]
    assert [len(draws) for _, draws in drawer.calls] == [1]


def test_only_allowed_tokens_keep_their_logits() -> None:
    mask = np.zeros(VOCABULARY, np.uint8)
    mask[[3, 4, 5, 49]] = 1
    packed = np.packbits(mask, bitorder="little").tobytes()
    sampler, drawer = sampler_with({"allowed_token_mask": packed, "allowed_token_ids": column(4, 5, 6)})
    logits = logits_of()

    sample(sampler, logits)

    expected = np.full(VOCABULARY, -np.inf, np.float32)
    expected[[4, 5]] = logits[0, [4, 5]]
    np.testing.assert_array_equal(drawer.calls[0][0][0], expected)


def test_a_bias_is_added_to_what_is_allowed() -> None:
    sampler, drawer = sampler_with(
        {"bias_token_ids": column(1, 2), "bias_values": column(5, -100, dtype="<f4"), "allowed_token_ids": column(2, 3)}
    )
    logits = logits_of()

    sample(sampler, logits)

    processed = drawer.calls[0][0][0]
    assert processed[1] == -torch.inf
    assert processed[2] == logits[0, 2] - 100
    assert processed[3] == logits[0, 3]


@pytest.mark.parametrize(("position", "banned"), [(10, True), (12, True), (13, False)])
def test_banned_tokens_return_when_the_output_is_long_enough(position: int, banned: bool) -> None:
    # prompt of 10: the token at position 13 is the fourth, after the three that must be
    sampler, _ = sampler_with({"banned_until_min_token_ids": column(8, 9), "min_new_tokens": 3, "prompt_length": 10})
    logits = logits_of()
    logits[0, 8] = 100.0

    assert (int(sample(sampler, logits, [position]).token_ids[0]) != 8) is banned


def stated_penalties(logits: np.ndarray, update: dict[str, Any], history: list[int], output: list[int]) -> np.ndarray:
    result = logits.copy()
    for token in set(history):
        factor = np.float32(update["repetition_penalty"])
        result[token] = result[token] / factor if result[token] > 0 else result[token] * factor
    for token in set(output):
        result[token] -= np.float32(update["frequency_penalty"]) * np.float32(output.count(token))
        result[token] -= np.float32(update["presence_penalty"])
    return result


def test_penalties_follow_history_and_what_was_sampled_since() -> None:
    penalties = {"repetition_penalty": 1.3, "frequency_penalty": 0.25, "presence_penalty": 0.5}
    prompt, output = [1, 2, 3, 3, 40], [5, 5, 6]
    sampler, drawer = sampler_with(
        {
            **penalties,
            "temperature": 1.0,
            "seed": 3,
            "prompt_length": len(prompt),
            "history_token_ids": column(*prompt, *output),
        }
    )
    for step in range(12):
        logits = logits_of(seed=step)
        token_ids = sample(sampler, logits, [len(prompt) + len(output)]).token_ids

        expected = stated_penalties(logits[0].numpy(), penalties, prompt + output, output)
        np.testing.assert_allclose(drawer.calls[-1][0][0], expected, rtol=1e-6, atol=1e-6)
        output.append(int(token_ids[0]))
    assert len(set(output)) < len(output)  # something did repeat


def test_a_slot_rebuilt_from_history_goes_on_as_if_never_lost() -> None:
    update = {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "temperature": 0.8, "seed": 9, "prompt_length": 3}
    history = [1, 2, 3]
    first, _ = sampler_with({**update, "history_token_ids": column(*history)})
    for step in range(5):
        history.append(int(sample(first, logits_of(seed=step), [len(history)]).token_ids[0]))
    second, _ = sampler_with({**update, "history_token_ids": column(*history)})

    for step in range(5, 10):
        one, two = (sample(s, logits_of(seed=step), [3 + step]).token_ids.tolist() for s in (first, second))
        assert one == two


def test_log_probabilities_are_of_the_raw_logits() -> None:
    sampler, _ = sampler_with(
        {"chosen_logprob": True, "logprobs": 3, "allowed_token_ids": column(11)},
        {},
        {"logprobs": 2},
        {"chosen_logprob": True, "temperature": 2.0},
    )
    logits = logits_of(rows=4)
    logits[2, 20] = logits[2, 10] = logits[2].max() + 1  # a tie at the top

    result = sample(sampler, logits)

    raw = torch.log_softmax(logits.double(), dim=1)
    chosen = [(0, 11), (2, 10), (3, int(result.token_ids[3]))]
    np.testing.assert_allclose(result.logprobs, [raw[row, token] for row, token in chosen], rtol=1e-5)
    assert result.ranks.tolist() == [int((logits[row] >= logits[row, token]).sum()) for row, token in chosen]
    best = logits[0].sort(descending=True).indices[:3].tolist()
    assert result.candidate_token_ids.tolist() == [*best, 10, 20]
    np.testing.assert_allclose(result.candidate_logprobs, [*raw[0, best].tolist(), raw[2, 10], raw[2, 20]], rtol=1e-5)
    assert result.ranks[1] == 2  # an equal logit counts as better, or as good


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_costs_only_itself(temperature: float) -> None:
    sampler, _ = sampler_with(*[{"temperature": temperature, "logprobs": 1}] * 5)
    logits = logits_of(rows=5)
    good = sample(sampler, logits).token_ids.tolist()
    logits[0, 3] = torch.nan
    logits[2, 4] = torch.inf
    logits[4] = -torch.inf

    result = sample(sampler, logits)

    assert result.token_ids.tolist() == [NOT_FINITE, good[1], NOT_FINITE, good[3], NOT_FINITE]
    assert np.isnan(result.logprobs).tolist() == [True, False, True, False, True]
    assert len(result.candidate_token_ids) == 5


def test_a_row_with_no_token_left_is_not_finite() -> None:
    sampler, _ = sampler_with(
        {"allowed_token_ids": column(3), "banned_until_min_token_ids": column(3), "min_new_tokens": 99}
    )
    assert sample(sampler, logits_of()).token_ids.tolist() == [NOT_FINITE]


def test_a_rows_token_does_not_depend_on_the_other_rows() -> None:
    updates: list[dict[str, Any]] = [
        {"temperature": 0.9, "seed": 1, "top_p": 0.9},
        {"temperature": 1.1, "seed": 2, "top_k": 5, "repetition_penalty": 1.2, "history_token_ids": column(1, 2)},
        {"logprobs": 2},
        {
            "temperature": 1.0,
            "seed": 4,
            "min_p": 0.05,
            "bias_token_ids": column(4),
            "bias_values": column(2, dtype="<f4"),
        },
    ]
    logits = logits_of(rows=4)
    together, _ = sampler_with(*updates)
    token_ids = sample(together, logits).token_ids.tolist()

    for row, update in enumerate(updates):
        alone, _ = sampler_with(update)
        assert sample(alone, logits[row : row + 1]).token_ids.tolist() == [token_ids[row]]


def test_no_rows_make_no_tokens() -> None:
    sampler, _ = sampler_with()
    assert sample(sampler, logits_of(rows=0)).token_ids.tolist() == []


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"logprobs": 51}, "logprobs"),
        ({"bias_token_ids": column(1), "bias_values": b""}, "differ in length"),
        ({"bias_token_ids": column(50), "bias_values": column(1, dtype="<f4")}, "bias_token_ids holds 50"),
        ({"bias_token_ids": column(1), "bias_values": column(np.nan, dtype="<f4")}, "bias_values"),
        ({"allowed_token_ids": column(1, 77)}, "allowed_token_ids holds 77"),
        ({"allowed_token_mask": b"\xff"}, "allowed_token_mask has 1 bytes"),
        ({"history_token_ids": b"abc"}, "3 bytes"),
        ({"presence_penalty": 1.0, "prompt_length": 4}, "history_token_ids holds 0"),
    ],
)
def test_settings_out_of_range_are_refused(update: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        sampler_with(update)


def words(*token_ids: list[int]) -> dict[str, Any]:
    return {"sampling": {"bad_words_token_ids": [{"ids": each} for each in token_ids]}}


def test_the_last_token_of_a_bad_word_is_excluded_where_the_output_ends_with_those_before_it() -> None:
    update = {**words([7], [3, 9], [5, 3, 8], [3, 4]), "prompt_length": 2, "history_token_ids": column(1, 5)}
    sampler, drawer = sampler_with(update)
    excluded = []
    for at, token_id in enumerate([3, 5, 3, 6, 2]):
        logits = torch.zeros(1, VOCABULARY)
        logits[0, token_id] = 1.0
        assert sample(sampler, logits, [2 + at]).token_ids.tolist() == [token_id]
        excluded.append(np.flatnonzero(np.isneginf(drawer.calls[-1][0][0])).tolist())

    assert excluded == [[7], [4, 7, 9], [7], [4, 7, 8, 9], [7]]  # tokens of the prompt do not count


def test_bad_words_of_many_lengths_are_looked_for_once_where_one_may_end(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_for: list[tuple[int, ...]] = []

    class Counted(dict[tuple[int, ...], Any]):
        def get(self, prefix: tuple[int, ...], default: Any = None) -> Any:
            looked_for.append(prefix)
            return super().get(prefix, default)

    many = words(*([6] * length + [5, 9] for length in range(90)), [6, 8, 7])
    update = worker_pb2.SamplingUpdate(**many, top_p=1.0, prompt_length=1, history_token_ids=column(1, 2, 4))
    settings = read_sampling_update(update, VOCABULARY)
    word_filter = WordFilter(dataclasses.replace(settings, bad_words=Counted(settings.bad_words)), None)
    assert looked_for == []
    for token_id in (6, 8):
        word_filter.advance(token_id)
        assert not word_filter.refusal
        assert word_filter.allowed[0] >> 7 & 1 == (token_id != 8)
    assert looked_for == [(6, 8)]


def test_a_slot_with_bad_words_goes_on_from_its_output_as_if_never_lost() -> None:
    sampler, _ = sampler_with({**words([3, 5, 9]), "prompt_length": 1, "history_token_ids": column(1, 3, 5)})
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 9] = 1.0

    assert sample(sampler, logits, [3]).token_ids.tolist() == [0]
    assert sample(sampler, logits, [4]).token_ids.tolist() == [9]


def test_where_bad_words_leave_nothing_the_row_says_so_beside_others() -> None:
    every = [[token_id] for token_id in range(VOCABULARY)]
    allowed = {"allowed_token_ids": column(4, 6)}
    late = {**words([4, 4], [4, 6]), **allowed, "prompt_length": 1, "history_token_ids": column(1, 4)}
    sampler, _ = sampler_with(
        {**words(*every), "history_token_ids": column(1), "prompt_length": 1},
        {**words([4], [6]), **allowed},
        {**late, "history_token_ids": column(1, 4)},
        {},
    )
    logits = logits_of(rows=4)

    token_ids = sample(sampler, logits).token_ids.tolist()

    assert token_ids == [NOTHING_ALLOWED_TOKEN] * 3 + [int(logits[3].argmax())]


@pytest.mark.parametrize("token_ids", [[], [VOCABULARY], [3, VOCABULARY]])
def test_a_bad_word_that_the_vocabulary_lacks_is_refused(token_ids: list[int]) -> None:
    with pytest.raises(PlanError, match="bad_words"):
        sampler_with(words(token_ids))
