"""The draw keeps what its settings say, and its noise is the one that is specified, to the bit."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.gpu_worker.ops import Draw
from octavo.gpu_worker.sampling.draw import draw_tokens, gumbel_noise, philox
from octavo.kernels.draw import kept_token_ids

F32 = np.float32
PLAIN = Draw(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, candidate_index=0, position=0)


def stated_log(f: np.float32, k: np.float32) -> np.float32:
    s = f / (F32(2) + f)
    z = s * s
    w2 = z * z
    t1 = w2 * (F32(0xCCCE13 / 2**25) + w2 * F32(0xF89E26 / 2**26))
    t2 = z * (F32(0xAAAAAA / 2**24) + w2 * F32(0x91E9EE / 2**25))
    half_square = F32(0.5) * f * f
    series = s * (half_square + (t2 + t1))
    return series + k * F32(9.0580006145e-06) - half_square + f + k * F32(6.9313812256e-01)


def stated_split(x: np.float32) -> tuple[np.float32, np.float32]:
    bits = int(x.view(np.int32))
    e = (bits - 0x3F3504F3) >> 23
    return np.int32(bits - (e << 23)).view(F32) - F32(1), F32(e)


def stated_noise(word: int) -> np.float32:
    """The noise of one random word, one operation after the other."""
    w = max(F32(np.uint32(word)), F32(0.5)) * F32(2**-32)
    w = min(w, F32(1 - 2**-24))
    f, k = (-w, F32(0)) if w < F32(0.29289323) else stated_split(F32(1) - w)
    return -stated_log(*stated_split(-stated_log(f, k)))


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [  # the known answers of the generator's authors
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 0xFFFFFFFFFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_generator_is_philox(counter: list[int], seed: int, words: list[int]) -> None:
    assert philox([np.array([word], np.uint32) for word in counter], seed)[:, 0].tolist() == words


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**31 - 1),
    candidate=st.integers(0, 100),
    token_ids=st.sets(st.integers(0, 200_000), min_size=1, max_size=40),
)
def test_noise_is_as_specified_and_of_each_token_alone(
    seed: int, position: int, candidate: int, token_ids: set[int]
) -> None:
    ordered = np.array(sorted(token_ids), np.int64)
    noise = gumbel_noise(ordered, seed, candidate, position)
    for token_id, value in zip(ordered.tolist(), noise, strict=True):
        counter = [np.array([word], np.uint32) for word in (token_id >> 2, position, candidate, 0)]
        word = int(philox(counter, seed)[token_id & 3, 0])
        assert value.tobytes() == stated_noise(word).tobytes()
        u = max(word, 0.5) / 2**32
        if word < 2**32 - 300:
            rounded = 2**-24 * u / ((1 - u) * -math.log1p(-u))  # u is a float32 there
            assert abs(float(value) - -math.log(-math.log1p(-u))) < 1e-5 + rounded


@pytest.mark.parametrize("word", [0, 1, 2, 1257966796, 1257966797, 2**31, 2**32 - 1])
def test_noise_at_the_ends_is_finite(word: int) -> None:
    assert math.isfinite(float(stated_noise(word)))


def stated_kept(scaled: np.ndarray, draw: Draw) -> set[int]:
    """The rules, said plainly."""
    order = sorted((i for i in range(len(scaled)) if scaled[i] > -np.inf), key=lambda i: (-scaled[i], i))
    if draw.top_n_sigma:
        sigma = statistics.pstdev([float(scaled[i]) for i in order])
        order = [i for i in order if scaled[i] >= scaled[order[0]] - F32(draw.top_n_sigma * sigma)]
    if draw.top_k:
        order = order[: draw.top_k]
    weights = [math.exp(float(scaled[i]) - float(scaled[order[0]])) for i in order]
    if draw.top_p < 1:
        count = next(n for n in range(1, len(order) + 1) if sum(weights[:n]) >= draw.top_p * sum(weights) - 1e-12)
        order = order[:count]
    if draw.min_p:
        order = [i for i in order if scaled[i] >= scaled[order[0]] + F32(math.log(draw.min_p))]
    if draw.typical_p < 1:
        order = stated_typical(scaled, order, draw.typical_p)
    return set(order)


def stated_typical(scaled: np.ndarray, order: list[int], typical_p: float) -> list[int]:
    """Locally typical sampling by its definition: |-log p - H|, in logits and rounded as they are."""
    weights = [math.exp(float(scaled[i]) - float(scaled[order[0]])) for i in order]
    probabilities = [weight / sum(weights) for weight in weights]
    entropy = -sum(p * math.log(p) for p in probabilities)
    logit_of_entropy = math.log(sum(weights)) + float(scaled[order[0]]) - entropy
    distances = [round(abs(float(scaled[i]) - logit_of_entropy), 5) for i in order]
    for radius in sorted(distances):
        kept = [k for k, distance in enumerate(distances) if distance <= radius]
        if sum(probabilities[k] for k in kept) >= typical_p - 1e-12:
            break
    return [order[k] for k in kept]


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.sampled_from([-np.inf, -3.0, -1.0, 0.0, 0.5, 0.5, 2.0, 2.25]), min_size=1, max_size=30),
    top_k=st.sampled_from([0, 1, 2, 5, 40]),
    top_p=st.sampled_from([0.0, 0.3, 0.8, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    top_n_sigma=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    typical_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
)
def test_what_is_kept_follows_the_rules(
    logits: list[float], top_k: int, top_p: float, min_p: float, top_n_sigma: float, typical_p: float
) -> None:
    if max(logits) == -np.inf:
        return
    scaled = np.array(logits, F32)
    draw = replace(PLAIN, top_k=top_k, top_p=top_p, min_p=min_p, top_n_sigma=top_n_sigma, typical_p=typical_p)
    assert set(kept_token_ids(scaled, draw).tolist()) == stated_kept(scaled, draw)


def test_greedy_takes_the_lowest_of_equal_best() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0]])
    assert draw_tokens(logits.numpy(), [replace(PLAIN, temperature=0.0)]).tolist() == [1]


def test_tokens_are_drawn_as_often_as_their_probability() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, -torch.inf, 0.5])
    temperature = 0.7
    draws = [replace(PLAIN, temperature=temperature, seed=5, position=position) for position in range(20_000)]

    drawn = draw_tokens(logits.expand(len(draws), -1).numpy(), draws)

    share = np.bincount(drawn, minlength=6) / len(draws)
    true = torch.softmax(logits / temperature, dim=0).numpy()
    assert np.abs(share - true).max() < 0.012  # four standard deviations
    assert share[4] == 0


def test_seed_candidate_and_position_each_give_another_stream() -> None:
    logits = torch.zeros(1, 5000)
    draws = [PLAIN, replace(PLAIN, seed=1), replace(PLAIN, seed=1 << 32), replace(PLAIN, candidate_index=1)]
    draws.append(replace(PLAIN, position=1))
    assert len({int(draw_tokens(logits.numpy(), [draw])[0]) for draw in draws}) == len(draws)
    alone = [int(draw_tokens(logits.numpy(), [draw])[0]) for draw in draws]
    assert draw_tokens(logits.expand(5, -1).numpy(), draws).tolist() == alone


@pytest.mark.parametrize(("top_p", "num_kept"), [(0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_top_p_keeps_no_token_beyond_the_one_that_reaches_it_exactly(top_p: float, num_kept: int) -> None:
    kept = kept_token_ids(np.zeros(4, F32), replace(PLAIN, top_p=top_p))

    assert sorted(kept.tolist()) == list(range(num_kept))


@pytest.mark.parametrize(("top_n_sigma", "kept"), [(0.5, [1, 3]), (1.0, [1, 3]), (1.99, [1, 3]), (2.0, [0, 1, 2, 3])])
def test_top_n_sigma_keeps_what_lies_so_many_standard_deviations_below_and_no_further(
    top_n_sigma: float, kept: list[int]
) -> None:
    logits = np.array([0, 2, 0, 2, -np.inf], F32)  # of those that can be drawn: 1

    assert kept_token_ids(logits, replace(PLAIN, top_n_sigma=top_n_sigma)).tolist() == kept
    halved = kept_token_ids(logits / F32(2), replace(PLAIN, top_n_sigma=top_n_sigma))
    assert halved.tolist() == kept, "whatever the temperature"


@pytest.mark.parametrize(
    ("typical_p", "kept"), [(0.2, [0, 1]), (0.5, [0, 1]), (0.51, [0, 1, 2]), (0.999, [0, 1, 2, 3])]
)
def test_typical_p_keeps_what_is_nearest_to_the_entropy_with_all_its_ties(typical_p: float, kept: list[int]) -> None:
    probabilities = np.array([0.25, 0.25, 0.4, 0.1])  # the entropy is 1.29; -log p is 1.39, 1.39, 0.92 and 2.3
    logits = np.log(probabilities).astype(F32)
    logits[0] = logits[1]

    assert kept_token_ids(logits, replace(PLAIN, typical_p=typical_p)).tolist() == kept
