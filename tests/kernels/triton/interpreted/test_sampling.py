# ruff: noqa: E501, N803 - texts of mutations; constants of a kernel are upper case
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The sampling kernels against the worker's own sampler, token for token and, for the noise, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from mutate import mutated

from octavo.gpu_worker.ops import Draw, Float32Array, Int32Array
from octavo.gpu_worker.protocol import NOT_FINITE_TOKEN
from octavo.gpu_worker.sampling import draw
from octavo.gpu_worker.sampling.sampler import Sampler
from octavo.gpu_worker.sampling.settings import SamplingSettings
from octavo.kernels import noise, reference, sampling, sampling_kernels
from octavo.kernels.configs import RowConfig
from octavo.kernels.draw import COLUMNS, FLOATS, column_values, kept_token_ids

CONFIG = RowConfig(block=128, num_warps=4)
VOCAB = 301
OFF = Draw(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=7, candidate_index=0, position=5)


def make_logits(num_rows: int, vocab: int = VOCAB, seed: int = 0, *, ties: bool = False) -> torch.Tensor:
    logits = torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    return (logits * 2).round() / 2 if ties else logits


def halves(seed: int) -> list[int]:
    return [int(np.uint32(word).view(np.int32)) for word in (seed & 0xFFFFFFFF, seed >> 32)]


def draw_settings(draws: list[Draw], slots: list[int] | None = None) -> sampling.DrawSettings:
    def ints(values: list[int]) -> torch.Tensor:
        return torch.from_numpy(np.array(values, dtype=np.int64).astype(np.uint32).view(np.int32))

    def column(name: str, values: list[Any]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32) if name in FLOATS else ints(values)

    return sampling.DrawSettings(
        slots=ints(list(range(len(draws))) if slots is None else slots),
        positions=ints([d.position for d in draws]),
        columns={name: column(name, [column_values(d)[name] for d in draws]) for name in COLUMNS},
        seeds=torch.tensor([halves(d.seed) for d in draws], dtype=torch.int32),
    )


def draw_on_gpu(
    logits: torch.Tensor,
    settings: sampling.DrawSettings,
    rules: sampling.LogitRules | None = None,
    *,
    has_edges: bool = True,
) -> torch.Tensor:
    workspace = sampling.make_workspace(len(logits) + 1, logits.shape[1], CONFIG, "cpu")
    for tensor in vars(workspace).values():
        tensor.fill_(-7)
    token_ids = torch.full((len(logits),), -7, dtype=torch.int32)
    sampling.sample(logits, settings, rules, workspace, token_ids, config=CONFIG, has_edges=has_edges)
    return token_ids


@triton.jit
def _noise_kernel(out_ptr, start, position, candidate_index, seed_low, seed_high, BLOCK: tl.constexpr):
    values = noise.gumbel_noise(start, position, candidate_index, seed_low, seed_high, BLOCK)
    tl.store(out_ptr + tl.arange(0, BLOCK), values)


@triton.jit
def _gumbel_kernel(random_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, noise._gumbel(tl.load(random_ptr + i).to(tl.uint32, bitcast=True)))


def check_noise(seed: int = 7, candidate: int = 0, position: int = 5, start: int = 0) -> None:
    out = torch.empty(1024)
    words = torch.tensor([position, candidate], dtype=torch.int64).numpy().astype(np.uint32).view(np.int32).tolist()
    key = [torch.tensor(word, dtype=torch.int32) for word in (*words, *halves(seed))]
    _noise_kernel[(1,)](out, start, *(int(word) for word in key), BLOCK=1024)
    expected = draw.gumbel_noise(np.arange(start, start + 1024), seed, candidate, position)
    assert np.array_equal(out.numpy().view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 + 5, 2**64 - 3])
@pytest.mark.parametrize(("candidate", "position", "start"), [(0, 5, 0), (3, 2**31 - 1, 1024), (2**31 + 1, 0, 150528)])
def test_the_noise_has_the_bits_of_the_worker(seed: int, candidate: int, position: int, start: int) -> None:
    check_noise(seed, candidate, position, start)


