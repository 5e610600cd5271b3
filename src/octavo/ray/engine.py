"""The engine of the Serve application: a scheduler and its workers, below one replica."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import ray

from octavo.ray.progress import Progress, sample
from octavo.services.offline.local_server import LocalServer

_STALL_S = 60.0


class Engine:
    """A replica. Its processes are children of `octavo serve --gateways 0`, which restarts those that die.

    Requests do not come through the replica: gateways connect to the scheduler, whose address they ask for.

    model  a folder, a .gguf file, a hub id or "demo": each node has to have it
    flags  further options of `octavo serve`
    """

    def __init__(self, model: str, flags: Sequence[str] = ()) -> None:
        """Return once a worker is ready. Raises LocalServerError."""
        # Whoever reaches the nodes of a Ray cluster can run anything there, with certificates or without.
        own = ["--gateways=0", f"--scheduler-address={ray.util.get_node_ip_address()}:0", "--trusted-network"]
        self._server = LocalServer(model, [*flags, *own, "--metrics-address=127.0.0.1:0"], verbose=True)
        self._server.__enter__()
        self._progress = Progress(_STALL_S, time.monotonic())

    def address(self) -> str:
        """Return where gateways reach the scheduler."""
        return self._server.scheduler_address

    async def check_health(self) -> None:
        """Raise if the engine does not get on: Serve then replaces the replica."""
        if not self._server.is_running:
            raise RuntimeError("octavo serve has ended")
        if problem := self._progress.problem(await sample(self._server.metrics[0]), time.monotonic()):
            raise RuntimeError(f"the engine has {problem}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what QueuePolicy decides by."""
        found = await sample(self._server.metrics[0])
        return {"sequences": found.running + found.waiting, "queue_s": found.queue_s, "kv_usage": found.kv_usage}

    async def __del__(self) -> None:
        """Let running requests end, then stop. Serve calls this when it removes the replica."""
        await asyncio.to_thread(self._server.close)
