# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Add a layer's result to the residual stream and normalise the sum, which is the next residual (encoders)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels.aot_spec import AotSpec
from octavo.kernels.configs import norm_config
from octavo.kernels.rms_norm import check_norm


@triton.jit
def _add_layer_norm(
    residual_ptr,
    update_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    eps,
    HIDDEN: tl.constexpr,
    COLS: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Take one row. Grid (T,).

    residual  [T, HIDDEN] float32, written in place: the norm of the sum of residual and update
    update    [T, HIDDEN];  weight, bias [HIDDEN];  output [T, HIDDEN]: the same norm in another type
    COLS = HIDDEN rounded up to a power of two.
    """
    row = tl.program_id(0).to(tl.int64) * HIDDEN
    cols = tl.arange(0, COLS)
    mask = cols < HIDDEN
    x = tl.load(residual_ptr + row + cols, mask=mask, other=0.0)
    if HAS_UPDATE:
        x += tl.load(update_ptr + row + cols, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, x - tl.sum(x) / HIDDEN, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred) / HIDDEN + eps)
    y = centred * inverse * tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(residual_ptr + row + cols, y, mask=mask)
    tl.store(output_ptr + row + cols, y, mask=mask)


def add_layer_norm(
    residual: torch.Tensor,
    update: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    eps: float,
) -> None:
    """Write the norm of residual + update, or of residual without one, to `residual` and to `output`.

    residual  [T, hidden_size] float32, written in place
    update    [T, hidden_size], any float type, or None
    weight    [hidden_size], any float type;  bias the same or None
    output    [T, hidden_size], any float type: (x - mean) / sqrt(variance + eps) * weight + bias
    """
    num_tokens, hidden_size = check_norm(residual, update, output, weight, bias)
    if num_tokens == 0:
        return
    config = norm_config(hidden_size)
    _add_layer_norm[(num_tokens,)](
        residual,
        residual if update is None else update,
        weight,
        weight if bias is None else bias,
        output,
        eps,
        HIDDEN=hidden_size,
        COLS=config.block,
        HAS_UPDATE=update is not None,
        HAS_BIAS=bias is not None,
        num_warps=config.num_warps,
        num_stages=2,
        enable_fp_fusion=True,
    )


def _spec(hidden_size: int, *, has_update: bool) -> AotSpec:
    config = norm_config(hidden_size)
    return AotSpec(
        function="_add_layer_norm",
        label=f"{hidden_size}{' update' if has_update else ''}",
        signature={
            "residual_ptr": "*fp32:16",
            **dict.fromkeys(("update_ptr", "weight_ptr", "bias_ptr", "output_ptr"), "*bf16:16"),
            "eps": "fp32",
        },
        constexprs={"HIDDEN": hidden_size, "COLS": config.block, "HAS_UPDATE": has_update, "HAS_BIAS": True},
        num_warps=config.num_warps,
        require={"ld128": 2},
    )


AOT_SPECS = [_spec(384, has_update=True), _spec(768, has_update=False), _spec(1024, has_update=True)]
