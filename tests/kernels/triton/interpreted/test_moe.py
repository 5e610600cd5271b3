"""Mixtures of experts, from the router's logits to the residual stream, against plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from mutate import guarded, mutated

from octavo.kernels import expert_routing as routing
from octavo.kernels import moe as kernel
from octavo.kernels import reference
from octavo.kernels.configs import ExpertsConfig, RowConfig
from octavo.kernels.quantized_linear import quantize_weight
from octavo.kernels.routing import PLAIN_ROUTING, Routing

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F32: 1e-5, F16: 5e-3, BF16: 4e-2}
CONFIG = ExpertsConfig(block_out=32, block_rows=16, block_in=32, num_warps=4, num_stages=1)
ROWS = RowConfig(64, 1)


@dataclass(frozen=True)
class Case:
    """Sizes of a mixture and the rows of a step. `padding`: rows that take no expert."""

    tokens: int = 5
    hidden: int = 48
    inner: int = 40
    routed: int = 4
    chosen: int = 2
    shared: int = 0
    normalized: bool = True
    activation: str = "silu"
    padding: tuple[int, ...] = ()
    popular: int | None = None  # an expert that most rows choose
    dtype: torch.dtype = F32
    weights: torch.dtype | None = None  # of eight bits
    spare_tokens: int = 3  # that the workspace has room for
    routing: Routing = PLAIN_ROUTING
    has_bias: bool = False
    has_biases: bool = False


def check(case: Case, module: Any = kernel) -> torch.Tensor:
    """Compare with torch; return the residual."""
    random = torch.Generator().manual_seed(6)
    experts = case.routed + case.shared
    residual = torch.randn(case.tokens, case.hidden, generator=random)
    x = guarded(torch.randn(case.tokens, case.hidden, generator=random).to(case.dtype))
    has_gate = case.shared > 0 and case.routing.has_shared_gate
    logits = 2 * torch.randn(case.tokens, case.routed + has_gate, generator=random)
    bias = guarded(torch.randn(case.routed, generator=random)) if case.has_bias else None
    if case.popular is not None:
        logits[:, case.popular] = 5
    gate_up = torch.randn(experts, 2 * case.inner, case.hidden, generator=random) * 1.5 * case.hidden**-0.5
    down = torch.randn(experts, case.hidden, case.inner, generator=random) * case.inner**-0.5
    gate_up, down = gate_up.to(case.dtype), down.to(case.dtype)
    biases = None
    if case.has_biases:
        biases = (
            guarded(2 * torch.randn(experts, 2 * case.inner, generator=random)),
            guarded(torch.randn(experts, case.hidden, generator=random)),
        )
    choice = (case.chosen, case.shared, case.normalized)
    mixture = routing.Mixture(guarded(gate_up), guarded(down), *choice, routing=case.routing, bias=bias, biases=biases)
    if case.weights is not None:
        (gate_ups, gate_up_scales), (downs, down_scales) = (quantized(stack, case.weights) for stack in (gate_up, down))
        gate_up, down = gate_ups.float() * gate_up_scales[..., None], downs.float() * down_scales[..., None]
        mixture = routing.Mixture(
            guarded(gate_ups), guarded(downs), *choice, guarded(gate_up_scales), guarded(down_scales)
        )
    slots = torch.arange(case.tokens, dtype=torch.int32)
    slots[list(case.padding)] = -1
    terms = reference.experts(
        x,
        logits,
        gate_up,
        down,
        case.activation,
        num_chosen=case.chosen,
        num_shared=case.shared,
        is_normalized=case.normalized,
        routing=case.routing,
        bias=bias,
        biases=biases,
    )
    terms[list(case.padding)] = 0
    workspace = module.ExpertsWorkspace(mixture, case.tokens + case.spare_tokens, CONFIG, case.dtype)
    for name, tensor in vars(workspace).items():  # what another step left
        if isinstance(tensor, torch.Tensor):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 1)
            setattr(workspace, name, guarded(tensor))
    stream = guarded(residual)
    module.add_experts(stream, x, guarded(logits), guarded(slots), mixture, workspace, case.activation, CONFIG, ROWS)
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(stream, residual + terms, rtol=tolerance, atol=tolerance)
    return stream


def quantized(stack: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return matrices [N, rows, columns] of eight bits, and the scale of each row [N, rows]."""
    pieces = [quantize_weight(matrix, dtype) for matrix in stack]
    return torch.stack([values for values, _ in pieces]), torch.stack([scales for _, scales in pieces])


