# ruff: noqa: N803, N806 - constants of a kernel are upper case
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Mixtures of experts: rows choose experts, are sorted by them, and one launch multiplies all.

A pair of a row and an expert that it takes is an assignment; assignment a is number a % TAKEN of row
a // TAKEN, a row's experts ascending. A tile is up to `block_rows` assignments of one expert. Which
tiles there are is known to the GPU only: the list of tiles has a fixed length, and what is left over
of it does nothing. So nothing waits for the host, and a CUDA graph takes any routing.

As in `quantized_linear.py` the weights are the first operand of the matrix instruction: 64 of their
rows fill the wide instructions, however few rows chose an expert. A row is summed over all inputs by
one program, and its experts are added in their order, so its bits do not depend on other rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.kernels.aot_spec import AotSpec
from octavo.kernels.configs import GATED, TARGETS, ExpertsConfig, RowConfig, experts_config, power_of_two
from octavo.kernels.gated import ACTIVATIONS, activate

_SORT_BLOCK = 1024  # assignments that the sort looks at in one go
_FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _choose(
    logits_ptr,
    slot_mapping_ptr,
    expert_ids_ptr,
    weights_ptr,
    NUM_ROUTED: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    IS_NORMALIZED: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_SHARED: tl.constexpr,
):
    """Choose the experts of one row. Grid (T,).

    logits        [T, NUM_ROUTED], one column more if there are shared experts
    slot_mapping  [T] int32, negative for padding, which takes no expert
    expert_ids    [T, NUM_CHOSEN + NUM_SHARED] int32, ascending, -1 for padding;  weights the same, float32
    PADDED, PADDED_SHARED = NUM_ROUTED, NUM_SHARED rounded up to powers of two.
    """
    row = tl.program_id(0).to(tl.int64)
    TAKEN: tl.constexpr = NUM_CHOSEN + NUM_SHARED
    NUM_LOGITS: tl.constexpr = NUM_ROUTED + (1 if NUM_SHARED > 0 else 0)
    is_real = tl.load(slot_mapping_ptr + row) >= 0
    expert = tl.arange(0, PADDED)
    is_expert = expert < NUM_ROUTED
    logits = tl.load(logits_ptr + row * NUM_LOGITS + expert, mask=is_expert, other=float("-inf")).to(tl.float32)
    powers = tl.where(is_expert, tl.exp2((logits - tl.max(logits)) * 1.4426950408889634), 0.0)
    # Each turn takes the best of those left. NaN counts as best, so that there is always one.
    keys = tl.where(logits != logits, float("inf"), logits)
    is_chosen = tl.zeros([PADDED], tl.int32)
    for _ in tl.static_range(NUM_CHOSEN):
        is_left = is_expert & (is_chosen == 0)
        best = tl.max(tl.where(is_left, keys, float("-inf")))
        first = tl.min(tl.where(is_left & (keys == best), expert, PADDED))
        is_chosen = tl.where(expert == first, 1, is_chosen)
    total = tl.sum(tl.where(is_chosen != 0, powers, 0.0)) if IS_NORMALIZED else tl.sum(powers)
    place = row * TAKEN + tl.cumsum(is_chosen) - 1
    tl.store(expert_ids_ptr + place, tl.where(is_real, expert, -1), mask=is_chosen != 0)
    tl.store(weights_ptr + place, powers / total, mask=is_chosen != 0)
    if NUM_SHARED > 0:
        shared = tl.arange(0, PADDED_SHARED)
        logit = tl.load(logits_ptr + row * NUM_LOGITS + NUM_ROUTED).to(tl.float32)
        weight = tl.zeros([PADDED_SHARED], tl.float32) + 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * logit))
        place = row * TAKEN + NUM_CHOSEN + shared
        tl.store(expert_ids_ptr + place, tl.where(is_real, NUM_ROUTED + shared, -1), mask=shared < NUM_SHARED)
        tl.store(weights_ptr + place, weight, mask=shared < NUM_SHARED)