def check_gumbel() -> None:
    """All exponents of the uniform number, and its ends."""
    random = np.random.default_rng(1).integers(0, 2**32, size=1024, dtype=np.uint64)
    random[:512] >>= np.arange(512, dtype=np.uint64) % 32
    random[512:516] = [0, 1, 2**32 - 1, 2**31]
    words = random.astype(np.uint32)
    out = torch.empty(1024)
    _gumbel_kernel[(1,)](torch.from_numpy(words.view(np.int32)), out, BLOCK=1024)
    w = np.maximum(words.astype(np.float32), np.float32(0.5)) * np.float32(2**-32)
    expected = -draw._log(-draw._log1m(np.minimum(w, np.float32(1 - 2**-24))))
    assert np.array_equal(out.numpy().view(np.int32), expected.view(np.int32))


def test_the_noise_of_any_random_word_has_the_bits_of_the_worker() -> None:
    check_gumbel()


DRAWS = {
    "greedy": replace(OFF, temperature=0.0),
    "temperature": OFF,
    "cold": replace(OFF, temperature=0.1),
    "hot": replace(OFF, temperature=30.0),
    "top_k 1": replace(OFF, top_k=1),
    "top_k": replace(OFF, top_k=20, temperature=5.0),
    "top_k of nearly all": replace(OFF, top_k=VOCAB - 21, temperature=50.0),
    "top_k of all": replace(OFF, top_k=VOCAB),
    "top_k above all": replace(OFF, top_k=2**31 - 1),
    "top_p": replace(OFF, top_p=0.7, temperature=2.0),
    "small top_p": replace(OFF, top_p=1e-6),
    "top_p of nearly all": replace(OFF, top_p=0.99999, temperature=30.0),
    "min_p": replace(OFF, min_p=0.05, temperature=4.0),
    "min_p 1": replace(OFF, min_p=1.0),
    "all": replace(OFF, top_k=40, top_p=0.8, min_p=0.02, temperature=1.3),
    "top_n_sigma": replace(OFF, top_n_sigma=1.5, temperature=4.0),
    "top_n_sigma and more": replace(OFF, top_n_sigma=1.2, top_k=40, top_p=0.9, min_p=0.01, temperature=4.0),
    "top_k above top_n_sigma": replace(OFF, top_n_sigma=0.9, top_k=VOCAB - 21, temperature=4.0),
    "typical_p": replace(OFF, typical_p=0.5, temperature=4.0),
    "small typical_p": replace(OFF, typical_p=1e-6),
    "typical_p and more": replace(
        OFF, typical_p=0.6, top_n_sigma=2.5, top_k=90, top_p=0.9, min_p=0.01, temperature=4.0
    ),
    "last place": replace(OFF, seed=2**64 - 3, position=2**31 - 1, candidate_index=2**31),
}


SIGMA = [name for name in DRAWS if "top_n_sigma" in name]
TYPICAL = [name for name in DRAWS if "typical_p" in name]


def check_draws(draws: list[Draw], *, ties: bool = False, seed: int = 0) -> None:
    logits = make_logits(len(draws), seed=seed, ties=ties)
    logits[:, 7] = -math.inf
    before = logits.clone()
    drawn = draw_on_gpu(logits, draw_settings(draws))
    assert torch.equal(logits, before), "the raw logits must stay"
    assert drawn.tolist() == draw.draw_tokens(logits.numpy(), draws).tolist()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", DRAWS)
def test_the_token_is_that_of_the_worker(name: str, ties: bool) -> None:
    check_draws([replace(DRAWS[name], position=DRAWS[name].position - i) for i in range(2)], ties=ties)


