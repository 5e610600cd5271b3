# ruff: noqa: E501 - texts of mutations
"""Paged attention against plain torch, over what ragged batches can look like."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mutate import mutated

from octavo.kernels import paged_attention as kernel
from octavo.kernels import reference
from octavo.kernels.attention_plan import pad_plan, plan_attention
from octavo.kernels.configs import AttentionConfig

F32, F16, BF16, FP8 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn
TOLERANCE = {F32: 2e-5, F16: 4e-3, BF16: 3e-2}


@dataclass(frozen=True)
class Case:
    """A batch. `queries` and `lengths`: new and all tokens of each sequence."""

    queries: tuple[int, ...] = (1, 5, 1, 17)
    lengths: tuple[int, ...] = (64, 64, 33, 40)
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    dtype: torch.dtype = F32
    cache_dtype: torch.dtype | None = None
    window: int = 0
    soft_cap: float = 0.0
    scales: tuple[float, float] = (1.0, 1.0)
    has_sinks: bool = False
    block_m: int = 16
    block_n: int = 32
    split_keys: int = 1024
    padding: int = 0


@dataclass
class Batch:
    """What `case` describes, with random values and blocks in a random order."""

    queries: torch.Tensor
    kv_cache: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    sinks: torch.Tensor | None = None


def make_batch(case: Case, seed: int = 0) -> Batch:
    random = torch.Generator().manual_seed(seed)
    num_blocks = [-(-length // 16) for length in case.lengths]
    order = torch.randperm(sum(num_blocks), generator=random) + 1  # block 0 belongs to nobody
    # Two columns more than are needed: a mutant that goes too far reads block 0, not other memory.
    tables = torch.zeros(len(num_blocks), max(num_blocks) + 2, dtype=torch.int32)
    for seq, count in enumerate(num_blocks):
        tables[seq, :count] = order[sum(num_blocks[:seq]) :][:count]
    queries = torch.randn(sum(case.queries), case.num_heads, case.head_dim, generator=random) * 2
    cache = torch.randn(len(order) + 1, 2, 16, case.num_kv_heads, case.head_dim, generator=random)
    stored = cache.to(case.cache_dtype or case.dtype)
    for seq, length in enumerate(case.lengths):  # a cache holds anything beyond a sequence's end
        if length % 16:
            stored[int(tables[seq, num_blocks[seq] - 1]), :, length % 16 :] = float("nan")
    starts = torch.tensor([0, *case.queries]).cumsum(0).int()
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    sinks = 2 + 3 * torch.randn(case.num_heads, generator=random) if case.has_sinks else None
    return Batch(queries.to(case.dtype), stored, starts, lengths, tables, sinks)


def attend(case: Case, batch: Batch, module: ModuleType = kernel) -> torch.Tensor:
    config = AttentionConfig(case.block_m, case.block_n, num_warps=4, num_stages=2, split_keys=case.split_keys)
    plan = plan_attention(
        batch.query_start_loc.numpy(),
        batch.seq_lens.numpy(),
        tile_queries=kernel.tile_queries(config, case.num_heads, case.num_kv_heads),
        key_tile=case.block_n,
        split_keys=case.split_keys,
        window=case.window,
    )
    plan = pad_plan(plan, len(plan.work) + case.padding, len(plan.combines) + case.padding)
    partial, stats = kernel.partial_buffers(config, plan.num_slots, case.num_kv_heads, case.head_dim, "cpu")
    partial.fill_(float("nan"))
    stats.fill_(float("nan"))
    output = torch.full_like(batch.queries, float("nan"))
    module.paged_attention(
        batch.queries,
        batch.kv_cache,
        torch.from_numpy(plan.work),
        torch.from_numpy(plan.combines),
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_tables,
        output,
        partial,
        stats,
        config=config,
        scale=case.head_dim**-0.5,
        window=case.window,
        soft_cap=case.soft_cap,
        sinks=batch.sinks,
        key_scale=case.scales[0],
        value_scale=case.scales[1],
    )
    return output


def check(case: Case, module: ModuleType = kernel) -> None:
    batch = make_batch(case)
    expected = reference.paged_attention(
        batch.queries,
        batch.kv_cache,
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_tables,
        scale=case.head_dim**-0.5,
        window=case.window,
        soft_cap=case.soft_cap,
        sinks=batch.sinks,
        key_scale=case.scales[0],
        value_scale=case.scales[1],
    )
    tolerance = TOLERANCE[case.dtype] * max(1.0, case.scales[1])
    torch.testing.assert_close(attend(case, batch, module).float(), expected, rtol=tolerance, atol=tolerance)


CASES = {
    "mixed": Case(),
    "one token": Case(queries=(1,), lengths=(1,)),
    "whole prompt": Case(queries=(37,), lengths=(37,)),
    "a sequence without work": Case(queries=(3, 0, 2), lengths=(3, 20, 18)),
    "a padding sequence": Case(queries=(3, 0), lengths=(3, 0), padding=3),
    "one head a key head": Case(num_heads=2, num_kv_heads=2),
    "three heads a key head": Case(num_heads=9, num_kv_heads=3, head_dim=64),
    "eight heads a key head": Case(num_heads=8, num_kv_heads=1),
    "head_dim 80": Case(head_dim=80),
    "head_dim 256": Case(head_dim=256, queries=(1, 4), lengths=(33, 20)),
    "head_dim 8": Case(head_dim=8),
    "window": Case(window=9),
    "window of one": Case(window=1),
    "window and split": Case(window=40, lengths=(129, 100, 33, 40), split_keys=32),
    "soft cap": Case(soft_cap=2.0),
    "split": Case(split_keys=32),
    "split, last piece of one key": Case(queries=(1, 3), lengths=(65, 33), split_keys=32),
    "split, group of three, padding": Case(num_heads=3, num_kv_heads=1, split_keys=32, padding=2),
    "large tile": Case(block_m=64, block_n=64, queries=(1, 50), lengths=(70, 90)),
    "large tile, split": Case(block_m=64, block_n=32, queries=(1, 50), lengths=(70, 90), split_keys=32),
}


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_attention_is_that_of_torch(name: str, dtype: torch.dtype) -> None:
    check(replace(CASES[name], dtype=dtype))


@pytest.mark.parametrize("split_keys", [1024, 32])
def test_an_fp8_cache_is_read_with_its_scales(split_keys: int) -> None:
    check(Case(dtype=BF16, cache_dtype=FP8, scales=(0.5, 2.0), split_keys=split_keys))


def test_a_very_low_and_a_very_high_score_do_not_overflow() -> None:
    case = Case(queries=(2,), lengths=(40,), split_keys=32)
    batch = make_batch(case)
    batch.queries *= 1e4
    assert torch.isfinite(attend(case, batch)).all()


@pytest.mark.parametrize("case", [Case(split_keys=32), Case(window=40, split_keys=32)], ids=["full", "window"])
def test_a_token_has_the_same_bits_alone_and_in_any_chunk(case: Case) -> None:
    """The matrix units of a GPU are not the interpreter's; what is proved is the order of the work."""
    whole = replace(case, queries=(70,), lengths=(70,))
    batch = make_batch(whole)
    expected = attend(whole, batch)
    for start, end in ((0, 1), (0, 31), (31, 33), (31, 70), (69, 70)):
        chunk = replace(whole, queries=(end - start,), lengths=(end,))
        part = Batch(
            batch.queries[start:end].contiguous(),
            batch.kv_cache,
            torch.tensor([0, end - start], dtype=torch.int32),
            torch.tensor([end], dtype=torch.int32),
            batch.block_tables,
        )
        assert torch.equal(attend(chunk, part), expected[start:end]), (start, end)


