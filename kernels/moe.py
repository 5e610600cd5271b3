# ruff: noqa: N803 - constants of a kernel are upper case
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Mixtures of experts: one launch multiplies the rows of all experts, `expert_routing.py` says which.

As in `quantized_linear.py` the weights are the first operand of the matrix instruction: 64 of their
rows fill the wide instructions, however few rows chose an expert. A row is summed over all inputs by
one program, and its experts are added in their order, so its bits do not depend on other rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels.aot_spec import AotSpec
from octavo.kernels.configs import GATED, LINEAR_KINDS, ROW_TARGETS, TARGETS, ExpertsConfig, RowConfig, experts_config
from octavo.kernels.expert_routing import Assignments, Mixture, assign
from octavo.kernels.gated import ACTIVATIONS, gate_times_up
from octavo.kernels.quantized_linear import QUANTIZED_TYPES

_FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _expert_linear(
    x_ptr,
    weight_ptr,
    output_ptr,
    weights_ptr,
    scales_ptr,
    bias_ptr,
    sorted_ptr,
    tile_experts_ptr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    TAKEN: tl.constexpr,
    IS_GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Multiply the rows of one tile with BLOCK_OUT outputs of its expert.

    Grid (num_tiles, ceil(OUT / BLOCK_OUT)): programs that share weights start together.

    IS_GATED: x [T, IN], weight [num_experts, 2 * OUT, IN] gate and then up, output [T * TAKEN, OUT]
    else:     x [T * TAKEN, IN], weight [num_experts, OUT, IN], output [T * TAKEN, OUT], times the
              assignment's weight of weights [T * TAKEN] float32
    scales                [num_experts, 2 * OUT or OUT] float32 with HAS_SCALES: a weight is what is stored times it
    bias                  as scales, with HAS_BIAS: added to the sums of each row
    sorted, tile_experts  as `_sort` writes them
    """
    tile = tl.program_id(0)
    expert = tl.load(tile_experts_ptr + tile)
    if expert >= 0:
        assignment = tl.load(sorted_ptr + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))
        is_row = assignment >= 0
        row = assignment // TAKEN if IS_GATED else assignment
        out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        is_out = out < OUT
        x_rows = row.to(tl.int64)[:, None] * IN
        w_rows = (expert.to(tl.int64) * (2 * OUT if IS_GATED else OUT) + out)[:, None] * IN
        acc = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
        up_acc = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
        for start in tl.range(0, IN, BLOCK_IN):
            inner = start + tl.arange(0, BLOCK_IN)
            is_inner = inner < IN
            w_mask = is_out[:, None] & is_inner[None, :]
            x = tl.load(x_ptr + x_rows + inner[None, :], mask=is_row[:, None] & is_inner[None, :], other=0.0)
            w = tl.load(weight_ptr + w_rows + inner[None, :], mask=w_mask, other=0.0)
            acc = tl.dot(w.to(x.dtype), x.T, acc, input_precision="ieee")
            if IS_GATED:
                up = tl.load(weight_ptr + OUT * IN + w_rows + inner[None, :], mask=w_mask, other=0.0)
                up_acc = tl.dot(up.to(x.dtype), x.T, up_acc, input_precision="ieee")
        if HAS_SCALES:
            scale_ptr = scales_ptr + expert * (2 * OUT if IS_GATED else OUT) + out
            acc = acc * tl.load(scale_ptr, mask=is_out, other=0.0)[:, None]
            if IS_GATED:
                up_acc = up_acc * tl.load(scale_ptr + OUT, mask=is_out, other=0.0)[:, None]
        if HAS_BIAS:
            of_expert = bias_ptr + expert * (2 * OUT if IS_GATED else OUT) + out
            acc += tl.load(of_expert, mask=is_out, other=0.0)[:, None]
            if IS_GATED:
                up_acc += tl.load(of_expert + OUT, mask=is_out, other=0.0)[:, None]
        if IS_GATED:
            acc = gate_times_up(acc, up_acc, ACTIVATION)
        else:
            acc = acc * tl.load(weights_ptr + assignment, mask=is_row, other=0.0)[None, :]
        place = assignment.to(tl.int64)[:, None] * OUT + out[None, :]
        tl.store(output_ptr + place, acc.T, mask=is_row[:, None] & is_out[None, :])


@triton.jit
def _add_experts(
    terms_ptr, expert_ids_ptr, residual_ptr, HIDDEN: tl.constexpr, TAKEN: tl.constexpr, BLOCK: tl.constexpr
):
    """Add BLOCK columns of a row's terms to the residual. Grid (T, ceil(HIDDEN / BLOCK)).

    terms [T * TAKEN, HIDDEN];  expert_ids [T * TAKEN] int32;  residual [T, HIDDEN] float32, written in place
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < HIDDEN
    if tl.load(expert_ids_ptr + row * TAKEN) >= 0:  # the terms of padding were never written
        total = tl.load(residual_ptr + row * HIDDEN + cols, mask=mask, other=0.0)
        for number in tl.static_range(TAKEN):
            term = tl.load(terms_ptr + (row * TAKEN + number) * HIDDEN + cols, mask=mask, other=0.0)
            total += term.to(tl.float32)
        tl.store(residual_ptr + row * HIDDEN + cols, total, mask=mask)


class ExpertsWorkspace(Assignments):
    """What `add_experts` writes on the way. One serves all layers of the same sizes, in any step up to `max_tokens`."""

    def __init__(
        self, mixture: Mixture, max_tokens: int, config: ExpertsConfig, dtype: torch.dtype | None = None
    ) -> None:
        """Allocate on the device of `mixture`; the terms of the sum have `dtype`, by default that of the weights."""
        super().__init__(mixture, max_tokens, config)
        _, hidden, inner = mixture.down.shape
        count = max_tokens * mixture.num_taken
        self.gated = mixture.down.new_empty(count, inner, dtype=dtype)
        self.terms = mixture.down.new_empty(count, hidden, dtype=dtype)

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))


