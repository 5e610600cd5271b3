# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The noise of the draw: -log(-log(u)), with u from a counter-based generator.

It is specified to the bit: float32, rounded after every operation, in the order written here, and
equal to that of `gpu_worker/sampling/draw.py`. Kernels that call it must be compiled without fused
multiply-add (`enable_fp_fusion=False`), and division is the IEEE one (`tl.div_rn`).
"""

from __future__ import annotations

import triton
import triton.language as tl

# fdlibm's logf.
_LG1 = tl.constexpr(0xAAAAAA / 2**24)
_LG2 = tl.constexpr(0xCCCE13 / 2**25)
_LG3 = tl.constexpr(0x91E9EE / 2**25)
_LG4 = tl.constexpr(0xF89E26 / 2**26)
_LN2_HIGH = tl.constexpr(6.9313812256e-01)
_LN2_LOW = tl.constexpr(9.0580006145e-06)
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
# Below this w, 1 - w would lose the bits of w that matter.
_SMALL = tl.constexpr(0.29289323)


@triton.jit
def _log_of(f, k):
    """Return log(1 + f) + k log(2), as fdlibm's logf does. The order of operations is fixed."""
    s = tl.div_rn(f, 2.0 + f)
    z = s * s
    w = z * z
    odd = w * (_LG2 + w * _LG4)
    even = z * (_LG1 + w * _LG3)
    series = even + odd
    half_square = 0.5 * f * f
    return s * (half_square + series) + k * _LN2_LOW - half_square + f + k * _LN2_HIGH


@triton.jit
def _split(x):
    """Return k and f with x = 2^k * (1 + f), 1 + f between the square roots of a half and of two."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    return exponent.to(tl.float32), mantissa - 1.0


@triton.jit
def _gumbel(random):
    """Return -log(-log(u)) of 32 random bits."""
    w = tl.maximum(random.to(tl.float32), 0.5) * (1.0 / 4294967296.0)
    w = tl.minimum(w, 1.0 - 1.0 / 16777216.0)
    k, f = _split(1.0 - w)
    small = w < _SMALL
    exponential = -_log_of(tl.where(small, -w, f), tl.where(small, 0.0, k))
    k, f = _split(exponential)
    return -_log_of(f, k)


@triton.jit
def gumbel_noise(start, position, candidate_index, seed_low, seed_high, BLOCK: tl.constexpr):
    """Return the noise of tokens start .. start + BLOCK - 1; `start` is a multiple of four.

    Four neighbours share a counter of Philox4x32-10: token t has word t % 4 of counter t / 4.
    """
    counter = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = counter ^ counter
    words = tl.philox_impl(
        counter,
        zero + position.to(tl.uint32, bitcast=True),
        zero + candidate_index.to(tl.uint32, bitcast=True),
        zero,
        zero + seed_low.to(tl.uint32, bitcast=True),
        zero + seed_high.to(tl.uint32, bitcast=True),
        10,
    )
    return _gumbel(tl.interleave(tl.interleave(words[0], words[2]), tl.interleave(words[1], words[3])))
