"""The engine of the Serve application: a scheduler and its workers, below one replica."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
import ray

from octavo.services.offline.local_server import LocalServer

_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Sample:
    """What a scheduler said of itself at one moment."""

    running: float
    waiting: float
    queue_s: float
    kv_usage: float
    workers: float
    steps: float

    @classmethod
    def parse(cls, text: str) -> Sample:
        """Read the exposition of a scheduler's metrics. A metric that is not there counts as 0."""
        from prometheus_client.parser import text_string_to_metric_families

        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return cls(
            running=sums.get("octavo_sequences_running", 0.0),
            waiting=sums.get("octavo_sequences_waiting", 0.0),
            queue_s=sums.get("octavo_queue_estimate_seconds", 0.0),
            kv_usage=sums.get("octavo_kv_cache_usage_ratio", 0.0),
            workers=sums.get("octavo_workers_ready", 0.0),
            steps=sums.get("octavo_steps_total", 0.0),
        )


async def sample(address: str) -> Sample:
    """Ask the scheduler whose metrics are at host:port. Raises aiohttp.ClientError, TimeoutError."""
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.get(f"http://{address}/metrics", raise_for_status=True) as answer,
    ):
        return Sample.parse(await answer.text())


class Progress:
    """Judges samples, one after the other.

    stall_s  how long an engine may have work and take no step, or have no worker. The engine's own supervisor restarts
             what dies or hangs within that time; beyond it somebody else has to.
    """

    def __init__(self, stall_s: float, now: float) -> None:
        self._stall_s = stall_s
        self._steps = -1.0
        self._last = now

    def problem(self, found: Sample, now: float) -> str:
        """Return what is wrong; empty if nothing is. `now` only grows, in seconds."""
        is_idle = found.running + found.waiting == 0
        if found.workers and (is_idle or found.steps != self._steps):
            self._last = now
        self._steps = found.steps
        if now - self._last <= self._stall_s:
            return ""
        what = f"{found.running + found.waiting:.0f} sequences and no step" if found.workers else "no worker"
        return f"{what} for {now - self._last:.0f} s"


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
