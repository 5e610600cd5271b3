"""Runs models on the CPU with the native kernels of `kernels/cpu`.

The model's `forward` runs once, over operations that pack weights and record; each step then is
one native call over the recorded program.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch

from octavo.gpu_worker.ops import Activation, Draw, Experts, Heads, Int32Array, Linear, Model, Norm, Rotary, StepInput
from octavo.kernels.cpu import library
from octavo.kernels.cpu.runtime import BLOCK_COLUMNS, Program, Runtime, padded

_BLOCK_TOKENS = 16
_MAX_HEAD_DIM = 256


class CpuDevice:
    """A `Device` with bf16 weights, activations and KV cache, and float32 sums."""

    name = "cpu"

    def __init__(
        self,
        model: Model,
        max_batch_tokens: int,
        max_running: int,
        max_blocks_per_sequence: int,
        *,
        num_threads: int = 0,
        variant: str = "",
    ) -> None:
        """Pack the model's weights; the model itself may be dropped afterwards.

        num_threads  0: one for each core that this process may use
        variant      instruction set of the kernels, "" for the best that this CPU has
        """
        self._runtime = Runtime(variant, num_threads)
        self._vocab_size = model.vocab_size
        heads = model.heads
        self._block_shape = (model.num_layers, heads.num_kv_heads, 2, heads.head_dim * _BLOCK_TOKENS)
        self._cache = library.Cache(None, 0)
        self._blocks = np.empty((0, *self._block_shape), np.uint16)
        self._logits = torch.empty(max_running, model.vocab_size)

        recorder = _Recorder(self._runtime, model)
        end = model.forward(recorder)
        assert end is recorder.end, "a model's forward must return what ops.logits gave it"
        buffers, num_buffers = recorder.allocate_buffers(max_batch_tokens)
        ops = (library.Op * len(recorder.ops))(*recorder.ops)
        self._program = Program(
            self._runtime,
            library.ProgramInfo(
                ops=ops,
                buffers=buffers,
                num_ops=len(ops),
                num_buffers=num_buffers,
                num_layers=model.num_layers,
                num_kv_heads=heads.num_kv_heads,
                head_dim=heads.head_dim,
                vocab_size=model.vocab_size,
                max_batch_tokens=max_batch_tokens,
                max_running=max_running,
                max_blocks_per_sequence=max_blocks_per_sequence,
            ),
        )

    def kv_block_bytes(self) -> int:
        """Bytes that one block of 16 tokens takes, over all layers, keys and values."""
        return int(np.prod(self._block_shape)) * 2

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate the zeroed cache, block 0 included. Memory is taken when a block is first written."""
        assert self._cache.num_blocks == 0, "the KV cache is allocated once"
        address = self._runtime.allocate(num_blocks * self.kv_block_bytes())
        self._cache = library.Cache(address, num_blocks)
        pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint16))
        self._blocks = np.ctypeslib.as_array(pointer, shape=(num_blocks, *self._block_shape))

    def forward(self, step: StepInput) -> torch.Tensor:
        """Run one step; return logits [R, vocab_size] float32, valid until the next call.

        Raises ValueError, before anything is written, if an index of the step is out of range.
        """
        num_rows = len(step.logits_rows)
        if num_rows > len(self._logits):
            self._logits = torch.empty(num_rows, self._vocab_size)
        self._program.run(_native_step(step), self._cache, self._logits)
        return self._logits[:num_rows]

    def copy_blocks(self, pairs: Int32Array) -> None:
        """Copy blocks, pairs [N, 2] of (from, to), in order. Raises ValueError for a block that is not there."""
        if pairs.size and not 0 <= pairs.min() <= pairs.max() < len(self._blocks):
            raise ValueError(f"copy_blocks: {pairs.tolist()} with {len(self._blocks)} blocks")
        for source, target in pairs.tolist():
            self._blocks[target] = self._blocks[source]

    def profile(self, on: bool) -> dict[str, tuple[int, int]]:
        """Return (ns, phases) by name of operation since the last call, and go on measuring, or no longer."""
        return {library.PROFILE_NAMES[kind]: values for kind, values in self._program.profile(on).items()}

    def draw(self, logits: torch.Tensor, draws: list[Draw]) -> Int32Array:
        """Draw a token for each row of processed `logits` [N, vocab_size] float32; return [N].

        A row of which no token can be drawn, all -inf or not a number, gives -1.
        """
        rows = [(d.top_p, d.min_p, d.seed, d.temperature, d.top_k, d.candidate_index, d.position) for d in draws]
        return self._runtime.draw(logits, np.array(rows, dtype=library.DRAW_FIELDS))


