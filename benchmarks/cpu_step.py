"""Measure steps of the cpu device.

    python benchmarks/cpu_step.py [--threads N] [--variant NAME] [--long]

The model has the shapes of SmolLM2-135M and random weights: nothing is fetched. GB/s counts packed
weights and the KV cache read, GFLOP/s the multiplications and additions of the model. A step is
timed many times on the wall clock; "best" says what the kernels can do, "median" what one gets.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from octavo.gpu_worker.devices.cpu import CpuDevice
from octavo.gpu_worker.ops import Draw, Heads, Linear, Norm, Ops, Rotary, StepInput, Value

BLOCK_TOKENS = 16
HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 576, 1536, 30, 49152
HEADS = Heads(num_heads=9, num_kv_heads=3, head_dim=64)
QKV = (HEADS.num_heads + 2 * HEADS.num_kv_heads) * HEADS.head_dim
LAYER_WEIGHTS = HIDDEN * (QKV + HEADS.num_heads * HEADS.head_dim + 3 * INTERMEDIATE)
HEAD_WEIGHTS = HIDDEN * VOCAB
MAX_POSITIONS = 4096


class RandomModel:
    """SmolLM2-135M with random weights."""

    num_layers, heads, vocab_size = LAYERS, HEADS, VOCAB

    def __init__(self) -> None:
        torch.manual_seed(0)
        angles = torch.outer(torch.arange(MAX_POSITIONS), 1e5 ** -(torch.arange(0, 64, 2) / 64))
        self.rotary = Rotary(angles.cos(), angles.sin(), rotary_dim=64)
        self.norm = Norm(torch.ones(HIDDEN), 1e-5)
        self.embedding = _random(VOCAB, HIDDEN).weight
        self.layers = [
            [
                _random(QKV, HIDDEN),
                _random(HIDDEN, 576),
                _random(INTERMEDIATE, HIDDEN),
                _random(INTERMEDIATE, HIDDEN),
                _random(HIDDEN, INTERMEDIATE),
            ]
            for _ in range(LAYERS)
        ]

    def forward(self, ops: Ops) -> Value:
        """Run one step."""
        x = ops.embed(self.embedding)
        for index, (qkv, output, gate, up, down) in enumerate(self.layers):
            queries = ops.rotary_write_kv(
                ops.norm_linear(x, self.norm, qkv), index, HEADS, self.rotary, q_norm=None, k_norm=None
            )
            x = ops.linear_residual(ops.paged_attention(queries, index, HEADS, 0.125, 0), output, x)
            x = ops.linear_residual(ops.norm_gated_linear(x, self.norm, gate, up, "silu"), down, x)
        return ops.logits(x, self.norm, Linear(self.embedding))


def _random(rows: int, columns: int) -> Linear:
    return Linear((torch.randn(rows, columns) / columns**0.5).to(torch.bfloat16))


def make_step(batch: int, start: int, num_new: int) -> StepInput:
    """Return a step of `batch` sequences with `num_new` tokens each, from position `start` on."""
    blocks_each = MAX_POSITIONS // BLOCK_TOKENS
    block_tables = 1 + np.arange(batch * blocks_each, dtype=np.int32).reshape(batch, blocks_each)
    positions = np.tile(np.arange(start, start + num_new), batch)
    rows = np.repeat(np.arange(batch), num_new)
    slots = block_tables[rows, positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS
    ends = np.arange(1, batch + 1) * num_new
    columns = [
        np.random.default_rng(start).integers(0, VOCAB, batch * num_new),
        positions,
        slots,
        np.concatenate([[0], ends]),
        np.full(batch, start + num_new),
        block_tables,
        ends - 1,
    ]
    return StepInput(*(np.ascontiguousarray(column, dtype=np.int32) for column in columns))


def measure(run: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Return best and median time of a call, in ms."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return min(times), statistics.median(times)


def report(name: str, device: CpuDevice, batch: int, context: int, num_new: int, seconds: float) -> None:
    """Fill the cache up to the step, time the step, print a line."""
    for start in range(0, context - num_new, 16):
        device.forward(make_step(batch, start, min(16, context - num_new - start)))
    step = make_step(batch, context - num_new, num_new)
    best, median = measure(lambda: device.forward(step), seconds)
    tokens = batch * num_new
    keys_seen = batch * sum(range(context - num_new + 1, context + 1))
    attention = 4 * LAYERS * keys_seen * HEADS.num_heads * HEADS.head_dim
    flops = 2 * (LAYERS * LAYER_WEIGHTS * tokens + HEAD_WEIGHTS * batch) + attention
    num_bytes = 2 * (LAYERS * LAYER_WEIGHTS + HEAD_WEIGHTS) + batch * context * device.kv_block_bytes() // BLOCK_TOKENS
    print(
        f"{name:24} best {best:7.2f} ms  median {median:7.2f} ms  {tokens / median * 1e3:7.0f} tok/s"
        f"  {num_bytes / best / 1e6:6.1f} GB/s  {flops / best / 1e6:6.0f} GFLOP/s",
        flush=True,
    )


def report_draws(device: CpuDevice, seconds: float) -> None:
    """Time drawing, a row of 49,152 logits each."""
    logits = torch.randn(32, VOCAB) * 3
    for name, draw in {
        "argmax": Draw(0, 0, 1, 0, 7, 0, 5),
        "temperature": Draw(1, 0, 1, 0, 7, 0, 5),
        "top_k 50, top_p 0.9": Draw(1, 50, 0.9, 0, 7, 0, 5),
        "top_p 0.9": Draw(1, 0, 0.9, 0, 7, 0, 5),
        "min_p 0.1": Draw(1, 0, 1, 0.1, 7, 0, 5),
    }.items():
        best, median = measure(lambda draw=draw: device.draw(logits, [draw] * 32), seconds / 4)  # type: ignore[misc]
        print(f"draw {name:20} best {best / 32:7.4f} ms  median {median / 32:7.4f} ms a row, of 32", flush=True)


def main() -> None:
    """Print a line for each kind of step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core")
    parser.add_argument("--variant", default="", help="avx512_bf16, avx2 or portable; default: the best")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each line")
    parser.add_argument("--long", action="store_true", help="contexts of 512 and 2048 as well")
    options = parser.parse_args()
    device = CpuDevice(
        RandomModel(), 1024, 32, MAX_POSITIONS // BLOCK_TOKENS, num_threads=options.threads, variant=options.variant
    )
    device.allocate_kv(32 * MAX_POSITIONS // BLOCK_TOKENS + 1)
    for context in (128, 512, 2048) if options.long else (128,):
        for batch in (1, 8, 32):
            report(f"decode B={batch} ctx {context}", device, batch, context, 1, options.seconds)
    for length in (32, 128, 512, 1024) if options.long else (512,):
        report(f"prefill {length}", device, 1, length, length, options.seconds)
    report_draws(device, options.seconds)


if __name__ == "__main__":
    main()
