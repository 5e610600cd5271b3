"""Makes Triton 3.9's interpreter compute with bfloat16, which it holds as 16-bit integers.

Left alone it adds and multiplies the bit patterns, and cuts float32 off instead of rounding it. So
operands are widened to float32 before an operation and results are rounded back after. Casts to
float8_e4m3fn, whose rounding loses a carry, go through torch; what is out of range becomes NaN. For
tests only; `test_bf16_shim.py` fails where the interpreter is another one.

Products of matrices are numpy's einsum, which calls no BLAS: on some processors the order in which OpenBLAS sums a
row depends on the row's place in the tile, and tests compare bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_Handle = interpreter.TensorHandle
_FP8_MAX = 448.0
_Builder = type(interpreter.interpreter_builder)


def widen(handle: Any) -> Any:
    """Return a bfloat16 handle as float32, any other as it is."""
    if not isinstance(handle, _Handle) or handle.dtype.scalar != tl.bfloat16:
        return handle
    return _Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def narrow(handle: Any) -> Any:
    """Return a float32 handle rounded to bfloat16, to the nearest and ties to even."""
    bits = np.ascontiguousarray(handle.data).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return _Handle(np.where(nan, 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)


def _to_fp8(handle: Any) -> Any:
    """Return a float32 handle rounded to float8_e4m3fn."""
    data = torch.from_numpy(np.array(handle.data, dtype=np.float32))
    data = data.where(data.abs() <= _FP8_MAX, torch.nan)
    return _Handle(data.to(torch.float8_e4m3fn).view(torch.uint8).numpy(), tl.float8e4nv)


def _is_bf16(value: Any) -> bool:
    return isinstance(value, _Handle) and value.dtype.scalar == tl.bfloat16


def _operation(original: Callable[..., Any], num_operands: int) -> Callable[..., Any]:
    """Wrap a builder's operation over `num_operands` handles."""

    def wrapped(self: Any, *arguments: Any) -> Any:
        operands = arguments[:num_operands]
        if not any(_is_bf16(operand) for operand in operands):
            return original(self, *arguments)
        result = original(self, *map(widen, operands), *arguments[num_operands:])
        if result.data.dtype == np.float32:
            return narrow(result)
        return _Handle(result.data, tl.int1 if result.data.dtype == np.bool_ else result.dtype)

    return wrapped


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    def operand(handle: Any) -> Any:
        if handle.dtype.primitive_bitwidth == 8 and handle.dtype.is_floating():
            return interpreter._convert_float(handle.data, handle.dtype, tl.float16, None).view(np.float16)
        return widen(handle).data

    product = np.einsum("...mk,...kn->...mn", operand(a), operand(b), dtype=d.data.dtype, optimize=False)
    return _Handle(product + d.data, d.dtype.scalar)


def _cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, source: Any, to: Any, *rest: Any) -> Any:
        kinds = (source.dtype.scalar, to.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            return narrow(source)
        if kinds == (tl.float32, tl.float8e4nv):
            return _to_fp8(source)
        if tl.bfloat16 not in kinds or kinds[0] == kinds[1]:
            return original(self, source, to, *rest)
        if kinds[0] == tl.bfloat16:
            wide = widen(source)
            return wide if kinds[1] == tl.float32 else original(self, wide, to, *rest)
        return narrow(original(self, source, tl.float32, *rest))

    return wrapped


def install() -> None:
    """Replace the operations; once a process."""
    if getattr(_Builder, "octavo_bf16", False):
        return
    for name, num_operands in (("unary_op", 1), ("binary_op", 2), ("ternary_op", 3)):
        setattr(_Builder, name, _operation(getattr(_Builder, name), num_operands))
    _Builder.create_dot = _dot
    _Builder.cast_impl = _cast(_Builder.cast_impl)
    _Builder.create_fp_to_fp = _cast(_Builder.create_fp_to_fp)
    _Builder.octavo_bf16 = True
