"""Latent attention (arXiv 2405.04434), over a cache of what keys and values of all heads are made of.

A head's key is K c beside a rotated part that all heads share, its value V c: K and V of the head, c of the token. With
(K c) q = c (K^T q) and a sum of V c = V (a sum of c), the first matrix goes to the queries, and the second to what was
attended to. So nothing but c and the rotated part is kept of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.gpu_worker.models.config import LatentConfig, ModelConfig
from octavo.gpu_worker.ops import HeadLinear, Heads, LatentOps, Linear, Module, Norm, Rotary, Value

if TYPE_CHECKING:  # what a model needs of memory is known without torch
    import torch


@dataclass(frozen=True)
class LatentAttention:
    """What attends in one layer. Queries are made of the hidden state, or of the shorter vector of `query_down`."""

    query_down: Linear | None
    query_norm: Norm | None
    queries: Linear
    latent: Linear
    latent_norm: Norm
    to_latent: HeadLinear
    to_value: HeadLinear

    def attend(self, ops: LatentOps, x: Value, layer: int, heads: Heads, rotary: Rotary, scale: float) -> Value:
        """Return what each head of a norm's result `x` attends to: [T, num_heads * value_dim of a head]."""
        ops.write_latent(ops.linear(x, self.latent), layer, heads, rotary, self.latent_norm)
        if self.query_down is not None and self.query_norm is not None:
            x = ops.norm(ops.linear(x, self.query_down), self.query_norm)
        queries = ops.rotate_queries(ops.linear(x, self.queries), heads.num_heads, rotary)
        attended = ops.paged_attention(ops.head_linear(queries, self.to_latent), layer, heads, scale, 0)
        return ops.head_linear(attended, self.to_value)


def linear_shapes(config: ModelConfig, latent: LatentConfig) -> dict[str, tuple[int, int, bool]]:
    """Return rows and columns of one layer's matrices, named without the layer, and whether each has a bias."""
    hidden, num_heads = config.hidden_size, config.heads.num_heads
    queries = num_heads * latent.query_dim
    shapes = {
        "self_attn.kv_a_proj_with_mqa": (latent.rank + latent.rope_dim, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, num_heads * latent.value_dim, config.output_bias),
    }
    if not latent.is_split:
        shapes["self_attn.kv_b_proj"] = (num_heads * (latent.nope_dim + latent.value_dim), latent.rank, False)
    if not latent.query_rank:
        return {**shapes, "self_attn.q_proj": (queries, hidden, False)}
    return {
        **shapes,
        "self_attn.q_a_proj": (latent.query_rank, hidden, config.qkv_bias),
        "self_attn.q_b_proj": (queries, latent.query_rank, False),
    }


def other_shapes(latent: LatentConfig, num_heads: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one layer's norms inside of attention and of its split matrices, named without the layer."""
    shapes: dict[str, tuple[int, ...]] = {"self_attn.kv_a_layernorm": (latent.rank,)}
    if latent.query_rank:
        shapes["self_attn.q_a_layernorm"] = (latent.query_rank,)
    if latent.is_split:
        shapes["self_attn.k_b_proj"] = (num_heads, latent.rank, latent.nope_dim)
        shapes["self_attn.v_b_proj"] = (num_heads, latent.value_dim, latent.rank)
    return shapes


def take_layer(
    config: ModelConfig, latent: LatentConfig, tensors: dict[str, torch.Tensor], prefix: str
) -> LatentAttention:
    """Take a layer's tensors, whose names begin with `prefix`, out of `tensors`; all but those of its output."""

    def linear(name: str, *, is_reordered: bool = False) -> Linear:
        weight = tensors.pop(f"{prefix}self_attn.{name}.weight")
        bias = tensors.pop(f"{prefix}self_attn.{name}.bias", None)
        module = "" if is_reordered else f"{prefix}self_attn.{name}"
        return Linear(weight, bias, modules=(Module(module, weight.shape[0]),))

    def norm(name: str) -> Norm:
        # transformers' classes do not hand the config's epsilon on to these.
        return Norm(tensors.pop(f"{prefix}self_attn.{name}.weight"), 1e-6)

    if latent.is_split:
        to_latent, to_value = (tensors.pop(f"{prefix}self_attn.{kind}_b_proj.weight") for kind in "kv")
    else:
        matrices = tensors.pop(f"{prefix}self_attn.kv_b_proj.weight").view(config.heads.num_heads, -1, latent.rank)
        to_latent, to_value = matrices[:, : latent.nope_dim].transpose(1, 2), matrices[:, latent.nope_dim :]
    return LatentAttention(
        query_down=linear("q_a_proj") if latent.query_rank else None,
        query_norm=norm("q_a_layernorm") if latent.query_rank else None,
        queries=linear("q_b_proj" if latent.query_rank else "q_proj", is_reordered=config.is_interleaved),
        latent=linear("kv_a_proj_with_mqa", is_reordered=config.is_interleaved),
        latent_norm=norm("kv_a_layernorm"),
        to_latent=HeadLinear(to_latent),
        to_value=HeadLinear(to_value),
    )
