"""Computes StepPlans: a device with its KV memory, and the slots of the present epoch."""

from __future__ import annotations

import logging
import time

import torch

from octavo.gpu_worker.batch import Limits, Slots
from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.devices import make_device
from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.loading import LoadedModel
from octavo.gpu_worker.ops import Device
from octavo.gpu_worker.protocol import BLOCK_SIZE
from octavo.gpu_worker.sampler import Sampled, Sampler
from octavo.worker.v1 import worker_pb2

log = logging.getLogger("octavo.worker")

_DEFAULT_MAX_BATCH_TOKENS = 2048
_DEFAULT_MAX_RUNNING = 64
_MIN_CONTEXT = 64


class Engine:
    """Owner of the device and of all that plans refer to. Not thread safe."""

    def __init__(self, device: Device, limits: Limits, max_model_len: int) -> None:
        self.device = device
        self.limits = limits
        self.max_model_len = max_model_len
        self.reset()

    def reset(self) -> None:
        """Forget every slot; weights and KV memory stay."""
        self._slots = Slots(self.limits)
        self._sampler = Sampler(self.device, self.limits.vocab_size, self.limits.max_running)

    def run(self, plan: worker_pb2.StepPlan) -> worker_pb2.StepResult:
        """Compute a plan. Raises PlanError if it breaks the contract; other errors are the device's."""
        step = self._slots.apply(plan)
        for slot in step.freed_slots.tolist():
            self._sampler.free_slot(slot)
        for slot, settings in step.opened:
            self._sampler.open_slot(slot, settings)
        if len(step.copy_pairs):
            self.device.copy_blocks(step.copy_pairs)
        started = time.perf_counter()
        logits = torch.empty(0, self.limits.vocab_size) if step.input is None else self.device.forward(step.input)
        computed = time.perf_counter()
        sampled = self._sampler.sample(logits, step.sampled_slots, step.sampled_positions)
        self._slots.record(step.sampled_slots, sampled.token_ids)
        return _result(
            plan.step_id,
            step.sampled_slots.astype("<u4").tobytes(),
            sampled,
            forward_us=round((computed - started) * 1e6),
            sample_us=round((time.perf_counter() - computed) * 1e6),
        )


def make_engine(loaded: LoadedModel, config: WorkerConfig, wanted: worker_pb2.WorkerConfig) -> Engine:
    """Build the device and allocate its KV cache, within the worker's and the scheduler's limits.

    Raises ModelError or DeviceError.
    """
    max_batch_tokens = wanted.max_batch_tokens or _DEFAULT_MAX_BATCH_TOKENS
    max_running = wanted.max_running or _DEFAULT_MAX_RUNNING
    max_blocks_per_sequence = -(-loaded.max_model_len // BLOCK_SIZE)
    device = make_device(
        config.device,
        loaded.model,
        max_batch_tokens,
        max_running,
        max_blocks_per_sequence,
        num_threads=config.num_threads,
    )
    num_blocks = count_blocks(config.kv_cache_memory, device.kv_block_bytes(), wanted.kv_blocks)
    device.allocate_kv(num_blocks)
    limits = Limits(max_running, max_batch_tokens, max_blocks_per_sequence, num_blocks, loaded.model.vocab_size)
    max_model_len = min(loaded.max_model_len, (num_blocks - 1) * BLOCK_SIZE)
    if max_model_len < loaded.max_model_len:
        log.info("kv_cache_memory limits the context to %d of %d tokens", max_model_len, loaded.max_model_len)
    return Engine(device, limits, max_model_len)


def count_blocks(kv_cache_memory: int, block_bytes: int, wanted: int) -> int:
    """Return how many blocks there are, block 0 included; raise ModelError if they hold no useful context."""
    num_blocks = kv_cache_memory // block_bytes
    if wanted:
        num_blocks = min(num_blocks, wanted)
    if (num_blocks - 1) * BLOCK_SIZE < _MIN_CONTEXT:
        least = (_MIN_CONTEXT // BLOCK_SIZE + 1) * block_bytes
        raise ModelError(
            f"the KV cache has room for {max(num_blocks - 1, 0) * BLOCK_SIZE} tokens, too few to be of use: raise "
            f"kv_cache_memory from {kv_cache_memory} to {least} bytes or more"
            + (f", and the scheduler's kv_blocks from {wanted}" if wanted else "")
        )
    return num_blocks


def _result(
    step_id: int, slot_indexes: bytes, sampled: Sampled, *, forward_us: int, sample_us: int
) -> worker_pb2.StepResult:
    """Pack a step's tokens into columns."""
    return worker_pb2.StepResult(
        step_id=step_id,
        slot_indexes=slot_indexes,
        token_ids=sampled.token_ids.astype("<u4").tobytes(),
        logprobs=sampled.logprobs.astype("<f4").tobytes(),
        ranks=sampled.ranks.astype("<u4").tobytes(),
        candidate_token_ids=sampled.candidate_token_ids.astype("<u4").tobytes(),
        candidate_logprobs=sampled.candidate_logprobs.astype("<f4").tobytes(),
        forward_us=forward_us,
        sample_us=sample_us,
    )
