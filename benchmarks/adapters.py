"""Measure what LoRA adapters cost the cpu device: steps with them in turn with steps without, and while one loads.

    python -m benchmarks.adapters MODEL [--rank 16] [--threads N] [--rounds 30]

MODEL is a folder or .gguf file of a decoder. Adapters are random, of all seven projections in every layer. A decode
step of 1 and of 32 sequences is timed with no adapter, with one that all have, and with a different one for each, out
of 64; the rates are those of the medians, relative to no adapter. Then an adapter is read, checked and packed, as it
is for the first request that has it: with nothing else to do, and by another thread, as a worker does, while steps of
32 sequences with adapters run: the longest step is the stall of a stream.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from octavo.common.adapter_files import read_files
from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.devices import make_device
from octavo.gpu_worker.devices.cpu.device import CpuDevice
from octavo.gpu_worker.loading.adapters import PeftAdapter
from octavo.gpu_worker.loading.loading import load_for_device
from octavo.gpu_worker.ops import StepInput
from tests.peft_folders import random_tensors, write_adapter

NUM_ADAPTERS = 64
CONTEXT = 200
BLOCKS = CONTEXT // 16 + 1


def decode_step(num_rows: int, adapter_ids: list[int]) -> StepInput:
    """Return a step of one token of each sequence."""
    tables = (1 + np.arange(num_rows * BLOCKS, dtype=np.int32)).reshape(num_rows, BLOCKS)
    positions = np.full(num_rows, CONTEXT - 1, np.int32)
    ids = np.array(adapter_ids, np.int32)
    return StepInput(
        token_ids=np.arange(100, 100 + num_rows, dtype=np.int32),
        positions=positions,
        slot_mapping=tables[:, positions[0] // 16] * 16 + positions % 16,
        query_start_loc=np.arange(num_rows + 1, dtype=np.int32),
        seq_lens=positions + 1,
        block_tables=tables,
        logits_rows=np.arange(num_rows, dtype=np.int32),
        adapter_ids=ids if ids.any() else None,
    )


def medians(device: CpuDevice, steps: dict[str, StepInput], rounds: int) -> dict[str, float]:
    """Time steps in turn; return the median of each in ms."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            device.forward(step)
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(each) for name, each in times.items()}


def load_ms(device: CpuDevice, folder: Path) -> float:
    """Read, check and pack an adapter; return how long that took."""
    started = time.perf_counter()
    device.pack_adapter(PeftAdapter(read_files(folder), device.adapter_modules()).pairs())
    return 1000 * (time.perf_counter() - started)


def longest_while_loading(device: CpuDevice, step: StepInput, folder: Path, rounds: int) -> tuple[list[float], float]:
    """Run steps while another thread loads adapters; return their times in ms, and that of one load."""
    took: list[float] = []

    def load() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        took.extend(load_ms(device, folder) for _ in range(rounds))

    thread = threading.Thread(target=load)
    thread.start()
    times = []
    while thread.is_alive():
        started = time.perf_counter()
        device.forward(step)
        times.append(1000 * (time.perf_counter() - started))
    return times, statistics.median(took)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    config = WorkerConfig(model=args.model, device="cpu", num_threads=args.threads)
    loaded = load_for_device(config, lambda *_: None)
    device = make_device("cpu", loaded.model, 64, 32, BLOCKS, num_threads=args.threads)
    assert isinstance(device, CpuDevice)
    device.allocate_kv(32 * BLOCKS + 1)
    with tempfile.TemporaryDirectory() as place:
        folders = []
        for seed in range(1, NUM_ADAPTERS + 1):
            tensors = random_tensors(device.adapter_modules(), args.rank, seed % 4)
            folders.append(write_adapter(Path(place) / str(seed % 4), tensors, args.rank))
            adapter = PeftAdapter(read_files(folders[-1]), device.adapter_modules())
            device.set_adapter(seed, device.pack_adapter(adapter.pairs()))
        print(f"rank {args.rank}, {adapter.num_values * 2 / 1e6:.1f} MB an adapter")
        for rows in (1, 32):
            steps = {
                "none": decode_step(rows, [0] * rows),
                "one": decode_step(rows, [1] * rows),
                "64": decode_step(rows, [1 + row * 2 % NUM_ADAPTERS for row in range(rows)]),
            }
            found = medians(device, steps, args.rounds)
            for name, ms in found.items():
                print(f"{rows:2} rows, adapters: {name:4} {ms:7.2f} ms  {100 * found['none'] / ms:5.1f} % of the rate")
        cold_ms = statistics.median(load_ms(device, folders[0]) for _ in range(9))
        print(f"first use of one that is not in memory: {cold_ms:.0f} ms")
        times, busy_ms = longest_while_loading(device, steps["64"], folders[0], 20)
        print(f"while one loads ({busy_ms:.0f} ms): median step {statistics.median(times):.1f} ms", end=", ")
        print(f"longest {max(times):.1f} ms, so a stall of {max(times) - found['64']:.1f} ms")


if __name__ == "__main__":
    main()
