"""What it costs that a row's bits do not depend on the batch, on the cpu device.

    python benchmarks/batch_invariance.py [--threads N] [--rounds N]

The linear layers of a step of SmolLM2-135M (random weights, bfloat16) are timed in turn with those of oneDNN, as torch
calls it. oneDNN promises no order of sums: its weights are packed for the number of rows of the step, and it may take
another kernel for each. Ours sums every output in one order whatever the step. The time of ours is that of the phases
of a step (`CpuDevice.profile`): norms, activations, residuals and the waits between phases are in it, and not in
oneDNN's.

Attention pays otherwise: keys are attended in pieces of one size, also where another size would keep threads busier.
That is timed by `cpu_step.py --long`: batch 1 is the one that few pieces could leave a thread idle in.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from cpu_step import BLOCK_TOKENS, MAX_POSITIONS, RandomModel, make_step

from octavo.gpu_worker.devices.cpu.device import CpuDevice
from octavo.gpu_worker.ops import Linear
from octavo.kernels.machine import available_cores

LINEAR_PHASES = ("norm_linear", "linear_residual", "norm_gated_linear", "rowwise", "logits")
STEPS = {1: (1, 128, 1), 8: (8, 128, 1), 32: (32, 128, 1), 512: (1, 512, 512)}  # rows: batch, context, new tokens each


class OneDnnLayers:
    """All linear layers of a step, as products of oneDNN over weights that are packed for so many rows."""

    def __init__(self, model: RandomModel, num_rows: int, num_logits: int) -> None:
        layers = [(layer, num_rows) for layers in model.layers for layer in layers]
        layers.append((Linear(model.embedding), num_logits))
        self._products: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer, rows in layers:
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight, rows)
            self._products.append((torch.randn(rows, layer.weight.shape[1]).to(torch.bfloat16), packed))

    def run(self) -> None:
        """Compute every layer once."""
        for rows, packed in self._products:
            torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")


def linear_ms(device: CpuDevice, run: Callable[[], object]) -> float:
    """Return the time of the linear phases of one step."""
    device.profile(True)
    run()
    return sum(ns for kind, (ns, _) in device.profile(False).items() if kind in LINEAR_PHASES) / 1e6


def wall_ms(run: Callable[[], object]) -> float:
    """Return the time of one call."""
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


def main() -> None:
    """Print a line for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each; a turn is up to 20 steps")
    options = parser.parse_args()
    num_threads = options.threads or available_cores()
    torch.set_num_threads(num_threads)
    model = RandomModel()
    device = CpuDevice(model, 1024, 32, MAX_POSITIONS // BLOCK_TOKENS, num_threads=num_threads)
    device.allocate_kv(32 * MAX_POSITIONS // BLOCK_TOKENS + 1)
    print(f"linear layers of a step, {num_threads} threads: best ms, and the median ratio of turns")
    for num_rows, (batch, context, num_new) in STEPS.items():
        step = make_step(batch, context - num_new, num_new)
        layers = OneDnnLayers(model, num_rows, batch)
        repeats = 20 if num_rows < 100 else 2
        ours, theirs = [], []
        for turn in range(options.rounds + 1):
            mine = min(linear_ms(device, lambda step=step: device.forward(step)) for _ in range(repeats))  # type: ignore[misc]
            other = min(wall_ms(layers.run) for _ in range(repeats))
            if turn:  # the first warms up
                ours.append(mine)
                theirs.append(other)
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        print(
            f"{num_rows:4} rows  octavo {min(ours):7.2f}  oneDNN {min(theirs):7.2f}  octavo / oneDNN {ratio:5.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
