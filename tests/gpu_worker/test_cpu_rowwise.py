"""Where rows are many, what lies between two attentions is done for a few of them at once: with the same bits."""

from __future__ import annotations

import pytest
import torch

from octavo.gpu_worker.devices.cpu.device import CpuDevice
from octavo.gpu_worker.quantization import Quantization

from .test_cpu_device import (
    SHAPES,
    VARIANTS,
    Sequence,
    TinyModel,
    make_sequence,
    run,
)
from .test_cpu_experts import ExpertsModel, Mixture
from .test_cpu_quantization import make_device

NAMES = (
    "plain",
    "wide, bias",
    "odd sizes",
    "group of 3, head_dim 64",
    "head_dim 256, gelu",
    "head_dim 128, qk norm",
    "window across tiles",
)
MODELS = {name: lambda name=name: TinyModel(SHAPES[name]) for name in NAMES} | {
    "experts": lambda: ExpertsModel(Mixture(num_shared=1), layers=2)
}
CASES = [(name, Quantization.NONE) for name in MODELS]
CASES += [(name, scheme) for name in ("wide, bias", "experts") for scheme in (Quantization.INT8, Quantization.INT4)]
# New tokens of the sequences in steps one after the other. With 256 rows for each thread rows are many.
MANY_ROWS = [(300, 0, 1, 211), (17, 492, 1, 2)]
FEW_ROWS = [(100, 0, 1, 111), (100, 0, 0, 100), (100, 0, 0, 0), (17, 200, 1, 2), (0, 200, 0, 0), (0, 92, 0, 0)]


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def start() -> list[Sequence]:
    """Return sequences as long as all steps together make them, in blocks of their own."""
    lengths = [sum(step[s] for step in MANY_ROWS) for s in range(4)]
    return [make_sequence(s, length, list(range(1 + 40 * s, 41 + 40 * s))) for s, length in enumerate(lengths)]


def run_steps(device: CpuDevice, steps: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """Return the logits of all tokens of each sequence."""
    sequences = start()
    outputs: list[list[torch.Tensor]] = [[] for _ in sequences]
    for step in steps:
        for output, logits in zip(outputs, run(device, list(zip(sequences, step, strict=True))), strict=True):
            output.append(logits)
    return [torch.cat(output) for output in outputs]


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_bits_are_those_of_few_rows(name: str, scheme: Quantization, variant: str, num_threads: int) -> None:
    model = MODELS[name]()

    many = run_steps(make_device(model, scheme, variant, num_threads), MANY_ROWS)

    few = run_steps(make_device(model, scheme, variant, num_threads), FEW_ROWS)
    for logits, expected in zip(many, few, strict=True):
        assert torch.equal(logits, expected)


@pytest.mark.parametrize(("num_threads", "num_rows"), [(1, 255), (1, 256), (2, 511), (2, 512)])
def test_it_takes_256_rows_for_each_thread(variant: str, num_threads: int, num_rows: int) -> None:
    device = make_device(TinyModel(SHAPES["plain"]), Quantization.NONE, variant, num_threads)
    device.profile(True)

    run(device, [(make_sequence(1, num_rows, list(range(1, 40))), num_rows)])

    phases = {name: count for name, (_, count) in device.profile(False).items()}
    if variant == "amx" or num_rows % 256 != 0:
        assert "rowwise" not in phases
    else:  # before the first attention, between the two layers', and behind the last
        assert phases == {"rowwise": 3, "paged_attention": 2, "prepare": 1, "logits": 1}


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_step_of_many_rows_shows_progress_in_every_layer_many_times(num_threads: int) -> None:
    device = make_device(TinyModel(SHAPES["plain"]), Quantization.NONE, "", num_threads)
    before = device.progress()

    run(device, [(make_sequence(0, 500, list(range(1, 41))), 500)])

    # At least each operation of each layer over at most 96 rows.
    assert device.progress() - before > SHAPES["plain"].layers * 500 // 96 * 4
