"""Runs encoders on the CPU with the native kernels, in float32: each step is one native call.

Vectors are compared with those of other systems, and bfloat16 moves them too far: so weights and
activations keep their float32. Nothing is cached between steps.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from octavo.gpu_worker.errors import DeviceError
from octavo.gpu_worker.ops import (
    Activation,
    Draw,
    EncoderModel,
    Float32Array,
    Heads,
    Int32Array,
    LayerNorm,
    Linear,
    StepInput,
    UInt32Array,
)
from octavo.kernels.cpu import encoder
from octavo.kernels.cpu.encoder import EncoderOp, EncoderProgram, EncoderStep, Table
from octavo.kernels.cpu.runtime import Arena, Runtime

_HEAD_MULTIPLE = 16
_END = -1  # what `hidden` returns


class CpuEncoder:
    """A `Device` for encoders. It draws no tokens and has no cache."""

    name = "cpu"

    def __init__(
        self,
        model: EncoderModel,
        max_batch_tokens: int,
        max_running: int,  # noqa: ARG002 - nothing here is sized by it
        max_blocks_per_sequence: int,  # noqa: ARG002
        *,
        num_threads: int = 0,
        variant: str = "",
    ) -> None:
        """Pack the model's weights; the model itself may be dropped afterwards. Raises DeviceError.

        num_threads  0: one for each core that this process may use
        variant      instruction set of the kernels, "" for the best that this CPU has
        """
        runtime = Runtime(variant, num_threads)
        recorder = _Recorder(runtime)
        end = model.forward(recorder)
        assert end is _END, "a model's forward must return what ops.hidden gave it"
        self._memory = recorder.memory
        self._program = EncoderProgram(runtime, recorder.ops, recorder.columns, max_batch_tokens)
        self._hidden = np.empty((max_batch_tokens, model.output_size), np.float32)

    def kv_block_bytes(self) -> int:
        """There is no cache."""
        return 0

    def allocate_kv(self, num_blocks: int) -> None:
        """There is no cache."""
        assert num_blocks == 1, f"{num_blocks} blocks of a model without a cache"

    def forward(self, step: StepInput) -> Float32Array:
        """Run one step; return hidden states [R, hidden_size], valid until the next call.

        Raises ValueError, before anything is written, if an index of the step is out of range.
        """
        num_rows = len(step.logits_rows)
        arrays = {
            name: np.ascontiguousarray(getattr(step, name), np.int32)
            for name in ("token_ids", "positions", "query_start_loc", "logits_rows")
        }
        native = EncoderStep(
            num_tokens=len(step.token_ids), num_sequences=len(step.query_start_loc) - 1, num_rows=num_rows
        )
        if step.segments is not None:
            arrays["segments"] = np.ascontiguousarray(step.segments, np.int32)
        for name, values in arrays.items():
            setattr(native, name, values.ctypes.data)
        assert num_rows <= len(self._hidden), f"{num_rows} rows of {len(self._hidden)}"
        self._program.run(native, self._hidden)
        return self._hidden[:num_rows]

    def copy_blocks(self, pairs: Int32Array) -> None:
        """There are none."""
        assert not pairs.size, "a model without a cache has no blocks to copy"

    def mask(self, row: Float32Array, allowed: UInt32Array) -> None:
        """There are no tokens to forbid."""
        del row, allowed
        raise AssertionError("an encoder makes no tokens")

    def draw(self, logits: Float32Array, draws: list[Draw]) -> Int32Array:
        """There are no tokens to draw."""
        del logits, draws
        raise AssertionError("an encoder makes no tokens")


class _Recorder:
    """`EncoderOps` whose values are numbers of buffers; a buffer is used again once its value is used up."""

    def __init__(self, runtime: Runtime) -> None:
        self.memory = Arena(runtime)
        self.ops: list[EncoderOp] = []
        self.columns: list[int] = []
        self._free: dict[int, list[int]] = {}

    def embed_sum(self, words: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor) -> int:
        tables = [self._table(table) for table in (words, positions, segments)]
        op = EncoderOp(kind=encoder.EMBED_SUM, words=tables[0], positions=tables[1], segments=tables[2])
        return self._record(op, -1, words.shape[1])

    def layer_norm(self, x: int, norm: LayerNorm) -> int:
        op = EncoderOp(
            kind=encoder.LAYER_NORM,
            norm_weight=self._padded(norm.weight),
            norm_bias=None if norm.bias is None else self._padded(norm.bias),
            norm_eps=norm.eps,
        )
        result = self._record(op, x, self.columns[x])
        self._release(x)
        return result

    def linear(self, x: int, linear: Linear, activation: Activation | None = None) -> int:
        op = self._linear(linear, x, encoder.LINEAR)
        op.activation = encoder.ACTIVATIONS[activation]
        return self._record(op, x, linear.weight.shape[0])

    def linear_residual(self, x: int, linear: Linear, residual: int) -> int:
        op = self._linear(linear, x, encoder.LINEAR_RESIDUAL)
        op.input, op.output, op.columns = x, residual, self.columns[residual]
        self.ops.append(op)
        self._release(x)
        return residual

    def self_attention(self, qkv: int, heads: Heads, scale: float) -> int:
        if heads.head_dim % _HEAD_MULTIPLE:
            raise DeviceError(
                f"device cpu: heads of {heads.head_dim} dimensions are no multiple of {_HEAD_MULTIPLE}; "
                "use device reference"
            )
        op = EncoderOp(kind=encoder.SELF_ATTENTION, num_heads=heads.num_heads, head_dim=heads.head_dim, scale=scale)
        result = self._record(op, qkv, heads.num_heads * heads.head_dim)
        self._release(qkv)
        return result

    def hidden(self, x: int) -> int:
        self.ops.append(EncoderOp(kind=encoder.HIDDEN, input=x, output=-1, columns=self.columns[x]))
        return _END

    def _record(self, op: EncoderOp, read: int, columns: int) -> int:
        """Append an operation whose result is a new value; return the value's buffer.

        Only values of the same width share one: the padding of a row must stay zero.
        """
        reusable = self._free.get(columns)
        if not reusable:
            self.columns.append(columns)
            reusable = [len(self.columns) - 1]
        written = reusable.pop()
        op.input, op.output, op.columns = read, written, columns
        self.ops.append(op)
        return written

    def _release(self, buffer: int) -> None:
        """Note that a value is not used any more."""
        self._free.setdefault(self.columns[buffer], []).append(buffer)

    def _linear(self, linear: Linear, x: int, kind: int) -> EncoderOp:
        """Pack a layer: [out / 32][in][32], as gemm_f32.h says."""
        out_features, in_features = linear.weight.shape
        assert in_features == self.columns[x], (tuple(linear.weight.shape), self.columns[x])
        blocks = -(-out_features // encoder.ROW_MULTIPLE)
        padded = torch.zeros(blocks * encoder.ROW_MULTIPLE, in_features)
        padded[:out_features] = linear.weight.detach().float()
        packed = padded.view(blocks, encoder.ROW_MULTIPLE, in_features).transpose(1, 2).contiguous()
        bias = None if linear.bias is None else self._padded(linear.bias)
        return EncoderOp(kind=kind, in_features=in_features, weight=self._store(packed), bias=bias)

    def _table(self, table: torch.Tensor) -> Table:
        stride = -(-table.shape[1] // encoder.ROW_MULTIPLE) * encoder.ROW_MULTIPLE
        rows = torch.zeros(table.shape[0], stride)
        rows[:, : table.shape[1]] = table.detach().float()
        return Table(self._store(rows), table.shape[0], stride)

    def _padded(self, values: torch.Tensor) -> int:
        return self._store(torch.nn.functional.pad(values.detach().float(), (0, -len(values) % encoder.ROW_MULTIPLE)))

    def _store(self, values: torch.Tensor) -> int:
        """Copy float32 values; return their address."""
        values = values.contiguous()
        address = self.memory.allocate(values.numel() * 4)
        ctypes.memmove(address, values.data_ptr(), values.numel() * 4)
        return address
