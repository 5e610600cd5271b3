"""Whether an engine gets on with its work, and how much there is: read from its scheduler's metrics."""

from __future__ import annotations

from dataclasses import dataclass

import aiohttp

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
