"""Measure the CPU kernels of several commits in turn, in one process.

    python benchmarks/cpu_turns.py HEAD~1 HEAD . [--rounds 40] [--step 32x128x1 ...] [--profile]

`.` is the working tree. A step is SEQUENCESxCONTEXTxNEW or SEQUENCESxCONTEXTxNEWxSHARED: so many sequences, tokens of
each after the step, tokens of each that the step computes, and tokens that all have in the same KV blocks. The machine
changes within seconds, so all kernels run a step before any runs the next one, in one order and then in the other,
and the ratio is the median of the ratios to the first commit within a round. Logits must be equal, bit by bit, or the
line says so: a commit may change the order of a sum, but should know it. The model is the one of `cpu_step.py`.

The Python side is the working tree's: kernels with another binary interface are refused when they are loaded.
"""

from __future__ import annotations

import argparse
import io
import statistics
import subprocess
import tarfile
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from cpu_step import BLOCK_TOKENS, MAX_POSITIONS, RandomModel, fill_cache, make_step

from octavo.gpu_worker.devices.cpu.device import CpuDevice
from octavo.gpu_worker.ops import StepInput
from octavo.kernels.cpu import build, library

WORKING_TREE = "."
KERNELS = "kernels/cpu"
MAX_SEQUENCES = 32
STEPS = ("1x128x1", "8x128x1", "32x128x1", "32x1056x1x1024", "1x512x512")


def sources_of(revision: str, folder: Path) -> Path:
    """Return the folder of a commit's kernels, taken out of git into `folder`. Raises CalledProcessError."""
    if revision == WORKING_TREE:
        return build.SOURCE_FOLDER
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "archive", revision, KERNELS]
    archive = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder / KERNELS


def make_device(sources: Path, model: RandomModel) -> CpuDevice:
    """Compile the kernels in a folder, unless that was done before, and return a device with them."""
    build.SOURCE_FOLDER, build.READY_FOLDER = sources, sources / "ready"
    library.load.cache_clear()
    device = CpuDevice(model, 2048, MAX_SEQUENCES, MAX_POSITIONS // BLOCK_TOKENS)
    device.allocate_kv(MAX_SEQUENCES * MAX_POSITIONS // BLOCK_TOKENS + 1)
    return device


def measure(devices: dict[str, CpuDevice], step: StepInput, rounds: int) -> tuple[dict[str, list[float]], set[str]]:
    """Return the times of a step in ms by commit, one a round, and the commits with other logits than the first."""
    times: dict[str, list[float]] = {name: [] for name in devices}
    logits = {name: np.array(device.forward(step)) for name, device in devices.items()}
    first = next(iter(logits.values()))
    for round_ in range(rounds):
        for name, device in list(devices.items())[:: -1 if round_ % 2 else 1]:
            device.forward(step)  # another device's weights and rows are in the caches
            started = time.perf_counter()
            device.forward(step)
            times[name].append((time.perf_counter() - started) * 1e3)
    return times, {name for name, its in logits.items() if not np.array_equal(its, first)}


def profiles(devices: dict[str, CpuDevice], step: StepInput, rounds: int) -> dict[str, dict[str, float]]:
    """Return the median ms of each kind of operation in a step, by commit."""
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in devices}
    for _ in range(rounds):
        for name, device in devices.items():
            device.forward(step)
            device.profile(True)
            device.forward(step)
            for kind, (ns, _) in device.profile(False).items():
                found[name][kind].append(ns / 1e6)
    return {name: {kind: statistics.median(its) for kind, its in kinds.items()} for name, kinds in found.items()}


def main() -> None:
    """Print a line for each step and commit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs="+", help="the first one is what the others are compared with")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--step", nargs="+", default=STEPS)
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes, in runs of their own")
    options = parser.parse_args()
    model = RandomModel()
    with tempfile.TemporaryDirectory() as work:
        folders = {name: sources_of(name, Path(work, str(at))) for at, name in enumerate(options.revisions)}
        devices = {name: make_device(folder, model) for name, folder in folders.items()}
    for text in options.step:
        sequences, context, num_new, *num_shared = (int(part) for part in text.split("x"))
        for device in devices.values():
            fill_cache(device, sequences, context - num_new, *num_shared)
        step = make_step(sequences, context - num_new, num_new, *num_shared)
        times, others = measure(devices, step, options.rounds)
        kinds = profiles(devices, step, options.rounds) if options.profile else {}
        first = next(iter(times.values()))
        for name, its in times.items():
            quarter, median = statistics.quantiles(its, n=4)[:2]
            ratio = statistics.median(mine / base for mine, base in zip(its, first, strict=True))
            print(
                f"{text:16} {name:12} best {min(its):7.2f}  lower quartile {quarter:7.2f}  median {median:7.2f} ms"
                f"  {ratio:.3f} times the first" + ("  OTHER LOGITS" if name in others else ""),
                flush=True,
            )
            if kinds:
                print("   ", ", ".join(f"{kind} {ms:.2f}" for kind, ms in kinds[name].items()), flush=True)


if __name__ == "__main__":
    main()
