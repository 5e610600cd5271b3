"""A model as the native kernels run it: a recorded program over packed weights. Needs no torch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from octavo.gpu_worker.ops import Heads
from octavo.kernels.cpu import library
from octavo.kernels.cpu.runtime import BLOCK_COLUMNS, Arena, Program, Runtime, padded


@dataclass(frozen=True)
class PackedValue:
    """What an operation returns: rows of `columns` elements, one for each token; float32, else bf16."""

    columns: int
    is_float: bool

    @property
    def row_bytes(self) -> int:
        """Bytes of a row with its padding."""
        return padded(self.columns, BLOCK_COLUMNS) * (4 if self.is_float else 2)


@dataclass(frozen=True, eq=False)
class PackedModel:
    """A model that can run under any limits of a scheduler.

    runtime  the kernels that the weights are packed for
    memory   where the pointers in `ops` point
    ops      the program; `input` and `output` are numbers of `values`
    """

    num_layers: int
    heads: Heads
    vocab_size: int
    runtime: Runtime
    memory: Arena
    ops: tuple[library.Op, ...]
    values: tuple[PackedValue, ...]

    def program(self, memory: Arena, max_batch_tokens: int, max_running: int, max_blocks_per_sequence: int) -> Program:
        """Return the program with buffers of its own in `memory`, for steps within these limits."""
        ops = (library.Op * len(self.ops))(*self.ops)
        buffers = self._allocate_buffers(ops, memory, max_batch_tokens)
        info = library.ProgramInfo(
            ops=ops,
            buffers=buffers,
            num_ops=len(ops),
            num_buffers=len(buffers),
            num_layers=self.num_layers,
            num_kv_heads=self.heads.num_kv_heads,
            head_dim=self.heads.head_dim,
            vocab_size=self.vocab_size,
            max_batch_tokens=max_batch_tokens,
            max_running=max_running,
            max_blocks_per_sequence=max_blocks_per_sequence,
        )
        return Program(self.runtime, info, self.memory, memory)

    def _allocate_buffers(
        self, ops: ctypes.Array[library.Op], memory: Arena, max_batch_tokens: int
    ) -> ctypes.Array[library.Buffer]:
        """Give each value a buffer, and two values one where the first is read no more; number them in `ops`."""
        last_use = {}
        for index, op in enumerate(ops):
            last_use.update({value: index for value in (op.input, op.output) if value >= 0})
        buffers: list[library.Buffer] = []
        numbers: dict[int, int] = {}
        free: dict[PackedValue, list[int]] = {}
        for index, op in enumerate(ops):
            read, written = op.input, op.output
            if written >= 0 and written not in numbers:
                # Only values of the same shape share: the padding of a row must stay zero.
                value = self.values[written]
                reusable = free.get(value)
                if not reusable:
                    address = memory.allocate(max_batch_tokens * value.row_bytes)
                    buffers.append(library.Buffer(address, padded(value.columns, BLOCK_COLUMNS)))
                numbers[written] = reusable.pop() if reusable else len(buffers) - 1
            op.input = -1 if read < 0 else numbers[read]
            op.output = -1 if written < 0 else numbers[written]
            for number in {read, written} - {-1}:
                if last_use[number] == index:
                    free.setdefault(self.values[number], []).append(numbers[number])
        return (library.Buffer * len(buffers))(*buffers)
