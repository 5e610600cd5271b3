"""Look whether a worker on a busy machine is taken for one that hangs, and how soon one is found that does.

    python benchmarks/busy_machine.py [--busy 0 4 8 16] [--devices cpu reference] [--requests 10]
        [--lengths 1 64 500 2000 8000] [--hangs 3] [--limit-s 600]

For each device and each number of busy processes, which compute at normal priority beside it, `octavo serve demo`
runs `--requests` requests, three at a time, with prompts of the lengths given (on `reference` the longest two take
minutes each, and hold up those beside them: `--lengths 1 64 500` shows as much sooner). Then its worker is stopped
(SIGSTOP), and made to compute for ever, `--hangs` times each while a stream runs. Each part is given up after
`--limit-s`.

Prints for each: requests that ended well, that were quarantined, that failed otherwise, and that were not through in
time; workers that were lost or killed meanwhile, which must be none; and how long it took until the scheduler had
given up a stopped worker and one that computes for ever, median and maximum, and that all those streams ended well.
Exits with 1 if a healthy worker was lost, a request was quarantined or lost, or a hang was not found.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from octavo.services.client import Client, OctavoError

# Python imports a module of this name at start. A process that gets SIGUSR2 computes for ever, in its main thread.
SITECUSTOMIZE = """
import signal
def spin(*_):
    while True:
        pass
signal.signal(signal.SIGUSR2, spin)
"""
CONCURRENCY = 3
START_S = 300.0
FOUND_S = 60.0
LOST = re.compile(r"lost worker|hangs: killing it|worker-\d+ ended")


class Server:
    """`octavo serve demo`, its output, and its worker."""

    def __init__(self, device: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        (Path(self._folder.name) / "sitecustomize.py").write_text(SITECUSTOMIZE)
        self.lines: list[tuple[float, str]] = []  # with the monotonic time
        self._device = device
        self._reading: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Server:
        path = f"{self._folder.name}:{os.environ.get('PYTHONPATH', '')}"
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "octavo.services.cli", "serve", "demo", "--device", self._device),
            *("--grpc-address", "127.0.0.1:0", "--http-address", "", "--parent-pid", str(os.getpid())),
            *("--kv-cache-memory", "1GiB", "--startup-timeout-s", str(START_S)),
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._reading = asyncio.create_task(self._read())
        line = await self.line("ready in ", 0.0, START_S)
        found = re.search(r"grpc (\S+)", line)
        assert found, line
        self.client = Client(found[1].rstrip(","))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        self._process.send_signal(signal.SIGINT)
        try:
            await asyncio.wait_for(self._process.wait(), 60)
        except TimeoutError:
            self._process.kill()
        self._folder.cleanup()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self.lines.append((time.monotonic(), line.decode(errors="replace").rstrip()))

    async def line(self, text: str, since: float, timeout_s: float) -> str:
        """Return the first line with a text that came after a time. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not (found := [line for at, line in self.lines if at >= since and text in line]):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return found[0]

    def worker(self) -> int:
        """Return the worker's process."""
        children = psutil.Process(self._process.pid).children(recursive=True)
        return next(child.pid for child in children if child.cmdline()[:2] == ["octavo", "worker"])

    def num_lost(self, since: float) -> int:
        """Return how many lines say that a worker was lost."""
        return sum(1 for at, line in self.lines if at >= since and LOST.search(line))


def compute_for_ever() -> None:
    """Be a busy process."""
    while True:
        pass


async def generate(client: Client, length: int, number: int, num_tokens: int = 16) -> str:
    """Return how a request ended: "" for well."""
    ids = [1000 + (7 * n + 131 * number) % 20_000 for n in range(length)]
    options = {"temperature": 0.0, "ignore_end_of_sequence": True, "max_new_tokens": num_tokens}
    try:
        async with client.stream(token_ids=ids, timeout_s=3600.0, **options) as stream:  # type: ignore[arg-type]
            async for _ in stream:
                pass
    except OctavoError as error:
        return f"{error.code.name} {error}"
    return ""


