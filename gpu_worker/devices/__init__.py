"""Devices that run models, and the choice between them."""

from __future__ import annotations

import logging
from typing import Final

import torch

from octavo.gpu_worker.errors import DeviceError
from octavo.gpu_worker.host_runner import HostRunner
from octavo.gpu_worker.ops import Device, Model
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
) -> Runner:
    """Build what runs steps on a device of DEVICES. Raises DeviceError if it is missing.

    "auto" is the native CPU device, or the slow reference device where the native one cannot be
    built. num_threads 0 means all cores.
    """
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
    """Build a device of DEVICES for `model`. Raises DeviceError if it is missing.

    "auto" is the native CPU device, or the slow reference device where the native one cannot be
    built. num_threads 0 means all cores.
    """
    limits = (model, max_batch_tokens, max_running, max_blocks_per_sequence)
    if name not in DEVICES:
        raise DeviceError(f"device {name!r} is not one of {', '.join(DEVICES)}")
    if name == "cuda":
        raise DeviceError("device cuda is not in this build; use cpu, or auto")
    if name == "reference":
        return _reference(*limits)
    # Imported late: it loads native code that the reference device does without.
    from octavo.gpu_worker.devices.cpu import CpuDevice
    from octavo.kernels.cpu.build import BuildError

    if name == "auto" and torch.cuda.is_available():
        log.info("a GPU is here, but this build has no device for it: using the CPU")
    try:
        return CpuDevice(*limits, num_threads=num_threads)
    except BuildError as error:
        if name == "cpu":
            raise DeviceError(f"device cpu: {error}") from error
        log.warning("the CPU kernels cannot be built; falling back to the reference device, which is SLOW: %s", error)
        return _reference(*limits)


def _reference(model: Model, max_batch_tokens: int, max_running: int, max_blocks_per_sequence: int) -> Device:
    from octavo.gpu_worker.devices.reference import ReferenceDevice

    return ReferenceDevice(model, max_batch_tokens, max_running, max_blocks_per_sequence)
