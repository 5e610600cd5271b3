"""Where the memory of a GPU goes."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.gpu_worker.devices.cuda.accelerator import Accelerator

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
