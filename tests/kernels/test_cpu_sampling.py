from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from octavo.gpu_worker.sampling.draw import best_tokens
from octavo.kernels.cpu import library
from octavo.kernels.cpu.runtime import Runtime
from octavo.kernels.draw import STRUCT

F32 = np.float32
Floats = npt.NDArray[np.float32]
VOCAB = 5003
OFF: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "seed": 7}
SETTINGS: dict[str, dict[str, Any]] = {
    "temperature": {},
    "cold": {"temperature": 0.1},
    "freezing": {"temperature": 1e-5},
    "hot": {"temperature": 30.0},
    "top_k 1": {"top_k": 1},
    "top_k 50": {"top_k": 50},
    "top_k above the number of noise blocks": {"top_k": 2000},
    "top_k of all": {"top_k": VOCAB},
    "top_p": {"top_p": 0.9},
    "small top_p": {"top_p": 1e-6},
    "no top_p": {"top_p": 0.0},
    "top_p of a long top_k": {"top_k": 900, "top_p": 0.95, "temperature": 5.0},
    "top_p of nearly all": {"top_p": 0.999999},
    "hot top_p": {"top_p": 0.7, "temperature": 30.0},
    "min_p": {"min_p": 0.05},
    "all": {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "temperature": 1.3},
    "top_p and min_p": {"top_p": 0.8, "min_p": 0.02},
    "top_n_sigma": {"top_n_sigma": 1.0, "temperature": 3.0},
    "top_n_sigma of many": {"top_n_sigma": 3.0, "top_k": 900, "top_p": 0.95, "temperature": 30.0},
    "top_n_sigma alone and top_k above": {"top_n_sigma": 2.0, "top_k": 5000, "temperature": 30.0},
    "typical_p": {"typical_p": 0.5},
    "small typical_p": {"typical_p": 1e-6, "temperature": 3.0},
    "typical_p of nearly all": {"typical_p": 0.9999, "temperature": 30.0},
    "typical_p and more": {"typical_p": 0.6, "top_k": 900, "top_p": 0.95, "min_p": 0.001, "temperature": 5.0},
    "large seed": {"seed": 2**64 - 3},
    "last position": {"position": 2**32 - 1, "candidate_index": 2**32 - 1},
}


@pytest.fixture(scope="module", params=library.runnable_variants())
def runtime(request: pytest.FixtureRequest) -> Runtime:
    return Runtime(request.param, num_threads=2)


def make_draws(num_rows: int, **settings: Any) -> npt.NDArray[np.void]:
    draws = np.zeros(num_rows, dtype=STRUCT)
    draws["position"] = np.arange(num_rows)
    for name, value in {**OFF, **settings}.items():
        draws[name] = value
    return draws


