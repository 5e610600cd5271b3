"""Mixtures of experts on the native CPU device: the values of plain torch, and a row's bits its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from octavo.gpu_worker.devices.cpu.device import CpuDevice
from octavo.gpu_worker.loading.loading import load_model
from octavo.gpu_worker.ops import Activation, Experts, Ops, Value
from octavo.kernels.routing import PLAIN_ROUTING, Routing

from .paged import MAX_BLOCKS, Paged
from .test_cpu_device import (
    VARIANTS,
    Sequence,
    Shape,
    TinyModel,
    WholeSequenceOps,
    make_device,
    make_sequence,
    run,
    run_in_chunks,
    shuffled_blocks,
)
from .test_models import random_tokens
from .tiny import EXPERTS, make_checkpoint


@dataclass(frozen=True)
class Mixture:
    hidden: int = 64
    inner: int = 48
    num_routed: int = 8
    num_chosen: int = 2
    num_shared: int = 0
    is_normalized: bool = True
    activation: Activation = "silu"
    routing: Routing = PLAIN_ROUTING
    has_bias: bool = False
    has_biases: bool = False  # of the layers, the router's too


MIXTURES = {
    "two of eight": Mixture(),
    "odd sizes": Mixture(hidden=77, inner=37, num_routed=13, num_chosen=3),
    "not normalized, shared experts": Mixture(num_routed=6, num_shared=2, is_normalized=False),
    "many small ones": Mixture(inner=16, num_routed=70, num_chosen=8, num_shared=1, activation="gelu_tanh"),
    "all of them": Mixture(num_routed=3, num_chosen=3),
    "one of two": Mixture(num_routed=2, num_chosen=1, is_normalized=False),
    "more columns than one item takes": Mixture(hidden=352, inner=400, num_routed=4),
    "sigmoids, not normalized, a scale": Mixture(is_normalized=False, routing=Routing("sigmoid", scale=0.5)),
    "sigmoids, a bias, the best groups, a shared one": Mixture(
        num_routed=12,
        num_chosen=3,
        num_shared=2,
        routing=Routing("sigmoid", 4, 2, scale=1.5, has_shared_gate=False),
        has_bias=True,
    ),
    "biases, a clamped gate": Mixture(hidden=77, inner=37, activation="swigluoai", has_biases=True),
    "softmax, a bias": Mixture(num_routed=7, has_bias=True),
    "softmax, groups by their best expert": Mixture(is_normalized=False, routing=Routing("softmax", 2, 1, 1)),
}


class ExpertsModel(TinyModel):
    """A model whose feed-forward layers are mixtures."""

    def __init__(self, mixture: Mixture, layers: int = 1) -> None:
        super().__init__(Shape(hidden=mixture.hidden, layers=layers))
        count = mixture.num_routed + mixture.num_shared
        self.activation: Activation = mixture.activation
        self.mixtures = [
            Experts(
                router=4
                * self._random(
                    mixture.num_routed + (mixture.num_shared > 0 and mixture.routing.has_shared_gate), mixture.hidden
                ),
                gate=tuple(2 * self._random(mixture.inner, mixture.hidden) for _ in range(count)),
                up=tuple(2 * self._random(mixture.inner, mixture.hidden) for _ in range(count)),
                down=tuple(2 * self._random(mixture.hidden, mixture.inner) for _ in range(count)),
                num_chosen=mixture.num_chosen,
                num_shared=mixture.num_shared,
                is_normalized=mixture.is_normalized,
                routing=mixture.routing,
                bias=self._random(mixture.num_routed).float() if mixture.has_bias else None,
                router_bias=self._random(mixture.num_routed, 1)[:, 0] if mixture.has_biases else None,
                biases=(
                    0.5 * self._random(count, 2 * mixture.inner).float(),
                    self._random(count, mixture.hidden).float(),
                )
                if mixture.has_biases
                else None,
            )
            for _ in range(layers)
        ]

    def forward(self, ops: Ops) -> Value:
        x = ops.embed(self.embedding)
        for index, (layer, experts) in enumerate(zip(self.layers, self.mixtures, strict=True)):
            qkv = ops.linear(ops.norm(x, layer["norm"]), layer["qkv"])
            queries = ops.rotary_write_kv(qkv, index, self.heads, self.rotary, None, None)
            attended = ops.paged_attention(queries, index, self.heads, 0.25, 0)
            x = ops.add(x, ops.linear(attended, layer["output"]))
            x = ops.add_experts(x, ops.norm(x, layer["norm"]), experts, self.activation)
        return ops.logits(ops.norm(x, self.norm), self.head)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", MIXTURES)
def test_logits_are_those_of_plain_torch(name: str, variant: str) -> None:
    model = ExpertsModel(MIXTURES[name])
    device = make_device(model, variant)
    sequence = make_sequence(1, 150, shuffled_blocks(1))

    logits = torch.cat([*run(device, [(sequence, 141)]), run_in_chunks(device, sequence, 1)])

    ops = WholeSequenceOps(sequence.token_ids)
    expected = model.forward(ops)
    # Where two experts are as good, rounding decides, and a different expert is a different result.
    # Scores lie closer together than logits, and what they choose may be weighed by small ones, which round by more.
    by_score = MIXTURES[name].has_bias or MIXTURES[name].routing.num_groups > 1
    is_clear = ops.choice_margins > (0.03 if by_score else 0.1)
    assert is_clear.float().mean() > (0.3 if by_score else 0.5)
    assert expected.std() > 0.3
    atol = 0.1 if by_score or MIXTURES[name].has_biases else 0.06  # whose terms are larger
    torch.testing.assert_close(logits[is_clear], expected[is_clear], atol=atol, rtol=0.03)
    assert (logits - expected)[is_clear].square().mean().sqrt() < 0.01 * expected.std()


@pytest.mark.parametrize(("num_rows", "phases"), [(16, 6), (17, 7)])
def test_experts_for_many_rows_are_chosen_by_all_threads(num_rows: int, phases: int) -> None:
    device = make_device(ExpertsModel(Mixture()))
    device.profile(True)

    run(device, [(make_sequence(1, num_rows, [1, 2]), num_rows)])

    # The router; choosing and sorting, in one or two; rows that are copied; the gated layers, and the others.
    profile = device.profile(False)
    assert profile["norm_experts_residual"][1] + profile["prepare"][1] == phases


def test_of_equal_experts_the_first_are_chosen(variant: str) -> None:
    model = ExpertsModel(Mixture(num_routed=20))
    model.mixtures[0].router[5:] = model.mixtures[0].router[5]
    model.mixtures[0].router[:5] = 0
    for expert in range(7, 20):  # never chosen: 5 and 6 are as good, or 0 and 1 are better
        model.mixtures[0].down[expert].fill_(torch.nan)

    logits = run_in_chunks(make_device(model, variant), make_sequence(1, 100, shuffled_blocks(1)), 100)

    assert logits.isfinite().all()


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_bits_do_not_depend_on_how_a_prompt_is_chunked(variant: str, chunk: int) -> None:
    device = make_device(ExpertsModel(MIXTURES["not normalized, shared experts"], layers=2), variant)
    whole = run_in_chunks(device, make_sequence(1, 200, shuffled_blocks(1)), 200)

    assert torch.equal(run_in_chunks(device, make_sequence(1, 200, shuffled_blocks(2)), chunk), whole)


def test_bits_do_not_depend_on_the_rest_of_the_batch(variant: str) -> None:
    device = make_device(ExpertsModel(MIXTURES["odd sizes"], layers=2), variant)
    sequences = [make_sequence(seed, 60, [1 + 4 * seed + i for i in range(4)]) for seed in range(32)]
    alone = [run_in_chunks(device, sequence, 60) for sequence in sequences]
    for sequence in sequences:
        sequence.computed = 0
    random = np.random.default_rng(0)

    together: list[list[torch.Tensor]] = [[] for _ in sequences]
    while unfinished := [i for i in range(32) if sequences[i].computed < 60]:
        chosen = random.permutation(unfinished)[: random.integers(1, 33)]
        parts = [(i, min(60 - sequences[i].computed, int(random.choice([1, 1, 2, 5, 15])))) for i in chosen]
        for (i, _), logits in zip(parts, run(device, [(sequences[i], n) for i, n in parts]), strict=True):
            together[i].append(logits)

    assert all(torch.equal(torch.cat(pieces), one) for one, pieces in zip(alone, together, strict=True))


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    model = ExpertsModel(MIXTURES["more columns than one item takes"], layers=2)
    outputs = [
        run_in_chunks(make_device(model, num_threads=count), make_sequence(1, 130, shuffled_blocks(1)), 43)
        for count in (1, 2, 5)
    ]

    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_a_broken_sequence_spoils_no_other_in_its_step() -> None:
    model = ExpertsModel(MIXTURES["not normalized, shared experts"])
    model.embedding[5] = torch.nan
    device = make_device(model)
    clean = run_in_chunks(device, make_sequence(1, 20, [1, 2]), 20)
    sequence, broken = make_sequence(1, 20, [3, 4]), Sequence([5] * 16, [5])
    assert 5 not in sequence.token_ids

    broken_logits, logits = run(device, [(broken, 16), (sequence, 20)])

    assert broken_logits.isnan().all()
    assert torch.equal(logits, clean)


@pytest.mark.parametrize("name", EXPERTS)
def test_a_checkpoint_gives_better_logits_than_transformers_in_bfloat16(name: str, tmp_path: Path) -> None:
    true_model = make_checkpoint(tmp_path, name)
    paged = Paged(CpuDevice(load_model(tmp_path, "auto", 0, lambda *_: None).model, 512, 8, MAX_BLOCKS, num_threads=1))
    token_ids = random_tokens(150)
    with torch.no_grad():
        true = true_model(torch.tensor([token_ids])).logits[0]
        rounded = true_model.to(torch.bfloat16)(torch.tensor([token_ids])).logits[0]

    logits = paged.compute(paged.new(token_ids), chunk=150)

    # The median: in a few rows rounding decides between two experts, and the logits are far apart.
    assert median_error(logits, true) < median_error(rounded, true)


def median_error(logits: torch.Tensor, true: torch.Tensor) -> float:
    return float((logits - true).abs().amax(dim=-1).median())
