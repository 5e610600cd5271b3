"""The kernels that work row by row, add + RMSNorm and gated activations, against plain torch."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from mutate import guarded, mutated

from octavo.kernels import gated as gated_kernel
from octavo.kernels import reference
from octavo.kernels import rms_norm as norm_kernel
from octavo.kernels.configs import GATED
from octavo.kernels.gated import ACTIVATIONS

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F32: 1e-5, F16: 2e-3, BF16: 1.6e-2}
DTYPES = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["fp32", "fp16", "bf16"])


def check_norm(tokens: int, hidden: int, dtype: torch.dtype, *, update: bool, module: ModuleType = norm_kernel) -> None:
    random = torch.Generator().manual_seed(4)
    residual = torch.randn(tokens, hidden, generator=random) * 5
    added = torch.randn(tokens, hidden, generator=random).to(dtype) if update else None
    weight = (torch.rand(hidden, generator=random) + 0.5).to(dtype)
    added = None if added is None else guarded(added)
    total = residual if added is None else residual + added.float()
    output = guarded(torch.full((tokens, hidden), float("nan"), dtype=dtype))
    stream = guarded(residual)
    module.add_rms_norm(stream, added, weight, output, 0.3)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(stream, total, rtol=0, atol=0)
    torch.testing.assert_close(output.float(), reference.rms_norm(total, weight, 0.3), rtol=tolerance, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (3, 17), (2, 576), (2, 1024), (1, 4095)])
def test_the_sum_and_its_norm_are_those_of_torch(tokens: int, hidden: int, dtype: torch.dtype, update: bool) -> None:
    check_norm(tokens, hidden, dtype, update=update)


def test_a_step_without_tokens_does_nothing() -> None:
    check_norm(0, 16, F32, update=True)
    check_gated(0, 16, F32, "silu")


def check_gated(tokens: int, cols: int, dtype: torch.dtype, activation: str, module: ModuleType = gated_kernel) -> None:
    random = torch.Generator().manual_seed(5)
    gate_up = torch.randn(tokens, 2 * cols, generator=random) * 4
    if tokens:
        gate_up[0, 0], gate_up[-1, cols - 1] = 200.0, -200.0  # far beyond where the exponential overflows
    gate_up = guarded(gate_up.to(dtype))
    output = guarded(torch.full((tokens, cols), float("nan"), dtype=dtype))
    module.gated(gate_up, output, activation, GATED["cuda:90"])
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(output.float(), reference.gated(gate_up, activation), rtol=tolerance, atol=tolerance)


@DTYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("tokens", "cols"), [(1, 3), (3, 1023), (2, 1024), (2, 2500)])
def test_the_activation_is_that_of_torch(tokens: int, cols: int, dtype: torch.dtype, activation: str) -> None:
    check_gated(tokens, cols, dtype, activation)


def check_both(module: ModuleType) -> None:
    for activation in ACTIVATIONS:
        check_gated(3, 1500, F32, activation, module=module)


NORM_MUTATIONS = [
    ("update left out", "if HAS_UPDATE:", "if False:"),
    ("residual not written", "tl.store(residual_ptr + row + cols, x, mask=mask)", "pass"),
    ("no epsilon", "/ HIDDEN + eps", "/ HIDDEN"),
    ("mean over the padding", "/ HIDDEN + eps", "/ COLS + eps"),
    ("no weight", "x * inverse * weight", "x * inverse"),
    ("always the first row", "tl.program_id(0).to(tl.int64) * HIDDEN", "tl.program_id(0).to(tl.int64) * 0"),
    ("row stride of the padding", "tl.program_id(0).to(tl.int64) * HIDDEN", "tl.program_id(0).to(tl.int64) * COLS"),
]
GATED_MUTATIONS = [
    ("gate and up swapped", "gate_times_up(gate, up, ACTIVATION), mask", "gate_times_up(up, gate, ACTIVATION), mask"),
    ("base of the exponential", "-1.4426950408889634", "-1.0"),
    ("gelu for silu", "if ACTIVATION == 1:", "if True:"),
    ("silu for gelu", "if ACTIVATION == 1:", "if False:"),
    ("silu for the clamped one", "if ACTIVATION == 2:", "if False:"),
    ("no limit of the gate", "tl.where(gate > 7.0, 7.0, gate)", "gate"),
    ("no lower limit", "tl.where(up < -7.0, -7.0, up)", "up"),
    ("no cubic term", "0.044715", "0.0"),
    ("up from the wrong column", "+ COLS + cols", "+ cols"),
    ("row stride of one half", "row * (2 * COLS)", "row * COLS"),
    ("always the first block", "tl.program_id(1) * BLOCK", "0"),
]


@pytest.mark.gates
@pytest.mark.parametrize(("old", "new"), [m[1:] for m in NORM_MUTATIONS], ids=[m[0] for m in NORM_MUTATIONS])
def test_a_mutated_norm_is_caught(tmp_path: Path, old: str, new: str) -> None:
    mutant = mutated(norm_kernel, tmp_path, old, new)
    with pytest.raises(AssertionError):
        check_norm(3, 17, F32, update=True, module=mutant)


@pytest.mark.gates
@pytest.mark.parametrize(("old", "new"), [m[1:] for m in GATED_MUTATIONS], ids=[m[0] for m in GATED_MUTATIONS])
def test_a_mutated_activation_is_caught(tmp_path: Path, old: str, new: str) -> None:
    mutant = mutated(gated_kernel, tmp_path, old, new)
    with pytest.raises(AssertionError):
        check_both(mutant)
