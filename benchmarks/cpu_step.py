"""Measure steps of the cpu device.

    python benchmarks/cpu_step.py [--quantization none|int8|int4] [--threads N] [--variant NAME] [--long] [--profile]
                                  [--beside-busy] [--shared-prefix TOKENS]

The model has the shapes of SmolLM2-135M and random weights: nothing is fetched. A step is timed
many times on the wall clock; "best" says what the kernels can do, "median" what one gets.

The floor of a step is max(bytes / read rate, operations / dot rate): bytes of packed weights and of
the KV cache read (blocks that sequences share once), multiplications and additions of the model, and
the two rates at which this machine reads memory and multiplies bf16 pairs in registers, measured with
as many threads in turn with the steps: on a shared machine the rates change from one second to the
next. Shares are best against best and median against median. Where weights are compressed, the floor of
two bytes a weight is given as well: the least that a step takes that reads them as they are.

Where weights are quantised, the operations of linear layers count at the rate at which this machine
multiplies quads of bytes in registers, and those of attention at that of bf16 pairs. Scaling a group's
sum of integers, and quantising activations, count as nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from octavo.gpu_worker.devices.cpu.device import CpuDevice
from octavo.gpu_worker.ops import Draw, Heads, Linear, Norm, Ops, Rotary, StepInput, Value
from octavo.gpu_worker.quantization import Quantization
from octavo.kernels.cpu.runtime import Arena, Runtime

BLOCK_TOKENS = 16
HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 576, 1536, 30, 49152
HEADS = Heads(num_heads=9, num_kv_heads=3, head_dim=64)
QKV = (HEADS.num_heads + 2 * HEADS.num_kv_heads) * HEADS.head_dim
LAYER_WEIGHTS = HIDDEN * (QKV + HEADS.num_heads * HEADS.head_dim + 3 * INTERMEDIATE)
HEAD_WEIGHTS = HIDDEN * VOCAB
MAX_POSITIONS = 4096
BATCHES = (1, 8, 32)
OWN_TOKENS = 32  # of a sequence after a shared prefix
# Bytes of a weight of a layer and of the head, with its share of the scales; see kernels/cpu/quantized.h.
WEIGHT_BYTES = {
    Quantization.NONE: (2.0, 2.0),
    Quantization.INT8: (1 + 2 / 32, 1 + 2 / 32),
    Quantization.INT4: (0.5 + 4 / 32, 1 + 2 / 32),
}
COMPRESSED_BYTES = (1.5, 1.5)  # but for 320 bytes in 27,968; see kernels/cpu/compressed.h
# The last layer takes queries, keys and values of all tokens, and computes only the rows that logits come from.
TOKEN_OPERATIONS = 2 * ((LAYERS - 1) * LAYER_WEIGHTS + QKV * HIDDEN)
ROW_OPERATIONS = 2 * (LAYER_WEIGHTS - QKV * HIDDEN + HEAD_WEIGHTS)
KEY_OPERATIONS = 4 * HEADS.num_heads * HEADS.head_dim  # of a query and a key, in one layer
READ_BYTES = 256 << 20  # far more than any cache holds
DOT_ITEMS = 64
ROUNDS = 8


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
                ops.linear(ops.norm(x, self.norm), qkv), index, HEADS, self.rotary, q_norm=None, k_norm=None
            )
            x = ops.add(x, ops.linear(ops.paged_attention(queries, index, HEADS, 0.125, 0), output))
            x = ops.add(x, ops.linear(ops.gated_linear(ops.norm(x, self.norm), gate, up, "silu"), down))
        return ops.logits(ops.norm(x, self.norm), Linear(self.embedding))


def _random(rows: int, columns: int) -> Linear:
    return Linear((torch.randn(rows, columns) / columns**0.5).to(torch.bfloat16))


def make_step(batch: int, start: int, num_new: int, num_shared: int = 0, first: int = 0) -> StepInput:
    """Return a step of `batch` sequences with `num_new` tokens each, from position `start` on.

    num_shared  tokens, in whole blocks, that all sequences have in the same blocks
    first       number of the first sequence: sequences of one number have the same blocks in every step
    """
    blocks_each = MAX_POSITIONS // BLOCK_TOKENS
    block_tables = 1 + np.arange((first + batch) * blocks_each, dtype=np.int32).reshape(first + batch, blocks_each)
    block_tables[:, : num_shared // BLOCK_TOKENS] = block_tables[0, : num_shared // BLOCK_TOKENS]
    block_tables = block_tables[first:]
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


def fill_cache(device: CpuDevice, batch: int, end: int, num_shared: int = 0) -> None:
    """Compute the first `end` tokens of `batch` sequences, those that are shared once."""
    for start in range(0, end, BLOCK_TOKENS):
        writers = batch if start >= num_shared else 1
        device.forward(make_step(writers, start, min(BLOCK_TOKENS, end - start), num_shared))


class Roofline:
    """The machine's two limits, measured by the threads that a device of so many threads would have."""

    def __init__(self, num_threads: int, variant: str) -> None:
        self._runtime = Runtime(variant, num_threads)
        self._memory = Arena(self._runtime)
        self._address = self._memory.allocate(READ_BYTES)
        ctypes.memset(self._address, 1, READ_BYTES)
        self._flops = self._runtime.measure_dot(DOT_ITEMS)
        self._integer_ops = self._runtime.measure_integer_dot(DOT_ITEMS)
        self.reads_compressed = self._runtime.reads_compressed

    def read_rates(self, seconds: float) -> list[float]:
        """Return rates of reading, bytes per ms."""
        times = times_of(lambda: self._runtime.measure_read(self._address, READ_BYTES), seconds)
        return [READ_BYTES / ms for ms in times]

    def dot_rates(self, seconds: float) -> list[float]:
        """Return rates of multiplying pairs, operations per ms."""
        return [self._flops / ms for ms in times_of(lambda: self._runtime.measure_dot(DOT_ITEMS), seconds)]

    def integer_rates(self, seconds: float) -> list[float]:
        """Return rates of multiplying quads of bytes, operations per ms."""
        times = times_of(lambda: self._runtime.measure_integer_dot(DOT_ITEMS), seconds)
        return [self._integer_ops / ms for ms in times]


