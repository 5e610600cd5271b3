# ruff: noqa: E501 - texts of mutations
"""Linear layers of eight bits, and the quantisation of rows, against plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mutate import guarded, mutated

from octavo.kernels import quantized_linear as kernel
from octavo.kernels import reference
from octavo.kernels.configs import LinearConfig

F32, F16, BF16, FP8, INT8 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8
TOLERANCE = {F32: 2e-5, F16: 2e-3, BF16: 1.6e-2}
TILE = LinearConfig(32, 16, 32, num_warps=4, num_stages=2)


@dataclass(frozen=True)
class Case:
    """A layer and its input. With `quantized_x` activations have the type of the weights."""

    num_tokens: int = 19
    in_features: int = 80
    out_features: int = 45
    dtype: torch.dtype = F32
    weight_dtype: torch.dtype = INT8
    quantized_x: bool = False
    bias: bool = True
    config: LinearConfig = TILE


def run(case: Case, x: torch.Tensor, layer: tuple[torch.Tensor, ...], module: ModuleType = kernel) -> torch.Tensor:
    """Return the layer's output for the rows of `x`, through the kernels."""
    values, scales, bias = layer
    output = guarded(torch.full((len(x), case.out_features), float("nan"), dtype=case.dtype))
    x_scales = None
    if case.quantized_x:
        x_values, x_scales = torch.empty(x.shape, dtype=case.weight_dtype), torch.empty(len(x))
        module.quantize_rows(x, x_values, x_scales)
        x = x_values
    module.quantized_linear(
        x, values, scales, output, config=case.config, x_scales=x_scales, bias=bias if case.bias else None
    )
    return output


def make(case: Case) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    random = torch.Generator().manual_seed(6)
    weight = torch.randn(case.out_features, case.in_features, generator=random) * 3
    x = torch.randn(case.num_tokens, case.in_features, generator=random)
    x *= torch.linspace(0.1, 5, case.num_tokens)[:, None]  # rows want scales of their own
    values, scales = kernel.quantize_weight(weight, case.weight_dtype)
    bias = torch.randn(case.out_features, generator=random) * 20
    return guarded(x.to(case.dtype)), (guarded(values), guarded(scales), guarded(bias.to(case.dtype)))


def check(case: Case, module: ModuleType = kernel) -> None:
    x, (values, scales, bias) = make(case)
    actual = run(case, x, (values, scales, bias), module)
    x_values, x_scales = reference.quantize_rows(x, case.weight_dtype) if case.quantized_x else (x, None)
    expected = reference.quantized_linear(x_values, values, scales, x_scales=x_scales, bias=bias if case.bias else None)
    tolerance = TOLERANCE[case.dtype]
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance * largest)


CASES = {
    "odd": Case(),
    "one token": Case(num_tokens=1),
    "no bias": Case(bias=False),
    "exact tiles": Case(num_tokens=16, in_features=64, out_features=64),
    "fewer inputs than a tile": Case(in_features=16, out_features=3),
    "inputs that no descriptor can read": Case(in_features=77),
    "no tokens": Case(num_tokens=0),
}
KINDS = {
    "int8": Case(),
    "fp8": Case(weight_dtype=FP8),
    "int8_int8": Case(quantized_x=True),
    "fp8_fp8": Case(weight_dtype=FP8, quantized_x=True),
}


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_the_layer_is_that_of_torch(name: str, kind: str, dtype: torch.dtype, tma: bool) -> None:
    layer = KINDS[kind]
    config = replace(TILE, tma=tma)
    check(
        replace(CASES[name], weight_dtype=layer.weight_dtype, quantized_x=layer.quantized_x, dtype=dtype, config=config)
    )


def test_descriptors_are_used_where_rows_allow_it_and_pointers_elsewhere() -> None:
    for in_features, described in ((80, True), (77, False)):
        x, (values, *_) = make(Case(in_features=in_features))
        assert kernel._can_be_described(values) is described
        assert kernel._can_be_described(x) is described


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_alone_and_in_any_company(kind: str) -> None:
    case = replace(KINDS[kind], num_tokens=40)
    x, layer = make(case)
    expected = run(case, x, layer)
    for start, end in ((0, 1), (7, 24), (39, 40)):
        assert torch.equal(run(case, x[start:end].contiguous(), layer), expected[start:end]), (start, end)


def check_rows(dtype: torch.dtype = INT8, module: ModuleType = kernel) -> None:
    random = torch.Generator().manual_seed(7)
    x = torch.randn(5, 77, generator=random) * torch.tensor([1e-6, 1.0, 300.0, 0.0, 1.0])[:, None]
    x[4] = torch.arange(77) - 38.0  # with 127 as the largest all others are whole numbers and halves
    x[4, 0], x[4, 1] = 127.0, 0.5
    values, scales = guarded(torch.zeros(5, 77, dtype=dtype)), guarded(torch.full((5,), float("nan")))
    module.quantize_rows(guarded(x), values, scales)
    expected_values, expected_scales = reference.quantize_rows(x, dtype)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    assert torch.equal(values.float(), expected_values.float())


