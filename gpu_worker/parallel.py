"""Tensor parallelism around any model and any device that executes operations at once.

A rank's model is built from its parts of the tensors (`sharding.py`), so almost every operation is
right as it is. What is missing are sums over the ranks, and two places where columns are joined.
"""

from __future__ import annotations

import torch

from octavo.gpu_worker.collectives import Collectives
from octavo.gpu_worker.ops import Activation, Experts, Heads, Linear, Model, Norm, Ops, Rotary
from octavo.gpu_worker.sharding import Sharding


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

    def embed(self, table: torch.Tensor) -> torch.Tensor:
        """Look up in this rank's columns [vocab_size, hidden_size / ranks]; return [T, hidden_size]."""
        return self._collectives.join_columns(self._ops.embed(table))

    def norm_linear(self, x: torch.Tensor, norm: Norm, linear: Linear) -> torch.Tensor:
        """Return this rank's rows of the layer."""
        return self._tensor(self._ops.norm_linear(x, norm, linear))

    def rotary_write_kv(
        self, qkv: torch.Tensor, layer: int, heads: Heads, rotary: Rotary, q_norm: Norm | None, k_norm: Norm | None
    ) -> torch.Tensor:
        """Work on this rank's heads."""
        return self._tensor(self._ops.rotary_write_kv(qkv, layer, heads, rotary, q_norm, k_norm))

    def paged_attention(
        self, queries: torch.Tensor, layer: int, heads: Heads, scale: float, window: int
    ) -> torch.Tensor:
        """Attend with this rank's heads."""
        return self._tensor(self._ops.paged_attention(queries, layer, heads, scale, window))

    def linear_residual(self, x: torch.Tensor, linear: Linear, residual: torch.Tensor) -> torch.Tensor:
        """Return residual + linear(x), whole, from this rank's columns of `x` and of the weights."""
        if self._collectives.rank:
            residual.zero_()  # rank 0 adds it
        return self._collectives.all_reduce(self._ops.linear_residual(x, linear, residual))

    def norm_gated_linear(
        self, x: torch.Tensor, norm: Norm, gate: Linear, up: Linear, activation: Activation
    ) -> torch.Tensor:
        """Return this rank's inner dimensions."""
        return self._tensor(self._ops.norm_gated_linear(x, norm, gate, up, activation))

    def norm_experts_residual(
        self, x: torch.Tensor, norm: Norm, experts: Experts, activation: Activation
    ) -> torch.Tensor:
        """Return x + the experts' weighted sum, whole, from this rank's inner dimensions of each expert."""
        if self._collectives.rank == 0:
            return self._collectives.all_reduce(
                self._tensor(self._ops.norm_experts_residual(x, norm, experts, activation))
            )
        # The experts need x itself, so it is taken away after: that rounds no more than adding to it does.
        partial = self._tensor(self._ops.norm_experts_residual(x.clone(), norm, experts, activation))
        return self._collectives.all_reduce(partial - x)

    def logits(self, x: torch.Tensor, norm: Norm, head: Linear | None) -> torch.Tensor:
        """Return the logits of the whole vocabulary, each rank makes a piece of it; or the hidden states."""
        piece = self._tensor(self._ops.logits(x, norm, head))
        if head is None:
            return piece
        if not len(piece):
            return piece.new_empty(0, self._vocab_size)
        width = Sharding(0, self._collectives.world_size).vocab_rows(self._vocab_size).stop
        padded = torch.nn.functional.pad(piece, (0, width - piece.shape[1]))
        return self._collectives.join_columns(padded)[:, : self._vocab_size]

    @staticmethod
    def _tensor(value: object) -> torch.Tensor:
        assert isinstance(value, torch.Tensor), "this device hands on no tensors: see devices/cuda_parallel.py"
        return value