def philox(counter: npt.NDArray[np.uint64], position: int, candidate: int, seed: int) -> list[npt.NDArray[np.uint64]]:
    mask = np.uint64(0xFFFFFFFF)
    c = [counter, np.full_like(counter, position), np.full_like(counter, candidate), np.zeros_like(counter)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high_a, high_b = a >> np.uint64(32), b >> np.uint64(32)
        c = [high_b ^ c[1] ^ np.uint64(key[0]), b & mask, high_a ^ c[3] ^ np.uint64(key[1]), a & mask]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def log_of_parts(f: Floats, k: Floats) -> Floats:
    s = f / (F32(2) + f)
    z = s * s
    w = z * z
    t1 = w * (F32(float.fromhex("0xccce13p-25")) + w * F32(float.fromhex("0xf89e26p-26")))
    t2 = z * (F32(float.fromhex("0xaaaaaap-24")) + w * F32(float.fromhex("0x91e9eep-25")))
    half_square = F32(0.5) * f * f
    log: Floats = (
        s * (half_square + (t2 + t1)) + k * F32(9.0580006145e-06) - half_square + f + k * F32(6.9313812256e-01)
    )
    return log


def split(x: Floats) -> tuple[Floats, Floats]:
    e = (x.view(np.int32) - np.int32(0x3F3504F3)) >> np.int32(23)
    return (x.view(np.int32) - (e << np.int32(23))).view(np.float32) - F32(1), e.astype(np.float32)


def gumbel(num_tokens: int, seed: int, candidate: int, position: int) -> Floats:
    words = philox(np.arange(-(-num_tokens // 4), dtype=np.uint64), position, candidate, seed)
    random = np.stack(words, 1).ravel()[:num_tokens].astype(np.uint32)
    w = np.maximum(random.astype(np.float32), F32(0.5)) * F32(2.0**-32)
    w = np.minimum(w, F32(1 - 2.0**-24))
    f, k = split(F32(1) - w)
    small = w < F32(0.29289323)
    e = -log_of_parts(np.where(small, -w, f), np.where(small, F32(0), k))
    return -log_of_parts(*split(e))


def kept(scaled: Floats, draw: Any) -> npt.NDArray[np.int64]:
    order = np.lexsort((np.arange(len(scaled)), -scaled.astype(np.float64)))
    order = order[scaled[order] > -np.inf]
    if draw["top_n_sigma"] > 0:
        sigma = scaled[order].astype(np.float64).std()
        order = order[scaled[order] >= scaled.max() - F32(draw["top_n_sigma"] * sigma)]
    floor = scaled.max() + F32(math.log(draw["min_p"])) if draw["min_p"] > 0 else F32(-np.inf)
    if draw["top_k"] > 0:
        order = order[: draw["top_k"]]
    if draw["top_p"] < 1:
        weights = np.exp(scaled[order].astype(np.float64) - np.float64(scaled.max()))
        sums = np.cumsum(weights)
        order = order[: int((sums < draw["top_p"] * sums[-1]).sum()) + 1]
    order = order[scaled[order] >= floor]
    if draw["typical_p"] < 1:
        depths = scaled[order].astype(np.float64) - np.float64(scaled.max())
        center = F32(np.float64(scaled.max()) + (np.exp(depths) * depths).sum() / np.exp(depths).sum())
        distances = np.abs(scaled[order] - center)
        nearest = np.argsort(distances, kind="stable")
        sums = np.cumsum(np.exp(depths)[nearest])
        last = nearest[min(int((sums < draw["typical_p"] * sums[-1]).sum()), len(order) - 1)]
        order = order[distances <= distances[last]]
    return order


def expected_token(logits: Floats, draw: Any) -> int:
    scaled = logits / draw["temperature"]
    values = np.full_like(scaled, -np.inf)
    tokens = kept(scaled, draw)
    noise = gumbel(len(logits), int(draw["seed"]), int(draw["candidate_index"]), int(draw["position"]))
    values[tokens] = scaled[tokens] + noise[tokens]
    return int(values.argmax())


def test_noise_is_that_of_philox4x32_10() -> None:
    # Random123's published answers for counters and keys of zeros and of ones.
    assert [int(w[0]) for w in philox(np.zeros(1, np.uint64), 0, 0, 0)] == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_draw_is_that_of_the_specification(runtime: Runtime, name: str) -> None:
    logits = (np.random.default_rng(3).standard_normal((48, VOCAB)) * 4).astype(np.float32)
    logits[::3] = np.round(logits[::3])  # many ties
    logits[5, 100:] = -np.inf
    draws = make_draws(48, **SETTINGS[name])

    tokens = runtime.draw(logits, draws)

    assert tokens.tolist() == [expected_token(row, draw) for row, draw in zip(logits, draws, strict=True)]


@pytest.mark.parametrize("seed", range(40))
def test_the_largest_noise_wins_among_equal_logits(runtime: Runtime, seed: int) -> None:
    draws = make_draws(1, seed=seed * 2**33 + seed, position=11, candidate_index=seed)

    token = runtime.draw(np.zeros((1, 50_000), F32), draws)[0]

    noise = gumbel(50_000, int(draws["seed"][0]), seed, 11)
    assert (token, noise[token]) == (noise.argmax(), noise.max())


def test_noise_in_both_tails_is_bit_exact(runtime: Runtime) -> None:
    # A logit that makes the sum equal to the bar's only if the noise is exact to the last bit:
    # token 0 has logit 0, token 1 the difference of their noises, as near as float32 comes.
    seeds = np.arange(3000)
    draws = make_draws(len(seeds), position=5)
    draws["seed"] = seeds
    noise = np.stack([gumbel(2, int(seed), 0, 5) for seed in seeds])
    logits = np.zeros((len(seeds), 2), np.float32)
    logits[:, 1] = noise[:, 0] - noise[:, 1]
    above, below = logits.copy(), logits.copy()
    above[:, 1] = np.nextafter(logits[:, 1], F32(np.inf))
    below[:, 1] = np.nextafter(logits[:, 1], F32(-np.inf))

    for rows in (below, logits, above):
        tokens = runtime.draw(rows, draws)
        assert tokens.tolist() == (rows + noise).argmax(1).tolist()


@pytest.mark.parametrize("level", [0.0, -20.0, 3e5])
def test_a_token_far_below_wins_by_the_least_difference(runtime: Runtime, level: float) -> None:
    # Noise is computed only for tokens that might reach the likeliest one, here token 0.
    low = 1500
    draws = make_draws(1000, position=5)
    draws["seed"] = np.arange(len(draws))
    noise = np.stack([gumbel(low + 4, seed, 0, 5) for seed in range(len(draws))])
    lifts = noise[:, low] - noise[:, 0]
    assert lifts.max() > 8
    logits = np.full(noise.shape, level - 200, F32)
    logits[:, 0] = level
    logits[:, low] = F32(level) - lifts
    above, below = logits.copy(), logits.copy()
    above[:, low] = np.nextafter(logits[:, low], F32(np.inf))
    below[:, low] = np.nextafter(logits[:, low], F32(-np.inf))

    for rows in (below, logits, above):
        tokens = runtime.draw(rows, draws)
        assert tokens.tolist() == (rows + noise).argmax(1).tolist()


def test_draws_follow_the_softmax(runtime: Runtime) -> None:
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = np.tile(np.log(probabilities).astype(F32), (20_000, 1))

    counts = np.bincount(runtime.draw(logits, make_draws(20_000)), minlength=4)

    chi_square = ((counts - 20_000 * probabilities) ** 2 / (20_000 * probabilities)).sum()
    assert chi_square < 16.3  # one in a thousand, at three degrees of freedom; the seed is fixed


def test_ties_at_the_kth_place_keep_the_lower_ids(runtime: Runtime) -> None:
    logits = np.zeros((1, 1000), F32)
    logits[0, 900] = 1.0

    tokens = {int(runtime.draw(logits, make_draws(1, top_k=4, position=p, temperature=5.0))[0]) for p in range(300)}

    assert tokens == {0, 1, 2, 900}


def test_temperature_zero_takes_the_lowest_id_of_the_highest_logits(runtime: Runtime) -> None:
    logits = torch.randn(7, 1001).numpy()
    logits[:, [17, 500, 1000]] = 9.0

    assert runtime.draw(logits, make_draws(7, temperature=0.0)).tolist() == [17] * 7
    assert runtime.argmax(logits).tolist() == [17] * 7


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_a_row_without_a_drawable_token_gives_minus_one(runtime: Runtime, temperature: float, value: float) -> None:
    logits = np.full((2, 301), value, F32)
    logits[1, 300] = -80.0

    assert runtime.draw(logits, make_draws(2, temperature=temperature)).tolist() == [-1, 300]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("vocab_size", [1, 15, 1024, 1025, 2100])
def test_the_argmax_of_a_row_is_the_first_of_the_highest_or_minus_one_if_that_is_not_finite(
    runtime: Runtime, vocab_size: int, value: float
) -> None:
    generator = np.random.default_rng(vocab_size)
    logits = generator.integers(-2, 3, (vocab_size + 1, vocab_size)).astype(F32)  # many are equal
    places = np.arange(vocab_size)
    logits[places, places] = value  # in the last row it is nowhere
    logits[0] = value

    assert runtime.argmax(logits).tolist() == best_tokens(logits).tolist()


def test_rows_are_independent_of_each_other_and_of_their_stride(runtime: Runtime) -> None:
    logits = torch.randn(9, 777).numpy() * 2
    draws = make_draws(9, top_k=100)
    wide = np.full((9, 800), 99.0, F32)
    wide[:, :777] = logits

    together = runtime.draw(wide[:, :777], draws)

    alone = [int(runtime.draw(logits[i : i + 1], draws[i : i + 1])[0]) for i in range(9)]
    assert together.tolist() == alone


@pytest.mark.parametrize(("top_p", "num_kept"), [(0.25, 1), (0.5, 2), (0.75, 3)])
def test_top_p_keeps_no_token_beyond_the_one_that_reaches_it_exactly(
    runtime: Runtime, top_p: float, num_kept: int
) -> None:
    logits = np.full((200, 64), -np.inf, F32)
    logits[:, 10:14] = 0.0

    tokens = runtime.draw(logits, make_draws(200, top_p=top_p))

    assert set(tokens.tolist()) == set(range(10, 10 + num_kept))
