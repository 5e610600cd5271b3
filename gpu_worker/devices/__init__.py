"""Devices that run models, and the choice between them."""

from __future__ import annotations

import importlib.util
import logging
from typing import Final

import torch

from octavo.gpu_worker.collectives import Collectives
from octavo.gpu_worker.errors import DeviceError
from octavo.gpu_worker.host_runner import HostRunner
from octavo.gpu_worker.ops import Device, Model
from octavo.gpu_worker.parallel import ParallelModel
from octavo.gpu_worker.runner import Runner

log = logging.getLogger("octavo.worker")

DEVICES: Final = ("auto", "cuda", "cpu", "reference")


def make_runner(
    name: str,
    model: Model,
    max_batch_tokens: int,
    max_running: int,
    max_blocks_per_sequence: int,
    *,
    num_threads: int = 0,
    kv_cache_dtype: str = "auto",
    collectives: Collectives | None = None,
) -> Runner:
    """Build what runs steps on a device of DEVICES. Raises DeviceError if it is missing.

    "auto" is a GPU if torch finds one, else the native CPU device, or the slow reference device where
    the native one cannot be built. num_threads 0 means all cores. With `collectives` the model is one
    rank's part of a model.
    """
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return _cuda(model, max_batch_tokens, max_running, max_blocks_per_sequence, kv_cache_dtype, collectives)
    if kv_cache_dtype != "auto":
        raise DeviceError(f"kv_cache_dtype {kv_cache_dtype} is for device cuda; use auto")
    if collectives is not None:
        model = ParallelModel(model, collectives)
    device = make_device(name, model, max_batch_tokens, max_running, max_blocks_per_sequence, num_threads=num_threads)
    return HostRunner(device, max_running, max_blocks_per_sequence, model.vocab_size)


def make_device(
    name: str,
    model: Model,
    max_batch_tokens: int,
    max_running: int,
    max_blocks_per_sequence: int,
    *,
    num_threads: int = 0,
) -> Device:
    """Build one of DEVICES that computes in the host's memory. Raises DeviceError if it is missing.

    "auto" is the native CPU device, or the slow reference device where the native one cannot be
    built. num_threads 0 means all cores.
    """
    limits = (model, max_batch_tokens, max_running, max_blocks_per_sequence)
    if name not in DEVICES:
        raise DeviceError(f"device {name!r} is not one of {', '.join(DEVICES)}")
    assert name != "cuda", "a GPU runs steps, see make_runner"
    if name == "reference":
        return _reference(*limits)
    # Imported late: it loads native code that the reference device does without.
    from octavo.gpu_worker.devices.cpu import CpuDevice
    from octavo.kernels.cpu.build import BuildError

    try:
        return CpuDevice(*limits, num_threads=num_threads)
    except BuildError as error:
        if name == "cpu":
            raise DeviceError(f"device cpu: {error}") from error
        log.warning("the CPU kernels cannot be built; falling back to the reference device, which is SLOW: %s", error)
        return _reference(*limits)


def _cuda(
    model: Model,
    max_batch_tokens: int,
    max_running: int,
    max_blocks_per_sequence: int,
    kv_cache_dtype: str,
    collectives: Collectives | None,
) -> Runner:
    if not torch.cuda.is_available():
        raise DeviceError("device cuda: torch finds no GPU; install a torch with CUDA or ROCm and a driver, or use cpu")
    # Imported late: triton is in an extra of its own.
    if importlib.util.find_spec("triton") is None:
        raise DeviceError('device cuda needs triton: pip install "octavo[cuda]", or use cpu')
    from octavo.gpu_worker.devices.cuda import CudaRunner
    from octavo.gpu_worker.devices.cuda_parallel import over_ranks

    limits = (model, max_batch_tokens, max_running, max_blocks_per_sequence)
    if collectives is None:
        return CudaRunner(*limits, kv_cache_dtype=kv_cache_dtype)
    return CudaRunner(
        *limits,
        device=gpu_of_rank(collectives.rank, torch.cuda.device_count()),
        kv_cache_dtype=kv_cache_dtype,
        wrap=over_ranks(collectives, model.vocab_size),
    )


def gpu_of_rank(rank: int, num_gpus: int) -> str:
    """Return which of the GPUs that its process sees a rank computes on; each machine has as many."""
    return f"cuda:{rank % num_gpus}"


def device_of_ranks(name: str) -> str:
    """Return which device runs a part of a model that is split over processes. Raises DeviceError."""
    if name == "auto" and torch.cuda.is_available():
        return "cuda"
    if name not in ("cuda", "reference"):
        raise DeviceError(
            f"device {name} cannot run a model that is split over processes here: use device cuda, one process, or "
            "device reference to try it"
        )
    return name


def _reference(model: Model, max_batch_tokens: int, max_running: int, max_blocks_per_sequence: int) -> Device:
    from octavo.gpu_worker.devices.reference import ReferenceDevice

    return ReferenceDevice(model, max_batch_tokens, max_running, max_blocks_per_sequence)
