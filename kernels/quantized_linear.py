# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Linear layers whose weights have eight bits: int8 or float8_e4m3fn, one scale for each output.

Activations are either as they are (`x` of 16 or 32 bits: the weights are widened to its type on the
way to the product) or quantised too, with one scale for each token (`quantize_rows`), and multiplied in
eight bits: int8 with int8 weights, float8_e4m3fn with float8_e4m3fn ones.

The kernel computes weight @ x.T. The weights are then the first operand of the matrix instruction,
which may come from registers, where they are widened; and tokens are the columns, of which the wide
instructions of sm_90 take as few as 8, where they take no fewer than 64 rows. A decode of 16 tokens
wastes nothing.

The order in which a row of `x` is summed up depends on nothing but the shape of the weights: all of the
inputs in one program, `block_in` at a time. Products of int8 are exact in any order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from octavo.kernels.aot_spec import AotSpec
from octavo.kernels.configs import LINEAR_KINDS, TARGETS, LinearConfig, LinearKind, linear_config, norm_config

FP8_MAX = 448.0
INT8_MAX = 127.0
QUANTIZED_TYPES = (torch.int8, torch.float8_e4m3fn)
_FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit(do_not_specialize=["num_tokens"])
def _quantized_linear(
    weight,
    x,
    output_ptr,
    weight_scales_ptr,
    x_scales_ptr,
    bias_ptr,
    num_tokens,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    HAS_X_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_INTEGER: tl.constexpr,
    USE_TMA: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Compute BLOCK_OUT outputs of BLOCK_TOKENS tokens.

    Grid (ceil(T / BLOCK_TOKENS), ceil(OUT / BLOCK_OUT)): programs that share weights start together.

    weight  [OUT, IN] of eight bits;  x [T, IN]: pointers, or with USE_TMA descriptors of blocks
            [BLOCK_OUT, BLOCK_IN] and [BLOCK_TOKENS, BLOCK_IN]
    output  [T, OUT];  weight_scales [OUT] float32;  x_scales [T] float32;  bias [OUT]
    IS_INTEGER: both are int8, and summed in int32. IN is at most 2^16 then: 127 * 127 * 2^16 < 2^31.
    """
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_token, is_out = token < num_tokens, out < OUT
    acc = tl.zeros([BLOCK_OUT, BLOCK_TOKENS], tl.int32 if IS_INTEGER else tl.float32)
    for start in tl.range(0, IN, BLOCK_IN):
        if USE_TMA:  # what is out of bounds is read as zero
            w = weight.load([tl.program_id(1) * BLOCK_OUT, start])
            columns = x.load([tl.program_id(0) * BLOCK_TOKENS, start])
        else:
            inner = start + tl.arange(0, BLOCK_IN)
            is_inner = inner < IN
            w_offset = out.to(tl.int64)[:, None] * IN + inner[None, :]
            x_offset = token.to(tl.int64)[:, None] * IN + inner[None, :]
            w = tl.load(weight + w_offset, mask=is_out[:, None] & is_inner[None, :], other=0.0)
            columns = tl.load(x + x_offset, mask=is_token[:, None] & is_inner[None, :], other=0.0)
        if IS_INTEGER:
            acc = tl.dot(w, columns.T, acc, out_dtype=tl.int32)
        elif HAS_X_SCALES:
            # Left to itself sm_90 sums fp8 products with fewer bits than float32 has.
            acc = tl.dot(w, columns.T, acc, max_num_imprecise_acc=BLOCK_IN)
        else:
            acc = tl.dot(w.to(columns.dtype), columns.T, acc, input_precision="ieee")
    result = acc.to(tl.float32) * tl.load(weight_scales_ptr + out, mask=is_out, other=0.0)[:, None]
    if HAS_X_SCALES:
        result = result * tl.load(x_scales_ptr + token, mask=is_token, other=0.0)[None, :]
    if HAS_BIAS:
        result += tl.load(bias_ptr + out, mask=is_out, other=0.0).to(tl.float32)[:, None]
    place = token.to(tl.int64)[:, None] * OUT + out[None, :]
    tl.store(output_ptr + place, result.T, mask=is_token[:, None] & is_out[None, :])


@triton.jit
def _quantize_rows(
    x_ptr,
    output_ptr,
    scales_ptr,
    COLS: tl.constexpr,
    PADDED: tl.constexpr,
    LARGEST: tl.constexpr,
    IS_INT8: tl.constexpr,
):
    """Quantise one row. Grid (T,).

    x [T, COLS];  output [T, COLS] int8 or float8_e4m3fn;  scales [T] float32
    PADDED = COLS rounded up to a power of two; LARGEST = the largest number of the type.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, PADDED)
    mask = cols < COLS
    x = tl.load(x_ptr + row * COLS + cols, mask=mask, other=0.0).to(tl.float32)
    # A maximum may skip NaN; the sum does not, and so the row's results are NaN and are noticed.
    scale = tl.max(tl.abs(x)) / LARGEST + tl.sum(x * 0.0)
    scale = tl.where(scale == 0, 1.0, scale)
    tl.store(scales_ptr + row, scale)
    y = tl.minimum(tl.maximum(x / scale, -LARGEST), LARGEST)
    if IS_INT8:  # adding 1.5 * 2^23 leaves no bit below one: rounds to the nearest, ties to even
        y = (y + 12582912.0) - 12582912.0
    tl.store(output_ptr + row * COLS + cols, y.to(output_ptr.dtype.element_ty), mask=mask)


