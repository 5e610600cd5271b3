"""Threads, memory and packed weights of the native kernels, with torch tensors going in.

All pointers handed out here point into the runtime's arena: they live as long as the runtime.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from octavo.kernels.cpu import library

BLOCK_COLUMNS = 32  # outputs in a packed block; rows of all buffers are padded to this as well
GATED_COLUMNS = 16  # outputs of a gated pair in a packed block

_TYPES = {torch.bfloat16: library.BF16, torch.float16: library.F16, torch.float32: library.F32}


class Runtime:
    """One loaded library with its threads and one arena. Not for use by several threads at once."""

    def __init__(self, variant: str = "", num_threads: int = 0) -> None:
        """Load `variant` ("": the best) and start threads (0: one for each core that may be used)."""
        self.library = library.load(variant)
        self.num_threads = num_threads or library.available_cores()
        self.pool = self.library.octavo_pool_create(self.num_threads)
        self.arena = self.library.octavo_arena_create()
        self._release = weakref.finalize(self, _release, self.library, self.pool, self.arena)

    def allocate(self, num_bytes: int) -> int:
        """Return the address of zeroed memory, 64-byte aligned. Raises MemoryError."""
        address: int | None = self.library.octavo_arena_allocate(self.arena, num_bytes)
        if address is None:
            raise MemoryError(f"no {num_bytes / 2**30:.2f} GiB of memory for weights, activations or KV cache")
        return address

    def store_floats(self, values: torch.Tensor, multiple: int = 1) -> int:
        """Copy `values` as float32, zero-padded to a multiple; return the address."""
        floats = values.detach().to(torch.float32).contiguous()
        address = self.allocate(padded(floats.numel(), multiple) * 4)
        ctypes.memmove(address, floats.data_ptr(), floats.numel() * 4)
        return address

    def store_norm(self, weight: torch.Tensor, eps: float) -> library.Norm:
        """Copy an RMSNorm."""
        return library.Norm(self.store_floats(weight, BLOCK_COLUMNS), eps, weight.numel())

    def store_rows(self, matrix: torch.Tensor) -> tuple[int, int]:
        """Copy a matrix as bf16 rows; return address and stride."""
        stride = padded(matrix.shape[1], BLOCK_COLUMNS)
        address = self.allocate(matrix.shape[0] * stride * 2)
        with _MatrixView(matrix) as view:
            self.library.octavo_to_bf16(self.pool, view, address, stride)
        return address, stride

    def pack_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> library.Linear:
        """Pack weight [out_features, in_features] and bias."""
        out_features, in_features = weight.shape
        address = self.allocate(2 * self.library.octavo_packed_weight_size(out_features, in_features))
        with _MatrixView(weight) as view:
            self.library.octavo_pack_linear(self.pool, view, address)
        packed_bias = None if bias is None else self.store_floats(bias, BLOCK_COLUMNS)
        return library.Linear(address, packed_bias, in_features, out_features)

    def pack_gated(
        self, gate: torch.Tensor, up: torch.Tensor, gate_bias: torch.Tensor | None, up_bias: torch.Tensor | None
    ) -> library.Linear:
        """Pack a gated pair of layers, both [out_features, in_features], as one."""
        assert gate.shape == up.shape, f"gate {tuple(gate.shape)} and up {tuple(up.shape)} differ"
        out_features, in_features = gate.shape
        columns = 2 * padded(out_features, GATED_COLUMNS)
        address = self.allocate(2 * self.library.octavo_packed_weight_size(columns, in_features))
        with _MatrixView(gate) as gate_view, _MatrixView(up) as up_view:
            self.library.octavo_pack_gated(self.pool, gate_view, up_view, address)
        packed_bias = None
        if gate_bias is not None or up_bias is not None:
            pair = torch.zeros(2, padded(out_features, GATED_COLUMNS))
            for row, bias in zip(pair, (gate_bias, up_bias), strict=True):
                if bias is not None:
                    row[:out_features] = bias.detach()
            packed_bias = self.store_floats(pair.view(2, -1, GATED_COLUMNS).transpose(0, 1).flatten())
        return library.Linear(address, packed_bias, in_features, out_features)

    def pack_experts(
        self, gate: Sequence[torch.Tensor], up: Sequence[torch.Tensor], down: Sequence[torch.Tensor]
    ) -> tuple[library.Linear, library.Linear]:
        """Pack experts of one shape behind each other; return the first one's gated pair and down layer.

        gate, up  of each expert [intermediate_size, hidden_size];  down  [hidden_size, intermediate_size]
        """
        inner, hidden = gate[0].shape
        gated_bytes = 2 * self.library.octavo_packed_weight_size(2 * padded(inner, GATED_COLUMNS), hidden)
        down_bytes = 2 * self.library.octavo_packed_weight_size(hidden, inner)
        gated_address, down_address = self.allocate(len(gate) * gated_bytes), self.allocate(len(down) * down_bytes)
        for expert, parts in enumerate(zip(gate, up, down, strict=True)):
            assert [tuple(part.shape) for part in parts] == [(inner, hidden), (inner, hidden), (hidden, inner)], expert
            views = [_MatrixView(part) for part in parts]
            with views[0] as gate_view, views[1] as up_view, views[2] as down_view:
                self.library.octavo_pack_gated(self.pool, gate_view, up_view, gated_address + expert * gated_bytes)
                self.library.octavo_pack_linear(self.pool, down_view, down_address + expert * down_bytes)
        return library.Linear(gated_address, None, hidden, inner), library.Linear(down_address, None, inner, hidden)

    def measure_read(self, address: int, num_bytes: int) -> int:
        """Read memory as fast as it goes, with all threads; return how many bytes were read."""
        return int(self.library.octavo_measure_read(self.pool, address, num_bytes))

    def measure_dot(self, num_items: int) -> int:
        """Multiply bf16 pairs in registers, with all threads; return the number of floating-point operations."""
        return int(self.library.octavo_measure_dot(self.pool, num_items))

    def draw(self, logits: torch.Tensor, draws: npt.NDArray[np.void]) -> npt.NDArray[np.int32]:
        """Draw a token for each row; `draws` [N] of library.DRAW_FIELDS. -1 where no token can be drawn."""
        rows = _as_rows(logits)
        assert len(draws) == len(rows), f"{len(draws)} draws for {len(rows)} rows of logits"
        token_ids = np.empty(len(rows), np.int32)
        self.library.octavo_draw(
            self.pool, rows.data_ptr(), rows.stride(0), *rows.shape, draws.ctypes.data, token_ids.ctypes.data
        )
        return token_ids

    def argmax(self, logits: torch.Tensor) -> npt.NDArray[np.int32]:
        """Return the lowest index of each row's largest value; -1 where there is none above -inf."""
        rows = _as_rows(logits)
        token_ids = np.empty(len(rows), np.int32)
        self.library.octavo_argmax(self.pool, rows.data_ptr(), rows.stride(0), *rows.shape, token_ids.ctypes.data)
        return token_ids