def _native_step(step: StepInput) -> library.Step:
    """Return the step as the library takes it. Raises ValueError if its arrays do not fit together.

    The library checks the values in them.
    """
    num_tokens, num_sequences = len(step.token_ids), len(step.seq_lens)
    shapes = {
        "token_ids": (num_tokens,),
        "positions": (num_tokens,),
        "slot_mapping": (num_tokens,),
        "query_start_loc": (num_sequences + 1,),
        "seq_lens": (num_sequences,),
        "block_tables": (num_sequences, step.block_tables.shape[-1]),
        "logits_rows": (len(step.logits_rows),),
    }
    native = library.Step(
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        num_logits_rows=len(step.logits_rows),
        max_blocks=step.block_tables.shape[-1],
    )
    for name, shape in shapes.items():
        array: Int32Array = getattr(step, name)
        if array.dtype != np.int32 or array.shape != shape or not array.flags.c_contiguous:
            raise ValueError(f"{name} must be a contiguous int32 array {shape}, not {array.dtype} {array.shape}")
        setattr(native, name, array.ctypes.data)
    return native


@dataclass(frozen=True, eq=False)
class _Value:
    """What an operation returned while recording: rows of `columns` elements, one for each token."""

    columns: int
    is_float: bool  # float32, else bf16

    @property
    def row_bytes(self) -> int:
        return padded(self.columns, BLOCK_COLUMNS) * (4 if self.is_float else 2)


