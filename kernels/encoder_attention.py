# ruff: noqa: N803, N806 - constants of a kernel are upper case
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Attention of encoders: all tokens of a sequence see each other, and nothing is kept of them.

Sequences lie one behind the other, without padding; keys and values are read where the projection wrote them.
A program takes a tile of queries of one sequence and one head, and all keys of that sequence from its first, so
the order of a query's sums depends on its own sequence only. There is no cache and no split: an encoder's
sequence fits in a step, and has a tile for every few of its tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from octavo.kernels.aot_spec import AotSpec
from octavo.kernels.configs import TARGETS, AttentionConfig, attention_config, power_of_two

_LOG2_E = 1.4426950408889634
_FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _attend_sequence(
    qkv_ptr,
    output_ptr,
    work_ptr,
    query_start_loc_ptr,
    score_scale,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attend with one tile of queries and one head to all keys of their sequence. Grid (tiles, NUM_HEADS).

    qkv              [T, 3, NUM_HEADS, HEAD_DIM]: queries, keys, values;  output [T, NUM_HEADS, HEAD_DIM]
    work             [tiles, 2] int32: sequence, first query (index into the step's tokens)
    query_start_loc  [S + 1] int32;  score_scale = scale * log2(e)
    """
    head = tl.program_id(1)
    sequence = tl.load(work_ptr + tl.program_id(0) * 2)
    first_query = tl.load(work_ptr + tl.program_id(0) * 2 + 1)
    begin = tl.load(query_start_loc_ptr + sequence)
    end = tl.load(query_start_loc_ptr + sequence + 1)
    ROW: tl.constexpr = NUM_HEADS * HEAD_DIM
    query = first_query + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, PADDED_DIM)
    is_dim = dim < HEAD_DIM
    query_mask = (query < end)[:, None] & is_dim[None, :]
    column = head * HEAD_DIM + dim
    queries = tl.load(qkv_ptr + query.to(tl.int64)[:, None] * (3 * ROW) + column[None, :], mask=query_mask, other=0.0)

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    for start in tl.range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        is_key = key < end
        place = key.to(tl.int64) * (3 * ROW)
        keys = tl.load(
            qkv_ptr + ROW + place[None, :] + column[:, None], mask=is_key[None, :] & is_dim[:, None], other=0.0
        )
        scores = tl.dot(queries, keys, input_precision="ieee") * score_scale
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))  # each tile has a key: never -inf
        weights = tl.exp2(scores - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(weights, axis=1)
        values = tl.load(
            qkv_ptr + 2 * ROW + place[:, None] + column[None, :], mask=is_key[:, None] & is_dim[None, :], other=0.0
        )
        acc = tl.dot(weights.to(queries.dtype), values, acc * shrink[:, None], input_precision="ieee")
        best = new_best

    tl.store(output_ptr + query.to(tl.int64)[:, None] * ROW + column[None, :], acc / total[:, None], mask=query_mask)


def encoder_work(query_start_loc: npt.NDArray[Any], config: AttentionConfig) -> npt.NDArray[np.int32]:
    """Return the tiles of a step, [tiles, 2] int32: sequence, first query; `query_start_loc` is [S + 1]."""
    starts = np.asarray(query_start_loc, np.int64)
    tiles_of = -(-np.diff(starts) // config.block_m)
    sequence = np.repeat(np.arange(len(tiles_of)), tiles_of)
    number = np.arange(len(sequence)) - np.repeat(np.cumsum(tiles_of) - tiles_of, tiles_of)
    return np.stack([sequence, starts[sequence] + number * config.block_m], axis=1).astype(np.int32)


def encoder_attention(
    qkv: torch.Tensor,
    work: torch.Tensor,
    query_start_loc: torch.Tensor,
    output: torch.Tensor,
    *,
    config: AttentionConfig,
    scale: float,
) -> None:
    """Attend among all tokens of each sequence; write `output`. Nothing waits for the GPU or allocates.

    qkv              [T, 3, num_heads, head_dim] bfloat16, float16 or float32: queries, keys, values
    work             [tiles, 2] int32, `encoder_work` of the step and `config`
    query_start_loc  [S + 1] int32: sequence s owns tokens query_start_loc[s] .. query_start_loc[s + 1]
    output           [T, num_heads, head_dim] of the same type
    """
    num_tokens, _, num_heads, head_dim = qkv.shape
    assert qkv.dtype in _FLOAT_TYPES, qkv.dtype
    assert qkv.shape[1] == 3, qkv.shape
    assert head_dim <= 256, f"head_dim {head_dim} is above 256"
    assert output.shape == (num_tokens, num_heads, head_dim), (output.shape, qkv.shape)
    assert output.dtype == qkv.dtype, (output.dtype, qkv.dtype)
    assert work.shape[1] == 2, work.shape
    assert work.dtype == query_start_loc.dtype == torch.int32, (work.dtype, query_start_loc.dtype)
    for tensor in (qkv, work, query_start_loc, output):
        assert tensor.is_contiguous(), "every tensor must be contiguous"
        assert tensor.device == qkv.device, (tensor.device, qkv.device)
    if len(work):
        _attend_sequence[(len(work), num_heads)](
            qkv,
            output,
            work,
            query_start_loc,
            scale * _LOG2_E,
            **_constants(num_heads, head_dim, config),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )


def _constants(num_heads: int, head_dim: int, config: AttentionConfig) -> dict[str, int]:
    return {
        "NUM_HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": max(power_of_two(head_dim), 16),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }


def _spec(target: str, num_heads: int, head_dim: int, kind: str) -> AotSpec:
    config = attention_config(target, "mixed", head_dim, is_float32=kind == "fp32")
    wide = {"wgmma": 1} if target in ("cuda:90", "cuda:100") else {}
    return AotSpec(
        function="_attend_sequence",
        label=f"D={head_dim} {kind}",
        signature={
            "qkv_ptr": f"*{kind}:16",
            "output_ptr": f"*{kind}:16",
            "work_ptr": "*i32:16",
            "query_start_loc_ptr": "*i32:16",
            "score_scale": "fp32",
        },
        constexprs=_constants(num_heads, head_dim, config),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        targets=(target,),
        require={"ld128": 1, **({} if kind == "fp32" else {"mma": 1, **wide})},
    )


AOT_SPECS = [
    _spec(target, num_heads, head_dim, kind)
    for target in TARGETS
    for num_heads, head_dim, kind in ((12, 32, "bf16"), (12, 64, "bf16"), (12, 64, "fp32"))
]
