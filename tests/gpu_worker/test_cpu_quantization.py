"""Quantised weights on the native CPU device: the values of plain torch, and a row's bits its own."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from octavo.gpu_worker.devices.cpu.device import CpuDevice
from octavo.gpu_worker.ops import Heads, Linear, Ops, Value
from octavo.gpu_worker.quantization import Quantization
from octavo.kernels.cpu import library

from .test_cpu_device import (
    MAX_BLOCKS,
    MAX_SEQUENCES,
    MAX_TOKENS,
    NUM_BLOCKS,
    Sequence,
    Shape,
    TinyModel,
    WholeSequenceOps,
    make_sequence,
    run,
    run_in_chunks,
    shuffled_blocks,
)
from .test_cpu_experts import MIXTURES, ExpertsModel

GROUP = 32
VARIANTS = library.runnable_variants()
ModelOf = TypeVar("ModelOf", bound=TinyModel)
SCHEMES = (Quantization.INT8, Quantization.INT4)
SHAPES = {
    "plain": Shape(),
    "odd sizes, bias": Shape(hidden=77, intermediate=101, vocab=131, bias=True),
    "many groups, gelu": Shape(
        hidden=352, intermediate=200, heads=Heads(6, 2, 32), rotary_dim=32, activation="gelu_tanh"
    ),
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def in_groups(x: torch.Tensor, padding: str = "constant") -> torch.Tensor:
    """Cut the last dimension, padded with zeros or another of `torch.nn.functional.pad`'s modes, into groups."""
    return torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % GROUP), padding).unflatten(-1, (-1, GROUP))


def int8_rounded(x: torch.Tensor, scale_type: torch.dtype = torch.float16) -> torch.Tensor:
    """Return x as eight bits and a scale for each group can tell it."""
    groups = in_groups(x)
    scales = (groups.abs().amax(-1, keepdim=True) / 127).to(scale_type).float()
    codes = (groups / torch.where(scales == 0, 1, scales)).round().clamp(-127, 127)
    return (codes * scales).flatten(-2)[..., : x.shape[-1]]


def int4_rounded(x: torch.Tensor) -> torch.Tensor:
    """Return x as four bits, a scale and a minimum for each group can tell it; each group has codes 0 and 15."""
    groups = in_groups(x, "replicate")
    low = groups.amin(-1, keepdim=True)
    digits, exponent = torch.frexp((groups.amax(-1, keepdim=True) - low) / 15)
    scales = torch.ldexp((digits * 64).ceil() / 64, exponent)
    low = (low / scales).round() * scales  # a multiple of few digits, so that half precision has it exactly
    codes = ((groups - low) / scales).round().clamp(0, 15)
    codes.scatter_(-1, groups.argmin(-1, keepdim=True), 0).scatter_(-1, groups.argmax(-1, keepdim=True), 15)
    return (codes * scales + low).flatten(-2)[..., : x.shape[-1]]


class QuantizedOps(WholeSequenceOps):
    """Plain torch over dequantised numbers. Routers are not quantised."""

    @staticmethod
    def _linear(x: torch.Tensor, linear: Linear) -> torch.Tensor:
        return WholeSequenceOps._linear(int8_rounded(x, torch.float32), linear)


def make_exact(model: ModelOf, scheme: Quantization) -> ModelOf:
    """Replace a model's weights by near ones that the scheme can tell exactly."""
    for layer in model.layers:
        for name, linear in layer.items():
            if isinstance(linear, Linear):
                rounded = int4_rounded if scheme is Quantization.INT4 else int8_rounded
                layer[name] = Linear(rounded(linear.weight), linear.bias)
    model.head, model.embedding = Linear(int8_rounded(model.head.weight)), int8_rounded(model.embedding)
    return model


def make_device(model: TinyModel, scheme: Quantization, variant: str = "", num_threads: int = 2) -> CpuDevice:
    limits = (MAX_TOKENS, MAX_SEQUENCES, MAX_BLOCKS)
    device = CpuDevice(model, *limits, num_threads=num_threads, variant=variant, quantization=scheme)
    device.allocate_kv(NUM_BLOCKS)
    return device


class FeedForwardModel(TinyModel):
    """A model without attention, so that nothing but rounding to bf16 is different in plain torch."""

    def forward(self, ops: Ops) -> Value:
        x = ops.embed(self.embedding)
        for layer in self.layers:
            weights: dict[str, Any] = layer
            normed = ops.norm(x, weights["norm"])
            gated = ops.gated_linear(normed, weights["gate"], weights["up"], self.shape.activation)
            x = ops.add(x, ops.linear(gated, weights["down"]))
        return ops.logits(ops.norm(x, self.norm), self.head)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", SHAPES)
