"""Decode steps against their floor, the scheduler's share of them, and start-up."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from lab import Lab
from loop import MAX_BATCH_TOKENS, make_engine, plans_of, replay, requests_of, serve
from models import LLAMA_8B, SMOLLM2, TINY, Shape, loaded_model, random_model
from report import Row

from octavo.gpu_worker.devices.cuda.runner import CudaRunner
from octavo.gpu_worker.engine import Engine
from octavo.gpu_worker.loading.loading import LoadedModel

CONTEXT, NUM_NEW = 1024, 96
BATCHES = (1, 8, 32, 128, 256)


def measure_small_steps(lab: Lab) -> Iterator[Row]:
    """Decode steps of SmolLM2's shape."""
    batches = lab.pick(BATCHES, (1,))
    for batch, step, floor, note in _steps(lab, lab.pick(SMOLLM2, TINY), batches):
        name = f"SmolLM2 decode, batch {batch}"
        if batch == 1:
            yield Row("steps", name, step, "us", at_most=700.0, note=note)
        else:
            yield Row("steps", name, step / floor, "x floor", note=note)


def measure_8b_steps(lab: Lab) -> Iterator[Row]:
    """Decode steps of an 8B model's shape."""
    batches = lab.pick(BATCHES, (1, 2))
    for batch, step, floor, note in _steps(lab, lab.pick(LLAMA_8B, TINY), batches):
        name = f"8B decode, batch {batch}"
        if batch == 1:
            yield Row("steps", name, 1e6 / step, "tok/s", at_least=150.0, note=note)
        else:
            most = 1.35 if batch >= lab.pick(32, 2) else None
            yield Row("steps", name, step / floor, "x floor", at_most=most, note=note)


def measure_quantized_steps(lab: Lab) -> Iterator[Row]:
    """Decode steps of an 8B model's shape with int8 weights, beside the floor of weights of that size."""
    batches = lab.pick((1, 32), (1,))
    for batch, step, floor, note in _steps(lab, lab.pick(LLAMA_8B, TINY), batches, "int8"):
        yield Row("steps", f"8B decode with int8 weights, batch {batch}", step / floor, "x floor", note=note)


def _steps(
    lab: Lab, shape: Shape, batches: tuple[int, ...], quantization: str = "none"
) -> Iterator[tuple[int, float, float, str]]:
    """Yield batch, time of a decode step and its floor in microseconds, and a note, for each batch that fits."""
    context, num_new = lab.pick((CONTEXT, NUM_NEW), (24, 5))
    loaded = random_model(lab, shape, context + num_new)
    max_batch, engine = largest_engine(lab, loaded, shape, batches, context + num_new, quantization)
    for batch in batches:
        if batch > max_batch:
            yield batch, math.nan, 1.0, "not measured: the cache does not fit"  # misses any target
            continue
        engine.reset()
        requests = requests_of(shape.vocab_size, batch, context, num_new)
        step = statistics.median(steady(replay(engine, plans_of(engine, requests)).decode_us(batch)))
        floor = shape.floor_us(batch, context, lab.ceilings, quantized=quantization != "none")
        rates = f"{1e6 * batch / step:.0f} tok/s, {step:.0f} us, floor {floor:.0f} us"
        yield batch, step, floor, f"{rates} at context {context}, {engine.runner.memory_used_bytes() / 2**30:.1f} GiB"


def measure_throughput(lab: Lab) -> Iterator[Row]:
    """Decode with the scheduler in the loop, beside the same plans made beforehand: A B A B."""
    shape = lab.pick(SMOLLM2, TINY)
    batch = lab.pick(256, 2)
    context, num_new = lab.pick((128, 192), (12, 5))
    loaded = random_model(lab, shape, context + num_new)
    _, engine = largest_engine(lab, loaded, shape, (batch,), context + num_new)
    requests = requests_of(shape.vocab_size, batch, context, num_new)
    plans = plans_of(engine, requests)
    alone, together, own = [], [], []
    for _ in range(2):
        engine.reset()
        alone += steady(replay(engine, plans).decode_us(batch))
        engine.reset()
        started = time.perf_counter()
        trace = serve(engine, requests)
        seconds = time.perf_counter() - started
        together += steady(trace.decode_us(batch))
        own += trace.scheduler_us
    step, looped = statistics.median(alone), statistics.median(together)
    made = sum(map(len, trace.tokens.values()))
    note = f"{looped:.0f} us a step with it, {step:.0f} us without; its own time {statistics.median(own):.0f} us"
    yield Row("throughput", f"{shape.name} batch {batch}, all of it", made / seconds, "tok/s", note="prompts included")
    yield Row("throughput", "share of the scheduler", 100 * (1 - step / looped), "%", at_most=5.0, note=note)


def measure_start(lab: Lab) -> Iterator[Row]:
    """From nothing to ready: loading (the small model, if there is a file), moving, buffers, graphs."""
    if lab.model is not None:
        yield from _start(lab, lab.model.name, lambda: loaded_model(lab.model), 10.0)  # type: ignore[arg-type]
    small = lab.pick(SMOLLM2, TINY)
    yield from _start(lab, f"{small.name}, random weights", lambda: random_model(lab, small, 2048), 10.0)
    large = lab.pick(LLAMA_8B, TINY)
    yield from _start(lab, f"{large.name}, random weights", lambda: random_model(lab, large, 8192), 30.0)


def _start(lab: Lab, name: str, load: Callable[[], LoadedModel], most: float) -> Iterator[Row]:
    started = time.perf_counter()
    loaded = load()
    _synchronize(lab)
    read = time.perf_counter()
    limits = (lab.pick(MAX_BATCH_TOKENS, 64), lab.pick(256, 4))
    runner = CudaRunner(loaded.model, *limits, -(-loaded.max_model_len // 16), device=lab.device)
    moved = time.perf_counter()
    make_engine(runner, loaded, limits[1], limits[0], lab.pick(4096, 80))
    _synchronize(lab)
    ready = time.perf_counter()
    parts = (("weights", read - started), ("moving and buffers", moved - read), ("cache and graphs", ready - moved))
    note = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in parts)
    yield Row("start", f"{name}: ready", ready - started, "s", at_most=most, note=note)


def largest_engine(
    lab: Lab, loaded: LoadedModel, shape: Shape, batches: tuple[int, ...], tokens: int, quantization: str = "none"
) -> tuple[int, Engine]:
    """Return the largest batch whose cache fits, and an engine for it with all its graphs."""
    max_tokens = lab.pick(MAX_BATCH_TOKENS, 64)
    limits = (max_tokens, max(batches), -(-tokens // 16))
    runner = CudaRunner(loaded.model, *limits, device=lab.device, quantization=quantization)
    blocks_each = -(-tokens // 16) + 1
    room = runner.kv_memory_bytes() // runner.kv_block_bytes()
    fitting = [batch for batch in batches if batch * blocks_each + 1 <= room]
    assert fitting, f"{shape.name}: not even one sequence of {tokens} tokens fits"
    engine = make_engine(runner, loaded, max(batches), max_tokens, max(fitting) * blocks_each + 1)
    while runner.use_idle_time():
        pass
    return max(fitting), engine


def steady(times: list[float]) -> list[float]:
    """Leave out the first steps, in which kernels may still be compiled."""
    return times[len(times) // 4 :]


def _synchronize(lab: Lab) -> None:
    if not lab.interpreted:
        torch.cuda.synchronize()
