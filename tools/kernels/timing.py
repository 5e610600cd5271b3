# mypy: allow-untyped-calls
"""Times what is launched on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_FLUSH_BYTES = 512 << 20  # several times what the second-level cache of any target holds


class Timer:
    """Times launches on `device`: with events on a GPU, with the clock on "cpu" (Triton's interpreter)."""

    def __init__(self, device: str, repeats: int = 30) -> None:
        """`repeats`: how often a launch is timed; one is enough where time means nothing."""
        self._is_gpu = device != "cpu"
        self._repeats = repeats
        self._flush = torch.empty(_FLUSH_BYTES if self._is_gpu else 0, dtype=torch.int8, device=device)

    def median_us(self, run: Callable[[], object]) -> float:
        """Return the median time of `run` in microseconds, each time with a cold cache.

        It runs once before that, and must launch the same on the same memory every time.
        """
        run()
        if self._is_gpu:
            torch.cuda.synchronize()
        return statistics.median(self._events(run) if self._is_gpu else self._clock(run))

    def _clock(self, run: Callable[[], object]) -> list[float]:
        times = []
        for _ in range(self._repeats):
            started = time.perf_counter()
            run()
            times.append((time.perf_counter() - started) * 1e6)
        return times

    def _events(self, run: Callable[[], object]) -> list[float]:
        # Launched by the host a short kernel would be timed with the host's work; a graph is there at once.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        pairs = []
        for _ in range(self._repeats):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            before.record()
            graph.replay()
            after.record()
            pairs.append((before, after))
        torch.cuda.synchronize()
        return [before.elapsed_time(after) * 1e3 for before, after in pairs]