class _Recorder:
    """An `Ops` that records a program.

    An embedding table is held in rows; one that the head is tied to is looked up in the head's
    packed weights instead, so that it is there once.
    """

    def __init__(self, runtime: Runtime, model: Model) -> None:
        self.ops: list[library.Op] = []
        self.end = object()  # what `logits` returns
        self._runtime = runtime
        self._heads = model.heads
        self._num_layers = model.num_layers
        self._vocab_size = model.vocab_size
        self._embeddings: list[tuple[library.Op, torch.Tensor]] = []  # to be stored once the head is known
        self._inputs: list[_Value | None] = []  # of each operation
        self._outputs: list[_Value | None] = []
        # Rotary tables are shared between layers. The tensors are kept so that an id stays theirs.
        self._rotary_tables: dict[int, tuple[torch.Tensor, int]] = {}
        heads = model.heads
        assert heads.head_dim % 16 == 0, f"head_dim {heads.head_dim} is not a multiple of 16"
        assert heads.head_dim <= _MAX_HEAD_DIM, f"head_dim {heads.head_dim} is above {_MAX_HEAD_DIM}"
        assert heads.num_heads % heads.num_kv_heads == 0, heads

    def embed(self, table: torch.Tensor) -> _Value:
        assert table.shape[0] >= self._vocab_size, f"embedding {tuple(table.shape)}, vocab_size {self._vocab_size}"
        op = library.Op(kind=library.EMBED, vocab_size=table.shape[0])
        self._embeddings.append((op, table))
        return self._record(op, None, _Value(table.shape[1], is_float=True))

    def norm_linear(self, x: _Value, norm: Norm, linear: Linear) -> _Value:
        op = library.Op(kind=library.NORM_LINEAR, norm=self._norm(norm, x), linear=self._linear(linear, x))
        return self._record(op, x, _Value(linear.weight.shape[0], is_float=True))

    def rotary_write_kv(
        self, qkv: _Value, layer: int, heads: Heads, rotary: Rotary, q_norm: Norm | None, k_norm: Norm | None
    ) -> _Value:
        self._check_layer(layer, heads)
        assert qkv.columns == (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim, qkv
        assert rotary.rotary_dim in range(0, heads.head_dim + 1, 2), rotary.rotary_dim
        assert rotary.cos.shape == rotary.sin.shape == (len(rotary.cos), rotary.rotary_dim // 2), rotary.cos.shape
        op = library.Op(
            kind=library.ROTARY_WRITE_KV,
            cos=self._rotary_table(rotary.cos),
            sin=self._rotary_table(rotary.sin),
            rotary_dim=rotary.rotary_dim,
            max_positions=len(rotary.cos),
            **self._attention_fields(layer, heads),
        )
        if q_norm is not None:
            op.q_norm = self._head_norm(q_norm, heads)
        if k_norm is not None:
            op.k_norm = self._head_norm(k_norm, heads)
        return self._record(op, qkv, _Value(heads.num_heads * heads.head_dim, is_float=False))

    def paged_attention(self, queries: _Value, layer: int, heads: Heads, scale: float, window: int) -> _Value:
        self._check_layer(layer, heads)
        assert queries.columns == heads.num_heads * heads.head_dim, queries
        op = library.Op(
            kind=library.PAGED_ATTENTION, scale=scale, window=window, **self._attention_fields(layer, heads)
        )
        return self._record(op, queries, _Value(queries.columns, is_float=False))

    def linear_residual(self, x: _Value, linear: Linear, residual: _Value) -> _Value:
        assert (x.is_float, residual.is_float) == (False, True), (x, residual)
        assert linear.weight.shape[0] == residual.columns, (tuple(linear.weight.shape), residual)
        op = library.Op(kind=library.LINEAR_RESIDUAL, linear=self._linear(linear, x))
        return self._record(op, x, residual)

    def norm_gated_linear(self, x: _Value, norm: Norm, gate: Linear, up: Linear, activation: Activation) -> _Value:
        assert gate.weight.shape[1] == x.columns, (tuple(gate.weight.shape), x)
        op = library.Op(
            kind=library.NORM_GATED_LINEAR,
            norm=self._norm(norm, x),
            linear=self._runtime.pack_gated(gate.weight, up.weight, gate.bias, up.bias),
            activation=library.ACTIVATIONS[activation],
        )
        return self._record(op, x, _Value(gate.weight.shape[0], is_float=False))

    def norm_experts_residual(self, x: _Value, norm: Norm, experts: Experts, activation: Activation) -> _Value:
        assert experts.gate[0].shape[1] == x.columns, (tuple(experts.gate[0].shape), x)
        num_logits = experts.num_routed + (experts.num_shared > 0)
        assert experts.router.shape == (num_logits, x.columns), (tuple(experts.router.shape), experts.num_routed)
        assert 0 < experts.num_chosen <= experts.num_routed, (experts.num_chosen, experts.num_routed)
        gated, down = self._runtime.pack_experts(experts.gate, experts.up, experts.down)
        op = library.Op(
            kind=library.NORM_EXPERTS_RESIDUAL,
            norm=self._norm(norm, x),
            linear=self._linear(Linear(experts.router), x),
            activation=library.ACTIVATIONS[activation],
            experts=library.Experts(
                gated, down, len(experts.gate), experts.num_chosen, experts.num_shared, experts.is_normalized
            ),
        )
        return self._record(op, x, x)

    def logits(self, x: _Value, norm: Norm, head: Linear) -> object:
        assert head.weight.shape[0] == self._vocab_size, (tuple(head.weight.shape), self._vocab_size)
        op = library.Op(kind=library.LOGITS, norm=self._norm(norm, x), linear=self._linear(head, x))
        self._append(op, x, None)
        for embedding, table in self._embeddings:
            if _is_same(table, head.weight):
                embedding.linear = op.linear
            else:
                embedding.table, embedding.table_stride = self._runtime.store_rows(table)
        self._embeddings.clear()
        return self.end

    def allocate_buffers(self, max_batch_tokens: int) -> tuple[ctypes.Array[library.Buffer], int]:
        """Give each value a buffer, and two values one where the first is read no more; return (buffers, count)."""
        last_use = {}
        for index, (read, written) in enumerate(zip(self._inputs, self._outputs, strict=True)):
            last_use.update({value: index for value in (read, written) if value is not None})
        buffers: list[library.Buffer] = []
        numbers: dict[_Value, int] = {}
        free: dict[tuple[int, bool], list[int]] = {}
        for index, (op, read, written) in enumerate(zip(self.ops, self._inputs, self._outputs, strict=True)):
            if written is not None and written not in numbers:
                # Only values of the same shape share: the padding of a row must stay zero.
                reusable = free.get((written.columns, written.is_float))
                if not reusable:
                    address = self._runtime.allocate(max_batch_tokens * written.row_bytes)
                    buffers.append(library.Buffer(address, padded(written.columns, BLOCK_COLUMNS)))
                numbers[written] = reusable.pop() if reusable else len(buffers) - 1
            op.input = -1 if read is None else numbers[read]
            op.output = -1 if written is None else numbers[written]
            for value in {read, written}:
                if value is not None and last_use[value] == index:
                    free.setdefault((value.columns, value.is_float), []).append(numbers[value])
        return (library.Buffer * len(buffers))(*buffers), len(buffers)

    def _record(self, op: library.Op, read: _Value | None, written: _Value) -> _Value:
        self._append(op, read, written)
        return written

    def _append(self, op: library.Op, read: _Value | None, written: _Value | None) -> None:
        self.ops.append(op)
        self._inputs.append(read)
        self._outputs.append(written)

    def _norm(self, norm: Norm, x: _Value) -> library.Norm:
        assert x.is_float, x
        assert norm.weight.shape == (x.columns,), (tuple(norm.weight.shape), x)
        return self._runtime.store_norm(norm.weight, norm.eps)

    def _head_norm(self, norm: Norm, heads: Heads) -> library.Norm:
        assert norm.weight.shape == (heads.head_dim,), (tuple(norm.weight.shape), heads)
        return self._runtime.store_norm(norm.weight, norm.eps)

    def _linear(self, linear: Linear, x: _Value) -> library.Linear:
        assert linear.weight.shape[1] == x.columns, (tuple(linear.weight.shape), x)
        assert linear.bias is None or linear.bias.shape == linear.weight.shape[:1], linear.bias
        return self._runtime.pack_linear(linear.weight, linear.bias)

    def _rotary_table(self, table: torch.Tensor) -> int:
        if id(table) not in self._rotary_tables:
            self._rotary_tables[id(table)] = (table, self._runtime.store_floats(table))
        return self._rotary_tables[id(table)][1]

    def _check_layer(self, layer: int, heads: Heads) -> None:
        assert 0 <= layer < self._num_layers, f"layer {layer} of {self._num_layers}"
        assert heads == self._heads, f"layer {layer} has {heads}, the KV cache is laid out for {self._heads}"

    @staticmethod
    def _attention_fields(layer: int, heads: Heads) -> dict[str, int]:
        return {
            "layer": layer,
            "num_heads": heads.num_heads,
            "num_kv_heads": heads.num_kv_heads,
            "head_dim": heads.head_dim,
        }


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.data_ptr(), one.dtype, one.shape, one.stride()) == (
        other.data_ptr(),
        other.dtype,
        other.shape,
        other.stride(),
    )
