# ruff: noqa: N803, N806 - constants of a kernel are upper case
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Paged attention: one kernel for prompts, chunks of prompts and decodes, driven by a work list.

The cache of a layer is one tensor [num_blocks, 2, 16, num_kv_heads, head_dim], keys at 0 and values
at 1 of the second dimension. A block of 16 tokens is then one contiguous piece of memory, so copying
it, moving it to the host or sending it to another worker is one copy a layer, not two. Within a
block the heads of a token lie side by side, as a projection writes them: `rotary_kv.py` stores whole
rows, and attention reads head_dim contiguous elements, at least one full line of memory for
head_dim >= 64 with two bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels.aot_spec import AotSpec
from octavo.kernels.configs import FP8_TARGETS, TARGETS, AttentionConfig, Step, attention_config, power_of_two

BLOCK_SIZE = 16
_LOG2_E = 1.4426950408889634
_CACHE_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


@triton.jit
def _attend(
    query_ptr,
    cache_ptr,
    output_ptr,
    partial_ptr,
    stats_ptr,
    work_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    block_tables_ptr,
    sinks_ptr,
    max_blocks,
    score_scale,
    cap_scale,
    value_scale,
    NUM_KV_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Attend with one query tile and one key head to one piece of the keys.

    Grid (rows of the work list, NUM_KV_HEADS).

    query, output    [T, NUM_KV_HEADS * SHARED, HEAD_DIM], contiguous
    cache            [num_blocks, 2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM], contiguous
    partial          [num_slots, NUM_KV_HEADS, BLOCK_M, PADDED_DIM] float32: sums of weighted values
    stats            [num_slots, NUM_KV_HEADS, 2, BLOCK_M] float32: highest score, sum of weights
    work             [rows, 5], see `attention_plan.AttentionPlan`
    query_start_loc  [S + 1];  seq_lens [S];  block_tables [S, max_blocks], all int32
    sinks            [NUM_KV_HEADS * SHARED] float32, read with HAS_SINKS
    score_scale      scale * key scale * log2(e); with SOFT_CAP it is 2 * scale * key scale * log2(e) / cap
    cap_scale        cap * log2(e), used with SOFT_CAP
    SHARED = query heads that share a key head. Row m of a tile is query m // SHARED, head m % SHARED.
    """
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.load(work_ptr + row * 5)
    if sequence >= 0:  # captured graphs pad the work list
        first_query = tl.load(work_ptr + row * 5 + 1)
        kv_begin = tl.load(work_ptr + row * 5 + 2)
        kv_end = tl.load(work_ptr + row * 5 + 3)
        slot = tl.load(work_ptr + row * 5 + 4)
        query_end = tl.load(query_start_loc_ptr + sequence + 1)
        length = tl.load(seq_lens_ptr + sequence)

        m = tl.arange(0, BLOCK_M)
        dim = tl.arange(0, PADDED_DIM)
        query = first_query + m // SHARED
        # A group of 3 heads leaves the last of 16 rows empty; the next tile has that query.
        is_row = (m < BLOCK_M // SHARED * SHARED) & (query < query_end)
        position = length - query_end + query
        head = kv_head * SHARED + m % SHARED
        query_offset = (query.to(tl.int64) * (NUM_KV_HEADS * SHARED) + head) * HEAD_DIM
        query_mask = is_row[:, None] & (dim < HEAD_DIM)[None, :]
        queries = tl.load(query_ptr + query_offset[:, None] + dim[None, :], mask=query_mask, other=0.0)

        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
        table_ptr = block_tables_ptr + sequence.to(tl.int64) * max_blocks
        SIDE: tl.constexpr = BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM  # from a block's keys to its values
        for start in tl.range(kv_begin, kv_end, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            is_key = key < kv_end
            block = tl.load(table_ptr + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
            offset = block * (2 * SIDE) + ((key % BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM
            # What lies beyond the end was left by another sequence and may even be NaN: read as zero.
            keys = tl.load(
                cache_ptr + offset[None, :] + dim[:, None],
                mask=is_key[None, :] & (dim < HEAD_DIM)[:, None],
                other=0.0,
            )
            scores = tl.dot(queries, keys.to(queries.dtype), input_precision="ieee") * score_scale
            if SOFT_CAP:  # tanh(x) = 1 - 2 / (e^2x + 1), which has the right limits where e^2x overflows
                scores = cap_scale * (1.0 - 2.0 / (tl.exp2(scores) + 1.0))
            visible = is_key[None, :] & (key[None, :] <= position[:, None])
            if WINDOW > 0:
                visible = visible & (key[None, :] > position[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))

            new_best = tl.maximum(best, tl.max(scores, axis=1))
            # A row that has seen no key yet: -inf minus -inf would be NaN.
            base = tl.where(new_best == float("-inf"), 0.0, new_best)
            weights = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(best - base)
            total = total * shrink + tl.sum(weights, axis=1)
            values = tl.load(
                cache_ptr + SIDE + offset[:, None] + dim[None, :],
                mask=is_key[:, None] & (dim < HEAD_DIM)[None, :],
                other=0.0,
            ).to(queries.dtype)
            acc = tl.dot(weights.to(queries.dtype), values, acc * shrink[:, None], input_precision="ieee")
            best = new_best

        acc = acc * value_scale
        if slot < 0:
            if HAS_SINKS:
                total += _sink_share(sinks_ptr, head, best)
            output = acc / tl.where(total > 0, total, 1.0)[:, None]
            tl.store(output_ptr + query_offset[:, None] + dim[None, :], output, mask=query_mask)
        else:
            place = slot.to(tl.int64) * NUM_KV_HEADS + kv_head
            # Of a decode few rows of a tile are real. `_combine` reads the sums of those only, and the stats of all.
            tl.store(partial_ptr + (place * BLOCK_M + m)[:, None] * PADDED_DIM + dim[None, :], acc, mask=query_mask)
            tl.store(stats_ptr + place * 2 * BLOCK_M + m, best)
            tl.store(stats_ptr + (place * 2 + 1) * BLOCK_M + m, total)


@triton.jit
def _sink_share(sinks_ptr, head, best):
    """Return what the sinks of some rows' heads add to the sums of weights, which count from the highest score."""
    return tl.exp2(tl.load(sinks_ptr + head) * 1.4426950408889634 - best)


@triton.jit
def _combine(
    output_ptr,
    partial_ptr,
    stats_ptr,
    combines_ptr,
    query_start_loc_ptr,
    sinks_ptr,
    NUM_KV_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Join the partial results of ROWS rows of a query tile that was split.

    Grid (rows of `combines`, NUM_KV_HEADS, BLOCK_M / ROWS). `combines` is [rows, 4], see
    `attention_plan.AttentionPlan`; the other arguments are as in `_attend`. A piece in which a row
    sees no key weighs exactly nothing, so that other rows of its tile do not change its bits.
    """
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.load(combines_ptr + row * 4)
    if sequence >= 0:
        first_query = tl.load(combines_ptr + row * 4 + 1)
        slot = tl.load(combines_ptr + row * 4 + 2)
        num_slots = tl.load(combines_ptr + row * 4 + 3)
        query_end = tl.load(query_start_loc_ptr + sequence + 1)
        m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
        dim = tl.arange(0, PADDED_DIM)
        query = first_query + m // SHARED
        is_row = (m < BLOCK_M // SHARED * SHARED) & (query < query_end)

        best = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
        for piece in tl.range(0, num_slots):
            place = (slot + piece).to(tl.int64) * NUM_KV_HEADS + kv_head
            piece_best = tl.load(stats_ptr + place * 2 * BLOCK_M + m)
            piece_total = tl.load(stats_ptr + (place * 2 + 1) * BLOCK_M + m)
            mask = is_row[:, None] & (dim < HEAD_DIM)[None, :]
            values = tl.load(
                partial_ptr + (place * BLOCK_M + m)[:, None] * PADDED_DIM + dim[None, :], mask=mask, other=0.0
            )
            new_best = tl.maximum(best, piece_best)
            base = tl.where(new_best == float("-inf"), 0.0, new_best)
            old, new = tl.exp2(best - base), tl.exp2(piece_best - base)
            total = total * old + piece_total * new
            acc = acc * old[:, None] + values * new[:, None]
            best = new_best

        head = kv_head * SHARED + m % SHARED
        offset = (query.to(tl.int64) * (NUM_KV_HEADS * SHARED) + head) * HEAD_DIM
        if HAS_SINKS:
            total += _sink_share(sinks_ptr, head, best)
        output = acc / tl.where(total > 0, total, 1.0)[:, None]
        mask = is_row[:, None] & (dim < HEAD_DIM)[None, :]
        tl.store(output_ptr + offset[:, None] + dim[None, :], output, mask=mask)


def tile_queries(config: AttentionConfig, num_heads: int, num_kv_heads: int) -> int:
    """Return how many queries a tile holds: what `plan_attention` wants to know."""
    assert num_heads % num_kv_heads == 0, (num_heads, num_kv_heads)
    shared = num_heads // num_kv_heads
    assert shared <= config.block_m, f"{shared} heads share a key head; a tile has {config.block_m} rows"
    return config.block_m // shared


def partial_buffers(
    config: AttentionConfig, num_slots: int, num_kv_heads: int, head_dim: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate `partial` and `stats` of `paged_attention` for up to `num_slots` partial slots."""
    slots = max(num_slots, 1)
    partial = torch.empty(slots, num_kv_heads, config.block_m, _padded(head_dim), device=device)
    return partial, torch.empty(slots, num_kv_heads, 2, config.block_m, device=device)


def paged_attention(
    queries: torch.Tensor,
    kv_cache: torch.Tensor,
    work: torch.Tensor,
    combines: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    output: torch.Tensor,
    partial: torch.Tensor,
    stats: torch.Tensor,
    *,
    config: AttentionConfig,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Attend causally over a paged cache; write `output`. Nothing waits for the GPU or allocates.

    queries          [T, num_heads, head_dim] bfloat16, float16 or float32; `output` alike
    kv_cache         [num_blocks, 2, 16, num_kv_heads, head_dim] of the same type, or float8_e4m3fn;
                     a key is what is stored times `key_scale`, a value times `value_scale`
    work, combines   the plan of this step, made for `config` and `window` (`attention_plan.py`)
    query_start_loc  [S + 1] int32: row s owns queries query_start_loc[s] .. query_start_loc[s + 1]
    seq_lens         [S] int32: tokens of each sequence, its new ones included
    block_tables     [S, max_blocks] int32
    partial, stats   from `partial_buffers`, with room for the plan's slots
    window > 0: a query at position p sees positions p - window + 1 .. p, else 0 .. p.
    soft_cap > 0: scores become soft_cap * tanh(score / soft_cap).
    sinks            [num_heads] float32: one more score of a head's queries, without a value; or None
    """
    num_tokens, num_heads, head_dim = queries.shape
    num_kv_heads = kv_cache.shape[3]
    assert queries.dtype in _CACHE_TYPES[:3], queries.dtype
    assert kv_cache.dtype in (queries.dtype, torch.float8_e4m3fn), (kv_cache.dtype, queries.dtype)
    assert kv_cache.shape[1:] == (2, BLOCK_SIZE, num_kv_heads, head_dim), kv_cache.shape
    assert head_dim <= 256, f"head_dim {head_dim} is above 256"
    assert output.shape == queries.shape, (output.shape, queries.shape)
    assert output.dtype == queries.dtype, (output.dtype, queries.dtype)
    for tensor in (queries, kv_cache, work, combines, query_start_loc, seq_lens, block_tables, output, partial, stats):
        assert tensor.is_contiguous(), "every tensor must be contiguous"
        assert tensor.device == queries.device, (tensor.device, queries.device)
    for tensor in (work, combines, query_start_loc, seq_lens, block_tables):
        assert tensor.dtype == torch.int32, tensor.dtype
    assert work.shape[1] == 5, work.shape
    assert combines.shape[1] == 4, combines.shape
    assert len(query_start_loc) == len(seq_lens) + 1 == len(block_tables) + 1, "S differs"
    assert partial.shape[1:] == (num_kv_heads, config.block_m, _padded(head_dim)), partial.shape
    assert stats.shape == (len(partial), num_kv_heads, 2, config.block_m), stats.shape
    assert window >= 0, window
    assert soft_cap >= 0, soft_cap
    if sinks is not None:
        assert sinks.shape == (num_heads,), sinks.shape
        assert sinks.dtype == torch.float32, sinks.dtype
        assert sinks.device == queries.device, (sinks.device, queries.device)
        assert sinks.is_contiguous(), "sinks must be contiguous"
    tile_queries(config, num_heads, num_kv_heads)
    if num_tokens == 0:
        return
    shape = {
        "NUM_KV_HEADS": num_kv_heads,
        "SHARED": num_heads // num_kv_heads,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": _padded(head_dim),
        "BLOCK_M": config.block_m,
    }
    score_scale = scale * key_scale * _LOG2_E
    _attend[(len(work), num_kv_heads)](
        queries,
        kv_cache,
        output,
        partial,
        stats,
        work,
        query_start_loc,
        seq_lens,
        block_tables,
        stats if sinks is None else sinks,
        block_tables.shape[1],
        2 * score_scale / soft_cap if soft_cap > 0 else score_scale,
        soft_cap * _LOG2_E,
        value_scale,
        **shape,
        BLOCK_SIZE=BLOCK_SIZE,
        BLOCK_N=config.block_n,
        WINDOW=window,
        SOFT_CAP=soft_cap > 0,
        HAS_SINKS=sinks is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    if len(combines):
        rows = _COMBINE_ROWS
        _combine[(len(combines), num_kv_heads, config.block_m // rows)](
            output,
            partial,
            stats,
            combines,
            query_start_loc,
            stats if sinks is None else sinks,
            **shape,
            ROWS=rows,
            HAS_SINKS=sinks is not None,
            num_warps=_COMBINE_WARPS,
            num_stages=2,
            enable_fp_fusion=True,
        )


_COMBINE_ROWS = 16
_COMBINE_WARPS = 4


def _padded(head_dim: int) -> int:
    """Matrix products want a power of two, at least 16."""
    return max(power_of_two(head_dim), 16)


def _attend_spec(
    label: str,
    target: str,
    step: Step,
    head_dim: int,
    shared: int,
    kind: str = "bf16",
    cache: str = "",
    **constexprs: int,
) -> AotSpec:
    config = attention_config(target, step, head_dim, is_float32=kind == "fp32")
    # Warp-group and tensor-memory products need 64 rows; float32 products have no matrix instruction.
    wide = config.block_m >= 64 and target in ("cuda:90", "cuda:100")
    return AotSpec(
        function="_attend",
        label=f"{step} D={head_dim} group={shared} {label or kind}",
        signature={
            **dict.fromkeys(("query_ptr", "output_ptr"), f"*{kind}:16"),
            "cache_ptr": f"*{cache or kind}:16",
            **dict.fromkeys(("partial_ptr", "stats_ptr", "sinks_ptr"), "*fp32:16"),
            **dict.fromkeys(("work_ptr", "query_start_loc_ptr", "seq_lens_ptr", "block_tables_ptr"), "*i32:16"),
            "max_blocks": "i32",
            **dict.fromkeys(("score_scale", "cap_scale", "value_scale"), "fp32"),
        },
        constexprs={
            "NUM_KV_HEADS": 8,
            "SHARED": shared,
            "HEAD_DIM": head_dim,
            "PADDED_DIM": _padded(head_dim),
            "BLOCK_SIZE": BLOCK_SIZE,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "WINDOW": 0,
            "SOFT_CAP": False,
            "HAS_SINKS": False,
            **constexprs,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        targets=(target,),
        require={"ld128": 1, **({"mma": 1} if kind != "fp32" else {}), **({"wgmma": 1} if wide else {})},
        # The sums of a large tile of wide heads fill the registers.
        min_blocks=1 if head_dim > 128 else 2,
    )


def _specs() -> list[AotSpec]:
    specs = []
    for target in TARGETS:
        for step in ("decode", "mixed"):
            specs += [
                _attend_spec("", target, step, 64, 3),
                _attend_spec("", target, step, 128, 4),
                _attend_spec("window, sinks", target, step, 64, 8, WINDOW=128, HAS_SINKS=True),
                _attend_spec("window, soft cap", target, step, 256, 8, WINDOW=4096, SOFT_CAP=True),
            ]
            if target in FP8_TARGETS:
                specs.append(_attend_spec("fp8 cache", target, step, 128, 4, cache="fp8e4nv"))
        specs.append(_attend_spec("", target, "decode", 80, 1, kind="fp16"))
        specs += [_attend_spec("", target, "mixed", head_dim, 4, kind="fp32") for head_dim in (64, 128, 256)]
        specs += [_combine_spec(target, head_dim) for head_dim in (64, 256)]
    return specs


def _combine_spec(target: str, head_dim: int) -> AotSpec:
    return AotSpec(
        function="_combine",
        label=f"D={head_dim}",
        signature={
            "output_ptr": "*bf16:16",
            "partial_ptr": "*fp32:16",
            "stats_ptr": "*fp32:16",
            "combines_ptr": "*i32:16",
            "query_start_loc_ptr": "*i32:16",
            "sinks_ptr": "*fp32:16",
        },
        constexprs={
            "NUM_KV_HEADS": 8,
            "SHARED": 4,
            "HEAD_DIM": head_dim,
            "PADDED_DIM": _padded(head_dim),
            "BLOCK_M": 64,
            "ROWS": _COMBINE_ROWS,
            "HAS_SINKS": False,
        },
        num_warps=_COMBINE_WARPS,
        targets=(target,),
        require={"ld128": 1},
    )


AOT_SPECS = _specs()
