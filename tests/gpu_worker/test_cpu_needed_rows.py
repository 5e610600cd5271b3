"""The last layer computes only the rows that logits are wanted of, and what comes of a step is the same bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from octavo.gpu_worker.devices.cpu.device import CpuDevice
from octavo.gpu_worker.quantization import Quantization

from .test_cpu_device import (
    MAX_BLOCKS,
    MAX_SEQUENCES,
    MAX_TOKENS,
    NUM_BLOCKS,
    VARIANTS,
    Sequence,
    Shape,
    TinyModel,
    make_device,
    make_sequence,
    make_step,
    run,
)
from .test_cpu_experts import ExpertsModel, Mixture


def make_headless_model() -> TinyModel:
    model = TinyModel(Shape())
    model.head = None  # type: ignore[assignment]
    return model


MODELS = {
    "dense": lambda: TinyModel(Shape(hidden=112, heads=replace(Shape().heads, num_heads=6), bias=True)),
    "window": lambda: TinyModel(Shape(window=37)),
    "one layer": lambda: TinyModel(Shape(layers=1)),
    "experts": lambda: ExpertsModel(Mixture(num_shared=1), layers=2),
    "hidden states": make_headless_model,
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# Of sequences with so many tokens: the rows of them whose logits are wanted, in this order, and how many rows the
# last layer has to compute: those from the first wanted one of each sequence on.
STEPS: dict[str, tuple[list[tuple[int, list[int]]], int]] = {
    "a prompt": ([(70, [69])], 1),
    "a piece of a prompt": ([(70, [])], 0),
    "prompts, pieces and decodes": ([(1, [0]), (40, [39]), (33, []), (1, [0]), (5, []), (90, [89]), (7, [6])], 5),
    "rows within prompts": ([(40, [12, 39]), (20, [19]), (50, [3])], 28 + 1 + 47),
    "in no order, and one twice": ([(30, [29, 7, 20, 7]), (40, [39])], 23 + 1),
    "all of one, none of another": ([(20, list(range(20))), (16, [])], 20),
    "a sequence without tokens": ([(10, [9]), (0, []), (12, [11])], 2),
}


def start(shape: list[tuple[int, list[int]]]) -> list[tuple[Sequence, int]]:
    """Return new sequences, to compute so many tokens of each."""
    return [
        (make_sequence(seed, 130, [1 + 9 * seed + i for i in range(9)]), count) for seed, (count, _) in enumerate(shape)
    ]


def wanted_rows(shape: list[tuple[int, list[int]]]) -> list[int]:
    starts = np.cumsum([0] + [count for count, _ in shape])
    return [int(begin) + row for begin, (_, rows) in zip(starts, shape, strict=False) for row in rows]


def check_step(device: CpuDevice, shape: list[tuple[int, list[int]]], before: int) -> None:
    """Compute a step with all logits, and with those wanted; then one token of each sequence after both."""
    outcomes = []
    for rows in (range(sum(count for count, _ in shape)), wanted_rows(shape)):
        parts = start(shape)
        if before:
            run(device, [(sequence, before) for sequence, _ in parts])
        step = replace(make_step(parts), logits_rows=np.array(rows, np.int32))
        logits = torch.from_numpy(device.forward(step).copy())
        for sequence, count in parts:
            sequence.computed += count
        after = torch.cat(run(device, [(sequence, 1) for sequence, _ in parts]))
        outcomes.append((logits, after))

    (everything, after_everything), (wanted, after_wanted) = outcomes
    assert torch.equal(wanted, everything[wanted_rows(shape)])
    assert torch.equal(after_wanted, after_everything)


@pytest.mark.parametrize("before", [0, 21])
@pytest.mark.parametrize("name", STEPS)
def test_wanted_rows_have_the_bits_that_they_have_among_all(variant: str, name: str, before: int) -> None:
    check_step(make_device(MODELS["dense"](), variant), STEPS[name][0], before)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("name", MODELS)
def test_so_it_is_with_every_kind_of_model(name: str, num_threads: int) -> None:
    device = make_device(MODELS[name](), num_threads=num_threads)

    for shape, _ in STEPS.values():
        check_step(device, shape, before=5)


@pytest.mark.parametrize("scheme", [Quantization.INT8, Quantization.INT4])
def test_so_it_is_with_quantised_weights(scheme: Quantization) -> None:
    device = CpuDevice(MODELS["dense"](), MAX_TOKENS, MAX_SEQUENCES, MAX_BLOCKS, num_threads=2, quantization=scheme)
    device.allocate_kv(NUM_BLOCKS)

    for shape, _ in STEPS.values():
        check_step(device, shape, before=5)


@pytest.mark.parametrize("name", STEPS)
def test_rows_that_are_not_needed_are_not_computed(name: str) -> None:
    shape, num_needed = STEPS[name]
    device = make_device(TinyModel(Shape(layers=1)))
    rows = wanted_rows(shape)
    device.profile(True)

    device.forward(replace(make_step(start(shape)), logits_rows=np.array(rows, np.int32)))

    phases = {kind: count for kind, (_, count) in device.profile(False).items()}
    # More than 32 rows are normed in a phase of their own: before queries, gate and head, for as many as each reads.
    num_tokens = sum(count for count, _ in shape)
    assert phases.get("prepare", 0) == sum(count > 32 for count in (num_tokens, num_needed, len(rows)))
    assert ("norm_gated_linear" in phases) == (num_needed > 0)
