# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The interpreter still is the one that the bfloat16 shim was written for, and the shim is right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

BF16 = torch.bfloat16


@triton.jit
def _arithmetic(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, x + y)
    tl.store(out_ptr + N + i, x * y)
    tl.store(out_ptr + 2 * N + i, tl.where(x < y, x, y))
    tl.store(out_ptr + 3 * N + i, x.to(tl.float32) * 1.001)


@triton.jit
def _product(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    place = i[:, None] * N + i[None, :]
    tl.store(out_ptr + place, tl.dot(tl.load(x_ptr + place), tl.load(y_ptr + place)))


def test_triton_is_the_version_that_the_shim_is_for() -> None:
    assert triton.__version__.startswith("3.9."), "check bf16_shim.py against the new interpreter"


def test_arithmetic_is_that_of_torch() -> None:
    x, y = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).to(BF16)
    out = torch.empty(4, 64, dtype=BF16)
    _arithmetic[(1,)](x, y, out, N=64)
    expected = [x + y, x * y, torch.minimum(x, y), (x.float() * np.float32(1.001)).to(BF16)]
    torch.testing.assert_close(out, torch.stack(expected), rtol=0, atol=0)


def test_a_product_of_matrices_is_that_of_torch() -> None:
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(2)).to(BF16)
    out = torch.empty(16, 16)
    _product[(1,)](x, x, out, N=16)
    torch.testing.assert_close(out, x.float() @ x.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [16, 64])
def test_a_product_of_matrices_has_the_same_bits_wherever_a_row_is(size: int) -> None:
    x = torch.randn(size, size, generator=torch.Generator().manual_seed(3))
    outputs = torch.empty(size, size, size)
    for turn in range(size):
        _product[(1,)](x.roll(turn, 0), x, outputs[turn], N=size)
    assert all(torch.equal(output.roll(-turn, 0), outputs[0]) for turn, output in enumerate(outputs))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 0.0, 3.4e38])
def test_rounding_keeps_what_is_special(value: float) -> None:
    x = torch.full((64,), value)
    out = torch.empty(4, 64, dtype=BF16)
    _arithmetic[(1,)](x, torch.zeros(64), out, N=64)
    torch.testing.assert_close(out[0], x.to(BF16), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _to_fp8(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.float8e4nv))


def test_rounding_to_fp8_is_that_of_torch() -> None:
    x = torch.cat([torch.linspace(-448, 448, 1000), torch.linspace(-0.1, 0.1, 1048)])
    out = torch.empty(2048, dtype=torch.float8_e4m3fn)
    _to_fp8[(1,)](x, out, N=2048)
    assert torch.equal(out.view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))
