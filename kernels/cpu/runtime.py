"""Threads and memory of the native kernels. Nothing here needs torch: packing weights does (`packing.py`)."""

from __future__ import annotations

import ctypes
import math
import os
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.kernels.cpu import library
from octavo.kernels.machine import available_cores, memory_nodes

BLOCK_COLUMNS = 32  # outputs in a packed block; rows of all buffers are padded to this as well
GATED_COLUMNS = 16  # outputs of a gated pair in a packed block


class Runtime:
    """One loaded library with its threads. Not for use by several threads at once."""

    def __init__(self, variant: str = "", num_threads: int = 0) -> None:
        """Load `variant` ("": the best) and start threads (0: one for each core that may be used).

        Raises library.KernelError where the system refuses a thread.
        """
        self.library = library.load(variant)
        self.num_threads = num_threads or available_cores()
        self.pool = self.library.octavo_pool_create(self.num_threads)
        self._release = weakref.finalize(self, self.library.octavo_pool_destroy, self.pool)
        # A daemon thread may run a step until the process is gone, which ends the threads anyway.
        self._release.atexit = False

    @property
    def identity(self) -> str:
        """A name that changes with the kernels' sources, their variant and their compiler."""
        return Path(self.library._name).name

    @property
    def activation_bytes(self) -> int:
        """Bytes of an activation between operations."""
        return int(self.library.octavo_activation_bytes())

    def progress(self) -> int:
        """How many pieces of work its threads have done, in any call; for use by any thread at any time."""
        return int(self.library.octavo_pool_progress(self.pool))

    def rows_at_once(self, weight_format: int) -> int:
        """How many rows a linear layer multiplies in little more time than one row; of library.WEIGHT_...."""
        return int(self.library.octavo_rows_at_once(weight_format))

    @property
    def reads_compressed(self) -> bool:
        """Whether linear layers may be of library.WEIGHT_COMPRESSED."""
        return bool(self.library.octavo_reads_compressed())

    def measure_read(self, address: int, num_bytes: int) -> int:
        """Read memory as fast as it goes, with all threads; return how many bytes were read."""
        return int(self.library.octavo_measure_read(self.pool, address, num_bytes))

    def measure_dot(self, num_items: int) -> int:
        """Multiply bf16 pairs in registers, with all threads; return the number of floating-point operations."""
        return int(self.library.octavo_measure_dot(self.pool, num_items))

    def measure_integer_dot(self, num_items: int) -> int:
        """Multiply quads of bytes in registers, with all threads; return the number of operations."""
        return int(self.library.octavo_measure_integer_dot(self.pool, num_items))

    def mask(self, row: npt.NDArray[np.float32], allowed: npt.NDArray[np.uint32]) -> None:
        """Set the logits of `row` [V] to -inf whose bit is not set: bit t % 32 of word t // 32. In place."""
        assert row.dtype == np.float32, f"logits are {row.dtype}"
        assert row.flags.c_contiguous, "a row must be contiguous"
        assert len(allowed) * 32 >= len(row), f"{len(allowed)} words for {len(row)} logits"
        self.library.octavo_mask(row.ctypes.data, allowed.ctypes.data, len(row))

    def draw(self, logits: npt.NDArray[np.float32], draws: npt.NDArray[np.void]) -> npt.NDArray[np.int32]:
        """Draw a token for each row; `draws` [N] of draw.STRUCT. -1 where no token can be drawn."""
        rows = _as_rows(logits)
        assert len(draws) == len(rows), f"{len(draws)} draws for {len(rows)} rows of logits"
        token_ids = np.empty(len(rows), np.int32)
        self.library.octavo_draw(
            self.pool, _address(rows), rows.strides[0] // 4, *rows.shape, _address(draws), _address(token_ids)
        )
        return token_ids

    def argmax(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
        """Return the lowest index of each row's largest value; -1 where that is infinite, or a value is NaN."""
        rows = _as_rows(logits)
        token_ids = np.empty(len(rows), np.int32)
        self.library.octavo_argmax(self.pool, _address(rows), rows.strides[0] // 4, *rows.shape, _address(token_ids))
        return token_ids


class Arena:
    """Memory of the native kernels. What is handed out lives as long as the arena.

    pieces  address and size in bytes of all that was handed out
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._handle = runtime.library.octavo_arena_create(sum(1 << node for node in memory_nodes()))
        self._release = weakref.finalize(self, runtime.library.octavo_arena_destroy, self._handle)
        # A thread that stores packed weights may read them until the process is gone, which frees them anyway.
        self._release.atexit = False
        self.pieces: list[tuple[int, int]] = []

    def allocate(self, num_bytes: int) -> int:
        """Return the address of zeroed memory, 64-byte aligned. Raises MemoryError."""
        address: int | None = self._runtime.library.octavo_arena_allocate(self._handle, num_bytes)
        if address is None:
            raise MemoryError(f"no {num_bytes / 2**30:.2f} GiB of memory for weights, activations or KV cache")
        self.pieces.append((address, num_bytes))
        return address

    def touch(self) -> bool:
        """Have the system give the memory of one more huge page for each thread, what was handed out first first.

        Changes nothing in it; nobody may write there meanwhile. False if no page is left.
        """
        return bool(self._runtime.library.octavo_arena_touch(self._handle, self._runtime.pool))


def read_file(runtime: Runtime, file: int, offset: int, address: int, num_bytes: int) -> list[int]:
    """Read a part of an open file to `address` with all threads; return its checksums. Raises OSError."""
    checksums = np.empty(math.ceil(num_bytes / library.CHUNK_BYTES), np.uint64)
    error = runtime.library.octavo_read_file(runtime.pool, file, offset, num_bytes, address, checksums.ctypes.data)
    if error != 0:
        raise OSError(error, os.strerror(error))
    return checksums.tolist()


def checksums_of(runtime: Runtime, data: npt.NDArray[np.uint8]) -> list[int]:
    """Return the checksums that `read_file` gives for the same bytes. Takes none of the runtime's threads."""
    checksums = np.empty(math.ceil(len(data) / library.CHUNK_BYTES), np.uint64)
    runtime.library.octavo_checksums(data.ctypes.data, len(data), checksums.ctypes.data)
    return checksums.tolist()


class Program:
    """A recorded program over buffers of an arena."""

    def __init__(self, runtime: Runtime, info: library.ProgramInfo, *memory: Arena) -> None:
        """Take a copy of `info` and of the arrays it points to, and keep `memory`, which its pointers point into."""
        self._runtime = runtime
        self._memory = memory
        self._library = runtime.library
        self._handle = self._library.octavo_program_create(runtime.pool, info)
        self._error = ctypes.create_string_buffer(256)
        self._release = weakref.finalize(self, self._library.octavo_program_destroy, self._handle)
        self._release.atexit = False  # see Runtime

    def run(
        self,
        step: library.Step,
        cache: library.Cache,
        logits: npt.NDArray[np.float32],
        best_token_ids: npt.NDArray[np.int32],
    ) -> None:
        """Run a step into `logits` [R, output_size]; what `Runtime.argmax` finds there into `best_token_ids` [R].

        Hidden states have no best tokens. Raises ValueError, before anything is written, on a bad index.
        """
        error = self._error
        outputs = _address(logits), _address(best_token_ids)
        if self._library.octavo_program_run(self._handle, step, cache, *outputs, error, len(error)) != 0:
            raise ValueError(error.value.decode())

    def profile(self, on: bool) -> dict[int, tuple[int, int]]:
        """Return (ns, phases) by kind of operation since the last call; measure on, or no longer.

        Kinds are those of `library`, PROFILE_ROWWISE and PROFILE_PREPARE. A phase is what lies between two waits of all
        threads for each other.
        """
        ns, phases = ((ctypes.c_int64 * library.PROFILE_SIZE)() for _ in range(2))
        self._library.octavo_program_profile(self._handle, on, ns, phases)
        return {kind: (ns[kind], phases[kind]) for kind in range(library.PROFILE_SIZE) if phases[kind]}


def padded(size: int, multiple: int) -> int:
    """Round up to a multiple."""
    return math.ceil(size / multiple) * multiple


def row_stride(size: int, element_bytes: int) -> int:
    """Return the distance of rows of whole cache lines: an odd number of lines.

    Then the same columns of neighbouring rows do not compete for the same places in a cache.
    """
    line = 64 // element_bytes
    return size + (line if size // line % 2 == 0 else 0)


def _address(array: npt.NDArray[Any]) -> int:
    """Return where an array's memory is: quicker than `ctypes.data`."""
    address: int = array.__array_interface__["data"][0]
    return address


def _as_rows(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    assert logits.dtype == np.float32, f"logits are {logits.dtype}"
    return logits if logits.strides[1] == 4 else np.ascontiguousarray(logits)


_BYTES = 256 << 20  # far more than any cache holds
_ROUNDS = 3


def read_rate(num_threads: int = 0) -> float:
    """Return bytes per second, with all threads (0: one a core): the best of some rounds. Takes tenths of a second.

    Raises build.BuildError, library.KernelError or MemoryError.
    """
    runtime = Runtime(num_threads=num_threads)
    arena = Arena(runtime)  # the memory lives as long as it does
    address = arena.allocate(_BYTES)
    ctypes.memset(address, 1, _BYTES)
    best = 0.0
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        num_bytes = runtime.measure_read(address, _BYTES)
        best = max(best, num_bytes / (time.perf_counter() - started))
    return best