def edges(logits: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    """Which tokens the kernel keeps, [R, V] bool."""
    settings = draw_settings(draws)
    types = {"i32": torch.int32, "fp32": torch.float32}
    found = {f"{name}_ptr": torch.empty(len(draws), dtype=types[kind]) for name, kind in sampling.EDGES.items()}
    sampling.find_edges(logits, settings.columns, found, CONFIG)
    keys, ids, lowest = found["edge_key_ptr"], found["edge_id_ptr"], found["lowest_ptr"]
    scaled = logits / settings.columns["temperature"][:, None]
    bits = torch.where(scaled == 0, 0.0, scaled).view(torch.int32).long() & 0xFFFFFFFF
    order = bits ^ torch.where(bits >> 31 == 1, 0xFFFFFFFF, 0x80000000)
    edge = (keys.long() & 0xFFFFFFFF)[:, None]
    kept = (order > edge) | ((order == edge) & (torch.arange(logits.shape[1])[None, :] <= ids[:, None]))
    is_near = (scaled - found["center_ptr"][:, None]).abs() <= found["radius_ptr"][:, None]
    left: torch.Tensor = kept & is_near & (scaled >= lowest[:, None]) & (scaled > -math.inf)
    return left


def check_edges(*, ties: bool, names: Iterable[str] = DRAWS) -> None:
    draws = [DRAWS[name] for name in names if DRAWS[name].temperature > 0]
    logits = make_logits(len(draws), seed=3, ties=ties)
    logits[:, 7] = -math.inf
    logits[:, 8:10] = torch.tensor([0.0, -0.0])
    kept = edges(logits, draws)
    for i, d in enumerate(draws):
        expected = kept_token_ids(logits[i].numpy() / np.float32(d.temperature), d)
        assert kept[i].nonzero().flatten().tolist() == expected.tolist(), d


@pytest.mark.parametrize("ties", [False, True])
def test_the_tokens_that_are_left_are_those_of_the_worker(ties: bool) -> None:
    check_edges(ties=ties)


@pytest.mark.parametrize("top_k", [1, 2, 3, 7, 8])
def test_of_tokens_that_tie_for_top_k_the_lowest_ids_stay(top_k: int) -> None:
    logits = torch.full((1, VOCAB), 1.0)
    logits[0, [5, 130, 131]] = 2.0
    kept = edges(logits, [replace(OFF, top_k=top_k)])[0].nonzero().flatten().tolist()
    assert kept == sorted([5, 130, 131, 0, 1, 2, 3, 4][:top_k])


def test_neighbours_do_not_change_a_token() -> None:
    draws = [DRAWS["all"], DRAWS["greedy"], DRAWS["top_p"], OFF]
    logits = make_logits(len(draws), seed=9)
    together = draw_on_gpu(logits, draw_settings(draws))
    for i, d in enumerate(draws):
        alone = draw_on_gpu(logits[i : i + 1].clone(), draw_settings([d]))
        assert alone.tolist() == together[i : i + 1].tolist()


def test_rows_without_filters_need_no_search() -> None:
    draws = [OFF, DRAWS["greedy"]]
    logits = make_logits(2)
    drawn = draw_on_gpu(logits, draw_settings(draws), has_edges=False)
    assert drawn.tolist() == draw.draw_tokens(logits.numpy(), draws).tolist()


@pytest.mark.parametrize("name", ["greedy", "all"])
def test_a_row_that_is_not_finite_has_no_token(name: str) -> None:
    logits = make_logits(5)
    logits[0, 299], logits[1, 0] = math.nan, math.inf
    logits[2] = -math.inf
    drawn = draw_on_gpu(logits, draw_settings([DRAWS[name]] * 5, [0, 1, 2, -1, 4])).tolist()
    assert drawn[:4] == [sampling.NOT_FINITE] * 4, "and neither has a padding row"
    assert drawn[4] >= 0


class TorchDrawer:
    """The worker's own draw."""

    def argmax(self, logits: Float32Array) -> Int32Array:
        return draw.best_tokens(logits)

    def draw(self, logits: Float32Array, draws: list[Draw]) -> Int32Array:
        return draw.draw_tokens(logits, draws)


@dataclass
class Slots:
    """The rules of some slots, as the worker has them and as the kernels have them."""

    settings: list[SamplingSettings]
    sampler: Sampler
    rules: sampling.LogitRules


def make_settings(**changes: Any) -> SamplingSettings:
    nothing = np.empty(0, np.uint32)
    neutral: dict[str, Any] = {
        "logprobs": 0,
        "chosen_logprob": True, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0,
        "bias_token_ids": nothing, "bias_values": np.empty(0, np.float32), "forbidden": None,
        "bad_words": {}, "banned_token_ids": nothing, "min_new_tokens": 0, "prompt_length": 4,
        "history_token_ids": np.array([1, 2, 250, 2], np.uint32), "grammar": "", "end_of_sequence_ids": nothing,
    }  # fmt: skip
    drawn = {name: changes.pop(name) for name in Draw.__match_args__ if name in changes}
    return SamplingSettings(**{"draw": replace(OFF, **{"seed": 3, **drawn}), **neutral, **changes})


def all_rules() -> list[SamplingSettings]:
    random = np.random.default_rng(2)
    forbidden = random.random(VOCAB) < 0.7
    ids = random.permutation(VOCAB)[:40].astype(np.uint32)
    values = random.normal(size=40).astype(np.float32) * 4
    values[3] = -np.inf
    penalties = {"presence_penalty": 0.7, "frequency_penalty": 0.3, "repetition_penalty": 1.7}
    return [
        make_settings(),
        make_settings(forbidden=forbidden),
        make_settings(bias_token_ids=ids, bias_values=values),
        make_settings(banned_token_ids=ids, min_new_tokens=2),
        make_settings(
            **penalties, temperature=0.0, history_token_ids=np.array([1, 2, 250, 2, 250, 250, 11], np.uint32)
        ),
        make_settings(
            **penalties,
            forbidden=forbidden,
            bias_token_ids=ids[:17],
            bias_values=values[:17],
        ),
        make_settings(repetition_penalty=0.5, history_token_ids=np.array([1, 2, 3, 4, 9, 9], np.uint32)),
        make_settings(frequency_penalty=-0.9, banned_token_ids=ids[:16], min_new_tokens=3, top_k=9, top_p=0.9),
    ]


def make_slots(settings: list[SamplingSettings]) -> Slots:
    count, words = len(settings), -(-VOCAB // 32)
    sampler = Sampler(TorchDrawer(), VOCAB, count)
    ints: dict[str, Any] = {"dtype": torch.int32}
    floats: dict[str, Any] = {"dtype": torch.float32}
    rules = sampling.LogitRules(
        allowed=torch.zeros(count, words, **ints),
        has_mask=torch.zeros(count, **ints),
        bias_ids=torch.full((count, 40), 5, **ints),
        bias_values=torch.full((count, 40), 99.0, **floats),
        num_biases=torch.zeros(count, **ints),
        banned_ids=torch.full((count, 40), 6, **ints),
        num_banned=torch.zeros(count, **ints),
        banned_until=torch.zeros(count, **ints),
        counts=torch.zeros(count, VOCAB, **ints),
        seen=torch.zeros(count, VOCAB, dtype=torch.int8),
        repetition=torch.tensor([s.repetition_penalty for s in settings], **floats),
        frequency=torch.tensor([s.frequency_penalty for s in settings], **floats),
        presence=torch.tensor([s.presence_penalty for s in settings], **floats),
    )
    for slot, s in enumerate(settings):
        sampler.open_slot(slot, s)
        if s.forbidden is not None:
            bits = np.zeros(words * 32, bool)
            bits[:VOCAB] = ~s.forbidden
            rules.allowed[slot] = torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32))
            rules.has_mask[slot] = 1
        rules.num_biases[slot], rules.num_banned[slot] = len(s.bias_token_ids), len(s.banned_token_ids)
        rules.bias_ids[slot, : len(s.bias_token_ids)] = torch.from_numpy(s.bias_token_ids.astype(np.int32))
        rules.bias_values[slot, : len(s.bias_values)] = torch.from_numpy(s.bias_values)
        rules.banned_ids[slot, : len(s.banned_token_ids)] = torch.from_numpy(s.banned_token_ids.astype(np.int32))
        rules.banned_until[slot] = s.prompt_length + s.min_new_tokens
        if s.has_penalties:
            history = torch.from_numpy(s.history_token_ids.astype(np.int64))
            rules.counts[slot] = torch.bincount(history[s.prompt_length :], minlength=VOCAB).int()
            rules.seen[slot, history] = 1
    return Slots(settings, sampler, rules)


