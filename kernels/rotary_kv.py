# ruff: noqa: N803, N806 - constants of a kernel are upper case
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Norm and rotate queries and keys, and write keys and values to the paged cache, in one launch.

A program takes several heads of one token, so that each of its 32 threads loads eight elements at
once. The halves that are rotated with each other are loaded apart: each is contiguous, where a
permuted load of the whole head would be element by element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo.kernels.aot_spec import AotSpec
from octavo.kernels.configs import FP8_TARGETS, ROTARY, ROW_TARGETS, RowConfig, power_of_two

BLOCK_SIZE = 16


@triton.jit
def _store(ptr, x, mask):
    """Store to a cache; a value beyond what float8_e4m3fn holds becomes the largest, not NaN."""
    if ptr.dtype.element_ty == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotary_write_kv(
    qkv_ptr,
    query_ptr,
    cache_ptr,
    positions_ptr,
    slot_mapping_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    key_factor,
    value_factor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    NORMS_ROW: tl.constexpr,
    ROW_PIECE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Take HEADS heads of one token: query heads, or key and value heads.

    Grid (T, ceil(NUM_HEADS / HEADS) + ceil(NUM_KV_HEADS / HEADS)).

    qkv           [T, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM]: queries, keys, values
    query         [T, NUM_HEADS, HEAD_DIM], written
    cache         [num_blocks, 2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM], written
    positions     [T] int32;  slot_mapping [T] int32: block_id * BLOCK_SIZE + offset, or -1 for padding
    cos, sin      [max_positions, HALF] float32
    q_norm, k_norm  [HEAD_DIM], read with HAS_NORM; with NORMS_ROW [NUM_HEADS, HEAD_DIM] and [NUM_KV_HEADS, HEAD_DIM]:
                    then the heads of a token are normed all at once
    key_factor, value_factor  1 / scale of an fp8 cache
    HALF = rotary_dim / 2. What is beyond the rotary dimensions of a head is REST_PADDED wide, 0 if none.
    """
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    QUERY_GROUPS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    REST: tl.constexpr = HEAD_DIM - 2 * HALF
    is_query = group < QUERY_GROUPS
    head = tl.where(is_query, group, group - QUERY_GROUPS) * HEADS + tl.arange(0, HEADS)
    is_head = head < tl.where(is_query, NUM_HEADS, NUM_KV_HEADS)
    # Keys lie behind the queries.
    source = token * (NUM_HEADS + 2 * NUM_KV_HEADS) + tl.where(is_query, head, NUM_HEADS + head)
    source_ptr = qkv_ptr + source[:, None] * HEAD_DIM
    half = tl.arange(0, HALF_PADDED)
    is_half = half < HALF
    mask = is_head[:, None] & is_half[None, :]
    one = tl.load(source_ptr + half[None, :], mask=mask, other=0.0).to(tl.float32)
    two = tl.load(source_ptr + HALF + half[None, :], mask=mask, other=0.0).to(tl.float32)
    if REST > 0:
        rest_dim = tl.arange(0, REST_PADDED)
        rest_mask = is_head[:, None] & (rest_dim < REST)[None, :]
        rest = tl.load(source_ptr + 2 * HALF + rest_dim[None, :], mask=rest_mask, other=0.0).to(tl.float32)
    if NORMS_ROW:
        row_size = tl.where(is_query, NUM_HEADS, NUM_KV_HEADS) * HEAD_DIM
        row_start = token * (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM + tl.where(is_query, 0, NUM_HEADS * HEAD_DIM)
        sums = tl.zeros([ROW_PIECE], tl.float32)
        for start in range(0, NUM_HEADS * HEAD_DIM, ROW_PIECE):
            piece = start + tl.arange(0, ROW_PIECE)
            row = tl.load(qkv_ptr + row_start + piece, mask=piece < row_size, other=0.0).to(tl.float32)
            sums += row * row
        row_inverse = 1.0 / tl.sqrt(tl.sum(sums, axis=0) / row_size + eps)
        weight_ptr = k_norm_ptr
        if is_query:
            weight_ptr = q_norm_ptr
        weight_ptrs = weight_ptr + head[:, None] * HEAD_DIM
        one = one * row_inverse * tl.load(weight_ptrs + half[None, :], mask=mask, other=0.0).to(tl.float32)
        two = two * row_inverse * tl.load(weight_ptrs + HALF + half[None, :], mask=mask, other=0.0).to(tl.float32)
        if REST > 0:
            row_weight = tl.load(weight_ptrs + 2 * HALF + rest_dim[None, :], mask=rest_mask, other=0.0)
            rest = rest * row_inverse * row_weight.to(tl.float32)
    elif HAS_NORM:
        squares = tl.sum(one * one, axis=1) + tl.sum(two * two, axis=1)
        if REST > 0:
            squares += tl.sum(rest * rest, axis=1)
        inverse = 1.0 / tl.sqrt(squares / HEAD_DIM + eps)
        norm_ptr = k_norm_ptr
        if is_query:
            norm_ptr = q_norm_ptr
        one = one * inverse[:, None] * tl.load(norm_ptr + half, mask=is_half, other=0.0).to(tl.float32)[None, :]
        two = two * inverse[:, None] * tl.load(norm_ptr + HALF + half, mask=is_half, other=0.0).to(tl.float32)[None, :]
        if REST > 0:
            weight = tl.load(norm_ptr + 2 * HALF + rest_dim, mask=rest_dim < REST, other=0.0)
            rest = rest * inverse[:, None] * weight.to(tl.float32)[None, :]
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * HALF + half, mask=is_half, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * HALF + half, mask=is_half, other=0.0)[None, :]
    rotated_one = one * cos - two * sin
    rotated_two = two * cos + one * sin

    if is_query:
        target_ptr = query_ptr + (token * NUM_HEADS + head)[:, None] * HEAD_DIM
        tl.store(target_ptr + half[None, :], rotated_one, mask=mask)
        tl.store(target_ptr + HALF + half[None, :], rotated_two, mask=mask)
        if REST > 0:
            tl.store(target_ptr + 2 * HALF + rest_dim[None, :], rest, mask=rest_mask)
    else:
        slot = tl.load(slot_mapping_ptr + token).to(tl.int64)
        if slot >= 0:  # captured graphs pad the batch; a padding token writes nothing
            SIDE: tl.constexpr = BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM  # from a block's keys to its values
            place = slot // BLOCK_SIZE * (2 * SIDE) + slot % BLOCK_SIZE * (NUM_KV_HEADS * HEAD_DIM)
            key_ptr = cache_ptr + place + head[:, None] * HEAD_DIM
            _store(key_ptr + half[None, :], rotated_one * key_factor, mask)
            _store(key_ptr + HALF + half[None, :], rotated_two * key_factor, mask)
            value_ptr = source_ptr + NUM_KV_HEADS * HEAD_DIM
            one = tl.load(value_ptr + half[None, :], mask=mask, other=0.0).to(tl.float32)
            two = tl.load(value_ptr + HALF + half[None, :], mask=mask, other=0.0).to(tl.float32)
            _store(key_ptr + SIDE + half[None, :], one * value_factor, mask)
            _store(key_ptr + SIDE + HALF + half[None, :], two * value_factor, mask)
            if REST > 0:
                _store(key_ptr + 2 * HALF + rest_dim[None, :], rest * key_factor, rest_mask)
                rest = tl.load(value_ptr + 2 * HALF + rest_dim[None, :], mask=rest_mask, other=0.0).to(tl.float32)
                _store(key_ptr + SIDE + 2 * HALF + rest_dim[None, :], rest * value_factor, rest_mask)


def rotary_write_kv(
    qkv: torch.Tensor,
    queries: torch.Tensor,
    kv_cache: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    config: RowConfig,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Norm (if weights are given) and rotate queries and keys; write `queries` and `kv_cache`.

    qkv           [T, num_heads + 2 * num_kv_heads, head_dim] any float type: queries, keys, values
    queries       [T, num_heads, head_dim], any float type
    kv_cache      [num_blocks, 2, 16, num_kv_heads, head_dim] any float type, or float8_e4m3fn: then
                  what is stored is the key / key_scale and the value / value_scale, clamped
    positions     [T] int32, within `cos` for padding too
    slot_mapping  [T] int32: block_id * 16 + offset, or -1 for padding; no slot twice
    cos, sin      [max_positions, rotary_dim / 2] float32; the first rotary_dim dimensions of a head are
                  rotated, dimension i with i + rotary_dim / 2
    config        `configs.ROTARY` of the target
    q_norm, k_norm  [head_dim] of the same type, both or neither; or [num_heads * head_dim] and
                  [num_kv_heads * head_dim]: then the heads of a token are normed all at once
    """
    num_tokens, num_heads, head_dim = queries.shape
    num_kv_heads, half = kv_cache.shape[3], cos.shape[1]
    assert qkv.shape == (num_tokens, num_heads + 2 * num_kv_heads, head_dim), (qkv.shape, queries.shape)
    assert kv_cache.shape[1:] == (2, BLOCK_SIZE, num_kv_heads, head_dim), kv_cache.shape
    assert positions.shape == slot_mapping.shape == (num_tokens,), (positions.shape, slot_mapping.shape)
    assert positions.dtype == slot_mapping.dtype == torch.int32, (positions.dtype, slot_mapping.dtype)
    assert cos.dtype == sin.dtype == torch.float32, (cos.dtype, sin.dtype)
    assert cos.shape == sin.shape, (cos.shape, sin.shape)
    assert 0 < 2 * half <= head_dim <= 256, (half, head_dim)
    assert (q_norm is None) == (k_norm is None), "norm both queries and keys, or neither"
    for tensor in (qkv, queries, kv_cache, positions, slot_mapping, cos, sin, q_norm, k_norm):
        assert tensor is None or tensor.is_contiguous(), "every tensor must be contiguous"
        assert tensor is None or tensor.device == qkv.device, (tensor.device, qkv.device)
    norms_row = q_norm is not None and q_norm.numel() != head_dim
    if q_norm is not None and k_norm is not None:
        sizes = (num_heads * head_dim, num_kv_heads * head_dim) if norms_row else (head_dim, head_dim)
        assert (q_norm.numel(), k_norm.numel()) == sizes, (q_norm.shape, k_norm.shape)
        assert q_norm.dtype == k_norm.dtype, (q_norm.dtype, k_norm.dtype)
    if num_tokens == 0:
        return
    heads = _heads(config, head_dim, half)
    groups = -(-num_heads // heads) + -(-num_kv_heads // heads)
    _rotary_write_kv[(num_tokens, groups)](
        qkv,
        queries,
        kv_cache,
        positions,
        slot_mapping,
        cos,
        sin,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        eps,
        1 / key_scale,
        1 / value_scale,
        **_shape(
            num_heads, num_kv_heads, head_dim, half, has_norm=q_norm is not None, heads=heads, norms_row=norms_row
        ),
        num_warps=config.num_warps,
        num_stages=2,
        enable_fp_fusion=True,
    )


def _heads(config: RowConfig, head_dim: int, half: int) -> int:
    """How many heads a program takes. Where next to nothing is rotated, the rest counts."""
    rest = head_dim - 2 * half
    return max(config.block // max(power_of_two(half), power_of_two(rest) // 2 if rest else 0), 1)


def _shape(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    half: int,
    *,
    has_norm: bool,
    heads: int,
    norms_row: bool = False,
) -> dict[str, int]:
    rest = head_dim - 2 * half
    return {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "HALF": half,
        "HALF_PADDED": power_of_two(half),
        "REST_PADDED": power_of_two(rest) if rest else 0,
        "HAS_NORM": has_norm,
        "NORMS_ROW": norms_row,
        "ROW_PIECE": 1024,
        "BLOCK_SIZE": BLOCK_SIZE,
        "HEADS": heads,
    }


def _spec(label: str, target: str, head_dim: int, half: int, *, norm: str = "", cache: str = "bf16") -> AotSpec:
    config = ROTARY[target]
    return AotSpec(
        function="_rotary_write_kv",
        label=label,
        signature={
            **dict.fromkeys(("qkv_ptr", "query_ptr"), "*bf16:16"),
            **dict.fromkeys(("q_norm_ptr", "k_norm_ptr"), f"*{norm or 'bf16'}:16"),
            "cache_ptr": f"*{cache}:16",
            **dict.fromkeys(("positions_ptr", "slot_mapping_ptr"), "*i32:16"),
            **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32:16"),
            **dict.fromkeys(("eps", "key_factor", "value_factor"), "fp32"),
        },
        constexprs=_shape(32, 8, head_dim, half, has_norm=bool(norm), heads=_heads(config, head_dim, half)),
        num_warps=config.num_warps,
        targets=(target,),
        require={"ld128": 2},
    )


def _specs() -> list[AotSpec]:
    specs = []
    for target in ROW_TARGETS:
        specs += [
            _spec("D=64", target, 64, 32),
            _spec("D=128 norm", target, 128, 64, norm="bf16"),
            _spec("D=256 fp32 norm", target, 256, 128, norm="fp32"),
            _spec("D=128 rotary 64", target, 128, 32),
        ]
        if target in FP8_TARGETS:
            specs.append(_spec("D=128 fp8 cache", target, 128, 64, cache="fp8e4nv"))
    return specs


AOT_SPECS = _specs()
