"""Runs the steps of a model that makes vectors on a GPU: its forward pass, then the pooling, both on the device.

The host gets one vector for each row of a step; what follows, the layers behind the pooling and the length, is
the `Pooler`'s, as on the other devices. As in `runner.py`, a step is one copy to the device and no host reads in it.
"""

from __future__ import annotations

import logging
from typing import Protocol, cast

import numpy as np
import torch

from octavo.gpu_worker.devices.cuda.accelerator import (
    Accelerator,
    Event,
    MemoryReport,
    kv_memory_bytes,
    make_accelerator,
)
from octavo.gpu_worker.devices.cuda.changes import Changes
from octavo.gpu_worker.devices.cuda.encoder import DeviceEncoder
from octavo.gpu_worker.devices.cuda.model import DeviceModel, Launched, Limits, warn_of_unstable_products
from octavo.gpu_worker.devices.cuda.step import Hidden
from octavo.gpu_worker.devices.cuda.weights import Weights
from octavo.gpu_worker.ops import EncoderModel, Float32Array, Int32Array, Model, NoAdapters
from octavo.gpu_worker.sampling.sampler import NOTHING_SAMPLED
from octavo.gpu_worker.steps.batch import Step
from octavo.gpu_worker.steps.pooler import Pooler, Pooling, PoolingMode, Unfinished
from octavo.gpu_worker.steps.runner import MAX_STEPS_IN_FLIGHT, Outcome
from octavo.kernels.pooling import Mode, pool

log = logging.getLogger("octavo.worker")

_MODES: dict[PoolingMode, Mode] = {"cls": "first", "last": "last", "mean": "sum", "mean_sqrt_len": "sum"}


class Forward(Protocol):
    """Owner of a model on the device."""

    weights: Weights

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, beside weights and cache."""

    def kv_block_bytes(self) -> int:
        """Bytes that a block takes; 0 without a cache."""

    def allocate_kv(self, num_blocks: int) -> Hidden:
        """Allocate the cache, and launch a step of padding, which compiles every kernel; return what it gave."""

    def run(self, step: Step, second_starts: Int32Array) -> Hidden | None:
        """Send a step and launch it; None if it has no rows. second_starts as `Pooler.second_segment_starts`."""


class CudaPoolingRunner(NoAdapters):
    """A `Runner`. Its weights and buffers are ready when `allocate_kv` returns.

    memory  where the memory went, from `allocate_kv` on
    """

    scores_prompts = False
    kv_windows: tuple[int, ...] = (0,)
    max_row_tokens = 1

    def __init__(
        self,
        model: Model | EncoderModel,
        max_batch_tokens: int,
        max_running: int,
        max_blocks_per_sequence: int,
        pooling: Pooling,
        *,
        device: str = "cuda",
        kv_cache_dtype: str = "auto",
    ) -> None:
        """Move the weights; arguments as in `CudaRunner`. Raises DeviceError."""
        self.name = "cuda"
        self._accelerator = accelerator = make_accelerator(device)
        limits = Limits(max_batch_tokens, max_running, max_blocks_per_sequence)
        self._pooling = pooling
        self._forward: Forward
        if model.num_layers == 0:
            self._forward = DeviceEncoder(cast(EncoderModel, model), limits, accelerator)
        else:
            self._forward = _Decoder(cast(Model, model), limits, accelerator, kv_cache_dtype)
        with torch.no_grad(), accelerator.computing():
            shape = (max_running, pooling.hidden_size)
            self._sums = torch.zeros(shape, dtype=torch.float64, device=accelerator.device)
            self._results = [_Result(accelerator, *shape) for _ in range(MAX_STEPS_IN_FLIGHT)]
        self._num_started = 0
        self.memory = MemoryReport(weights=self._forward.weights.num_bytes, buffers=self._buffer_bytes())
        self.reset()

    def kv_block_bytes(self) -> int:
        """Bytes that one block of 16 tokens takes, over all layers, keys and values; 0 if there is no cache."""
        return self._forward.kv_block_bytes()

    def kv_memory_bytes(self) -> int:
        """All that is left, but for a reserve."""
        return kv_memory_bytes(self._accelerator, num_graphs=0)

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate the zeroed cache, if the model has one, and compile every kernel."""
        with torch.no_grad(), self._accelerator.computing():
            self._pool(self._forward.allocate_kv(num_blocks), self._results[0].on_device[:1])
            warn_of_unstable_products(self._forward.weights)
            self._accelerator.synchronize()
        self.memory.kv_blocks = num_blocks if self.kv_block_bytes() else 0
        self.memory.kv_cache = self.memory.kv_blocks * self.kv_block_bytes()
        self.memory.buffers, self.memory.free = self._buffer_bytes(), self._accelerator.free_bytes()
        log.info("device memory: %s", self.memory)

    def memory_used_bytes(self) -> int:
        """Memory of the device in use."""
        return self._accelerator.used_bytes()

    def use_idle_time(self) -> bool:
        """There is nothing to prepare: the steps of such a model have no sizes that come again."""
        return False

    def progress(self) -> int:
        """0: what a GPU has done of a step cannot be seen from outside."""
        return 0

    def reset(self) -> None:
        """Wait for what is under way, and forget every slot."""
        self._accelerator.synchronize()
        self._pooler = Pooler(self._pooling)

    def close(self) -> None:
        """Wait for what is under way, and free weights, buffers and cache."""
        accelerator = self._accelerator
        accelerator.synchronize()
        vars(self).clear()  # also what refers to itself: a captured step knows its runner
        accelerator.release()

    def start(self, step: Step) -> _RunningStep:
        """Launch a step. Does not wait for the device."""
        for slot in step.freed_slots.tolist():
            self._pooler.free_slot(slot)
        for slot, settings in step.opened_for_vectors:
            self._pooler.open_slot(slot, settings)
        result = self._results[self._num_started % MAX_STEPS_IN_FLIGHT]
        self._num_started += 1
        with torch.no_grad(), self._accelerator.computing():
            began = self._accelerator.event()
            hidden = self._forward.run(step, self._pooler.second_segment_starts(step))
            computed = self._accelerator.event()
            count = 0 if hidden is None else len(hidden.slots)
            if hidden is not None:
                self._pool(hidden, result.on_device[:count])
            ended = self._accelerator.event()
            copied = result.download(self._accelerator, count) if count else ended
        unfinished = self._pooler.unfinished(step)
        return _RunningStep(self._pooler, unfinished, result.on_host[:count], (began, computed, ended, copied))

    def _pool(self, hidden: Hidden, output: torch.Tensor) -> None:
        mode = _MODES[self._pooling.mode]
        pool(hidden.states, hidden.slots, hidden.query_start_loc, hidden.seq_lens, self._sums, output, mode)

    def _buffer_bytes(self) -> int:
        results = sum(result.on_device.nbytes for result in self._results)
        return self._forward.num_bytes + self._sums.nbytes + results


