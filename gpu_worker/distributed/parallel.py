"""Tensor parallelism around any model and any device that executes operations at once.

A rank's model is built from its parts of the tensors (`loading/sharding.py`), so almost every operation is
right as it is. What is missing are sums over the ranks, and two places where columns are joined.
"""

from __future__ import annotations

from typing import cast

import torch

from octavo.gpu_worker.distributed.collectives import Collectives
from octavo.gpu_worker.loading.sharding import Sharding
from octavo.gpu_worker.ops import Activation, Experts, HeadLinear, Heads, LatentOps, Linear, Model, Norm, Ops, Rotary


class ParallelModel:
    """A rank's model, with the collectives that make its results those of the whole model."""

    def __init__(self, model: Model, collectives: Collectives) -> None:
        self.num_layers = model.num_layers
        self.heads = model.heads  # this rank's
        self.vocab_size = model.vocab_size
        self.dtype = model.dtype
        self._model = model
        self._collectives = collectives

    def forward(self, ops: Ops) -> torch.Tensor:
        """Run one step through `ops`; return the logits [R, vocab_size], the same bits on every rank."""
        logits: torch.Tensor = self._model.forward(ParallelOps(ops, self._collectives, self.vocab_size))
        return logits


class ParallelOps:
    """Operations whose inputs and results are whole where a model hands them on between layers."""

    def __init__(self, ops: Ops, collectives: Collectives, vocab_size: int) -> None:
        self._ops = ops
        self._collectives = collectives
        self._vocab_size = vocab_size

    def embed(self, table: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Look up in this rank's columns [vocab_size, hidden_size / ranks]; return [T, hidden_size]."""
        return self._collectives.join_columns(self._ops.embed(table, scale))

    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """Return the norm, which is whole."""
        return self._tensor(self._ops.norm(x, norm))

    def linear(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """Return this rank's rows of the layer; all of them, summed, where each rank has some columns of `x`."""
        product = self._tensor(self._ops.linear(x, linear))
        return self._collectives.all_reduce(product) if linear.is_partial else product

    def gated_linear(self, x: torch.Tensor, gate: Linear, up: Linear, activation: Activation) -> torch.Tensor:
        """Return this rank's inner dimensions."""
        return self._tensor(self._ops.gated_linear(x, gate, up, activation))

    def add(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the sum, which is whole."""
        return self._tensor(self._ops.add(residual, x))

    def add_experts(
        self, residual: torch.Tensor, x: torch.Tensor, experts: Experts, activation: Activation
    ) -> torch.Tensor:
        """Return residual + the experts' weighted sum, whole, from this rank's inner dimensions of each expert."""
        if self._collectives.rank:
            residual = torch.zeros_like(residual)  # rank 0 adds it
        return self._collectives.all_reduce(self._tensor(self._ops.add_experts(residual, x, experts, activation)))

    def rotary_write_kv(
        self, qkv: torch.Tensor, layer: int, heads: Heads, rotary: Rotary, q_norm: Norm | None, k_norm: Norm | None
    ) -> torch.Tensor:
        """Work on this rank's heads."""
        return self._tensor(self._ops.rotary_write_kv(qkv, layer, heads, rotary, q_norm, k_norm))

    def rotate_queries(self, queries: torch.Tensor, num_heads: int, rotary: Rotary) -> torch.Tensor:
        """Rotate this rank's heads."""
        return self._tensor(cast(LatentOps, self._ops).rotate_queries(queries, num_heads, rotary))

    def write_latent(self, latent: torch.Tensor, layer: int, heads: Heads, rotary: Rotary, norm: Norm) -> None:
        """Write them all: each rank has the whole cache."""
        cast(LatentOps, self._ops).write_latent(latent, layer, heads, rotary, norm)

    def head_linear(self, x: torch.Tensor, linear: HeadLinear) -> torch.Tensor:
        """Multiply this rank's heads."""
        return self._tensor(cast(LatentOps, self._ops).head_linear(x, linear))

    def paged_attention(
        self,
        queries: torch.Tensor,
        layer: int,
        heads: Heads,
        scale: float,
        window: int,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend with this rank's heads."""
        return self._tensor(self._ops.paged_attention(queries, layer, heads, scale, window, soft_cap, sinks))

    def logits(self, x: torch.Tensor, head: Linear | None, soft_cap: float = 0.0) -> torch.Tensor:
        """Return the logits of the whole vocabulary, each rank makes a piece of it; or the hidden states."""
        piece = self._tensor(self._ops.logits(x, head, soft_cap))
        if head is None:
            return piece
        if not len(piece):
            return piece.new_empty(0, self._vocab_size)
        width = Sharding(0, self._collectives.world_size).vocab_rows(self._vocab_size).stop
        padded = torch.nn.functional.pad(piece, (0, width - piece.shape[1]))
        return self._collectives.join_columns(padded)[:, : self._vocab_size]

    @staticmethod
    def _tensor(value: object) -> torch.Tensor:
        assert isinstance(value, torch.Tensor), "this device hands on no tensors: see devices/cuda/parallel.py"
        return value
