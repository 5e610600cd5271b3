"""Print what a batch's rows cost before each linear layer, on machines with more cores than this one.

    python benchmarks/cpu_schedule.py [--quantization none|int8|int4] [--hidden 4096]

A thread norms and quantises all rows for itself, or all threads share them and wait once more for each other. What a
row takes is measured here, by one thread; a wait is taken as `kNsOfWait` and `kNsOfWaitPerThread` of step_job.cpp say.
The rest is arithmetic: microseconds before a product in which hardly a weight is read, whatever the memory could give.
"""

from __future__ import annotations

import argparse

import torch
from cpu_step import make_step

from octavo.gpu_worker.devices.cpu.device import CpuDevice
from octavo.gpu_worker.ops import Heads, Linear, Norm, Ops, Rotary, Value
from octavo.gpu_worker.quantization import Quantization

MEASURED_ROWS, REPEATS = 64, 20
WAIT_US, WAIT_US_PER_THREAD = 1.0, 0.05
ROWS = (1, 4, 8, 16, 32)
THREADS = (2, 8, 16, 64, 128)
HEADS = Heads(num_heads=1, num_kv_heads=1, head_dim=64)


class OneLayer:
    """The layers of which rows are prepared, with few outputs."""

    num_layers, heads, vocab_size = 1, HEADS, 64

    def __init__(self, hidden: int) -> None:
        self.norm = Norm(torch.ones(hidden), 1e-5)
        self.rotary = Rotary(torch.ones(4096, 32), torch.zeros(4096, 32), rotary_dim=64)
        self.embedding = torch.randn(64, hidden).to(torch.bfloat16)
        self.qkv, self.output, self.head = (
            Linear((torch.randn(rows, columns) * 0.02).to(torch.bfloat16))
            for rows, columns in ((3 * 64, hidden), (hidden, 64), (64, hidden))
        )

    def forward(self, ops: Ops) -> Value:
        """Run one step."""
        x = ops.embed(self.embedding)
        qkv = ops.linear(ops.norm(x, self.norm), self.qkv)
        queries = ops.rotary_write_kv(qkv, 0, HEADS, self.rotary, q_norm=None, k_norm=None)
        x = ops.add(x, ops.linear(ops.paged_attention(queries, 0, HEADS, 0.125, 0), self.output))
        return ops.logits(ops.norm(x, self.norm), self.head)


def us_of_a_row(hidden: int, quantization: Quantization) -> float:
    """Return what it takes to norm and quantise a row of so many elements."""
    device = CpuDevice(OneLayer(hidden), MEASURED_ROWS, 1, 256, num_threads=1, quantization=quantization)
    device.allocate_kv(300)
    step = make_step(1, 0, MEASURED_ROWS)
    step.token_ids.fill(0)
    times = []
    for _ in range(REPEATS):
        device.profile(True)
        device.forward(step)
        times.append(device.profile(False)["prepare"][0])
    return min(times) / 1e3 / MEASURED_ROWS  # with the 64 elements that the second layer reads


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", choices=["none", "int8", "int4"], default="int4")
    parser.add_argument("--hidden", type=int, default=4096)
    options = parser.parse_args()
    row_us = us_of_a_row(options.hidden, Quantization(options.quantization))
    print(f"{options.quantization}, {options.hidden} elements: {row_us:.2f} us a row; each for itself / shared, us")
    print("threads " + "".join(f"{f'{rows} rows':>16}" for rows in ROWS))
    for threads in THREADS:
        wait_us = WAIT_US + WAIT_US_PER_THREAD * threads
        cells = [f"{rows * row_us:.1f} / {-(-rows // threads) * row_us + wait_us:.1f}" for rows in ROWS]
        print(f"{threads:7} " + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    main()