class _Decoder:
    """A model with a cache."""

    def __init__(self, model: Model, limits: Limits, accelerator: Accelerator, kv_cache_dtype: str) -> None:
        self._model = DeviceModel(model, limits, accelerator, kv_cache_dtype=kv_cache_dtype)
        self.weights = self._model.weights
        self.kv_block_bytes = self._model.kv_block_bytes

    @property
    def num_bytes(self) -> int:
        return self._model.num_bytes

    def allocate_kv(self, num_blocks: int) -> Hidden:
        self._model.allocate_kv(num_blocks)
        self._model.send(Changes(), self._model.planner.padding(1))
        return _hidden(self._model.launch(self._model.planner.graph_sizes(1)))

    def run(self, step: Step, _second_starts: Int32Array) -> Hidden | None:
        columns = self._model.planner.columns(step) if len(step.rows.slots) else None
        self._model.send(self._model.changes(step), columns)
        self._model.copy_blocks(step.copy_pairs)
        if columns is None:
            return None
        return _hidden(self._model.launch(columns.sizes))


def _hidden(launched: Launched) -> Hidden:
    return Hidden(launched.output, launched.slots, launched.query_start_loc, launched.seq_lens)


class _Result:
    """Where a step's vectors lie on the device, and where they are copied to."""

    def __init__(self, accelerator: Accelerator, max_rows: int, hidden_size: int) -> None:
        words = torch.zeros(max_rows, hidden_size, dtype=torch.int32, device=accelerator.device)
        self.on_device = words.view(torch.float32)
        self._pinned = accelerator.pinned(max_rows * hidden_size).view(torch.float32).view(max_rows, hidden_size)
        self.on_host: Float32Array = self._pinned.numpy()

    def download(self, accelerator: Accelerator, num_rows: int) -> Event:
        """Launch the copy of the first rows."""
        return accelerator.download(self.on_device[:num_rows], self._pinned[:num_rows])


class _RunningStep:
    """A step that was launched."""

    def __init__(
        self, pooler: Pooler, unfinished: Unfinished, pooled: Float32Array, events: tuple[Event, Event, Event, Event]
    ) -> None:
        """events: the step began, was computed, was pooled, and its result is there."""
        self._pooler = pooler
        self._unfinished = unfinished
        self._pooled = pooled
        self._began, self._computed, self._ended, self._copied = events

    def is_done(self) -> bool:
        """Tell whether the vectors are here."""
        return self._copied.is_past()

    def wait(self) -> Outcome:
        """Wait for them."""
        self._copied.wait()
        times = (self._computed.us_since(self._began), self._ended.us_since(self._computed))
        ending = np.flatnonzero(self._unfinished.ends)
        return Outcome(NOTHING_SAMPLED, *times, self._pooler.finish(self._pooled[ending], self._unfinished))