@dataclass
class Row:
    """A kind of step and what was measured of it, and of the machine between its steps."""

    name: str
    tokens: int
    num_bytes: int
    plain_bytes: int  # with weights that are not compressed
    flops: int  # of attention, and of linear layers that are not quantised
    integer_ops: int
    times: list[float] = field(default_factory=list)
    read_rates: list[float] = field(default_factory=list)
    dot_rates: list[float] = field(default_factory=list)
    integer_rates: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{self.name:19}"]
        rates = (self.read_rates, self.dot_rates, self.integer_rates)
        for word, time_ms, (read, dot, integer_dot) in (
            ("best", min(self.times), map(max, rates)),
            ("median", statistics.median(self.times), map(statistics.median, rates)),
        ):
            by_bytes, by_ops = self.num_bytes / read, self.flops / dot + self.integer_ops / integer_dot
            floor = max(by_bytes, by_ops)
            dots = f"{dot / 1e6:3.0f} GFLOP/s" + (f", {integer_dot / 1e6:3.0f} int8 Gop/s" if self.integer_ops else "")
            parts.append(
                f"{word} {time_ms:7.2f} ms = {floor / time_ms:4.0%} of floor {floor:6.2f}"
                f" (bytes {by_bytes:5.2f} at {read / 1e6:4.1f} GB/s, operations {by_ops:6.2f} at {dots})"
            )
            if self.plain_bytes > self.num_bytes:
                plain_floor = max(self.plain_bytes / read, by_ops)
                parts[-1] += f", {plain_floor / time_ms:4.0%} of {plain_floor:5.2f} with two bytes a weight"
        parts.append(f"{self.tokens / statistics.median(self.times) * 1e3:5.0f} tok/s")
        return "  ".join(parts)


def bytes_of_weights(scheme: Quantization, is_compressed: bool = False) -> int:
    """Return the bytes of all weights that a step reads."""
    layer_bytes, head_bytes = COMPRESSED_BYTES if is_compressed else WEIGHT_BYTES[scheme]
    return int(LAYERS * LAYER_WEIGHTS * layer_bytes + HEAD_WEIGHTS * head_bytes)


def times_of(run: Callable[[], object], seconds: float) -> list[float]:
    """Return the times of many calls, in ms."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return times


def make_row(
    name: str,
    device: CpuDevice,
    scheme: Quantization,
    roofline: Roofline,
    batch: int,
    context: int,
    num_new: int,
    num_shared: int,
    seconds: float,
) -> Row:
    """Fill the cache up to the step, then time the step and the machine's limits in turn."""
    fill_cache(device, batch, context - num_new, num_shared)
    step = make_step(batch, context - num_new, num_new, num_shared)
    tokens = batch * num_new
    keys_seen = batch * ((LAYERS - 1) * sum(range(context - num_new + 1, context + 1)) + context)
    attention = KEY_OPERATIONS * keys_seen
    linear = TOKEN_OPERATIONS * tokens + ROW_OPERATIONS * batch
    cache_bytes = (num_shared + batch * (context - num_shared)) * device.kv_block_bytes() // BLOCK_TOKENS
    plain_bytes = bytes_of_weights(scheme) + cache_bytes
    num_bytes = bytes_of_weights(scheme, roofline.reads_compressed and scheme is Quantization.NONE) + cache_bytes
    is_quantized = scheme is not Quantization.NONE
    flops, integer_ops = (attention, linear) if is_quantized else (attention + linear, 0)
    row = Row(name, tokens, num_bytes, plain_bytes, flops, integer_ops)
    for _ in range(ROUNDS):
        row.read_rates += roofline.read_rates(seconds / ROUNDS / 8)
        row.dot_rates += roofline.dot_rates(seconds / ROUNDS / 8)
        row.integer_rates += roofline.integer_rates(seconds / ROUNDS / 8)
        row.times += times_of(lambda: device.forward(step), seconds * 3 / 4 / ROUNDS)
    return row


