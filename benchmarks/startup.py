"""Measure how long `octavo serve` takes until it is ready, and what memory all its processes take under load.

    python benchmarks/startup.py [--model demo] [--quantization none int8 int4] [--starts 3] [--kv-cache-memory 256MiB]

For each scheme: a first start, which packs the weights and keeps them in a folder of this run's own, and
then starts that find them there. Each prints the seconds since its process was started at which each phase
was told, and "ready". After the last one 32 prompts of some 320 tokens run at once, which fill 256 MiB of the
demo model's KV cache, and the most memory that all processes had
together in that time is printed: PSS, in which a page that n processes share counts 1/n in each, sampled
twenty times a second. The KV cache counts whole: a worker takes its memory as soon as it is idle.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from octavo.services.cli.addresses import take_free
from octavo.services.client import Client

NUM_PROMPTS = 32
NEW_TOKENS = 64
PACKED_TIMEOUT_S = 60


class Start:
    """One `octavo serve`, ready; `phases` are (what, seconds since its start)."""

    def __init__(self, model: str, folder: Path, *flags: str) -> None:
        """Start it, with its packed weights in `folder`, and wait until it is ready."""
        (self.address,) = take_free("127.0.0.1:0", 1)
        command = [sys.executable, "-m", "octavo.services.cli", "serve", model, "--device", "cpu"]
        command += ["--grpc-address", self.address, "--http-address", "", *flags]
        started = time.perf_counter()
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Later starts of a source tree find its bytecode, as those of an installed package do.
            env={**os.environ, "OCTAVO_PACKED_CACHE_DIR": str(folder), "PYTHONDONTWRITEBYTECODE": ""},
        )
        self.phases: list[tuple[str, float]] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.phases.append((line.strip(), time.perf_counter() - started))
            if "ready" in line:
                return
        raise SystemExit("octavo serve ended:\n" + "\n".join(what for what, _ in self.phases))

    def stop(self) -> None:
        """End it."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)

    def pss_mib(self) -> dict[str, float]:
        """Return the memory of each of its processes, by name."""
        server = psutil.Process(self.process.pid)
        found: dict[str, float] = {}
        for process in [server, *server.children(recursive=True)]:
            words = process.cmdline()
            name = words[words.index("octavo") + 1] if "octavo" in words[:-1] else "serve"
            found[name] = found.get(name, 0.0) + process.memory_full_info().pss / 2**20
        return found


async def peak_under_load(start: Start) -> dict[str, float]:
    """Run the prompts; return the memory of all processes at the moment when it was most."""
    peak = start.pss_mib()

    async def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, start.pss_mib(), key=lambda sizes: sum(sizes.values()))
            await asyncio.sleep(0.05)

    async with Client(start.address) as client:
        watching = asyncio.create_task(watch())
        prompt = "Tell me a long story about a printer and a folded sheet of paper. "
        await asyncio.gather(
            *(
                client.generate(f"{number}. {prompt * 20}", max_new_tokens=NEW_TOKENS, ignore_end_of_sequence=True)
                for number in range(NUM_PROMPTS)
            )
        )
        watching.cancel()
    return peak


def wait_until_packed(folder: Path) -> None:
    """Wait until the packed weights are on the disk."""
    end = time.monotonic() + PACKED_TIMEOUT_S
    while not list(folder.glob("*.packed")):
        if time.monotonic() > end:
            raise SystemExit(f"no packed weights in {folder} after {PACKED_TIMEOUT_S} s")
        time.sleep(0.1)


def measure(model: str, scheme: str, num_starts: int, kv_cache_memory: str) -> None:
    """Print the starts and the memory of one scheme."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--quantization", scheme, "--kv-cache-memory", kv_cache_memory]
        seconds = []
        for number in range(num_starts + 1):
            start = Start(model, Path(folder), *flags)
            try:
                phases = ", ".join(f"{what.split(':')[0].split(' in ')[0]} {at:.2f} s" for what, at in start.phases)
                print(f"{scheme:5} {'first' if number == 0 else 'later'} start: {phases}", flush=True)
                if number == 0:
                    wait_until_packed(Path(folder))
                else:
                    seconds.append(start.phases[-1][1])
                if number == num_starts:
                    peak = asyncio.run(peak_under_load(start))
            finally:
                start.stop()
        parts = ", ".join(f"{name} {mib:.0f}" for name, mib in sorted(peak.items()))
        print(
            f"{scheme:5} later starts: median {statistics.median(seconds):.2f} s, best {min(seconds):.2f} s;"
            f" peak of {NUM_PROMPTS} prompts: {sum(peak.values()):.0f} MiB PSS ({parts}), KV cache {kv_cache_memory}",
            flush=True,
        )


def main() -> None:
    """Measure each scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--quantization", nargs="+", default=["none", "int8", "int4"])
    parser.add_argument("--starts", type=int, default=3, help="later starts of each scheme")
    parser.add_argument("--kv-cache-memory", default="256MiB")
    options = parser.parse_args()
    for scheme in options.quantization:
        measure(options.model, scheme, options.starts, options.kv_cache_memory)


if __name__ == "__main__":
    main()
