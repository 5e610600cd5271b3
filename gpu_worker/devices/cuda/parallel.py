"""Tensor parallelism on the `cuda` device: the sums and joins over ranks that a rank's operations lack.

As `gpu_worker/distributed/parallel.py`, but on buffers that are there before: nothing is allocated or read by the
host, so that a step with its collectives can be captured.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from octavo.gpu_worker.devices.cuda.ops import CudaOps, Residual
from octavo.gpu_worker.devices.cuda.products import padded_rows
from octavo.gpu_worker.distributed.collectives import Collectives
from octavo.gpu_worker.loading.sharding import Sharding
from octavo.gpu_worker.ops import Activation, Experts, Linear, Ops


def over_ranks(collectives: Collectives, vocab_size: int) -> Callable[[Ops], Ops]:
    """Return what makes a rank's operations those of the whole model: the `wrap` of a `CudaRunner`.

    vocab_size  of the whole model
    """

    def wrap(ops: Ops) -> Ops:
        assert isinstance(ops, CudaOps), ops
        return ParallelCudaOps(ops, collectives, vocab_size)

    return wrap


def largest_over_ranks(collectives: Collectives) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what makes of values [N] the largest that any rank has: the `largest` of a `CudaRunner`. For start-up."""

    def largest(values: torch.Tensor) -> torch.Tensor:
        gathered = values.new_empty(collectives.world_size, *values.shape)
        collectives.gather(values, gathered)
        return gathered.amax(dim=0)

    return largest


class ParallelCudaOps:
    """`CudaOps` of a rank, whose residual stream and logits are whole and have the same bits on every rank."""

    def __init__(self, ops: CudaOps, collectives: Collectives, vocab_size: int) -> None:
        self._ops = ops
        self._collectives = collectives
        self._vocab_size = vocab_size
        # These work on this rank's heads and inner dimensions, and are right as they are.
        self.norm = ops.norm
        self.gated_linear = ops.gated_linear
        self.add = ops.add
        self.rotary_write_kv = ops.rotary_write_kv
        self.paged_attention = ops.paged_attention

    def embed(self, table: torch.Tensor, scale: float = 1.0) -> Residual:
        """Look up in this rank's columns [vocab_size, hidden_size / ranks]."""
        count = len(self._ops.step.token_ids)
        columns = self._ops.embed(table, scale).stream[:count]
        hidden_size = columns.shape[1] * self._collectives.world_size
        stream = self._ops.buffers.get("whole_residual", hidden_size, torch.float32)[: padded_rows(count)]
        self._join_columns(columns, stream[:count], self._space("embedded", columns, 0))
        return Residual(stream)

    def linear(self, x: torch.Tensor, linear: Linear) -> torch.Tensor:
        """Sum the result over the ranks if each has some columns of `x` and of the weights."""
        result = self._ops.linear(x, linear)
        if linear.is_partial:
            self._sum(result[: len(self._ops.step.token_ids)])
        return result

    def add_experts(self, residual: Residual, x: torch.Tensor, experts: Experts, activation: Activation) -> Residual:
        """Sum the experts over the ranks, each of which has its inner dimensions of each expert."""
        sums = self._ops.buffers.get("experts", x.shape[1], torch.float32)[: len(self._ops.step.token_ids)]
        self._ops.sum_experts(x, experts, activation, sums.zero_())
        self._sum(sums)
        return Residual(residual.stream, sums)

    def logits(self, hidden: torch.Tensor, head: Linear | None, soft_cap: float = 0.0) -> torch.Tensor:
        """Return the logits of the whole vocabulary: each rank makes a piece, the last a shorter one."""
        piece = self._ops.logits(hidden, head, soft_cap)
        count, max_rows = len(piece), padded_rows(self._ops.max_logits_rows)
        whole = self._ops.buffers.get("whole_logits", self._vocab_size, piece.dtype, max_rows)[:count]
        width = Sharding(0, self._collectives.world_size).vocab_rows(self._vocab_size).stop
        padded = self._ops.buffers.get("padded_logits", width, piece.dtype, max_rows)[:count]
        padded[:, : piece.shape[1]].copy_(piece)
        self._join_columns(padded, whole, self._space("all_logits", padded, max_rows))
        return whole

    def _sum(self, x: torch.Tensor) -> None:
        """Sum [T, hidden_size] over the ranks, in place."""
        self._collectives.all_reduce(x, self._ops.buffers.get("summed", x.shape[1], x.dtype)[: len(x)])

    def _space(self, name: str, x: torch.Tensor, max_rows: int) -> torch.Tensor:
        """Return memory [world_size, *x.shape], contiguous; `x` has at most `max_rows` rows, 0: those of a step."""
        ranks = self._collectives.world_size
        space = self._ops.buffers.get(name, ranks * x.shape[1], x.dtype, max_rows)
        return space.view(-1)[: ranks * x.numel()].view(ranks, *x.shape)

    def _join_columns(self, x: torch.Tensor, whole: torch.Tensor, space: torch.Tensor) -> None:
        """Write every rank's columns [rows, columns] beside each other to `whole`, up to its width."""
        if not len(x):  # as on every rank
            return
        self._collectives.gather(x, space)
        for rank, columns in enumerate(space):
            place = whole[:, rank * x.shape[1] : (rank + 1) * x.shape[1]]
            place.copy_(columns[:, : place.shape[1]])
