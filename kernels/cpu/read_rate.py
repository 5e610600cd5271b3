"""Measures how fast this machine's processors read memory, which bounds how fast one sequence is decoded."""

from __future__ import annotations

import ctypes
import time

from octavo.kernels.cpu.runtime import Arena, Runtime

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