@triton.jit(do_not_specialize=["num_assignments"])
def _count(expert_ids_ptr, counts_ptr, num_assignments, BLOCK: tl.constexpr):
    """Count the assignments of one expert. Grid (num_experts,).

    expert_ids  [num_assignments] int32;  counts [num_experts] int32
    """
    expert = tl.program_id(0)
    count = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, num_assignments, BLOCK):
        index = start + tl.arange(0, BLOCK)
        ids = tl.load(expert_ids_ptr + index, mask=index < num_assignments, other=-1)
        count += (ids == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(count))


@triton.jit(do_not_specialize=["num_assignments", "num_tiles"])
def _sort(
    expert_ids_ptr,
    counts_ptr,
    sorted_ptr,
    tile_experts_ptr,
    num_assignments,
    num_tiles,
    NUM_EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one expert's assignments to its tiles, in their order. Grid (NUM_EXPERTS,).

    expert_ids    [num_assignments] int32;  counts [NUM_EXPERTS] int32
    sorted        [num_tiles, BLOCK_ROWS] int32: assignments, -1 where a tile is not full
    tile_experts  [num_tiles] int32: whose tile it is, -1 for tiles that are left over
    PADDED = NUM_EXPERTS rounded up to a power of two.
    """
    expert = tl.program_id(0)
    experts = tl.arange(0, PADDED)
    counts = tl.load(counts_ptr + experts, mask=experts < NUM_EXPERTS, other=0)
    tiles = (counts + BLOCK_ROWS - 1) // BLOCK_ROWS
    first_tile = tl.sum(tl.where(experts < expert, tiles, 0))
    end_tile = first_tile + tl.sum(tl.where(experts == expert, tiles, 0))
    target = first_tile * BLOCK_ROWS
    for start in tl.range(0, num_assignments, BLOCK):
        index = start + tl.arange(0, BLOCK)
        ids = tl.load(expert_ids_ptr + index, mask=index < num_assignments, other=-1)
        is_mine = (ids == expert).to(tl.int32)
        tl.store(sorted_ptr + target + tl.cumsum(is_mine) - 1, index, mask=is_mine != 0)
        target += tl.sum(is_mine)
    rest = target + tl.arange(0, BLOCK_ROWS)
    tl.store(sorted_ptr + rest, tl.full([BLOCK_ROWS], -1, tl.int32), mask=rest < end_tile * BLOCK_ROWS)
    # The last expert's program also marks the tiles that nobody needs.
    last_tile = tl.where(expert == NUM_EXPERTS - 1, num_tiles, end_tile)
    for start in tl.range(first_tile, last_tile, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        tl.store(tile_experts_ptr + tile, tl.where(tile < end_tile, expert, -1), mask=tile < last_tile)


@triton.jit
def _expert_linear(
    x_ptr,
    weight_ptr,
    output_ptr,
    weights_ptr,
    sorted_ptr,
    tile_experts_ptr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    TAKEN: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_SILU: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Multiply the rows of one tile with BLOCK_OUT outputs of its expert.

    Grid (num_tiles, ceil(OUT / BLOCK_OUT)): programs that share weights start together.

    IS_GATED: x [T, IN], weight [num_experts, 2 * OUT, IN] gate and then up, output [T * TAKEN, OUT]
    else:     x [T * TAKEN, IN], weight [num_experts, OUT, IN], output [T * TAKEN, OUT], times the
              assignment's weight of weights [T * TAKEN] float32
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
            acc = tl.dot(w, x.T, acc, input_precision="ieee")
            if IS_GATED:
                up = tl.load(weight_ptr + OUT * IN + w_rows + inner[None, :], mask=w_mask, other=0.0)
                up_acc = tl.dot(up, x.T, up_acc, input_precision="ieee")
        if IS_GATED:
            acc = activate(acc, IS_SILU) * up_acc
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


@dataclass(frozen=True)
class Mixture:
    """The weights of a mixture of experts, its last `num_shared` experts taken by every row.

    gate_up  [num_experts, 2 * intermediate_size, hidden_size]: gate, then up
    down     [num_experts, hidden_size, intermediate_size], of the same type
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    num_chosen: int
    num_shared: int
    is_normalized: bool

    @property
    def num_taken(self) -> int:
        """Experts that each row takes."""
        return self.num_chosen + self.num_shared

    @property
    def num_routed(self) -> int:
        """Experts that a row chooses from."""
        return len(self.down) - self.num_shared


def num_tiles(num_tokens: int, mixture: Mixture, config: ExpertsConfig) -> int:
    """Return how many tiles a step may need: full ones, and one that is not full for each expert."""
    num_assignments = num_tokens * mixture.num_taken
    return num_assignments // config.block_rows + min(num_assignments, len(mixture.down))


class ExpertsWorkspace:
    """What `add_experts` writes on the way. One serves all layers of the same sizes, in any step up to `max_tokens`."""

    def __init__(self, mixture: Mixture, max_tokens: int, config: ExpertsConfig) -> None:
        """Allocate on the device of `mixture`, whose type the terms of the sum have."""
        device, dtype = mixture.down.device, mixture.down.dtype
        num_experts, hidden, inner = mixture.down.shape
        count, tiles = max_tokens * mixture.num_taken, num_tiles(max_tokens, mixture, config)
        self.max_tokens = max_tokens
        self.expert_ids = torch.empty(count, dtype=torch.int32, device=device)
        self.weights = torch.empty(count, dtype=torch.float32, device=device)
        self.counts = torch.empty(num_experts, dtype=torch.int32, device=device)
        self.sorted = torch.empty(tiles, config.block_rows, dtype=torch.int32, device=device)
        self.tile_experts = torch.empty(tiles, dtype=torch.int32, device=device)
        self.gated = torch.empty(count, inner, dtype=dtype, device=device)
        self.terms = torch.empty(count, hidden, dtype=dtype, device=device)

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
    x             [T, hidden_size] the normed rows, of the type of the weights
    logits        [T, num_routed] the router's, any float type; one column more if there are shared experts
    slot_mapping  [T] int32; a negative one marks padding, whose residual stays as it is
    workspace     made for this configuration and sizes
    activation    "silu" or "gelu_tanh"
    config        `configs.experts_config`;  row_config  `configs.GATED` of the target
    """
    num_tokens, hidden = residual.shape
    num_experts, _, inner = mixture.down.shape
    taken, num_routed = mixture.num_taken, mixture.num_routed
    assert mixture.gate_up.shape == (num_experts, 2 * inner, hidden), (mixture.gate_up.shape, mixture.down.shape)
    assert mixture.down.shape == (num_experts, hidden, inner), (mixture.down.shape, residual.shape)
    assert 0 < mixture.num_chosen <= num_routed, (mixture.num_chosen, num_routed)
    assert x.shape == residual.shape, (x.shape, residual.shape)
    assert x.dtype == mixture.gate_up.dtype == mixture.down.dtype, (x.dtype, mixture.gate_up.dtype)
    assert x.dtype in _FLOAT_TYPES, x.dtype
    assert residual.dtype == torch.float32, residual.dtype
    assert logits.shape == (num_tokens, num_routed + (mixture.num_shared > 0)), (logits.shape, num_routed)
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
    work, tiles = workspace, num_tiles(num_tokens, mixture, config)
    _choose[(num_tokens,)](
        logits, slot_mapping, work.expert_ids, work.weights, **_choose_constants(mixture), num_warps=1
    )
    _count[(num_experts,)](work.expert_ids, work.counts, num_tokens * taken, BLOCK=_SORT_BLOCK, num_warps=4)
    _sort[(num_experts,)](
        work.expert_ids,
        work.counts,
        work.sorted,
        work.tile_experts,
        num_tokens * taken,
        tiles,
        NUM_EXPERTS=num_experts,
        PADDED=power_of_two(num_experts),
        BLOCK_ROWS=config.block_rows,
        BLOCK=_SORT_BLOCK,
        num_warps=4,
    )
    is_silu = activation == "silu"
    for source, weight, target in ((x, mixture.gate_up, work.gated), (work.gated, mixture.down, work.terms)):
        constants = _linear_constants(target.shape[1], source.shape[1], taken, source is x, is_silu, config)
        _expert_linear[(tiles, -(-target.shape[1] // config.block_out))](
            source,
            weight,
            target,
            work.weights,
            work.sorted,
            work.tile_experts,
            **constants,
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


def _choose_constants(mixture: Mixture) -> dict[str, int | bool]:
    return {
        "NUM_ROUTED": mixture.num_routed,
        "NUM_CHOSEN": mixture.num_chosen,
        "NUM_SHARED": mixture.num_shared,
        "IS_NORMALIZED": mixture.is_normalized,
        "PADDED": power_of_two(mixture.num_routed),
        "PADDED_SHARED": power_of_two(max(mixture.num_shared, 1)),
    }


def _linear_constants(
    out_features: int, in_features: int, taken: int, is_gated: bool, is_silu: bool, config: ExpertsConfig
) -> dict[str, int | bool]:
    return {
        "OUT": out_features,
        "IN": in_features,
        "TAKEN": taken,
        "IS_GATED": is_gated,
        "IS_SILU": is_silu,
        "BLOCK_OUT": config.block_out,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_IN": config.block_in,
    }


_HIDDEN, _INNER = 2048, 768  # of Qwen3 30B-A3B, which takes 8 of 128 experts


def _linear_spec(target: str, dtype: str, *, is_gated: bool) -> AotSpec:
    config = experts_config(target, is_float32=dtype == "fp32")
    sizes = (_INNER, _HIDDEN) if is_gated else (_HIDDEN, _INNER)
    # Float32 is for checking results. The wide instructions of cuda:90 and cuda:100 are of a warp group.
    require = {"mma": 4, "wgmma": 4 if target in ("cuda:90", "cuda:100") else 0, "ld128": 8}
    pointer = f"*{dtype}:16"
    return AotSpec(
        function="_expert_linear",
        label=f"{'gate, up' if is_gated else 'down'} {dtype}",
        signature={
            "x_ptr": pointer,
            "weight_ptr": pointer,
            "output_ptr": pointer,
            "weights_ptr": "*fp32:16",
            "sorted_ptr": "*i32:16",
            "tile_experts_ptr": "*i32:16",
        },
        constexprs=_linear_constants(*sizes, 8, is_gated, True, config),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        targets=(target,),
        require={} if dtype == "fp32" else require,
    )


def _choose_spec(num_routed: int, num_chosen: int, num_shared: int) -> AotSpec:
    mixture = Mixture(torch.empty(0), torch.empty(num_routed + num_shared, 0, 0), num_chosen, num_shared, True)
    return AotSpec(
        function="_choose",
        label=f"{num_chosen} of {num_routed}{f', {num_shared} shared' if num_shared else ''}",
        signature={
            "logits_ptr": "*fp32:16",
            "slot_mapping_ptr": "*i32:16",
            "expert_ids_ptr": "*i32:16",
            "weights_ptr": "*fp32:16",
        },
        constexprs=_choose_constants(mixture),
        num_warps=1,
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
    *(_choose_spec(*sizes) for sizes in ((8, 2, 0), (128, 8, 0), (60, 4, 4))),
    AotSpec(
        function="_count",
        label="",
        signature={"expert_ids_ptr": "*i32:16", "counts_ptr": "*i32:16", "num_assignments": "i32"},
        constexprs={"BLOCK": _SORT_BLOCK},
        num_warps=4,
    ),
    AotSpec(
        function="_sort",
        label="128 experts",
        signature={
            "expert_ids_ptr": "*i32:16",
            "counts_ptr": "*i32:16",
            "sorted_ptr": "*i32:16",
            "tile_experts_ptr": "*i32:16",
            "num_assignments": "i32",
            "num_tiles": "i32",
        },
        constexprs={"NUM_EXPERTS": 128, "PADDED": 128, "BLOCK_ROWS": 64, "BLOCK": _SORT_BLOCK},
        num_warps=4,
    ),
    *(_add_spec(target) for target in TARGETS),
]