def test_products_are_those_of_plain_torch_over_dequantised_numbers(
    name: str, scheme: Quantization, variant: str
) -> None:
    model = make_exact(FeedForwardModel(SHAPES[name]), scheme)
    device = make_device(model, scheme, variant)
    sequence = make_sequence(1, 100, shuffled_blocks(1))

    logits = torch.cat([*run(device, [(sequence, 91)]), run_in_chunks(device, sequence, 1)])

    expected = model.forward(QuantizedOps(sequence.token_ids))
    assert expected.std() > 0.3
    # Where a number is rounded to bf16 the other way, codes of its group are others. That is rare.
    assert (logits - expected).abs().median() < 3e-4 * expected.std()
    assert (logits - expected).square().mean().sqrt() < 0.01 * expected.std()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_of_a_whole_model_are_near_those_of_plain_torch(scheme: Quantization, variant: str) -> None:
    model = make_exact(TinyModel(SHAPES["many groups, gelu"]), scheme)
    sequence = make_sequence(1, 100, shuffled_blocks(1))

    logits = run_in_chunks(make_device(model, scheme, variant), sequence, 91)

    # Attention rounds to bf16 in another order than plain torch, and codes are coarser than bf16.
    expected = model.forward(QuantizedOps(sequence.token_ids))
    assert (logits - expected).square().mean().sqrt() < 0.04 * expected.std()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_that_no_code_tells_exactly_are_told_nearly(scheme: Quantization) -> None:
    model = FeedForwardModel(SHAPES["many groups, gelu"])
    token_ids = make_sequence(1, 100, [1]).token_ids
    expected = model.forward(WholeSequenceOps(token_ids))

    logits = run_in_chunks(make_device(model, scheme), make_sequence(1, 100, shuffled_blocks(1)), 100)

    error = (logits - expected).square().mean().sqrt() / expected.std()
    assert error < {Quantization.INT8: 0.04, Quantization.INT4: 0.25}[scheme]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
def test_bits_do_not_depend_on_how_a_prompt_is_chunked(scheme: Quantization, variant: str, chunk: int) -> None:
    device = make_device(TinyModel(SHAPES["many groups, gelu"]), scheme, variant)
    whole = run_in_chunks(device, make_sequence(1, 130, shuffled_blocks(1)), 130)

    assert torch.equal(run_in_chunks(device, make_sequence(1, 130, shuffled_blocks(2)), chunk), whole)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bits_do_not_depend_on_the_rest_of_the_batch(scheme: Quantization, variant: str) -> None:
    device = make_device(TinyModel(SHAPES["odd sizes, bias"]), scheme, variant)
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


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bits_do_not_depend_on_the_number_of_threads(scheme: Quantization) -> None:
    model = TinyModel(SHAPES["odd sizes, bias"])
    outputs = [
        run_in_chunks(make_device(model, scheme, num_threads=count), make_sequence(1, 130, shuffled_blocks(1)), 43)
        for count in (1, 2, 5)
    ]

    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts_are_quantised(scheme: Quantization, variant: str) -> None:
    model = ExpertsModel(MIXTURES["odd sizes"], layers=2)
    device = make_device(model, scheme, variant)
    sequence = make_sequence(1, 100, shuffled_blocks(1))

    logits = run_in_chunks(device, sequence, 100)

    ops = WholeSequenceOps(sequence.token_ids)
    expected = model.forward(ops)
    is_clear = ops.choice_margins > 0.3
    assert is_clear.float().mean() > 0.3
    error = (logits - expected)[is_clear].square().mean().sqrt() / expected.std()
    assert 0.01 < error < {Quantization.INT8: 0.1, Quantization.INT4: 0.6}[scheme]
    assert torch.equal(run_in_chunks(device, make_sequence(1, 100, shuffled_blocks(2)), 1), logits)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_broken_sequence_spoils_no_other_in_its_step(scheme: Quantization, variant: str) -> None:
    model = TinyModel(SHAPES["plain"])
    model.embedding[5] = torch.nan
    device = make_device(model, scheme, variant)
    clean = run_in_chunks(device, make_sequence(1, 20, [1, 2]), 20)
    sequence, broken = make_sequence(1, 20, [3, 4]), Sequence([5] * 16, [5])
    assert 5 not in sequence.token_ids

    broken_logits, logits = run(device, [(broken, 16), (sequence, 20)])

    assert broken_logits.isnan().all()
    assert torch.equal(logits, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_any_float_type_are_quantised(dtype: torch.dtype) -> None:
    model = make_exact(TinyModel(SHAPES["plain"]), Quantization.INT4)
    expected = run_in_chunks(make_device(model, Quantization.INT8), make_sequence(1, 20, [3, 1]), 20)

    for layer in model.layers:
        layer.update(
            {name: Linear(value.weight.to(dtype)) for name, value in layer.items() if isinstance(value, Linear)}
        )
    model.embedding, model.head = model.embedding.to(dtype), Linear(model.head.weight.to(dtype))
    logits = run_in_chunks(make_device(model, Quantization.INT8), make_sequence(1, 20, [3, 1]), 20)

    assert (
        torch.equal(logits, expected) if dtype == torch.float32 else (logits - expected).std() < 0.05 * expected.std()
    )