async def false_alarms(server: Server, lengths: Sequence[int], count: int, limit_s: float) -> tuple[str, bool]:
    """Run requests; return what happened, and whether it is as it must be."""
    started = time.monotonic()
    turns = asyncio.Semaphore(CONCURRENCY)

    async def one(number: int) -> str:
        async with turns:
            return await generate(server.client, lengths[number % len(lengths)], number)

    tasks = [asyncio.create_task(one(number)) for number in range(count)]
    done, late = await asyncio.wait(tasks, timeout=limit_s)
    for task in late:
        task.cancel()
    outcomes = [task.result() for task in done]
    bad = [outcome for outcome in outcomes if outcome]
    num_quarantined = sum("QUARANTINED" in outcome or "worker" in outcome for outcome in bad)
    lost = server.num_lost(started)
    text = (
        f"{len(outcomes) - len(bad)} of {count} requests well in {time.monotonic() - started:.0f} s, "
        f"{num_quarantined} quarantined, {len(bad) - num_quarantined} failed, {len(late)} late, {lost} workers lost"
    )
    return text + "".join(f"\n    {outcome[:160]}" for outcome in bad), not bad and not lost


async def hangs(server: Server, number: signal.Signals, count: int) -> tuple[str, bool]:
    """Let the worker hang while a stream runs; return how long that took to find, and whether all went well."""
    found: list[float] = []
    bad = []
    for n in range(count):
        await generate(server.client, 30, n, 40)  # so that it is no worker of a few steps
        stream = asyncio.create_task(generate(server.client, 50, 100 + n, 400))
        await asyncio.sleep(0.5)
        at = time.monotonic()
        os.kill(server.worker(), number)
        try:
            await server.line("lost worker", at, FOUND_S)
            found.append(time.monotonic() - at)
        except TimeoutError:
            bad.append("not found")
            os.kill(server.worker(), signal.SIGKILL)
        if outcome := await stream:
            bad.append(outcome)
    times = f"{statistics.median(found):.2f} / {max(found):.2f} s" if found else "-"
    return f"{times}" + "".join(f"\n    {each[:160]}" for each in bad), not bad


async def run(options: argparse.Namespace) -> bool:
    """Run all; return whether everything held."""
    held = True
    for device in options.devices:
        for num_busy in options.busy:
            async with Server(device) as server:
                busy = [
                    multiprocessing.get_context("spawn").Process(target=compute_for_ever, daemon=True)
                    for _ in range(num_busy)
                ]
                for process in busy:
                    process.start()
                try:
                    name = f"{device}, {num_busy} busy processes on {os.cpu_count()} cores"
                    text, good = await false_alarms(server, options.lengths, options.requests, options.limit_s)
                    print(f"{name}: {text}", flush=True)
                    held &= good
                    for what, number in (("stopped", signal.SIGSTOP), ("computing for ever", signal.SIGUSR2)):
                        if options.hangs:
                            text, good = await hangs(server, number, options.hangs)
                            print(f"{name}: a worker {what} is found after {text}", flush=True)
                            held &= good
                finally:
                    for process in busy:
                        process.kill()
                        process.join()
            if options.show_log:
                print("\n".join(line for _, line in server.lines))
    return held


def main() -> int:
    """Parse the command line and run; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 4, 8, 16])
    parser.add_argument("--devices", nargs="+", default=["cpu", "reference"])
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 64, 500, 2000, 8000])
    parser.add_argument("--hangs", type=int, default=3)
    parser.add_argument("--limit-s", type=float, default=600.0)
    parser.add_argument("--show-log", action="store_true", help="what the processes printed")
    return 0 if asyncio.run(run(parser.parse_args())) else 1


if __name__ == "__main__":
    sys.exit(main())
