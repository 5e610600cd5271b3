"""Runs models for vectors on the CPU with the native kernels, in float32: each step is one native call.

Vectors are compared with those of other systems, and bfloat16 moves them too far: so weights and
activations keep their float32. Sequences are computed whole, decoders' too: nothing is cached between steps.
"""

from __future__ import annotations

import numpy as np

from octavo.gpu_worker.devices.cpu.whole_recorder import record_whole
from octavo.gpu_worker.ops import (
    Draw,
    EncoderModel,
    Float32Array,
    Int32Array,
    Model,
    NoAdapters,
    StepInput,
    UInt32Array,
)
from octavo.kernels.cpu.encoder import EncoderProgram, EncoderStep
from octavo.kernels.cpu.runtime import Runtime


class CpuEncoder(NoAdapters):
    """A `Device` for encoders, and decoders without a head. It draws no tokens and has no cache."""

    name = "cpu"
    kv_windows: tuple[int, ...] = (0,)

    def __init__(
        self,
        model: EncoderModel | Model,
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
        runtime = self._runtime = Runtime(variant, num_threads)
        recorded = record_whole(model, runtime)
        self._memory = recorded.memory
        self._program = EncoderProgram(runtime, recorded.ops, recorded.columns, max_batch_tokens)
        self._hidden = np.empty((max_batch_tokens, recorded.output_size), np.float32)

    def kv_block_bytes(self) -> int:
        """There is no cache."""
        return 0

    def allocate_kv(self, num_blocks: int) -> None:
        """There is no cache."""
        assert num_blocks == 1, f"{num_blocks} blocks of a model without a cache"

    def touch_kv(self) -> bool:
        """There is no cache."""
        return False

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

    def progress(self) -> int:
        """Count the pieces of work that the threads have done; see `ops.Device.progress`."""
        return self._runtime.progress()

    def copy_blocks(self, pairs: Int32Array) -> None:
        """There are none."""
        assert not pairs.size, "a model without a cache has no blocks to copy"

    def mask(self, row: Float32Array, allowed: UInt32Array) -> None:
        """There are no tokens to forbid."""
        del row, allowed
        raise AssertionError("a model for vectors makes no tokens")

    def argmax(self, logits: Float32Array) -> Int32Array:
        """There are no tokens to choose."""
        del logits
        raise AssertionError("a model for vectors makes no tokens")

    def draw(self, logits: Float32Array, draws: list[Draw]) -> Int32Array:
        """There are no tokens to draw."""
        del logits, draws
        raise AssertionError("a model for vectors makes no tokens")
