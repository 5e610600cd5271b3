"""Runs the steps of a model that makes vectors, on a device whose memory is the host's."""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from octavo.gpu_worker.ops import Device, StepInput
from octavo.gpu_worker.sampling.sampler import NOTHING_SAMPLED
from octavo.gpu_worker.steps.batch import Step
from octavo.gpu_worker.steps.host_runner import Done, HostMemory, Tables
from octavo.gpu_worker.steps.pooler import Pooler, Pooling, Vectors
from octavo.gpu_worker.steps.runner import Outcome


class PoolingRunner(HostMemory):
    """A `Runner` over a `Device`: the model gives hidden states, and the pooler makes vectors of them."""

    def __init__(self, device: Device, max_running: int, max_blocks_per_sequence: int, pooling: Pooling) -> None:
        super().__init__(device)
        self._sizes = (max_running, max_blocks_per_sequence)
        self._pooling = pooling
        self.reset()

    def reset(self) -> None:
        """Forget every slot."""
        self._pooler = Pooler(self._pooling)
        self._tables = Tables(*self._sizes)

    def start(self, step: Step) -> Done:
        """Compute the step."""
        self._num_started += 1
        for slot in step.freed_slots.tolist():
            self._pooler.free_slot(slot)
        for slot, settings in step.opened_for_vectors:
            self._pooler.open_slot(slot, settings)
        self._tables.append(step)
        if len(step.copy_pairs):
            self._device.copy_blocks(step.copy_pairs)
        started = time.perf_counter()
        vectors = Vectors(np.empty(0, np.float32), np.empty(0, np.uint32))
        computed = started
        if len(step.rows.slots):
            hidden = self._device.forward(self._step_input(step))
            computed = time.perf_counter()
            vectors = self._pooler.pool(hidden, step)
        ended = time.perf_counter()
        times = (round((computed - started) * 1e6), round((ended - computed) * 1e6))
        return Done(Outcome(NOTHING_SAMPLED, *times, vectors))

    def _step_input(self, step: Step) -> StepInput:
        """Return the batch of a step that has rows: which hidden states are wanted, and of which text each token is."""
        batch = self._tables.step_input(step)
        starts = np.repeat(self._pooler.second_segment_starts(step), step.rows.query_lengths)
        segments = (batch.positions >= starts).astype(np.int32)
        return dataclasses.replace(batch, logits_rows=self._pooler.rows(step), segments=segments)