MUTATIONS = [
    ("no causal mask", "& (key[None, :] <= position[:, None])", ""),
    ("causal mask off by one", "(key[None, :] <= position", "(key[None, :] < position"),
    ("window off by one", "position[:, None] - WINDOW", "position[:, None] - WINDOW - 1"),
    ("position from the chunk's start", "length - query_end + query", "query"),
    ("block table shifted", "table_ptr + key // BLOCK_SIZE", "table_ptr + key // BLOCK_SIZE + 1"),
    ("block table of the first sequence", "sequence.to(tl.int64) * max_blocks", "0"),
    ("offset within a block ignored", "((key % BLOCK_SIZE) * NUM_KV_HEADS + kv_head)", "kv_head"),
    ("keys for values", "cache_ptr + SIDE +", "cache_ptr +"),
    ("no mask beyond the end", "is_key = key < kv_end", "is_key = key < kv_end + 16"),
    ("query heads in the wrong order", "head = kv_head * SHARED + m % SHARED", "head = m % SHARED * NUM_KV_HEADS + kv_head"),
    ("query and head swapped", "query = first_query + m // SHARED", "query = first_query + m % SHARED"),
    ("no rescaling of what was summed", "acc * shrink[:, None]", "acc"),
    ("no rescaling of the weights", "total * shrink +", "total +"),
    ("combine ignores the weights", "values * new[:, None]", "values"),
    ("combine forgets a piece", "tl.range(0, num_slots)", "tl.range(1, num_slots)"),
    ("fully masked pieces unguarded", 'tl.where(new_best == float("-inf"), 0.0, new_best)', "new_best"),
    ("rows of the next tile written", "(m < BLOCK_M // SHARED * SHARED) & ", ""),
    ("no soft cap", "if SOFT_CAP:", "if False:"),
    ("value scale ignored", "acc = acc * value_scale", "acc = acc"),
    ("key scale ignored", "scale * key_scale * _LOG2_E", "scale * _LOG2_E"),
]  # fmt: skip
HARD = [
    Case(window=20, split_keys=32, soft_cap=3.0, dtype=F32, cache_dtype=FP8, scales=(0.5, 2.0)),
    Case(split_keys=32, num_heads=3, num_kv_heads=1, queries=(7, 1, 1, 17)),
    Case(queries=(17, 6), lengths=(40, 70), split_keys=32),
    Case(queries=(17,), lengths=(40,), num_heads=3, num_kv_heads=1, block_n=16),
]


def check_hard(module: ModuleType) -> None:
    for case in HARD:
        check(case, module)


@pytest.mark.gates
@pytest.mark.parametrize(("old", "new"), [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS])
def test_a_mutated_kernel_is_caught(tmp_path: Path, old: str, new: str) -> None:
    mutant = mutated(kernel, tmp_path, old, new)
    with pytest.raises((AssertionError, IndexError)):
        check_hard(mutant)


@pytest.mark.parametrize("case", HARD)
def test_the_cases_that_mutants_fail_pass_unmutated(case: Case) -> None:
    check(case)
