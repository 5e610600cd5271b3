# ruff: noqa: N803, N806 - constants of a kernel are upper case
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Which experts rows take, and the tiles that a launch over all experts works through.

A pair of a row and an expert that it takes is an assignment; assignment a is number a % TAKEN of row
a // TAKEN, a row's experts ascending. A tile is up to `block_rows` assignments of one expert. Which
tiles there are is known to the GPU only: the list of tiles has a fixed length, and what is left over
of it does nothing. So nothing waits for the host, and a CUDA graph takes any routing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo.kernels.aot_spec import AotSpec
from octavo.kernels.configs import ExpertsConfig, power_of_two
from octavo.kernels.routing import PLAIN_ROUTING, Routing

_SORT_BLOCK = 1024  # assignments that the sort looks at in one go


@triton.jit
def _in_best_groups(
    choices,
    expert,
    NUM_ROUTED: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_CHOSEN_GROUPS: tl.constexpr,
    NUM_BEST: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Return what experts are chosen by, [PADDED], -inf outside of the best groups."""
    SIZE: tl.constexpr = NUM_ROUTED // NUM_GROUPS
    group = expert // SIZE
    of_group = tl.full([PADDED], float("-inf"), tl.float32)  # each expert's group's
    for number in tl.static_range(NUM_GROUPS):
        is_mine = group == number
        mine = tl.where(is_mine, choices, float("-inf"))
        best = tl.max(mine)
        if NUM_BEST > 1:
            first = tl.min(tl.where(is_mine & (mine == best), expert, PADDED))
            best += tl.max(tl.where(expert == first, float("-inf"), mine))
        of_group = tl.where(is_mine, tl.where(best != best, float("inf"), best), of_group)
    is_chosen = tl.zeros([PADDED], tl.int32)
    for _ in tl.static_range(NUM_CHOSEN_GROUPS):
        left = tl.where((is_chosen == 0) & (expert < NUM_ROUTED), of_group, float("-inf"))
        is_best = (is_chosen == 0) & (expert < NUM_ROUTED) & (left == tl.max(left))
        is_chosen = tl.where(group == tl.min(tl.where(is_best, group, PADDED)), 1, is_chosen)
    return tl.where(is_chosen != 0, choices, float("-inf"))


@triton.jit
def _choose(
    logits_ptr,
    slot_mapping_ptr,
    bias_ptr,
    expert_ids_ptr,
    weights_ptr,
    scale,
    NUM_ROUTED: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    IS_NORMALIZED: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHARED_GATE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    NUM_CHOSEN_GROUPS: tl.constexpr,
    NUM_BEST: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_SHARED: tl.constexpr,
):
    """Choose the experts of one row. Grid (T,).

    logits        [T, NUM_ROUTED], one column more if shared experts have a gate
    bias          [NUM_ROUTED] float32, read with HAS_BIAS
    slot_mapping  [T] int32, negative for padding, which takes no expert
    expert_ids    [T, NUM_CHOSEN + NUM_SHARED] int32, ascending, -1 for padding;  weights the same, float32
    PADDED, PADDED_SHARED = NUM_ROUTED, NUM_SHARED rounded up to powers of two.
    """
    row = tl.program_id(0).to(tl.int64)
    TAKEN: tl.constexpr = NUM_CHOSEN + NUM_SHARED
    NUM_LOGITS: tl.constexpr = NUM_ROUTED + (1 if NUM_SHARED > 0 and HAS_SHARED_GATE else 0)
    is_real = tl.load(slot_mapping_ptr + row) >= 0
    expert = tl.arange(0, PADDED)
    is_expert = expert < NUM_ROUTED
    logits = tl.load(logits_ptr + row * NUM_LOGITS + expert, mask=is_expert, other=float("-inf")).to(tl.float32)
    if IS_SIGMOID:
        powers = tl.where(is_expert, 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * logits)), 0.0)
        total = 1.0
    else:
        powers = tl.where(is_expert, tl.exp2((logits - tl.max(logits)) * 1.4426950408889634), 0.0)
        total = tl.sum(powers)
    choices = logits
    if HAS_BIAS or NUM_GROUPS > 1:
        choices = powers / total
        if HAS_BIAS:
            choices += tl.load(bias_ptr + expert, mask=is_expert, other=0.0)
    if NUM_GROUPS > 1:
        choices = _in_best_groups(choices, expert, NUM_ROUTED, NUM_GROUPS, NUM_CHOSEN_GROUPS, NUM_BEST, PADDED)
    # Each turn takes the best of those left. NaN counts as best, so that there is always one.
    keys = tl.where(choices != choices, float("inf"), choices)
    is_chosen = tl.zeros([PADDED], tl.int32)
    for _ in tl.static_range(NUM_CHOSEN):
        is_left = is_expert & (is_chosen == 0)
        best = tl.max(tl.where(is_left, keys, float("-inf")))
        first = tl.min(tl.where(is_left & (keys == best), expert, PADDED))
        is_chosen = tl.where(expert == first, 1, is_chosen)
    if IS_NORMALIZED:
        total = tl.sum(tl.where(is_chosen != 0, powers, 0.0))
    place = row * TAKEN + tl.cumsum(is_chosen) - 1
    tl.store(expert_ids_ptr + place, tl.where(is_real, expert, -1), mask=is_chosen != 0)
    tl.store(weights_ptr + place, powers / total * scale, mask=is_chosen != 0)
    if NUM_SHARED > 0:
        shared = tl.arange(0, PADDED_SHARED)
        weight = tl.zeros([PADDED_SHARED], tl.float32) + 1.0
        if HAS_SHARED_GATE:
            logit = tl.load(logits_ptr + row * NUM_LOGITS + NUM_ROUTED).to(tl.float32)
            weight = weight / (1.0 + tl.exp2(-1.4426950408889634 * logit))
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


@dataclass(frozen=True)
class Mixture:
    """The weights of a mixture of experts, its last `num_shared` experts taken by every row.

    gate_up  [num_experts, 2 * intermediate_size, hidden_size]: gate, then up
    down     [num_experts, hidden_size, intermediate_size], of the same type
    gate_up_scales, down_scales  [num_experts, rows] float32 if the weights are int8 or float8_e4m3fn
    bias     [num_routed] float32, added to scores for the choice; or None
    biases   [num_experts, 2 * intermediate_size] and [num_experts, hidden_size], float32; or None
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    num_chosen: int
    num_shared: int
    is_normalized: bool
    gate_up_scales: torch.Tensor | None = None
    down_scales: torch.Tensor | None = None
    routing: Routing = PLAIN_ROUTING
    bias: torch.Tensor | None = None
    biases: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def num_logits(self) -> int:
        """Columns of the router's logits."""
        return self.num_routed + (self.num_shared > 0 and self.routing.has_shared_gate)

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


class Assignments:
    """Who takes which expert in a step, on the device; arguments of the constructor as in `ExpertsWorkspace`.

    expert_ids    [max_tokens * num_taken] int32, -1 for padding;  weights the same, float32
    counts        [num_experts] int32: assignments of each
    sorted        [tiles, block_rows] int32: assignments, -1 where a tile is not full
    tile_experts  [tiles] int32: whose tile it is, -1 for those that are left over
    """

    def __init__(self, mixture: Mixture, max_tokens: int, config: ExpertsConfig) -> None:
        device = mixture.down.device
        count, tiles = max_tokens * mixture.num_taken, num_tiles(max_tokens, mixture, config)
        self.max_tokens = max_tokens
        self.expert_ids = torch.empty(count, dtype=torch.int32, device=device)
        self.weights = torch.empty(count, dtype=torch.float32, device=device)
        self.counts = torch.empty(len(mixture.down), dtype=torch.int32, device=device)
        self.sorted = torch.empty(tiles, config.block_rows, dtype=torch.int32, device=device)
        self.tile_experts = torch.empty(tiles, dtype=torch.int32, device=device)


def assign(
    logits: torch.Tensor, slot_mapping: torch.Tensor, mixture: Mixture, work: Assignments, config: ExpertsConfig
) -> int:
    """Write the assignments of a step to `work`; return how many tiles it may have. Arguments as in `add_experts`."""
    num_tokens, num_experts = len(logits), len(mixture.down)
    num_assignments, tiles = num_tokens * mixture.num_taken, num_tiles(num_tokens, mixture, config)
    _choose[(num_tokens,)](
        logits,
        slot_mapping,
        work.weights if mixture.bias is None else mixture.bias,
        work.expert_ids,
        work.weights,
        mixture.routing.scale,
        **_choose_constants(mixture),
        num_warps=1,
    )
    _count[(num_experts,)](work.expert_ids, work.counts, num_assignments, BLOCK=_SORT_BLOCK, num_warps=4)
    _sort[(num_experts,)](
        work.expert_ids,
        work.counts,
        work.sorted,
        work.tile_experts,
        num_assignments,
        tiles,
        NUM_EXPERTS=num_experts,
        PADDED=power_of_two(num_experts),
        BLOCK_ROWS=config.block_rows,
        BLOCK=_SORT_BLOCK,
        num_warps=4,
    )
    return tiles


def _choose_constants(mixture: Mixture) -> dict[str, int | bool]:
    return {
        "NUM_ROUTED": mixture.num_routed,
        "NUM_CHOSEN": mixture.num_chosen,
        "NUM_SHARED": mixture.num_shared,
        "IS_NORMALIZED": mixture.is_normalized,
        "IS_SIGMOID": mixture.routing.scores == "sigmoid",
        "HAS_BIAS": mixture.bias is not None,
        "HAS_SHARED_GATE": mixture.routing.has_shared_gate,
        "NUM_GROUPS": mixture.routing.num_groups,
        "NUM_CHOSEN_GROUPS": mixture.routing.num_chosen_groups,
        "NUM_BEST": mixture.routing.num_best,
        "PADDED": power_of_two(mixture.num_routed),
        "PADDED_SHARED": power_of_two(max(mixture.num_shared, 1)),
    }


def _choose_spec(num_routed: int, num_chosen: int, num_shared: int, routing: Routing | None = None) -> AotSpec:
    down, bias = torch.empty(num_routed + num_shared, 0, 0), None if routing is None else torch.empty(0)
    routing = routing or PLAIN_ROUTING
    mixture = Mixture(torch.empty(0), down, num_chosen, num_shared, True, None, None, routing, bias)
    shared, groups = f", {num_shared} shared" if num_shared else "", ", groups" if bias is not None else ""
    return AotSpec(
        function="_choose",
        label=f"{num_chosen} of {num_routed}{shared}{groups}",
        signature={
            "logits_ptr": "*fp32:16",
            "slot_mapping_ptr": "*i32:16",
            "bias_ptr": "*fp32:16",
            "expert_ids_ptr": "*i32:16",
            "weights_ptr": "*fp32:16",
            "scale": "fp32",
        },
        constexprs=_choose_constants(mixture),
        num_warps=1,
    )


AOT_SPECS = [
    *(_choose_spec(*sizes) for sizes in ((8, 2, 0), (128, 8, 0), (60, 4, 4))),
    _choose_spec(256, 8, 1, Routing("sigmoid", 8, 4, has_shared_gate=False)),
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
]
