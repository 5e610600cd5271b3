"""Sums and gathers over the ranks of a tensor-parallel group: gloo for the host, NCCL between GPUs.

Every rank gets the same bits from each of them, and an element's bits do not depend on which others
are in the call: sums are made in the order of the ranks. So all ranks draw the same tokens,
and a row's result does not depend on the other rows of its step, as on one device.

Nothing waits longer than the time-out: a rank that is gone or hangs raises RankError on the others.
NCCL's calls do not wait on the host; `worker.py` watches the time of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from octavo.gpu_worker.distributed.rendezvous import Store, dist
from octavo.gpu_worker.errors import RankError

ProcessGroup = Any


class Collectives:
    """The end of a group in this process. All ranks must make the same calls in the same order."""

    def __init__(self, store: Store, rank: int, world_size: int, host: str, timeout_s: float) -> None:
        """Connect to the other ranks through `store`, listening at the address `host` alone.

        Returns once all are connected; raises RankError.
        """
        assert world_size > 1, world_size
        self.rank = rank
        self.world_size = world_size
        self._timeout = timedelta(seconds=timeout_s)
        self._store = store
        options = dist.ProcessGroupGloo._Options()
        options._timeout = self._timeout
        # By default gloo listens wherever the host's name leads.
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        try:
            self._host = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, world_size, options)
        except RuntimeError as error:
            raise _rank_error(error) from error
        self._nccl: ProcessGroup | None = None

    def least(self, value: int) -> int:
        """Return the least of the ranks' values. Also a barrier: it returns once every rank has called it."""
        values = torch.tensor([value])
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        self._finish(lambda: self._host.allreduce([values], options))
        return int(values)

    def all_reduce(self, x: torch.Tensor, scratch: torch.Tensor | None = None) -> torch.Tensor:
        """Write the sum of every rank's `x`, added in the order of the ranks, to `x` and return it.

        x        contiguous, of the same shape on every rank, its size a multiple of the world size
        scratch  as `x`, overwritten; None: allocated if it is needed
        """
        group = self._group_of(x)
        if self.world_size == 2:  # one addition has no order
            self._finish(lambda: group.allreduce([x], dist.AllreduceOptions()))
            return x
        assert x.is_contiguous() and x.numel() % self.world_size == 0, x.shape  # noqa: PT018
        # Each rank sums one piece, in order. A library's own sum has an order that depends on the size.
        pieces = torch.empty_like(x) if scratch is None else scratch
        self._finish(lambda: group.alltoall_base(pieces.view(-1), x.view(-1), [], []))
        rows = pieces.view(self.world_size, -1)
        total = rows[0]
        for row in rows[1:]:
            total += row
        self._finish(lambda: group._allgather_base(x.view(-1), total))
        return x

    def join_columns(self, x: torch.Tensor) -> torch.Tensor:
        """Return [rows, world_size * columns] of every rank's `x` [rows, columns], in the order of the ranks."""
        x = x.contiguous()
        gathered = x.new_empty(self.world_size, *x.shape)
        self.gather(x, gathered)
        return gathered.transpose(0, 1).reshape(len(x), -1)

    def gather(self, x: torch.Tensor, gathered: torch.Tensor) -> None:
        """Write every rank's `x` to `gathered` [world_size, *x.shape]; both are contiguous."""
        group = self._group_of(x)
        self._finish(lambda: group._allgather_base(gathered.view(-1), x.view(-1)))

    def _group_of(self, x: torch.Tensor) -> ProcessGroup:
        """Return what moves tensors on the device of `x`."""
        if x.device.type == "cpu":
            return self._host
        if self._nccl is None:
            store = dist.PrefixStore("nccl", self._store)
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            self._nccl = dist.ProcessGroupNCCL(store, self.rank, self.world_size, options)
        return self._nccl

    @staticmethod
    def _finish(start: Callable[[], Any]) -> None:
        try:
            start().wait()
        except RuntimeError as error:
            raise _rank_error(error) from error


def _rank_error(error: RuntimeError) -> RankError:
    # gloo's messages begin with a place in its source and end with advice.
    reason = str(error).splitlines()[0].rpartition("cc:")[2].partition("] ")[2] or str(error).splitlines()[0]
    return RankError(f"a rank of this group is gone or hangs ({reason.partition('. This is')[0]})")
