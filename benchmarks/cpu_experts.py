"""Measure mixtures of experts on the cpu device, beside dense layers that do as much work for a row.

    python benchmarks/cpu_experts.py [--threads N] [--variant NAME] [--seconds S]

The layers have the shapes of Qwen3 30B-A3B (8 of 128 experts of 2048 x 768) and random weights, without
attention; a few layers with a quarter of the experts, to fit in memory. GB/s counts the weights of the
experts that a step is expected to choose (all choices alike), GFLOP/s the products. Each line is
measured in turn with its dense layers, and the ratio is the median of the turns.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from octavo.gpu_worker.devices.cpu.device import CpuDevice
from octavo.gpu_worker.ops import Experts, Heads, Linear, Norm, Ops, StepInput, Value

HIDDEN, INNER, NUM_EXPERTS, NUM_CHOSEN, LAYERS, VOCAB = 2048, 768, 32, 8, 2, 256
MAX_TOKENS = 512
EXPERT_WEIGHTS = 3 * HIDDEN * INNER


class Layers:
    """An embedding, feed-forward layers and a small head."""

    num_layers, heads, vocab_size = 1, Heads(1, 1, 16), VOCAB

    def __init__(self, *, dense: bool) -> None:
        torch.manual_seed(0)
        self.embedding = _random(VOCAB, HIDDEN)
        self.norm = Norm(torch.ones(HIDDEN), 1e-6)
        self.layers: list[Experts | tuple[Linear, Linear, Linear]] = [
            _dense_layer() if dense else _experts_layer() for _ in range(LAYERS)
        ]

    def forward(self, ops: Ops) -> Value:
        """Run one step."""
        x = ops.embed(self.embedding)
        for layer in self.layers:
            if isinstance(layer, Experts):
                x = ops.add_experts(x, ops.norm(x, self.norm), layer, "silu")
            else:
                gate, up, down = layer
                x = ops.add(x, ops.linear(ops.gated_linear(ops.norm(x, self.norm), gate, up, "silu"), down))
        return ops.logits(ops.norm(x, self.norm), Linear(self.embedding))


def _random(rows: int, columns: int) -> torch.Tensor:
    return (torch.randn(rows, columns) / columns**0.5).to(torch.bfloat16)


def _dense_layer() -> tuple[Linear, Linear, Linear]:
    inner = NUM_CHOSEN * INNER
    return Linear(_random(inner, HIDDEN)), Linear(_random(inner, HIDDEN)), Linear(_random(HIDDEN, inner))


def _experts_layer() -> Experts:
    gate, up = (tuple(_random(INNER, HIDDEN) for _ in range(NUM_EXPERTS)) for _ in range(2))
    down = tuple(_random(HIDDEN, INNER) for _ in range(NUM_EXPERTS))
    return Experts(_random(NUM_EXPERTS, HIDDEN), gate, up, down, NUM_CHOSEN, num_shared=0, is_normalized=True)


def make_step(num_tokens: int) -> StepInput:
    """Return a step of one sequence, with one row of logits."""
    columns = [
        np.random.default_rng(1).integers(0, VOCAB, num_tokens),
        np.arange(num_tokens),
        np.arange(16, 16 + num_tokens),
        np.array([0, num_tokens]),
        np.array([num_tokens]),
        np.arange(1, 1 + MAX_TOKENS // 16)[None],
        np.array([num_tokens - 1]),
    ]
    return StepInput(*(np.ascontiguousarray(column, dtype=np.int32) for column in columns))


def make_device(options: argparse.Namespace, *, dense: bool) -> CpuDevice:
    """Return a device with the layers packed."""
    device = CpuDevice(
        Layers(dense=dense), MAX_TOKENS, 1, MAX_TOKENS // 16, num_threads=options.threads, variant=options.variant
    )
    device.allocate_kv(1 + MAX_TOKENS // 16)
    return device


def main() -> None:
    """Print a line for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core")
    parser.add_argument("--variant", default="", help="amx, avx512_bf16, avx2 or portable; default: the best")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each line")
    options = parser.parse_args()
    experts, dense = make_device(options, dense=False), make_device(options, dense=True)
    for rows in (1, 8, 32, 512):
        step = make_step(rows)
        times: dict[CpuDevice, list[float]] = {experts: [], dense: []}
        end = time.perf_counter() + options.seconds
        while time.perf_counter() < end or len(times[dense]) < 6:
            for device, measured in times.items():
                started = time.perf_counter()
                device.forward(step)
                measured.append(time.perf_counter() - started)
        ratio = statistics.median(a / b for a, b in zip(times[experts][1:], times[dense][1:], strict=True))
        best = min(times[experts])
        chosen = NUM_EXPERTS * (1 - (1 - NUM_CHOSEN / NUM_EXPERTS) ** rows)
        print(
            f"{rows:4} rows  best {best * 1e3:7.2f} ms  median {statistics.median(times[experts]) * 1e3:7.2f} ms"
            f"  {2 * LAYERS * chosen * EXPERT_WEIGHTS / best / 1e9:6.1f} GB/s"
            f"  {2 * LAYERS * rows * NUM_CHOSEN * EXPERT_WEIGHTS / best / 1e9:6.0f} GFLOP/s"
            f"  {ratio:5.2f} times as long as dense",
            flush=True,
        )


if __name__ == "__main__":
    main()
