"""The oracle's operations of encoders: see `EncoderOps`.

A sequence is computed whole, so its attention is one product whose shape is its own. Everything
else works on rows, in whole tiles.
"""

from __future__ import annotations

import itertools
from typing import Protocol

import torch

from octavo.gpu_worker.ops import Heads, LayerNorm, StepInput


class Weights(Protocol):
    """The part of a device that is used here."""

    dtype: torch.dtype

    def weight(self, stored: torch.Tensor) -> torch.Tensor:
        """Return a weight in the type that is computed in."""


def embed_sum(
    device: Weights, step: StepInput, words: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor
) -> torch.Tensor:
    """Return the embeddings of the step's tokens [T, hidden_size]."""
    token_ids = torch.from_numpy(step.token_ids).long()
    places = torch.from_numpy(step.positions).long()
    segment = torch.zeros_like(token_ids)
    if step.segments is not None and len(segments) > 1:
        segment = torch.from_numpy(step.segments).long()
    return words[token_ids].to(device.dtype) + (segments[segment].to(device.dtype) + positions[places].to(device.dtype))


def layer_norm(device: Weights, x: torch.Tensor, norm: LayerNorm) -> torch.Tensor:
    """Return the norm of each row."""
    centred = x - x.sum(dim=-1, keepdim=True) / x.shape[-1]
    variance = (centred * centred).sum(dim=-1, keepdim=True) / x.shape[-1]
    normed = centred * torch.rsqrt(variance + norm.eps) * device.weight(norm.weight)
    return normed if norm.bias is None else normed + device.weight(norm.bias)


def self_attention(step: StepInput, qkv: torch.Tensor, heads: Heads, scale: float, reach: int) -> torch.Tensor:
    """Attend within each sequence, at most `reach` tokens away unless it is 0; rows beyond the step's stay zero."""
    output = qkv.new_zeros(len(qkv), heads.num_heads * heads.head_dim)
    starts = step.query_start_loc.tolist()
    for start, end in itertools.pairwise(starts):
        rows = qkv[start:end].view(end - start, -1, heads.head_dim).transpose(0, 1)
        queries, keys, values = torch.split(rows, [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads])
        shared = heads.num_heads // heads.num_kv_heads
        queries, keys, values = (
            queries.contiguous(),
            keys.repeat_interleave(shared, 0),
            values.repeat_interleave(shared, 0),
        )
        scores = queries @ keys.transpose(1, 2) * scale
        if reach:
            places = torch.arange(end - start)
            scores = scores.masked_fill((places[:, None] - places).abs() > reach, -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        output[start:end] = (weights @ values).transpose(0, 1).flatten(1)
    return output
