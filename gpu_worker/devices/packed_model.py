"""A model as the native kernels run it: a recorded program over packed weights. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.gpu_worker.devices.shared_buffers import share_buffers
from octavo.gpu_worker.ops import Heads
from octavo.kernels.cpu import library
from octavo.kernels.cpu.runtime import BLOCK_COLUMNS, Arena, Program, Runtime, padded, row_stride


@dataclass(frozen=True)
class PackedValue:
    """What an operation returns: rows of `columns` elements, one for each token; float32, else activations."""

    columns: int
    is_float: bool


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

    @property
    def output_size(self) -> int:
        """Columns of what a step gives: logits, or hidden states."""
        last = self.ops[-1]
        return int(last.norm.size) if last.kind == library.HIDDEN else self.vocab_size

    @property
    def rows_at_once(self) -> int:
        """How many rows all linear layers multiply in little more time than one row."""
        formats = {op.linear.format for op in self.ops if op.linear.weight}
        return min(map(self.runtime.rows_at_once, formats))

    def program(self, memory: Arena, max_batch_tokens: int, max_running: int, max_blocks_per_sequence: int) -> Program:
        """Return the program with buffers of its own in `memory`, for steps within these limits."""
        ops = (library.Op * len(self.ops))(*self.ops)
        buffers = []
        for shape in share_buffers(ops, self.values):
            element_bytes = 4 if shape.is_float else self.runtime.activation_bytes
            stride = row_stride(padded(shape.columns, BLOCK_COLUMNS), element_bytes)
            buffers.append(library.Buffer(memory.allocate(max_batch_tokens * stride * element_bytes), stride))
        info = library.ProgramInfo(
            ops=ops,
            buffers=(library.Buffer * len(buffers))(*buffers),
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