CASES = {
    "one row": Case(tokens=1),
    "two of four": Case(),
    "more rows of an expert than a tile takes": Case(tokens=37, popular=2),
    "sizes that fill no tile, three of seven": Case(hidden=50, inner=35, routed=7, chosen=3, tokens=6),
    "one of two, not normalized": Case(routed=2, chosen=1, normalized=False),
    "all of three, gelu": Case(routed=3, chosen=3, activation="gelu_tanh"),
    "biases, a clamped gate": Case(activation="swigluoai", has_biases=True, tokens=7, hidden=50, inner=35),
    "shared experts": Case(routed=5, shared=2, normalized=False),
    "padding": Case(tokens=6, padding=(0, 3, 5), shared=1),
    "only padding": Case(tokens=2, padding=(0, 1)),
    "sigmoids, not normalized, a scale": Case(normalized=False, routing=Routing("sigmoid", scale=0.5)),
    "sigmoids, a bias, the best groups, shared ones": Case(
        tokens=23,
        routed=12,
        chosen=3,
        shared=2,
        routing=Routing("sigmoid", 4, 2, scale=1.5, has_shared_gate=False),
        has_bias=True,
    ),
    "softmax, a bias": Case(routed=7, has_bias=True),
    "softmax, groups by their best expert": Case(routed=6, normalized=False, routing=Routing("softmax", 3, 2, 1)),
}


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_the_sum_of_a_rows_experts_is_that_of_torch(name: str, dtype: torch.dtype) -> None:
    check(replace(CASES[name], dtype=dtype))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("weights", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
def test_weights_of_eight_bits_count_as_their_value_times_their_scale(weights: torch.dtype, dtype: torch.dtype) -> None:
    check(Case(tokens=6, hidden=50, inner=35, shared=1, padding=(2,), weights=weights, dtype=dtype))


def test_a_step_without_tokens_does_nothing() -> None:
    check(Case(tokens=0))


def choose(logits: torch.Tensor, shared: int = 0, slot: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts [T, 2 + shared] that rows take, and their weights."""
    ids = torch.full((len(logits), 2 + shared), -7, dtype=torch.int32)
    weights = torch.zeros(ids.shape)
    experts = logits.shape[1] - (shared > 0) + shared
    mixture = routing.Mixture(torch.empty(0), torch.empty(experts, 1, 1), 2, shared, True)
    slots = torch.full((len(logits),), slot, dtype=torch.int32)
    constants = routing._choose_constants(mixture)
    routing._choose[(len(logits),)](guarded(logits), slots, weights, ids, weights, 1.0, **constants)
    return ids, weights


def test_on_a_tie_the_first_experts_are_chosen_whatever_the_logits() -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[1.0, 3, 3, 1, 3, 0], [2, 2, 2, 2, 2, 2], [0, -inf, -inf, -inf, -inf, -inf], [nan] * 6])
    ids, weights = choose(logits)
    assert ids.tolist() == [[1, 2], [0, 1], [0, 1], [0, 1]]
    assert weights[:2].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert weights[2].tolist() == [1.0, 0.0]
    assert weights[3].isnan().all()


def test_padding_takes_no_expert_and_others_all_shared_ones() -> None:
    logits = torch.tensor([[1.0, 3, 2, 0]])
    assert choose(logits, shared=3)[0].tolist() == [[1, 2, 3, 4, 5]]
    assert choose(logits, shared=3, slot=-1)[0].tolist() == [[-1] * 5]


def test_a_rows_bits_do_not_depend_on_the_other_rows() -> None:
    case = Case(tokens=20, routed=3, shared=1, popular=1)
    together = check(case)
    without_most = check(replace(case, padding=tuple(range(1, 19)), spare_tokens=0))
    assert torch.equal(without_most[[0, 19]], together[[0, 19]])


def sort(ids: list[int], experts: int, tiles: int) -> tuple[list[list[int]], list[int]]:
    """Return the assignments of each tile and the tiles' experts."""
    expert_ids = torch.tensor(ids, dtype=torch.int32)
    counts = torch.full((experts,), 99, dtype=torch.int32)
    ordered = torch.full((tiles, 4), 99, dtype=torch.int32)
    tile_experts = torch.full((tiles,), 99, dtype=torch.int32)
    routing._count[(experts,)](expert_ids, counts, len(ids), BLOCK=8)
    routing._sort[(experts,)](
        expert_ids, counts, ordered, tile_experts, len(ids), tiles, NUM_EXPERTS=experts, PADDED=4, BLOCK_ROWS=4, BLOCK=8
    )
    return ordered.tolist(), tile_experts.tolist()


def test_each_assignment_is_in_one_tile_of_its_expert_in_order() -> None:
    ids = [2, 0, 2, 2, -1, 2, 2, 0, -1, 2, 2]
    tiles, owners = sort(ids, experts=3, tiles=5)
    assert owners == [0, 2, 2, -1, -1]
    assert tiles[:3] == [[1, 7, -1, -1], [0, 2, 3, 5], [6, 9, 10, -1]]


@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
@pytest.mark.parametrize(("experts", "chosen"), [(2, 1), (4, 2), (70, 8)])
def test_there_are_tiles_enough_for_any_choice_and_one_less_is_too_few_for_some(
    tokens: int, experts: int, chosen: int
) -> None:
    mixture = routing.Mixture(torch.empty(0), torch.empty(experts, 1, 1), chosen, 0, True)
    count = tokens * chosen
    # The worst: as many experts as can be have one row beyond full tiles, and full tiles take the rest.
    ends = min(count, experts)
    needed = (count - ends) // CONFIG.block_rows + ends
    assert needed <= routing.num_tiles(tokens, mixture, CONFIG) <= needed + ends


MUTATIONS = [
    (
        "the next expert's weights",
        "(expert.to(tl.int64) * (2 * OUT if IS_GATED else OUT) + out)",
        "((expert + 1).to(tl.int64) * (2 * OUT if IS_GATED else OUT) + out)",
    ),
    ("gate and up swapped", "gate_times_up(acc, up_acc", "gate_times_up(up_acc, acc"),
    ("up's bias from the gate's", "of_expert + OUT", "of_expert"),
    ("no bias", "if HAS_BIAS:", "if False:"),
    ("the first expert's bias", "bias_ptr + expert *", "bias_ptr + 0 *"),
    ("up from the gate", "weight_ptr + OUT * IN + w_rows", "weight_ptr + w_rows"),
    ("row of the assignment's number", "assignment // TAKEN if IS_GATED else assignment", "assignment"),
    ("row for assignment", "assignment // TAKEN if IS_GATED else assignment", "assignment // TAKEN"),
    (
        "rows of the next tile",
        "sorted_ptr + tile * BLOCK_ROWS + tl.arange",
        "sorted_ptr + (tile + 1) * BLOCK_ROWS + tl.arange",
    ),
    ("no mask of inputs", "is_inner = inner < IN", "is_inner = inner < IN + BLOCK_IN"),
    ("no mask of outputs", "is_out = out < OUT", "is_out = out < OUT + BLOCK_OUT"),
    ("no scales", "if HAS_SCALES:", "if False:"),
    ("scales of the first expert", "scales_ptr + expert *", "scales_ptr + 0 *"),
    ("scale of the gate for up", "tl.load(scale_ptr + OUT,", "tl.load(scale_ptr,"),
    ("no weight", "tl.load(weights_ptr + assignment, mask=is_row, other=0.0)[None, :]", "1.0"),
    (
        "weight of the place in the tile",
        "tl.load(weights_ptr + assignment, mask",
        "tl.load(weights_ptr + tl.arange(0, BLOCK_ROWS), mask",
    ),
    ("padding is added to", "if tl.load(expert_ids_ptr + row * TAKEN) >= 0:", "if True:"),
    ("a term too few", "tl.static_range(TAKEN)", "tl.static_range(TAKEN - 1)"),
    ("terms of the wrong row", "(row * TAKEN + number) * HIDDEN", "(row + number) * HIDDEN"),
    (
        "residual replaced",
        "total = tl.load(residual_ptr + row * HIDDEN + cols, mask=mask, other=0.0)",
        "total = tl.zeros([BLOCK], tl.float32)",
    ),
    ("only the first columns", "cols = tl.program_id(1) * BLOCK", "cols = 0 * BLOCK"),
]
ROUTING_MUTATIONS = [
    ("softmax over all", "if IS_NORMALIZED", "if False"),
    ("softmax over the chosen", "if IS_NORMALIZED", "if True"),
    ("base of the exponential", "* 1.4426950408889634)", "* 1.0)"),
    (
        "the worst is chosen",
        'best = tl.max(tl.where(is_left, keys, float("-inf")))',
        'best = tl.min(tl.where(is_left, keys, float("inf")))',
    ),
    ("one expert too few", "tl.static_range(NUM_CHOSEN)", "tl.static_range(NUM_CHOSEN - 1)"),
    ("an expert is chosen twice", "is_expert & (is_chosen == 0)", "is_expert"),
    ("shared expert's number", "NUM_ROUTED + shared, -1)", "shared, -1)"),
    ("shared weight of a routed logit", "row * NUM_LOGITS + NUM_ROUTED)", "row * NUM_LOGITS)"),
    ("sigmoid of the negative", "tl.exp2(-1.4426950408889634 * logit)", "tl.exp2(1.4426950408889634 * logit)"),
    ("padding takes experts", "tl.where(is_real, expert, -1)", "expert"),
    (
        "tiles of the experts up to this one",
        "tl.where(experts < expert, tiles, 0)",
        "tl.where(experts <= expert, tiles, 0)",
    ),
    ("counts rounded down", "(counts + BLOCK_ROWS - 1) // BLOCK_ROWS", "counts // BLOCK_ROWS"),
    ("every piece at the same place", "target += tl.sum(is_mine)", "pass"),
    ("a tile's end not marked", "mask=rest < end_tile * BLOCK_ROWS)", "mask=rest < 0)"),
    ("tiles left over not marked", "tl.where(tile < end_tile, expert, -1)", "expert"),
    ("the last tiles forgotten", "tl.where(expert == NUM_EXPERTS - 1, num_tiles, end_tile)", "end_tile"),
    ("another expert counted", "count += (ids == expert)", "count += (ids == expert + 1)"),
    (
        "too few tiles",
        "num_assignments // config.block_rows + min(num_assignments, len(mixture.down))",
        "num_assignments // config.block_rows + 1",
    ),
]
HARD = [
    Case(tokens=20, hidden=72, inner=40, routed=4, chosen=2, shared=2, normalized=False, padding=(1, 7), popular=1),
    Case(tokens=3, hidden=40, inner=33, routed=5, chosen=3, padding=(2,)),
    Case(tokens=3, routed=3, weights=torch.int8),
    Case(tokens=3, hidden=40, inner=33, routed=3, has_biases=True),
]


def check_hard(module: ModuleType) -> None:
    for case in HARD:
        check(case, module)


@pytest.fixture
def _small_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "_SORT_BLOCK", 16)


@pytest.mark.gates
@pytest.mark.usefixtures("_small_sort")
@pytest.mark.parametrize(("old", "new"), [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS])
def test_a_mutated_kernel_is_caught(tmp_path: Path, old: str, new: str) -> None:
    mutant = mutated(kernel, tmp_path, old, new)
    with pytest.raises((AssertionError, IndexError)):
        check_hard(mutant)


@pytest.mark.gates
@pytest.mark.parametrize(("old", "new"), [m[1:] for m in ROUTING_MUTATIONS], ids=[m[0] for m in ROUTING_MUTATIONS])
def test_a_mutated_routing_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    mutant = mutated(routing, tmp_path, old, new)
    monkeypatch.setattr(mutant, "_SORT_BLOCK", 16)
    monkeypatch.setattr(kernel, "assign", mutant.assign)
    with pytest.raises((AssertionError, IndexError)):
        check_hard(kernel)


@pytest.mark.usefixtures("_small_sort")
@pytest.mark.parametrize("case", HARD)
def test_the_cases_that_mutants_fail_pass_unmutated(case: Case) -> None:
    check(case)