def check_rules(num_steps: int = 4) -> None:
    """Several steps, so that counts of produced tokens matter; slots in another order than rows."""
    slots = make_slots(all_rules())
    order = list(reversed(range(len(slots.settings))))
    before = slots.rules.counts.clone()
    for step in range(num_steps):
        logits = make_logits(len(order), seed=20 + step)
        logits[:, 9] += 6  # so that it is drawn more than once
        draws = [slots.settings[slot].draw_at(4 + step) for slot in order]
        drawn = draw_on_gpu(logits, draw_settings(draws, order), slots.rules)
        values, ranks = torch.empty(len(order)), torch.empty(len(order), dtype=torch.int32)
        sampling.logprobs(logits, drawn, values, ranks, config=CONFIG)
        positions = np.full(len(order), 4 + step, np.int32)
        expected = slots.sampler.sample(logits.numpy().copy(), np.array(order, np.int32), positions)
        assert drawn.numpy().view(np.uint32).tolist() == expected.token_ids.tolist()
        assert ranks.tolist() == expected.ranks.tolist()
        np.testing.assert_allclose(values.numpy(), expected.logprobs, rtol=1e-5, atol=1e-5)
        for slot, token_id in zip(order, drawn.tolist(), strict=True):
            before[slot, token_id] += slots.settings[slot].has_penalties
            assert slots.rules.seen[slot, token_id] == slots.settings[slot].has_penalties
    assert torch.equal(slots.rules.counts, before)


