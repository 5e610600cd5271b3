"""Norm, rotation and the write to the paged cache against plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mutate import guarded, mutated

from octavo.kernels import reference
from octavo.kernels import rotary_kv as kernel
from octavo.kernels.configs import ROTARY

F32, F16, BF16, FP8 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn
TOLERANCE = {F32: 1e-5, F16: 2e-3, BF16: 1.6e-2}


@dataclass(frozen=True)
class Case:
    """A layer's heads and a step. `slots`: where each token goes, -1 for padding."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    rotary_dim: int = 64
    slots: tuple[int, ...] = (33, 16, -1, 79, 48)
    norm: bool = False
    dtype: torch.dtype = F32
    cache_dtype: torch.dtype | None = None
    scales: tuple[float, float] = (1.0, 1.0)


def check(case: Case, module: ModuleType = kernel) -> None:
    random = torch.Generator().manual_seed(3)
    tokens, half = len(case.slots), case.rotary_dim // 2
    qkv = torch.randn(tokens, case.num_heads + 2 * case.num_kv_heads, case.head_dim, generator=random) * 3
    angles = torch.rand(50, half, generator=random) * 6
    cos, sin = angles.cos(), angles.sin()
    positions = torch.randint(0, 50, (tokens,), generator=random).int()
    slots = torch.tensor(case.slots, dtype=torch.int32)
    norms = torch.rand(2, case.head_dim, generator=random).to(case.dtype) + 0.5
    q_norm, k_norm = (norms[0].contiguous(), norms[1].contiguous()) if case.norm else (None, None)
    qkv = guarded(qkv.to(case.dtype))
    # Blocks before and after the cache: an address that is out of bounds hits them, not other memory.
    before = torch.randn(7, 2, 16, case.num_kv_heads, case.head_dim, generator=random)
    expected_memory = before.to(case.cache_dtype or case.dtype)
    memory = expected_memory.clone()
    expected_cache, cache = expected_memory[1:6], memory[1:6]
    expected = reference.rotary_write_kv(
        qkv,
        expected_cache,
        positions,
        slots,
        cos,
        sin,
        num_heads=case.num_heads,
        q_norm=q_norm,
        k_norm=k_norm,
        key_scale=case.scales[0],
        value_scale=case.scales[1],
    )
    queries = guarded(torch.full(expected.shape, float("nan"), dtype=case.dtype))
    module.rotary_write_kv(
        qkv,
        queries,
        cache,
        positions,
        slots,
        cos,
        sin,
        config=ROTARY["cuda:90"],
        q_norm=q_norm,
        k_norm=k_norm,
        key_scale=case.scales[0],
        value_scale=case.scales[1],
    )
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(queries.float(), expected, rtol=tolerance, atol=tolerance)
    if case.cache_dtype is FP8:  # a value at the border of two codes may fall to either side
        tolerance = 0.13
    torch.testing.assert_close(memory.float(), expected_memory.float(), rtol=tolerance, atol=tolerance)


CASES = {
    "plain": Case(),
    "norm": Case(norm=True),
    "one token": Case(slots=(5,)),
    "only padding": Case(slots=(-1, -1)),
    "rotary half of the head": Case(rotary_dim=32),
    "rotary quarter, norm": Case(rotary_dim=16, norm=True),
    "head_dim 80": Case(head_dim=80, rotary_dim=80),
    "head_dim 80, rotary 32": Case(head_dim=80, rotary_dim=32),
    "head_dim 8": Case(head_dim=8, rotary_dim=8, num_heads=3, num_kv_heads=1),
    "head_dim 256": Case(head_dim=256, rotary_dim=256, slots=(3, 4)),
    "more heads than a program takes": Case(num_heads=18, num_kv_heads=9),
    "uneven heads": Case(num_heads=9, num_kv_heads=3),
}


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_queries_and_cache_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    check(replace(CASES[name], dtype=dtype))


def test_an_fp8_cache_is_scaled_and_clamped() -> None:
    check(Case(cache_dtype=FP8, scales=(0.5, 2.0)))
    check(Case(cache_dtype=FP8, scales=(0.005, 0.001), rotary_dim=32))


MUTATIONS = [
    ("wrong direction", "one * cos - two * sin", "one * cos + two * sin"),
    ("halves swapped", "two * cos + one * sin", "one * cos + two * sin"),
    ("position of the token in the step", "tl.load(positions_ptr + token)", "token"),
    ("padding written", "if slot >= 0:", "if True:"),
    ("keys for values", "value_ptr = source_ptr + NUM_KV_HEADS * HEAD_DIM", "value_ptr = source_ptr"),
    ("values beside the wrong block", "(2 * SIDE)", "SIDE"),
    ("a block too far", "slot // BLOCK_SIZE * (2 * SIDE)", "(slot // BLOCK_SIZE + 1) * (2 * SIDE)"),
    ("offset in the block ignored", "slot % BLOCK_SIZE *", "0 *"),
    ("no norm", "if HAS_NORM:", "if False:"),
    ("norm of keys for queries", "norm_ptr = q_norm_ptr", "norm_ptr = k_norm_ptr"),
    ("mean over a part of the head", "squares / HEAD_DIM", "squares / HALF"),
    ("rest left out", "if REST > 0:", "if False:"),
    ("too few heads", "is_head = head < tl.where(is_query, NUM_HEADS, NUM_KV_HEADS)", "is_head = head < NUM_KV_HEADS"),
    (
        "a head too many",
        "tl.where(is_query, NUM_HEADS, NUM_KV_HEADS)",
        "tl.where(is_query, NUM_HEADS, NUM_KV_HEADS + 1)",
    ),
    ("key heads at the query heads", "tl.where(is_query, head, NUM_HEADS + head)", "head"),
    ("scale the wrong way", "1 / key_scale", "key_scale"),
    ("no clamp", "tl.minimum(tl.maximum(x, -448.0), 448.0)", "x"),
]
HARD = [
    Case(norm=True, rotary_dim=32, num_heads=9, num_kv_heads=3),
    Case(cache_dtype=FP8, scales=(0.005, 0.001)),
]


def check_hard(module: ModuleType) -> None:
    for case in HARD:
        check(case, module)


@pytest.mark.gates
@pytest.mark.parametrize(("old", "new"), [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS])
def test_a_mutated_kernel_is_caught(tmp_path: Path, old: str, new: str) -> None:
    mutant = mutated(kernel, tmp_path, old, new)
    with pytest.raises(AssertionError):
        check_hard(mutant)


@pytest.mark.parametrize("case", HARD)
def test_the_cases_that_mutants_fail_pass_unmutated(case: Case) -> None:
    check(case)