def add_experts(
    residual: torch.Tensor,
    x: torch.Tensor,
    logits: torch.Tensor,
    slot_mapping: torch.Tensor,
    mixture: Mixture,
    workspace: ExpertsWorkspace,
    activation: str,
    config: ExpertsConfig,
    row_config: RowConfig,
) -> None:
    """Add to each row of `residual` the weighted sum of its experts. Nothing waits for the GPU or allocates.

    residual      [T, hidden_size] float32, written in place
    x             [T, hidden_size] the normed rows, of the type of the weights unless those have eight bits
    logits        [T, num_routed] the router's, any float type; one column more if there are shared experts
    slot_mapping  [T] int32; a negative one marks padding, whose residual stays as it is
    workspace     made for this configuration and sizes
    activation    one of ACTIVATIONS
    config        `configs.experts_config`;  row_config  `configs.GATED` of the target
    """
    num_tokens, hidden = residual.shape
    num_experts, _, inner = mixture.down.shape
    taken, num_routed = mixture.num_taken, mixture.num_routed
    assert mixture.gate_up.shape == (num_experts, 2 * inner, hidden), (mixture.gate_up.shape, mixture.down.shape)
    assert mixture.down.shape == (num_experts, hidden, inner), (mixture.down.shape, residual.shape)
    assert 0 < mixture.num_chosen <= num_routed, (mixture.num_chosen, num_routed)
    assert x.shape == residual.shape, (x.shape, residual.shape)
    assert mixture.gate_up.dtype == mixture.down.dtype, (mixture.gate_up.dtype, mixture.down.dtype)
    assert x.dtype == workspace.terms.dtype, (x.dtype, workspace.terms.dtype)
    assert x.dtype in _FLOAT_TYPES, x.dtype
    for weight, scales in ((mixture.gate_up, mixture.gate_up_scales), (mixture.down, mixture.down_scales)):
        assert weight.dtype in ((x.dtype,) if scales is None else QUANTIZED_TYPES), (weight.dtype, x.dtype)
        assert scales is None or scales.shape == weight.shape[:2], (scales.shape, weight.shape)
        assert scales is None or (scales.is_contiguous() and scales.dtype == torch.float32), "scales are float32"
    for of_experts, weight in zip(mixture.biases or (), (mixture.gate_up, mixture.down), strict=False):
        assert of_experts.shape == weight.shape[:2], (of_experts.shape, weight.shape)
        assert of_experts.dtype == torch.float32, of_experts.dtype
    assert residual.dtype == torch.float32, residual.dtype
    assert logits.shape == (num_tokens, mixture.num_logits), (logits.shape, num_routed)
    assert slot_mapping.shape == (num_tokens,), slot_mapping.shape
    assert slot_mapping.dtype == torch.int32, slot_mapping.dtype
    assert activation in ACTIVATIONS, f"{activation} is none of {ACTIVATIONS}"
    assert num_tokens <= workspace.max_tokens, (num_tokens, workspace.max_tokens)
    assert workspace.terms.shape == (workspace.max_tokens * taken, hidden), "the workspace is of another size"
    assert workspace.gated.shape[1] == inner, "the workspace is of another size"
    assert workspace.sorted.shape[1] == config.block_rows, "the workspace is of another configuration"
    for tensor in (residual, x, logits, slot_mapping, mixture.gate_up, mixture.down):
        assert tensor.is_contiguous(), "every tensor must be contiguous"
        assert tensor.device == workspace.terms.device, (tensor.device, workspace.terms.device)
    if num_tokens == 0:
        return
    work, tiles = workspace, assign(logits, slot_mapping, mixture, workspace, config)
    gate_up_bias, down_bias = mixture.biases or (None, None)
    for source, weight, scales, bias, target in (
        (x, mixture.gate_up, mixture.gate_up_scales, gate_up_bias, work.gated),
        (work.gated, mixture.down, mixture.down_scales, down_bias, work.terms),
    ):
        constants = _linear_constants(target.shape[1], source.shape[1], taken, source is x, activation, config)
        _expert_linear[(tiles, -(-target.shape[1] // config.block_out))](
            source,
            weight,
            target,
            work.weights,
            work.weights if scales is None else scales,
            work.weights if bias is None else bias,
            work.sorted,
            work.tile_experts,
            **constants,
            HAS_SCALES=scales is not None,
            HAS_BIAS=bias is not None,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    _add_experts[(num_tokens, -(-hidden // row_config.block))](
        work.terms,
        work.expert_ids,
        residual,
        HIDDEN=hidden,
        TAKEN=taken,
        BLOCK=row_config.block,
        num_warps=row_config.num_warps,
    )


def _linear_constants(
    out_features: int, in_features: int, taken: int, is_gated: bool, activation: str, config: ExpertsConfig
) -> dict[str, int | bool]:
    return {
        "OUT": out_features,
        "IN": in_features,
        "TAKEN": taken,
        "IS_GATED": is_gated,
        "ACTIVATION": ACTIVATIONS.index(activation),
        "BLOCK_OUT": config.block_out,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_IN": config.block_in,
    }


_HIDDEN, _INNER = 2048, 768  # of Qwen3 30B-A3B, which takes 8 of 128 experts


def _linear_spec(target: str, dtype: str, *, is_gated: bool, weights: str = "") -> AotSpec:
    config = experts_config(target, is_float32=dtype == "fp32")
    sizes = (_INNER, _HIDDEN) if is_gated else (_HIDDEN, _INNER)
    # Float32 is for checking results. The wide instructions of cuda:90 and cuda:100 are of a warp group.
    require = {"mma": 4, "wgmma": 4 if target in ("cuda:90", "cuda:100") else 0, "ld128": 4 if weights else 8}
    pointer = f"*{dtype}:16"
    return AotSpec(
        function="_expert_linear",
        label=f"{'gate, up' if is_gated else 'down'} {weights or dtype}",
        signature={
            "x_ptr": pointer,
            "weight_ptr": f"*{weights}:16" if weights else pointer,
            "output_ptr": pointer,
            "weights_ptr": "*fp32:16",
            "scales_ptr": "*fp32:16",
            "bias_ptr": "*fp32:16",
            "sorted_ptr": "*i32:16",
            "tile_experts_ptr": "*i32:16",
        },
        constexprs={
            **_linear_constants(*sizes, 8, is_gated, "silu", config),
            "HAS_SCALES": bool(weights),
            "HAS_BIAS": False,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        targets=(target,),
        require={} if dtype == "fp32" else require,
    )


def _add_spec(target: str) -> AotSpec:
    return AotSpec(
        function="_add_experts",
        label="8 of 2048",
        signature={"terms_ptr": "*bf16:16", "expert_ids_ptr": "*i32:16", "residual_ptr": "*fp32:16"},
        constexprs={"HIDDEN": _HIDDEN, "TAKEN": 8, "BLOCK": GATED[target].block},
        num_warps=GATED[target].num_warps,
        targets=(target,),
        require={"ld128": 8},
    )


AOT_SPECS = [
    *(
        _linear_spec(target, dtype, is_gated=is_gated)
        for target in TARGETS
        for dtype in ("bf16", "fp32")
        for is_gated in (True, False)
    ),
    *(
        _linear_spec(target, "bf16", is_gated=is_gated, weights=weights)
        for target in TARGETS
        for kind, weights in (("int8", "i8"), ("fp8", "fp8e4nv"))
        for is_gated in (True, False)
        if kind in LINEAR_KINDS[target]
    ),
    *(_add_spec(target) for target in ROW_TARGETS),
]