def check_first_step() -> None:
    check_rules(num_steps=1)


def check_processed_bits() -> None:
    """The processed logits themselves, against plain torch."""
    slots = make_slots(all_rules())
    order = list(reversed(range(len(slots.settings))))
    logits = make_logits(len(order), seed=31)
    workspace = sampling.make_workspace(len(order), VOCAB, CONFIG, "cpu")
    draws = draw_settings([slots.settings[slot].draw_at(6) for slot in order], order)
    sampling._apply_rules(logits, draws, slots.rules, workspace.processed, CONFIG)
    for i, slot in enumerate(order):
        s = slots.settings[slot]
        bias = torch.zeros(VOCAB)
        bias[torch.from_numpy(s.bias_token_ids.astype(np.int64))] = torch.from_numpy(s.bias_values)
        banned = torch.zeros(VOCAB, dtype=torch.bool)
        banned[torch.from_numpy(s.banned_token_ids.astype(np.int64))] = s.prompt_length + s.min_new_tokens > 6
        expected = reference.process_logits(
            logits[i],
            allowed=None if s.forbidden is None else torch.from_numpy(~s.forbidden),
            bias=bias,
            banned=banned,
            counts=slots.rules.counts[slot],
            seen=slots.rules.seen[slot] != 0,
            repetition=s.repetition_penalty,
            frequency=s.frequency_penalty,
            presence=s.presence_penalty,
        )
        assert torch.equal(workspace.processed[i], expected), i


def test_masks_biases_bans_and_penalties_are_those_of_the_worker() -> None:
    check_rules()
    check_processed_bits()


