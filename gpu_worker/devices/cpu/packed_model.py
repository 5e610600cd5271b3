"""A model as the native kernels run it: a recorded program over packed weights and shared buffers. Needs no torch."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from octavo.gpu_worker.devices.cpu.adapters import LinearSite
from octavo.gpu_worker.errors import DeviceError
from octavo.gpu_worker.ops import Heads, Module
from octavo.kernels.cpu import library
from octavo.kernels.cpu.runtime import BLOCK_COLUMNS, Arena, Program, Runtime, padded, row_stride

MAX_HEAD_DIM = 256  # that the kernels have room for, or are fast with
MAX_LATENT_HEAD_DIM, MAX_LATENT_DIM = 576, 512


def check_heads(heads: Heads) -> None:
    """Raise DeviceError if the kernels cannot run such heads."""
    most = MAX_LATENT_HEAD_DIM if heads.latent_dim else MAX_HEAD_DIM
    if heads.head_dim % 16 or heads.head_dim > most:
        raise DeviceError(
            f"device cpu: heads of {heads.head_dim} dimensions are no multiple of 16, or more than {most}; use device "
            "reference"
        )
    if heads.latent_dim % 16 or heads.latent_dim > MAX_LATENT_DIM:
        raise DeviceError(
            f"device cpu: a latent cache of {heads.latent_dim} dimensions is no multiple of 16, or more than "
            f"{MAX_LATENT_DIM}; use device reference"
        )


def check_head_linear(in_features: int, out_features: int, head_dim: int) -> None:
    """Raise DeviceError if the kernels cannot multiply such parts of heads."""
    if in_features % 32 or out_features % 16 or head_dim % 16:
        raise DeviceError(
            f"device cpu: heads of latent attention with {in_features} of {head_dim} dimensions that become "
            f"{out_features}; the first must be a multiple of 32, the others of 16; use device reference"
        )
    if head_dim > MAX_LATENT_HEAD_DIM:
        raise DeviceError(
            f"device cpu: heads of latent attention with {head_dim} dimensions, more than {MAX_LATENT_HEAD_DIM}; use "
            "device reference"
        )


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
    modules  what the linear layers of its operations were joined of, where that is known; by number of the operation
    """

    num_layers: int
    heads: Heads
    vocab_size: int
    runtime: Runtime
    memory: Arena
    ops: tuple[library.Op, ...]
    values: tuple[PackedValue, ...]
    modules: Mapping[int, tuple[Module, ...]] = field(default_factory=dict)

    def sites(self) -> dict[int, LinearSite]:
        """Return the layers that adapters can add to, by number of the operation."""
        kind = library.NORM_GATED_LINEAR
        return {
            op: LinearSite(int(self.ops[op].linear.in_features), modules, self.ops[op].kind == kind)
            for op, modules in self.modules.items()
        }

    @property
    def output_size(self) -> int:
        """Columns of what a step gives: logits, or hidden states."""
        last = self.ops[-1]
        return int(last.norm.size) if last.kind == library.HIDDEN else self.vocab_size

    @property
    def max_positions(self) -> int:
        """How many positions there are rotary tables for."""
        return min(int(op.max_positions) for op in self.ops if op.max_positions)

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


Shape = TypeVar("Shape", bound=Hashable)


def share_buffers(ops: Iterable[Any], shapes: Sequence[Shape]) -> list[Shape]:
    """Give each value a buffer, and two values one where the first is read no more; number them in `ops`, in place.

    `ops` are structs whose `input` and `output` number values, -1 for none. Returns the buffers' shapes. Only values
    of the same shape share one: the padding of a row must stay zero.
    """
    last_use = {}
    for index, op in enumerate(ops):
        last_use.update({value: index for value in (op.input, op.output) if value >= 0})
    buffers: list[Shape] = []
    numbers: dict[int, int] = {}
    free: dict[Shape, list[int]] = {}
    for index, op in enumerate(ops):
        read, written = op.input, op.output
        if written >= 0 and written not in numbers:
            shape = shapes[written]
            reusable = free.get(shape)
            if not reusable:
                buffers.append(shape)
            numbers[written] = reusable.pop() if reusable else len(buffers) - 1
        op.input = -1 if read < 0 else numbers[read]
        op.output = -1 if written < 0 else numbers[written]
        for number in {read, written} - {-1}:
            if last_use[number] == index:
                free.setdefault(shapes[number], []).append(numbers[number])
    return buffers
