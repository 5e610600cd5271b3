"""Runs models on the CPU with the native kernels of `kernels/cpu`: each step is one native call.

The program and the packed weights come from `recorder.py`, or from the cache of an earlier start
(`packed_cache.py`). Then torch is never imported.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import numpy as np

from octavo.gpu_worker.devices.cpu.adapters import PackedAdapter
from octavo.gpu_worker.devices.cpu.packed_model import PackedModel
from octavo.gpu_worker.ops import Draw, Float32Array, Int32Array, LoraPair, Model, StepInput, UInt32Array
from octavo.gpu_worker.quantization import Quantization
from octavo.kernels.cpu import library
from octavo.kernels.cpu.runtime import Arena, Runtime
from octavo.kernels.draw import pack

_BLOCK_TOKENS = 16
_FLOAT_BYTES = 4


class CpuDevice:
    """A `Device` with bf16 activations and KV cache, float32 sums, and weights that are bf16 or quantised.

    Quantised weights are multiplied with activations of 8 bits, which are quantised in each step.
    """

    name = "cpu"
    kv_windows: tuple[int, ...] = (0,)

    def __init__(
        self,
        model: Model | PackedModel,
        max_batch_tokens: int,
        max_running: int,
        max_blocks_per_sequence: int,
        *,
        num_threads: int = 0,
        variant: str = "",
        quantization: Quantization = Quantization.NONE,
    ) -> None:
        """Pack the model's weights, unless they are packed; the model itself may be dropped afterwards.

        The rest says how to pack, and how what is packed now will run:

        num_threads   0: one for each core that this process may use
        variant       instruction set of the kernels, "" for the best that this CPU has
        quantization  how weights are kept
        """
        packed = model if isinstance(model, PackedModel) else _pack(model, Runtime(variant, num_threads), quantization)
        heads = packed.heads
        self._runtime = packed.runtime
        self._rows_at_once = packed.rows_at_once
        self._memory = Arena(packed.runtime)
        num_pages = 1 if heads.latent_dim else 2
        self._block_shape = (packed.num_layers, heads.num_kv_heads, num_pages, heads.head_dim * _BLOCK_TOKENS)
        self._cache = library.Cache(None, 0)
        self._blocks = np.empty((0, *self._block_shape), np.uint16)
        self._logits = _whole_lines(max_running, packed.output_size)
        self._best_token_ids = np.empty(max_running, np.int32)
        self._result = self._logits  # of the last step
        self._step: tuple[StepInput, library.Step] | None = None  # the last one, and as the library takes it
        self._sites, self._num_ops = packed.sites(), len(packed.ops)
        self._adapters: dict[int, PackedAdapter] = {}
        self._adapter_table = (ctypes.c_void_p * 1)()  # by adapter id
        self._program = packed.program(self._memory, max_batch_tokens, max_running, max_blocks_per_sequence)

    @property
    def rows_at_once(self) -> int:
        """How many rows all linear layers multiply in little more time than one row."""
        return self._rows_at_once

    def kv_block_bytes(self) -> int:
        """Bytes that one block of 16 tokens takes, over all layers, keys and values."""
        return int(np.prod(self._block_shape)) * 2

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate the zeroed cache, block 0 included. Memory is taken when a block is first touched or written."""
        assert self._cache.num_blocks == 0, "the KV cache is allocated once"
        address = self._memory.allocate(num_blocks * self.kv_block_bytes())
        self._cache = library.Cache(address, num_blocks)
        pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint16))
        self._blocks = np.ctypeslib.as_array(pointer, shape=(num_blocks, *self._block_shape))

    def touch_kv(self) -> bool:
        """Take the memory of the next piece of the cache, and of activations first; see `ops.Device.touch_kv`."""
        return self._memory.touch()

    def forward(self, step: StepInput) -> Float32Array:
        """Run one step; return logits or hidden states [R, output_size] float32, valid until the next call.

        Raises ValueError, before anything is written, if an index of the step is out of range.
        """
        num_rows = len(step.logits_rows)
        if num_rows > len(self._logits):
            self._logits = _whole_lines(num_rows, self._logits.shape[1])
            self._best_token_ids = np.empty(num_rows, np.int32)
        if self._step is None or step is not self._step[0]:  # else it is the same arrays, written anew
            self._step = step, _native_step(step)
        native = self._step[1]
        native.adapters, native.num_adapters = ctypes.addressof(self._adapter_table), len(self._adapter_table)
        self._program.run(native, self._cache, self._logits, self._best_token_ids)
        self._result = self._logits[:num_rows]
        return self._result

    def progress(self) -> int:
        """Count the pieces of work that the threads have done; see `ops.Device.progress`."""
        return self._runtime.progress()

    def copy_blocks(self, pairs: Int32Array) -> None:
        """Copy blocks, pairs [N, 2] of (from, to), in order. Raises ValueError for a block that is not there."""
        if pairs.size and not 0 <= pairs.min() <= pairs.max() < len(self._blocks):
            raise ValueError(f"copy_blocks: {pairs.tolist()} with {len(self._blocks)} blocks")
        for source, target in pairs.tolist():
            self._blocks[target] = self._blocks[source]

    def adapter_modules(self) -> dict[str, tuple[int, int]]:
        """See `ops.Device.adapter_modules`."""
        return {
            module.name: (module.out_features, site.in_features)
            for site in self._sites.values()
            for module in site.modules
            if module.name
        }

    def pack_adapter(self, pairs: Iterable[LoraPair]) -> PackedAdapter:
        """Round an adapter to bf16, in the order of the packed weights."""
        is_float = self._runtime.activation_bytes == _FLOAT_BYTES
        return PackedAdapter(self._num_ops, self._sites, pairs, splits_inputs=is_float)

    def set_adapter(self, adapter_id: int, packed: PackedAdapter | None) -> None:
        """See `ops.Device.set_adapter`."""
        assert adapter_id > 0, adapter_id
        self._adapters.pop(adapter_id, None)
        if packed is not None:
            self._adapters[adapter_id] = packed
        self._adapter_table = (ctypes.c_void_p * (max(self._adapters, default=0) + 1))()
        for each, adapter in self._adapters.items():
            self._adapter_table[each] = ctypes.addressof(adapter.layers)

    def profile(self, on: bool) -> dict[str, tuple[int, int]]:
        """Return (ns, phases) by name of operation since the last call, and go on measuring, or no longer."""
        return {library.PROFILE_NAMES[kind]: values for kind, values in self._program.profile(on).items()}

    def mask(self, row: Float32Array, allowed: UInt32Array) -> None:
        """Set what is not allowed in a row of logits [vocab_size] to -inf, in place; see `ops.Device.mask`."""
        self._runtime.mask(row, allowed)

    def argmax(self, logits: Float32Array) -> Int32Array:
        """Return the lowest id of each row's highest logit, or -1; see `ops.Device.argmax`."""
        return self._best_token_ids[: len(logits)].copy() if logits is self._result else self._runtime.argmax(logits)

    def draw(self, logits: Float32Array, draws: list[Draw]) -> Int32Array:
        """Draw a token for each row of processed `logits` [N, vocab_size] float32; return [N].

        A row of which no token can be drawn, all -inf or not a number, gives -1.
        """
        return self._runtime.draw(logits, pack(draws))


def _whole_lines(num_rows: int, size: int) -> Float32Array:
    """Return memory for rows that begin with a cache line, where `size` is a multiple of one.

    Then the kernels need not read a line to write it.
    """
    line = 64 // 4
    memory = np.empty(num_rows * size + line, np.float32)
    start = -(memory.ctypes.data // 4) % line
    return memory[start : start + num_rows * size].reshape(num_rows, size)


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
        **({} if step.adapter_ids is None else {"adapter_ids": (num_tokens,)}),
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
        setattr(native, name, array.__array_interface__["data"][0])  # quicker than `ctypes.data`
    return native


def _pack(model: Model, runtime: Runtime, quantization: Quantization) -> PackedModel:
    # Imported late: it needs torch.
    from octavo.gpu_worker.devices.cpu.recorder import record

    return record(model, runtime, quantization)