def test_a_mask_does_not_hide_that_a_row_is_not_finite() -> None:
    slots = make_slots(all_rules()[:2])
    logits = make_logits(2)
    assert slots.settings[1].forbidden is not None
    logits[1, int(np.flatnonzero(slots.settings[1].forbidden)[0])] = math.nan
    drawn = draw_on_gpu(logits, draw_settings([OFF, OFF]), slots.rules)
    assert drawn[0] >= 0
    assert drawn[1] == sampling.NOT_FINITE
    assert np.uint32(sampling.NOT_FINITE & 0xFFFFFFFF) == NOT_FINITE_TOKEN


def test_a_token_that_is_not_finite_has_no_logprob() -> None:
    values, ranks = torch.empty(1), torch.empty(1, dtype=torch.int32)
    sampling.logprobs(make_logits(1), torch.tensor([-1], dtype=torch.int32), values, ranks, config=CONFIG)
    assert math.isnan(values.item())
    assert ranks.item() == 0


def check_logprobs() -> None:
    logits = make_logits(3, ties=True)
    token_ids = torch.tensor([0, 140, 300], dtype=torch.int32)
    values, ranks = torch.empty(3), torch.empty(3, dtype=torch.int32)
    sampling.logprobs(logits, token_ids, values, ranks, config=CONFIG)
    expected = reference.logprobs(logits, token_ids)
    torch.testing.assert_close(values, expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(ranks, expected[1])


def test_log_probability_and_rank_are_those_of_torch() -> None:
    check_logprobs()


def check_noise_and_gumbel() -> None:
    check_noise(seed=2**32 + 5, candidate=3, start=1024)
    check_gumbel()


def check_tied_draws() -> None:
    check_draws([DRAWS["greedy"], replace(DRAWS["top_k"], top_k=3)], ties=True)
    equal = torch.ones(1, VOCAB)
    assert draw_on_gpu(equal, draw_settings([DRAWS["greedy"]]), has_edges=False).tolist() == [0]


def check_tied_edges() -> None:
    check_edges(ties=True, names=["top_k", "top_k of nearly all", "top_p", "min_p", "all", *SIGMA, *TYPICAL])
    zeros = torch.zeros(1, VOCAB)
    zeros[0, ::2] = -0.0
    assert edges(zeros, [replace(OFF, top_k=5)])[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


MUTATIONS = [
    (check_noise_and_gumbel, noise, "words in another order", "tl.interleave(words[0], words[2])", "tl.interleave(words[0], words[1])"),
    (check_noise_and_gumbel, noise, "counter not by token", "start // 4 + tl.arange", "tl.arange"),
    (check_noise_and_gumbel, noise, "halves of the seed swapped", "zero + seed_low.to", "zero + seed_high.to"),
    (check_noise_and_gumbel, noise, "candidate and position swapped", "zero + position.to", "zero + candidate_index.to"),
    (check_noise_and_gumbel, noise, "nine rounds", "        10,\n", "        9,\n"),
    (check_noise_and_gumbel, noise, "order of the sum", "- half_square + f + k * _LN2_HIGH", "+ (f - half_square) + k * _LN2_HIGH"),
    (check_noise_and_gumbel, noise, "small numbers not apart", "small = w < _SMALL", "small = w < 0.0"),
    (check_noise_and_gumbel, noise, "log of the wrong sign", "return -_log_of(f, k)", "return _log_of(f, k)"),
    (check_noise_and_gumbel, noise, "smallest number", "random.to(tl.float32), 0.5)", "random.to(tl.float32), 1.0)"),
    (check_processed_bits, sampling_kernels, "mask the wrong way", "& 1 != 0, x", "& 1 == 0, x"),
    (check_processed_bits, sampling_kernels, "bit of the wrong word", "token // 32", "token // 64"),
    (check_processed_bits, sampling_kernels, "biases of the row, not the slot", "bias_ids_ptr + slot", "bias_ids_ptr + row"),
    (check_processed_bits, sampling_kernels, "only the first biases", "tl.load(num_biases_ptr + slot), LIST)", "LIST, LIST)"),
    (check_processed_bits, sampling_kernels, "banned for ever", "if tl.load(positions_ptr + row) < tl.load(banned_until_ptr + slot):", "if True:"),
    (check_processed_bits, sampling_kernels, "repetition of negative logits", "x * repetition)", "tl.div_rn(x, repetition))"),
    (check_processed_bits, sampling_kernels, "presence by count", "tl.where(count > 0, presence, 0.0)", "count * presence"),
    (check_processed_bits, sampling_kernels, "frequency once", "count.to(tl.float32) * frequency", "frequency"),
    (check_first_step, sampling_kernels, "not counted", "tl.load(counts_ptr + place) + 1", "tl.load(counts_ptr + place)"),
    (check_first_step, sampling_kernels, "not seen", "tl.store(seen_ptr + place, 1)", "pass"),
    (check_tied_draws, sampling_kernels, "ties to the highest id", "tl.min(tl.where(score == best, token, VOCAB))", "tl.max(tl.where(score == best, token, 0))"),
    (check_tied_draws, sampling_kernels, "ties to the last piece", "tl.min(tl.where(score == best, ids, VOCAB))", "tl.max(tl.where(score == best, ids, 0))"),
    (check_tied_draws, sampling_kernels, "edge left out", "(key == edge_key) & (token <= tl.load(edge_id_ptr + row))", "False"),
    (check_tied_edges, sampling_kernels, "all ties at the edge", "(place == needed)", "(place == VOCAB)"),
    (check_tied_edges, sampling_kernels, "one tie too many", "(place == needed)", "(place == needed + 1)"),
    (check_tied_edges, sampling_kernels, "top-p of all, not of top-k", "weight = tl.where(kept, tl.exp2", "weight = tl.where(True, tl.exp2"),
    (check_tied_edges, sampling_kernels, "last digit left out", "tl.range(0, 16)", "tl.range(0, 15)"),
    (check_tied_edges, sampling_kernels, "order of negative floats", "tl.where(bits < 0, 0xFFFFFFFF, 0x80000000)", "tl.where(bits < 0, 0x80000000, 0x80000000)"),
    (check_tied_edges, sampling_kernels, "negative zero", "tl.where(x == 0, 0.0, x).to", "x.to"),
    (check_tied_edges, sampling_kernels, "min-p of the temperature", "lowest = best + log_min_p", "lowest = best * log_min_p"),
    (check_tied_edges, sampling_kernels, "variance for standard deviation", "tl.sqrt_rn(tl.div_rn(squares", "(tl.div_rn(squares"),
    (check_tied_edges, sampling_kernels, "what top-n-sigma took comes back", "is_enough = found < edge_key", "is_enough = found < 0"),
    (check_tied_edges, sampling_kernels, "the farthest typical token left out", "weights < typical_p * total", "weights < 0.5 * typical_p * total"),
    (check_logprobs, sampling_kernels, "rank without ties", "((x >= chosen)", "((x > chosen)"),
    (check_logprobs, sampling_kernels, "only the first piece's sum", "total += tl.exp2", "total = tl.exp2"),
]  # fmt: skip


@pytest.mark.gates
@pytest.mark.parametrize(
    ("check", "module", "old", "new"), [(*m[:2], *m[3:]) for m in MUTATIONS], ids=[m[2] for m in MUTATIONS]
)
def test_a_mutated_kernel_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Callable[[], None], module: ModuleType, old: str, new: str
) -> None:
    mutant = mutated(module, tmp_path, old, new)
    for name, value in vars(mutant).items():
        if isinstance(value, type(sampling_kernels.draw_piece)):
            for place in (noise, sampling_kernels, sampling):
                if hasattr(place, name):
                    monkeypatch.setattr(place, name, value)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("check", [check_noise_and_gumbel, check_tied_draws, check_tied_edges])
def test_what_mutants_fail_passes_unmutated(check: Callable[[], None]) -> None:
    check()