class Program:
    """A recorded program over buffers of a runtime."""

    def __init__(self, runtime: Runtime, info: library.ProgramInfo) -> None:
        """Take a copy of `info` and of the arrays it points to."""
        self._runtime = runtime  # keeps the weights alive
        self._library = runtime.library
        self._handle = self._library.octavo_program_create(runtime.pool, info)
        self._release = weakref.finalize(self, self._library.octavo_program_destroy, self._handle)

    def run(self, step: library.Step, cache: library.Cache, logits: torch.Tensor) -> None:
        """Run a step into `logits` [R, vocab_size]. Raises ValueError, before anything is written, on a bad index."""
        error = ctypes.create_string_buffer(256)
        if self._library.octavo_program_run(self._handle, step, cache, logits.data_ptr(), error, len(error)) != 0:
            raise ValueError(error.value.decode())

    def profile(self, on: bool) -> dict[int, tuple[int, int]]:
        """Return (ns, phases) by kind of operation since the last call; measure on, or no longer.

        Kinds are those of `library` and PROFILE_NORM. A phase is what lies between two waits of all
        threads for each other.
        """
        ns, phases = ((ctypes.c_int64 * library.PROFILE_SIZE)() for _ in range(2))
        self._library.octavo_program_profile(self._handle, on, ns, phases)
        return {kind: (ns[kind], phases[kind]) for kind in range(library.PROFILE_SIZE) if phases[kind]}


class _MatrixView:
    """A tensor as the library sees it, kept alive for the length of a `with`."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.detach().cpu().contiguous()
        if self._tensor.dtype not in _TYPES:
            self._tensor = self._tensor.to(torch.float32)

    def __enter__(self) -> library.Matrix:
        rows, columns = self._tensor.shape
        return library.Matrix(self._tensor.data_ptr(), _TYPES[self._tensor.dtype], rows, columns)

    def __exit__(self, *_: object) -> None:
        del self._tensor


def padded(size: int, multiple: int) -> int:
    """Round up to a multiple."""
    return math.ceil(size / multiple) * multiple


def _as_rows(logits: torch.Tensor) -> torch.Tensor:
    assert logits.dtype == torch.float32, f"logits are {logits.dtype}"
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _release(loaded: ctypes.CDLL, pool: int, arena: int) -> None:
    loaded.octavo_pool_destroy(pool)
    loaded.octavo_arena_destroy(arena)
