# ruff: noqa: D102 - the protocol says what a method does
"""The part of a GPU that is not arithmetic: streams, events, pinned memory, graphs, how much is free.

`HostAccelerator` offers the same on the CPU's memory, where everything is done when it is asked for. With it the
`cuda` device runs in Triton's interpreter (TRITON_INTERPRET=1), which is how it is tested without a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from octavo.gpu_worker.errors import DeviceError
from octavo.gpu_worker.memory import free_memory_bytes, resident_bytes
from octavo.kernels.gpu import gpu_target


class Event(Protocol):
    """A moment in the work of a device."""

    def is_past(self) -> bool:
        """Tell whether the work before it has ended."""

    def wait(self) -> None:
        """Wait until it has. Raises what went wrong in that work."""

    def us_since(self, earlier: Event) -> int:
        """Return the microseconds from an earlier event to this one; both are past."""


class Accelerator(Protocol):
    """A device's streams and memory. `target` is one of `kernels.configs.TARGETS`."""

    device: torch.device
    target: str

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """Everything below and every kernel is launched inside of this."""

    def pinned(self, num_words: int) -> torch.Tensor:
        """Allocate int32 words of the host's memory that the device can copy from and to."""

    def event(self) -> Event:
        """Mark this moment in the computing stream."""

    def download(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        """Copy to pinned memory beside the computing that follows; the event is when it is there."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record what `run` launches; return what launches it again."""

    def free_bytes(self) -> int:
        """Memory that can still be had."""

    def used_bytes(self) -> int:
        """Memory in use."""

    def synchronize(self) -> None:
        """Wait for everything that was launched."""

    def release(self) -> None:
        """Give memory that nothing refers to back to the device."""


class CudaAccelerator:
    """A GPU of torch's `cuda` kind: also AMD's, with ROCm."""

    def __init__(self, device: str) -> None:
        """Raise DeviceError if it is a GPU that no kernel is compiled for."""
        self.device = torch.device(device)
        if self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        try:
            self.target = gpu_target(self.device)
        except ValueError as error:
            raise DeviceError(f"device cuda: {error}; use cpu") from error
        # Sums are made in float32 to the end, also where a library splits them.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        self._compute = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with self.computing():
            self._pool = torch.cuda.graph_pool_handle()

    def computing(self) -> contextlib.AbstractContextManager[None]:
        return torch.cuda.stream(self._compute)

    def pinned(self, num_words: int) -> torch.Tensor:
        return torch.zeros(num_words, dtype=torch.int32, pin_memory=True)

    def event(self) -> Event:
        return _CudaEvent(self._compute)

    def download(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        self._copies.wait_stream(self._compute)
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
        return _CudaEvent(self._copies)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        run()  # compiles and loads what is used for the first time: that cannot be recorded
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._compute, capture_error_mode="thread_local"):
            run()
        replay: Callable[[], None] = graph.replay
        return replay

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def used_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        return int(total - free)

    def synchronize(self) -> None:
        self._compute.synchronize()
        self._copies.synchronize()

    def release(self) -> None:
        gc.collect()  # an error that was raised keeps what its functions held
        torch.cuda.empty_cache()


class HostAccelerator:
    """The CPU's memory, for tests: kernels run in Triton's interpreter, a graph is what it would record."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.target = "cuda:90"

    def computing(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def pinned(self, num_words: int) -> torch.Tensor:
        return torch.zeros(num_words, dtype=torch.int32)

    def event(self) -> Event:
        return _HostEvent()

    def download(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        target.copy_(source)
        return _HostEvent()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        return run

    def free_bytes(self) -> int:
        return free_memory_bytes()

    def used_bytes(self) -> int:
        return resident_bytes()

    def synchronize(self) -> None:
        return

    def release(self) -> None:
        return


def make_accelerator(device: str) -> Accelerator:
    """Return the accelerator of "cuda", "cuda:1" or, for tests, "cpu". Raises DeviceError."""
    return HostAccelerator() if device == "cpu" else CudaAccelerator(device)


class _CudaEvent:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        # `blocking` lets the thread sleep while it waits, in place of spinning.
        self._event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def is_past(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self._event.synchronize()

    def us_since(self, earlier: Event) -> int:
        assert isinstance(earlier, _CudaEvent), earlier
        return round(float(earlier._event.elapsed_time(self._event)) * 1000)


class _HostEvent:
    def __init__(self) -> None:
        self._at = time.perf_counter()

    def is_past(self) -> bool:
        return True

    def wait(self) -> None:
        return

    def us_since(self, earlier: Event) -> int:
        assert isinstance(earlier, _HostEvent), earlier
        return round((self._at - earlier._at) * 1e6)


GRAPH_BYTES = 8 << 20
"""What one captured step may take: not measured, there was no GPU. The report tells what it took."""

_KEPT_SHARE = 0.05
_KEPT_BYTES = 256 << 20
_HOST_KV_BYTES = 512 << 20


@dataclass
class MemoryReport:
    """Bytes by use. All but the graphs are allocated once, when the worker joins; `free` is what is left then."""

    weights: int = 0
    buffers: int = 0
    kv_cache: int = 0
    kv_blocks: int = 0
    graphs: int = 0
    free: int = 0

    def __str__(self) -> str:
        """Say it in one line."""
        parts = [
            f"{name} {getattr(self, name) / 2**20:,.0f} MiB"
            for name in ("weights", "buffers", "kv_cache", "graphs", "free")
        ]
        return ", ".join(parts) + f"; {self.kv_blocks} KV blocks"


def kv_memory_bytes(accelerator: Accelerator, num_graphs: int) -> int:
    """Return how many bytes the KV cache may take: graphs and the libraries' own needs are kept of what is free."""
    if accelerator.device.type == "cpu":
        return _HOST_KV_BYTES
    free = accelerator.free_bytes()
    kept = max(round(free * _KEPT_SHARE), _KEPT_BYTES) + num_graphs * GRAPH_BYTES
    return max(free - kept, 0)