def quantize_weight(
    weight: torch.Tensor, dtype: torch.dtype, maxima: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `weight` [out_features, in_features] in eight bits, and the scale of each output [out_features] float32.

    dtype   int8 or float8_e4m3fn. A weight is about its value times its row's scale; symmetric, the
            largest of a row is 127 or 448, ties go to the even number. A row of zeros has the scale 1.
    maxima  [out_features] float32: the largest magnitude of each row, of which `weight` may have only a part
    """
    assert dtype in QUANTIZED_TYPES, f"{dtype} is none of {QUANTIZED_TYPES}"
    largest = INT8_MAX if dtype == torch.int8 else FP8_MAX
    wide = weight.float()
    scales = (wide.abs().amax(dim=1) if maxima is None else maxima) / largest
    scales[scales == 0] = 1.0
    values = (wide / scales[:, None]).clamp(-largest, largest)
    return (values.round() if dtype == torch.int8 else values).to(dtype), scales


def quantize_rows(x: torch.Tensor, output: torch.Tensor, scales: torch.Tensor) -> None:
    """Write each row of `x` in eight bits to `output`, and its scale to `scales`; as `quantize_weight` does.

    x       [T, in_features], any float type
    output  [T, in_features] int8 or float8_e4m3fn
    scales  [T] float32; NaN if a number of the row is not finite
    """
    num_tokens, cols = x.shape
    assert output.dtype in QUANTIZED_TYPES, f"{output.dtype} is none of {QUANTIZED_TYPES}"
    assert output.shape == x.shape, (output.shape, x.shape)
    assert scales.shape == (num_tokens,), scales.shape
    assert scales.dtype == torch.float32, scales.dtype
    for tensor in (x, output, scales):
        assert tensor.is_contiguous(), "every tensor must be contiguous"
        assert tensor.device == x.device, (tensor.device, x.device)
    if num_tokens:
        _quantize_rows[(num_tokens,)](x, output, scales, **_quantize_launch(cols, output.dtype))


def quantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    output: torch.Tensor,
    *,
    config: LinearConfig,
    x_scales: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    """Write x @ (weight * weight_scales).T + bias to `output`. Nothing waits for the GPU or allocates.

    x              [T, in_features] float32, float16 or bfloat16; or, with `x_scales`, the type of `weight`
    weight         [out_features, in_features] int8 or float8_e4m3fn
    weight_scales  [out_features] float32
    output         [T, out_features] float32, float16 or bfloat16
    config         `configs.linear_config`
    x_scales       [T] float32: x is what is stored times its row's scale
    bias           [out_features], any float type
    """
    num_tokens, in_features = x.shape
    out_features = len(weight)
    assert weight.dtype in QUANTIZED_TYPES, f"{weight.dtype} is none of {QUANTIZED_TYPES}"
    assert weight.shape == (out_features, in_features), (weight.shape, x.shape)
    assert x.dtype == weight.dtype if x_scales is not None else x.dtype in _FLOAT_TYPES, (x.dtype, weight.dtype)
    assert output.shape == (num_tokens, out_features), output.shape
    assert output.dtype in _FLOAT_TYPES, output.dtype
    assert weight_scales.shape == (out_features,), weight_scales.shape
    assert weight_scales.dtype == torch.float32, weight_scales.dtype
    assert x_scales is None or x_scales.shape == (num_tokens,), "one scale a token"
    assert x_scales is None or x_scales.dtype == torch.float32, "scales are float32"
    assert bias is None or bias.shape == (out_features,), "one bias an output"
    assert in_features <= 2**16, f"in_features {in_features} is above 65536: sums of int8 may overflow"
    for tensor in (x, weight, weight_scales, output, x_scales, bias):
        assert tensor is None or tensor.is_contiguous(), "every tensor must be contiguous"
        assert tensor is None or tensor.device == x.device, (tensor.device, x.device)
    if num_tokens == 0:
        return
    use_tma = config.tma and _can_be_described(weight) and _can_be_described(x)
    grid = (-(-num_tokens // config.block_tokens), -(-out_features // config.block_out))
    _quantized_linear[grid](
        _descriptor(weight, config.block_out, config) if use_tma else weight,
        _descriptor(x, config.block_tokens, config) if use_tma else x,
        output,
        weight_scales,
        weight_scales if x_scales is None else x_scales,
        output if bias is None else bias,
        num_tokens,
        **_shape(config, out_features, in_features, use_tma=use_tma),
        HAS_X_SCALES=x_scales is not None,
        HAS_BIAS=bias is not None,
        IS_INTEGER=x.dtype == torch.int8,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )


def _can_be_described(matrix: torch.Tensor) -> bool:
    """Return whether all rows begin at multiples of 16 bytes, as a descriptor wants it."""
    return matrix.stride(0) * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0


def _descriptor(matrix: torch.Tensor, rows: int, config: LinearConfig) -> Any:
    """Describe a matrix for loads of `rows` rows at once; made for every launch, and kept by a captured graph."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, [rows, config.block_in])


def _shape(config: LinearConfig, out_features: int, in_features: int, *, use_tma: bool) -> dict[str, Any]:
    return {
        "OUT": out_features,
        "IN": in_features,
        "USE_TMA": use_tma,
        "BLOCK_OUT": config.block_out,
        "BLOCK_TOKENS": config.block_tokens,
        "BLOCK_IN": config.block_in,
    }


def _quantize_launch(cols: int, dtype: torch.dtype) -> dict[str, Any]:
    config = norm_config(cols)
    is_int8 = dtype == torch.int8
    return {
        "COLS": cols,
        "PADDED": config.block,
        "LARGEST": INT8_MAX if is_int8 else FP8_MAX,
        "IS_INT8": is_int8,
        "num_warps": config.num_warps,
        "num_stages": 2,
        "enable_fp_fusion": True,
    }


def _linear_spec(
    target: str, kind: LinearKind, label: str, out_features: int, num_tokens: int, *, use_tma: bool | None = None
) -> AotSpec:
    config = linear_config(target, kind, out_features, num_tokens)
    use_tma = config.tma if use_tma is None else use_tma
    weight_type = "i8" if kind.startswith("int8") else "fp8e4nv"
    x_type = weight_type if kind in ("int8_int8", "fp8_fp8") else "bf16"
    if use_tma:
        weight = f"tensordesc<{weight_type}[{config.block_out},{config.block_in}]>"
        x = f"tensordesc<{x_type}[{config.block_tokens},{config.block_in}]>"
    else:
        weight, x = f"*{weight_type}:16", f"*{x_type}:16"
    # A100 and MI300 have no products of warp groups; every other tile has the 64 rows that they want.
    wide = {"wgmma": 1} if target in ("cuda:90", "cuda:100") else {}
    return AotSpec(
        function="_quantized_linear",
        label=f"{kind} {label}",
        signature={
            "weight": weight,
            "x": x,
            "output_ptr": "*bf16:16",
            "weight_scales_ptr": "*fp32:16",
            "x_scales_ptr": "*fp32:16",
            "bias_ptr": "*bf16:16",
            "num_tokens": "i32",
        },
        constexprs={
            **_shape(config, out_features, 4096, use_tma=use_tma),
            "HAS_X_SCALES": x_type != "bf16",
            "HAS_BIAS": True,
            "IS_INTEGER": kind == "int8_int8",
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        targets=(target,),
        require={"mma": 1, **wide, **({"tma": 2} if use_tma else {"ld128": 2})},
        min_blocks=1 if config.block_out * config.block_tokens >= 128 * 128 else 2,
    )


def _quantize_spec(target: str, kind: str) -> AotSpec:
    launch = _quantize_launch(4096, torch.int8 if kind == "i8" else torch.float8_e4m3fn)
    constexprs = {name: launch[name] for name in ("COLS", "PADDED", "LARGEST", "IS_INT8")}
    return AotSpec(
        function="_quantize_rows",
        label=f"4096 {kind}",
        signature={"x_ptr": "*bf16:16", "output_ptr": f"*{kind}:16", "scales_ptr": "*fp32:16"},
        constexprs=constexprs,
        num_warps=launch["num_warps"],
        targets=(target,),
        require={"ld128": 1},
    )


def _specs() -> list[AotSpec]:
    specs = []
    for target in TARGETS:
        kinds = LINEAR_KINDS[target]
        for kind in kinds:
            sizes: tuple[tuple[str, int, int], ...]
            if kind == "int8_int8":
                sizes = (("few tokens", 4096, 16), ("some tokens", 4096, 64), ("many tokens", 4096, 4096))
            else:
                sizes = (("narrow", 4096, 64), ("wide", 28672, 64))
            specs += [_linear_spec(target, kind, label, out, tokens) for label, out, tokens in sizes]
            if linear_config(target, kind, 4096, 64).tma:  # where a row is no multiple of 16 bytes
                specs.append(_linear_spec(target, kind, "pointers", 4096, 64, use_tma=False))
        if "int8_int8" in kinds:
            specs += [_quantize_spec(target, "i8")]
        if "fp8_fp8" in kinds:
            specs += [_quantize_spec(target, "fp8e4nv")]
    return specs


AOT_SPECS = _specs()
