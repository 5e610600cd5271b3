# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Add a layer's result to the residual stream and normalise it, in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels.aot_spec import AotSpec
from octavo.kernels.configs import norm_config

MAX_HIDDEN_SIZE = 16384


@triton.jit
def _add_rms_norm(
    residual_ptr,
    update_ptr,
    weight_ptr,
    output_ptr,
    eps,
    HIDDEN: tl.constexpr,
    COLS: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
):
    """Take one row. Grid (T,).

    residual  [T, HIDDEN] float32; with HAS_UPDATE `update` is added to it in place
    update    [T, HIDDEN];  weight [HIDDEN];  output [T, HIDDEN]
    COLS = HIDDEN rounded up to a power of two.
    """
    row = tl.program_id(0).to(tl.int64) * HIDDEN
    cols = tl.arange(0, COLS)
    mask = cols < HIDDEN
    x = tl.load(residual_ptr + row + cols, mask=mask, other=0.0)
    if HAS_UPDATE:
        x += tl.load(update_ptr + row + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(residual_ptr + row + cols, x, mask=mask)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x) / HIDDEN + eps)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(output_ptr + row + cols, x * inverse * weight, mask=mask)


def check_norm(
    residual: torch.Tensor, update: torch.Tensor | None, output: torch.Tensor, *weights: torch.Tensor | None
) -> tuple[int, int]:
    """Check what a norm gets, as `add_rms_norm` describes it; return T and hidden_size."""
    num_tokens, hidden_size = residual.shape
    assert residual.dtype == torch.float32, residual.dtype
    assert hidden_size <= MAX_HIDDEN_SIZE, f"hidden_size {hidden_size} is above {MAX_HIDDEN_SIZE}"
    assert output.shape == residual.shape, (output.shape, residual.shape)
    assert update is None or update.shape == residual.shape, (update.shape, residual.shape)
    for weight in weights:
        assert weight is None or weight.shape == (hidden_size,), weight.shape
    for tensor in (residual, update, output, *weights):
        assert tensor is None or tensor.is_contiguous(), "every tensor must be contiguous"
        assert tensor is None or tensor.device == residual.device, (tensor.device, residual.device)
    return num_tokens, hidden_size


def add_rms_norm(
    residual: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, output: torch.Tensor, eps: float
) -> None:
    """Add `update`, if there is one, to `residual` in place; write the norm of the sum to `output`.

    residual  [T, hidden_size] float32
    update    [T, hidden_size], any float type, or None
    weight    [hidden_size], any float type
    output    [T, hidden_size], any float type: sum / sqrt(mean(sum^2) + eps) * weight
    """
    num_tokens, hidden_size = check_norm(residual, update, output, weight)
    if num_tokens == 0:
        return
    config = norm_config(hidden_size)
    _add_rms_norm[(num_tokens,)](
        residual,
        residual if update is None else update,
        weight,
        output,
        eps,
        HIDDEN=hidden_size,
        COLS=config.block,
        HAS_UPDATE=update is not None,
        num_warps=config.num_warps,
        num_stages=2,
        enable_fp_fusion=True,
    )


def _spec(hidden_size: int, *, has_update: bool, weight: str = "bf16") -> AotSpec:
    config = norm_config(hidden_size)
    return AotSpec(
        function="_add_rms_norm",
        label=f"{hidden_size}{' update' if has_update else ''}{'' if weight == 'bf16' else ' ' + weight}",
        signature={
            "residual_ptr": "*fp32:16",
            **dict.fromkeys(("update_ptr", "output_ptr"), "*bf16:16"),
            "weight_ptr": f"*{weight}:16",
            "eps": "fp32",
        },
        constexprs={"HIDDEN": hidden_size, "COLS": config.block, "HAS_UPDATE": has_update},
        num_warps=config.num_warps,
        require={"ld128": 2},
        min_blocks=1 if config.num_warps == 16 else 2,
    )


AOT_SPECS = [
    _spec(576, has_update=True),
    _spec(640, has_update=True, weight="fp32"),
    _spec(4096, has_update=False),
    _spec(16384, has_update=True),
]
