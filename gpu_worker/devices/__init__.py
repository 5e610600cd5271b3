"""Devices that run models, and the choice between them."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from octavo.gpu_worker.errors import DeviceError
from octavo.gpu_worker.ops import CheckedModel, Device, EncoderModel, Model
from octavo.gpu_worker.sampling.grammars import Grammars
from octavo.gpu_worker.steps.host_runner import HostRunner
from octavo.gpu_worker.steps.pooler import Pooling
from octavo.gpu_worker.steps.pooling_runner import PoolingRunner
from octavo.gpu_worker.steps.runner import Runner
from octavo.gpu_worker.steps.speculation import Speculation

if TYPE_CHECKING:  # torch and native code, which not every device needs
    from octavo.gpu_worker.devices.cpu.device import CpuDevice
    from octavo.gpu_worker.devices.cpu.packed_model import PackedModel
    from octavo.gpu_worker.distributed.collectives import Collectives

    _AnyModel = Model | EncoderModel | PackedModel

log = logging.getLogger("octavo.worker")

DEVICES: Final = ("auto", "cuda", "cpu", "reference")

# What a driver for NVIDIA's or AMD's GPUs puts there, also under WSL.
_DRIVER_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def choose_device(name: str) -> str:
    """Return the device that `name` of DEVICES stands for here: "cuda", "cpu" or "reference".

    "auto" is a GPU if torch finds one, else the native CPU device, or the slow reference device where
    the native one cannot be built. Raises DeviceError if the native one is asked for and cannot be built.
    """
    if name not in DEVICES:
        raise DeviceError(f"device {name!r} is not one of {', '.join(DEVICES)}")
    if name in ("cuda", "reference"):
        return name
    if name == "auto" and _has_gpu():
        return "cuda"
    from octavo.kernels.cpu import build, library

    try:
        library.load()
    except build.BuildError as error:
        if name == "cpu":
            raise DeviceError(f"device cpu: {error}") from error
        log.warning("the CPU kernels cannot be built; falling back to the reference device, which is SLOW: %s", error)
        return "reference"
    return "cpu"


def make_runner(
    name: str,
    model: _AnyModel,
    max_batch_tokens: int,
    max_running: int,
    max_blocks_per_sequence: int,
    *,
    num_threads: int = 0,
    kv_cache_dtype: str = "auto",
    quantization: str = "none",
    dtype: str = "auto",
    collectives: Collectives | None = None,
    pooling: Pooling | None = None,
    grammars: Grammars | None = None,
    speculation: Callable[..., Speculation] | None = None,
    max_kv_groups: int = 1,
) -> Runner:
    """Build what runs steps on a device of DEVICES, see `choose_device`. Raises DeviceError if it is missing.

    A packed model is for the cpu device and brings its threads with it; num_threads 0 means all cores.
    quantization is what the device is to do itself: a packed model is quantised already.
    With `collectives` the model is one rank's part of a model; with `pooling` vectors are made of what it gives,
    on the cpu device in float32 unless a decoder is wanted in `dtype` bfloat16.
    Without `grammars` no slot may have one. `speculation` makes what guesses tokens, for so many rows that are
    multiplied at once and KV blocks: for the cpu device, whose rows do not depend on each other to the last bit;
    others do without. `max_kv_groups`: of tables that the scheduler keeps for a slot; the reference device has several.
    """
    limits = (max_batch_tokens, max_running, max_blocks_per_sequence)
    device = choose_device(name)
    if device == "cuda":
        check_cuda()
        if pooling is not None:
            from octavo.gpu_worker.devices.cuda.pooling_runner import CudaPoolingRunner

            return CudaPoolingRunner(_unpacked(model), *limits, pooling, kv_cache_dtype=kv_cache_dtype)
        return _cuda(_decoder(model), *limits, kv_cache_dtype, quantization, collectives, grammars)
    if kv_cache_dtype != "auto":
        raise DeviceError(f"kv_cache_dtype {kv_cache_dtype} is for device cuda; use auto")
    if collectives is not None:
        from octavo.gpu_worker.distributed.parallel import ParallelModel

        model = ParallelModel(_decoder(model), collectives)
    is_exact = pooling is not None and (model.num_layers == 0 or dtype != "bfloat16")
    max_kv_groups = max_kv_groups if pooling is None and collectives is None else 1
    host_device = make_device(
        device, model, *limits, num_threads=num_threads, is_exact=is_exact, max_kv_groups=max_kv_groups
    )
    if pooling is not None:
        return PoolingRunner(host_device, max_running, max_blocks_per_sequence, pooling)
    make_speculation = None
    if device == "cpu" and speculation is not None:
        make_speculation = functools.partial(speculation, cast("CpuDevice", host_device).rows_at_once)
    return HostRunner(host_device, max_running, max_blocks_per_sequence, model.vocab_size, grammars, make_speculation)


def make_device(
    name: str,
    model: _AnyModel,
    max_batch_tokens: int,
    max_running: int,
    max_blocks_per_sequence: int,
    *,
    num_threads: int = 0,
    is_exact: bool = False,
    max_kv_groups: int = 1,
) -> Device:
    """Build the device "cpu" or "reference".

    is_exact  whether the cpu device computes in float32, with whole sequences and no cache

    Raises build.BuildError if the native kernels cannot be built, DeviceError if they cannot run the model.
    """
    limits = (max_batch_tokens, max_running, max_blocks_per_sequence)
    # Imported late: the one loads native code, the other torch.
    if name == "cpu":
        from octavo.gpu_worker.devices.cpu.device import CpuDevice
        from octavo.gpu_worker.devices.cpu.packed_model import PackedModel

        if isinstance(model, PackedModel):
            return CpuDevice(model, *limits, num_threads=num_threads)
        if is_exact:
            from octavo.gpu_worker.devices.cpu.encoder import CpuEncoder

            return CpuEncoder(model, *limits, num_threads=num_threads)
        return CpuDevice(_decoder(model), *limits, num_threads=num_threads)
    assert name == "reference", f"{name} does not compute in the host's memory"
    from octavo.gpu_worker.devices.reference.device import ReferenceDevice

    reference = ReferenceDevice(_unpacked(model), *limits, max_kv_groups=max_kv_groups)
    if isinstance(model, CheckedModel):
        model.check(reference)
    return reference


def check_cuda() -> None:
    """Raise DeviceError if there is no GPU, or nothing to compile kernels with."""
    import torch

    if not torch.cuda.is_available():
        raise DeviceError("device cuda: torch finds no GPU; install a torch with CUDA or ROCm and a driver, or use cpu")
    # Imported late: triton is in an extra of its own.
    if importlib.util.find_spec("triton") is None:
        raise DeviceError('device cuda needs triton: pip install "octavo[cuda]", or use cpu')


def _cuda(
    model: Model,
    max_batch_tokens: int,
    max_running: int,
    max_blocks_per_sequence: int,
    kv_cache_dtype: str,
    quantization: str,
    collectives: Collectives | None,
    grammars: Grammars | None,
) -> Runner:
    import torch

    from octavo.gpu_worker.devices.cuda.parallel import largest_over_ranks, over_ranks
    from octavo.gpu_worker.devices.cuda.runner import CudaRunner

    limits = (model, max_batch_tokens, max_running, max_blocks_per_sequence)
    if collectives is None:
        return CudaRunner(*limits, kv_cache_dtype=kv_cache_dtype, quantization=quantization, grammars=grammars)
    return CudaRunner(
        *limits,
        device=gpu_of_rank(collectives.rank, torch.cuda.device_count()),
        kv_cache_dtype=kv_cache_dtype,
        quantization=quantization,
        wrap=over_ranks(collectives, model.vocab_size),
        largest=largest_over_ranks(collectives),
        grammars=grammars,
    )


def gpu_of_rank(rank: int, num_gpus: int) -> str:
    """Return which of the GPUs that its process sees a rank computes on; each machine has as many."""
    return f"cuda:{rank % num_gpus}"


def device_of_ranks(name: str) -> str:
    """Return which device runs a part of a model that is split over processes. Raises DeviceError."""
    if name == "auto" and _has_gpu():
        return "cuda"
    if name not in ("cuda", "reference"):
        raise DeviceError(
            f"device {name} cannot run a model that is split over processes here: use device cuda, one process, or "
            "device reference to try it"
        )
    return name


def _has_gpu() -> bool:
    """Ask torch for a GPU, but only where there is a driver: a CPU's worker may do without torch."""
    if not any(Path(name).exists() for name in _DRIVER_FILES):
        return False
    import torch

    return torch.cuda.is_available()


def _unpacked(model: _AnyModel) -> Model | EncoderModel:
    from octavo.gpu_worker.devices.cpu.packed_model import PackedModel

    assert not isinstance(model, PackedModel), "the model is packed for the cpu device"
    return model


def _decoder(model: _AnyModel) -> Model:
    """Return a model that has a KV cache."""
    assert model.num_layers > 0, "an encoder makes vectors"
    return cast(Model, _unpacked(model))
