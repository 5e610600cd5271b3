"""Kill the worker of a running `octavo serve` again and again, and look how long its streams stall.

    python benchmarks/restarts.py [--kills 20] [--every-s 8] [--streams 32] [--device cpu]

Streams run without a pause: as one ends the next begins. Prints the longest time between two deltas of a stream
around each kill, as median, 99th percentile and maximum over all streams and kills, and how many requests were lost
(ended badly) or refused. Exits with 1 if any was.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import statistics
import sys
import time

from busy_machine import Server

from octavo.services.client import OctavoError

OUTPUT_TOKENS = 200


class Streams:
    """Streams that follow each other, the time at which each got its last delta, and the longest waits."""

    def __init__(self, server: Server, count: int) -> None:
        self._server = server
        self._last = [time.monotonic()] * count
        self.waits = [0.0] * count
        self.num_ended = 0
        self.problems: list[str] = []

    async def run(self, number: int) -> None:
        """Run one stream after the other."""
        turn = 0
        while True:
            turn += 1
            prompt = f"Story {number}, part {turn}:"
            options = {"temperature": 0.0, "ignore_end_of_sequence": True, "max_new_tokens": OUTPUT_TOKENS}
            try:
                async with self._server.client.stream(prompt=prompt, **options) as stream:  # type: ignore[arg-type]
                    async for _ in stream:
                        self._step(number)
            except OctavoError as error:
                self.problems.append(f"{error.code.name} {error}")
            self.num_ended += 1

    def _step(self, number: int) -> None:
        now = time.monotonic()
        self.waits[number] = max(self.waits[number], now - self._last[number])
        self._last[number] = now

    def take_waits(self) -> list[float]:
        """Return the longest waits since the last call, those that go on included."""
        now = time.monotonic()
        waits = [max(wait, now - last) for wait, last in zip(self.waits, self._last, strict=True)]
        self.waits = [0.0] * len(waits)
        return waits


async def run(options: argparse.Namespace) -> bool:
    """Run; return whether nothing was lost or refused."""
    async with Server(options.device) as server:
        streams = Streams(server, options.streams)
        tasks = [asyncio.create_task(streams.run(number)) for number in range(options.streams)]
        await asyncio.sleep(options.every_s)
        undisturbed = streams.take_waits()
        stalls: list[float] = []
        for _ in range(options.kills):
            with contextlib.suppress(StopIteration):  # it is being started
                os.kill(server.worker(), signal.SIGKILL)
            await asyncio.sleep(options.every_s)
            stalls += streams.take_waits()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    p99 = statistics.quantiles(stalls, n=100)[98]
    print(f"longest wait without a kill: {max(undisturbed):.2f} s")
    print(f"{options.kills} kills: stall {statistics.median(stalls):.2f} / {p99:.2f} / {max(stalls):.2f} s")
    refused = [problem for problem in streams.problems if "RESOURCE_EXHAUSTED" in problem or "UNAVAILABLE" in problem]
    lost = len(streams.problems) - len(refused)
    print(
        f"{streams.num_ended} requests ended, {lost} lost, {len(refused)} refused", *streams.problems[:5], sep="\n    "
    )
    return not streams.problems


def main() -> int:
    """Parse the command line and run; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--every-s", type=float, default=8.0)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    return 0 if asyncio.run(run(parser.parse_args())) else 1


if __name__ == "__main__":
    sys.exit(main())
