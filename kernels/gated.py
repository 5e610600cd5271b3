# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The activation of a gated feed-forward layer: activation(gate) * up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels.aot_spec import AotSpec
from octavo.kernels.configs import GATED, ROW_TARGETS, RowConfig

ACTIVATIONS = ("silu", "gelu_tanh", "swigluoai")


@triton.jit
def gate_times_up(gate, up, ACTIVATION: tl.constexpr):
    """Return activation(gate) * up of float32, with an index of ACTIVATIONS."""
    # All are gate * sigmoid(y), since (1 + tanh(x)) / 2 = sigmoid(2x). exp2 may overflow: 1 / inf is 0.
    y = gate
    if ACTIVATION == 1:
        y = 1.5957691216057308 * (gate + 0.044715 * (gate * gate * gate))
    if ACTIVATION == 2:  # a NaN passes, as it does elsewhere
        gate = tl.where(gate > 7.0, 7.0, gate)
        y = 1.702 * gate
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up)) + 1.0
    return gate / (1.0 + tl.exp2(-1.4426950408889634 * y)) * up


@triton.jit
def _gated(gate_up_ptr, output_ptr, COLS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Take BLOCK columns of one row. Grid (T, ceil(COLS / BLOCK)).

    gate_up  [T, 2 * COLS]: gate, then up;  output [T, COLS]
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < COLS
    gate = tl.load(gate_up_ptr + row * (2 * COLS) + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * (2 * COLS) + COLS + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(output_ptr + row * COLS + cols, gate_times_up(gate, up, ACTIVATION), mask=mask)


def gated(gate_up: torch.Tensor, output: torch.Tensor, activation: str, config: RowConfig) -> None:
    """Write activation(gate) * up to `output`.

    gate_up     [T, 2 * intermediate_size], any float type: gate, then up
    output      [T, intermediate_size], any float type
    activation  one of ACTIVATIONS
    config      `configs.GATED` of the target
    """
    num_tokens, cols = output.shape
    assert gate_up.shape == (num_tokens, 2 * cols), (gate_up.shape, output.shape)
    assert activation in ACTIVATIONS, f"{activation} is none of {ACTIVATIONS}"
    assert gate_up.is_contiguous(), "gate_up must be contiguous"
    assert output.is_contiguous(), "output must be contiguous"
    assert gate_up.device == output.device, (gate_up.device, output.device)
    if num_tokens == 0:
        return
    _gated[(num_tokens, -(-cols // config.block))](
        gate_up,
        output,
        COLS=cols,
        ACTIVATION=ACTIVATIONS.index(activation),
        BLOCK=config.block,
        num_warps=config.num_warps,
        num_stages=2,
        enable_fp_fusion=True,
    )


AOT_SPECS = [
    AotSpec(
        function="_gated",
        label=f"{activation} {cols}",
        signature={"gate_up_ptr": "*bf16:16", "output_ptr": "*bf16:16"},
        constexprs={"COLS": cols, "ACTIVATION": ACTIVATIONS.index(activation), "BLOCK": GATED[target].block},
        num_warps=GATED[target].num_warps,
        targets=(target,),
        require={"ld128": 2},
    )
    for target in ROW_TARGETS
    for activation, cols in (("silu", 1536), ("silu", 14336), ("gelu_tanh", 14336))
]