def report_profile(name: str, device: CpuDevice, batch: int, context: int, num_new: int, num_shared: int) -> None:
    """Print where the time of a step goes, by kind of operation, and how often all threads wait for each other."""
    step = make_step(batch, context - num_new, num_new, num_shared)
    device.profile(True)
    num_steps = 20
    for _ in range(num_steps):
        device.forward(step)
    kinds = device.profile(False)
    total = sum(ns for ns, _ in kinds.values())
    parts = [f"{kind} {ns / num_steps / 1e6:.2f} ms / {count // num_steps}" for kind, (ns, count) in kinds.items()]
    barriers = sum(count for _, count in kinds.values()) // num_steps
    print(f"  {name}: {total / num_steps / 1e6:.2f} ms in {barriers} phases: {', '.join(parts)}", flush=True)


def report_beside_busy(device: CpuDevice, seconds: float) -> None:
    """Time a step alone and beside a process that keeps a core busy, in turn."""
    for batch in BATCHES:
        step = make_step(batch, 127, 1)
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(ROUNDS):
            for is_busy, measured in times.items():
                process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if is_busy else None
                measured += times_of(lambda step=step: device.forward(step), seconds / ROUNDS)  # type: ignore[misc]
                if process is not None:
                    process.kill()
                    process.wait()
        for word, pick in (("mean", statistics.mean), ("median", statistics.median)):
            alone, beside = pick(times[False]), pick(times[True])
            print(
                f"decode B={batch:<3} {word:6} {alone:6.2f} ms alone, {beside:6.2f} ms beside a busy process:"
                f" {beside / alone:.2f} times",
                flush=True,
            )


def report_draws(device: CpuDevice, seconds: float) -> None:
    """Time drawing, a row of 49,152 logits each."""
    logits = torch.randn(32, VOCAB).numpy() * 3
    for name, draw in {
        "argmax": Draw(0, 0, 1, 0, 7, 0, 5),
        "temperature": Draw(1, 0, 1, 0, 7, 0, 5),
        "top_k 50, top_p 0.9": Draw(1, 50, 0.9, 0, 7, 0, 5),
        "top_p 0.9": Draw(1, 0, 0.9, 0, 7, 0, 5),
        "min_p 0.1": Draw(1, 0, 1, 0.1, 7, 0, 5),
    }.items():
        times = times_of(lambda draw=draw: device.draw(logits, [draw] * 32), seconds / 4)  # type: ignore[misc]
        best, median = min(times) / 32, statistics.median(times) / 32
        print(f"draw {name:20} best {best:7.4f} ms  median {median:7.4f} ms a row, of 32", flush=True)


def main() -> None:
    """Print a line for each kind of step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", default="none", choices=[scheme.value for scheme in WEIGHT_BYTES])
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core")
    parser.add_argument("--variant", default="", help="amx, avx512_bf16, avx2 or portable; default: the best")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each line")
    parser.add_argument("--long", action="store_true", help="contexts of 512 and 2048 as well")
    parser.add_argument("--shared-prefix", type=int, default=0, help="decode after so many shared tokens as well")
    parser.add_argument("--only", default="", help="only the kinds of step whose name holds this, like 'B=1 '")
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes")
    parser.add_argument("--beside-busy", action="store_true", help="steps beside a process that keeps a core busy")
    options = parser.parse_args()
    roofline = Roofline(options.threads, options.variant)
    scheme = Quantization(options.quantization)
    device = CpuDevice(
        RandomModel(),
        2048,
        32,
        MAX_POSITIONS // BLOCK_TOKENS,
        num_threads=options.threads,
        variant=options.variant,
        quantization=scheme,
    )
    device.allocate_kv(32 * MAX_POSITIONS // BLOCK_TOKENS + 1)
    contexts, prompts = ((128, 512, 2048), (32, 128, 512, 1024, 2048)) if options.long else ((128,), (512,))
    shapes = [(f"decode B={batch} ctx {context}", batch, context, 1, 0) for context in contexts for batch in BATCHES]
    shapes += [(f"prefill {length}", 1, length, length, 0) for length in prompts]
    if options.shared_prefix:
        context = options.shared_prefix + OWN_TOKENS
        shapes += [(f"decode B={batch} ctx {context}", batch, context, 1, 0) for batch in BATCHES[1:]]
        shapes += [(f"{name}, shared", *sizes, options.shared_prefix) for name, *sizes, _ in shapes[-2:]]
    for name, batch, context, num_new, num_shared in shapes:
        if options.only not in name:
            continue
        row = make_row(name, device, scheme, roofline, batch, context, num_new, num_shared, options.seconds)
        print(row, flush=True)
        if options.profile:
            report_profile(name, device, batch, context, num_new, num_shared)
    if options.beside_busy:
        report_beside_busy(device, options.seconds)
    report_draws(device, options.seconds)


if __name__ == "__main__":
    main()