@pytest.mark.parametrize("dtype", [INT8, FP8], ids=["int8", "fp8"])
def test_rows_are_quantised_as_by_torch(dtype: torch.dtype) -> None:
    check_rows(dtype)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_spoils_itself_and_no_other(bad: float) -> None:
    case = Case(quantized_x=True)
    x, layer = make(case)
    expected = run(case, x, layer)
    x[3, 5] = bad
    actual = run(case, x, layer)
    assert actual[3].isnan().all()
    others = [row for row in range(case.num_tokens) if row != 3]
    assert torch.equal(actual[others], expected[others])


@pytest.mark.parametrize("dtype", [INT8, FP8], ids=["int8", "fp8"])
def test_a_weight_is_its_value_times_its_scale_within_half_a_step(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 33, generator=torch.Generator().manual_seed(8)) * torch.logspace(-6, 6, 8)[:, None]
    weight[5] = 0
    values, scales = kernel.quantize_weight(weight, dtype)
    error = (values.float() * scales[:, None] - weight).abs()
    step = scales[:, None].expand_as(weight)
    if dtype is FP8:  # three bits behind the first one, and below 2^-6 steps of 2^-9
        step = torch.maximum(weight.abs() / 8, step * 2**-9)
    assert bool((error <= step * 0.5001).all())
    assert values[5].float().count_nonzero() == 0


MUTATIONS = [
    ("no scale of the weights", "* tl.load(weight_scales_ptr + out, mask=is_out, other=0.0)[:, None]", "* 1.0"),
    ("scale of the first output", "tl.load(weight_scales_ptr + out,", "tl.load(weight_scales_ptr + out * 0,"),
    ("scale of the first token", "tl.load(x_scales_ptr + token,", "tl.load(x_scales_ptr + token * 0,"),
    ("no scale of the tokens", "if HAS_X_SCALES:\n        result", "if False:\n        result"),
    ("no bias", "if HAS_BIAS:", "if False:"),
    ("bias of the first output", "tl.load(bias_ptr + out,", "tl.load(bias_ptr + out * 0,"),
    ("outputs and tokens swapped", "token.to(tl.int64)[:, None] * OUT + out[None, :]", "token[:, None] + out[None, :] * OUT"),
    ("always the first outputs", "tl.program_id(1) * BLOCK_OUT", "0"),
    ("always the first tokens", "tl.program_id(0) * BLOCK_TOKENS", "0"),
    ("always the first inputs", "inner = start + tl.arange(0, BLOCK_IN)", "inner = tl.arange(0, BLOCK_IN)"),
    ("always the first inputs, described", "BLOCK_OUT, start]", "BLOCK_OUT, 0]"),
    ("the last inputs left out", "tl.range(0, IN, BLOCK_IN)", "tl.range(0, IN // BLOCK_IN * BLOCK_IN, BLOCK_IN)"),
    ("inputs beyond the end", "is_inner = inner < IN", "is_inner = inner < IN + 16"),
    ("row stride of the outputs", "w_offset = out.to(tl.int64)[:, None] * IN", "w_offset = out.to(tl.int64)[:, None] * OUT"),
    ("tile of the tokens for the weights", "_descriptor(x, config.block_tokens, config)", "_descriptor(weight, config.block_tokens, config)"),
    ("one scale too small", "tl.max(tl.abs(x)) / LARGEST", "tl.max(x) / LARGEST"),
    ("cut off, not rounded", "y = (y + 12582912.0) - 12582912.0", "y = y"),
    ("scale of the padding's row", "tl.store(scales_ptr + row, scale)", "tl.store(scales_ptr, scale)"),
    ("zero scale", "tl.where(scale == 0, 1.0, scale)", "scale + 1e-9"),
]  # fmt: skip


def check_all(module: ModuleType) -> None:
    check(Case(num_tokens=33, quantized_x=True), module)
    check(Case(num_tokens=33, out_features=70, config=replace(TILE, tma=True)), module)
    check_rows(module=module)


@pytest.mark.gates
@pytest.mark.parametrize(("old", "new"), [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS])
def test_a_mutated_kernel_is_caught(tmp_path: Path, old: str, new: str) -> None:
    mutant = mutated(kernel, tmp_path, old, new)
    with pytest.raises((AssertionError, ValueError)):
        check_all(mutant)


def test_what_mutants_fail_passes_unmutated() -> None:
    check_all(kernel)
