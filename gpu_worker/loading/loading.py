"""From a path to a model that can run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from octavo.gpu_worker import quantization
from octavo.gpu_worker.config import HOST_KV_MEMORY, WorkerConfig
from octavo.gpu_worker.devices import choose_device
from octavo.gpu_worker.errors import DeviceError, ModelError
from octavo.gpu_worker.formats.checkpoint_files import read_json
from octavo.gpu_worker.loading import fallback
from octavo.gpu_worker.loading.sharding import WHOLE, Sharding
from octavo.gpu_worker.loading.tensor_names import is_wrapper, text_part
from octavo.gpu_worker.models.encoders import PREFIXES, architecture_of, is_bidirectional, makes_vectors
from octavo.gpu_worker.models.families import ARCHITECTURES
from octavo.gpu_worker.ops import EncoderModel, Heads, Model
from octavo.gpu_worker.quantization import Quantization
from octavo.gpu_worker.sampling.vocabulary import Vocabulary, read_vocabulary, tokenizer_sha256
from octavo.gpu_worker.steps.pooler import Pooling

if TYPE_CHECKING:  # these need torch, which a worker whose weights are packed never imports
    from octavo.gpu_worker.devices.cpu.packed_model import PackedModel
    from octavo.gpu_worker.loading.weights import Checkpoint

log = logging.getLogger("octavo.worker")

_LEAST_POSITIONS = 32768  # of rotary tables: with heads of 128 dimensions they take 16 MiB

# Called with a tensor's name, bytes done and bytes in all.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LoadedModel:
    """A model, the longest context it may see, and a fingerprint of its weights and settings.

    pooling  how vectors are made of what it gives; None if that is logits
    notes    what who runs it should know, in sentences
    """

    model: Model | EncoderModel | PackedModel
    architecture: str
    max_model_len: int
    model_version: str
    pooling: Pooling | None = None
    notes: tuple[str, ...] = ()


def load_for_device(config: WorkerConfig, progress: Progress, sharding: Sharding = WHOLE) -> LoadedModel:
    """Load the model of `config` for its device: packed already, for the cpu device, if it makes tokens.

    Raises ModelError or DeviceError.
    """
    try:
        return _load_for_device(config, progress, sharding)
    except ModelError as error:
        if config.model in str(error):
            raise
        raise ModelError(f"{config.model}: {error}") from error
    except MemoryError as error:
        raise ModelError(f"{config.model}: there is no memory for it ({error}); use a smaller model") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        log.debug("loading %s", config.model, exc_info=True)
        kind = type(error).__name__
        raise ModelError(
            f"{config.model}: cannot be loaded; a file of it is damaged or odd ({kind}: {error})"
        ) from error


def _load_for_device(config: WorkerConfig, progress: Progress, sharding: Sharding) -> LoadedModel:
    file = find_files(Path(config.model))
    device = device_of(config.device, file)
    has_vectors = makes_vectors(file)
    check_device(file, device, config.quantization, has_vectors=has_vectors)
    if device == "cpu" and not has_vectors:
        loaded = _load_packed(config, progress)
    else:
        loaded = load_model(
            Path(config.model),
            config.dtype,
            config.max_model_len,
            progress,
            sharding,
            num_threads=config.num_threads,
            reach=partial(positions_in_reach, config, device),
        )
    if config.quantization == Quantization.NONE:
        return loaded
    return replace(loaded, model_version=f"{loaded.model_version}-{config.quantization}")


def device_of(name: str, file: Path) -> str:
    """Return which device a model runs on if it is told so; see `choose_device`. Raises DeviceError."""
    device = choose_device(name)
    if name == "auto" and device != "reference" and fallback.is_needed(file):
        return "reference"
    if name == "auto" and device == "cuda" and latent_architecture(file):
        return choose_device("cpu")
    return device


def latent_architecture(file: Path) -> str:
    """Return the architecture of a model if it is one of latent attention that is described here, else nothing."""
    try:
        if file.suffix == ".gguf":
            from octavo.gpu_worker.formats.gguf_file import GgufFile
            from octavo.gpu_worker.loading.gguf_model import find_row

            name = find_row(GgufFile(file)).architecture
        elif is_wrapper(name := architecture_of(file)):
            name, _ = text_part(read_json(file / "config.json"), name, "")
    except ModelError:
        return ""
    return name if name in ARCHITECTURES and ARCHITECTURES[name].is_latent else ""


def check_device(file: Path, device: str, scheme: str, *, has_vectors: bool) -> None:
    """Raise DeviceError or ModelError if a device does not run a model, or not with weights quantised so.

    device  "cuda", "cpu" or "reference"
    """
    if problem := quantization.problem(scheme, device):
        raise DeviceError(problem)
    if fallback.is_needed(file):
        _check_fallback(file, device)
    architecture = architecture_of(file)
    if device == "cuda" and (latent := latent_architecture(file)):
        raise DeviceError(f"device cuda: it has no kernels for the latent attention of {latent}; use device cpu")
    if device == "cuda" and (architecture.startswith(("ModernBert", "NomicBert")) or is_bidirectional(file)):
        raise DeviceError(f"device cuda does not run {architecture}; serve this model with device cpu")
    if has_vectors and scheme != Quantization.NONE:
        raise ModelError(f"{file}: models for vectors are not quantised; take quantization away")


def _check_fallback(file: Path, device: str) -> None:
    """Raise DeviceError if the modules of transformers do not run on a device."""
    what = f"{architecture_of(file)} has no description of its own, and is computed by the modules of transformers"
    if device != "reference":
        raise DeviceError(f"device {device}: {what}, for which device reference is there (slow); take that, or auto")


def positions_in_reach(config: WorkerConfig, device: str, context: int, num_layers: int, heads: Heads) -> int:
    """Return how many positions rotary tables are made for: what the KV cache can hold, 32,768 at least.

    A config.json may name millions, whose tables take gigabytes. A GPU's cache has what is left there: then it is all
    of `context`.
    """
    memory = config.kv_cache_memory or (0 if device == "cuda" else HOST_KV_MEMORY)
    if memory == 0 or num_layers == 0:
        return context
    return min(context, max(_LEAST_POSITIONS, memory // kv_token_bytes(num_layers, heads, config.kv_cache_dtype)))


def kv_token_bytes(num_layers: int, heads: Heads, kv_cache_dtype: str = "auto") -> int:
    """Return the bytes that a token's keys and values take in all layers, in 16 bits or those of a type of 8."""
    return num_layers * heads.cached_per_token * (2 if kv_cache_dtype == "auto" else 1)


def vocabulary_reader(path: Path, vocab_size: int) -> Callable[[], Vocabulary] | None:
    """Return what reads the tokens of a model, which takes a while and may raise ModelError; None if it has none."""
    try:
        file = find_files(path)
    except ModelError:  # the model did not come from there
        return None
    if file.is_dir() and not (file / "tokenizer.json").exists():
        return None
    return lambda: read_vocabulary(file, vocab_size)


def tokenizer_of(path: Path) -> str:
    """Return what gateways compare a model's tokens by; empty if its files do not say. Takes a while."""
    try:
        return tokenizer_sha256(find_files(path))
    except ModelError:  # the model did not come from there
        return ""


def _load_packed(config: WorkerConfig, progress: Progress) -> LoadedModel:
    """Take the packed weights of an earlier start, or pack them now and keep them."""
    from octavo.gpu_worker.devices.cpu.packed_model import PackedModel
    from octavo.gpu_worker.loading.packed_cache import PackedCache, cache_key
    from octavo.kernels.cpu.runtime import Runtime

    runtime = Runtime(num_threads=config.num_threads)
    file = find_files(Path(config.model))
    cache = PackedCache.of(config)
    try:
        key = cache_key(file, [config.dtype, str(config.max_model_len), config.quantization], runtime)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error})") from error
    reach = partial(positions_in_reach, config, "cpu")

    def is_enough(found: LoadedModel) -> bool:
        packed = cast("PackedModel", found.model)
        return packed.max_positions >= reach(found.max_model_len, packed.num_layers, packed.heads)

    if cache is not None and (found := cache.load(key, runtime, is_enough)) is not None:
        progress(str(file), 1, 1)
        return found
    scheme = Quantization(config.quantization)
    loaded = load_model(
        file,
        config.dtype,
        config.max_model_len,
        progress,
        num_threads=config.num_threads,
        packed_as=scheme,
        reach=reach,
    )
    # Imported late: it needs torch, which is there by now.
    from octavo.gpu_worker.devices.cpu.recorder import record

    assert not isinstance(loaded.model, PackedModel), "a model that was read from its own files is not packed"
    loaded = replace(loaded, model=record(cast(Model, loaded.model), runtime, scheme))
    if cache is not None:
        cache.store_in_background(key, loaded)
    return loaded


def load_model(
    path: Path,
    dtype: str,
    max_model_len: int,
    progress: Progress,
    sharding: Sharding = WHOLE,
    *,
    num_threads: int = 0,
    packed_as: Quantization | None = None,
    reach: Callable[[int, int, Heads], int] | None = None,
) -> LoadedModel:
    """Load a Hugging Face folder or a .gguf file.

    dtype          "auto", or a name of `DTYPES` that all weights are converted to
    max_model_len  longest context wanted, 0 for all that the model was made for
    progress       called after each tensor
    sharding       which rank's part of it; the model then runs inside a `ParallelModel`
    num_threads    threads of torch, 0: one for each core that this process may use
    packed_as      leave matrices unread, or in a .gguf file's codes, for the cpu device to pack under this scheme
    reach          how many positions will be used of a context, with so many layers and such heads; None: all

    Raises ModelError.
    """
    import torch

    from octavo.gpu_worker.loading.weights import DTYPES
    from octavo.kernels.machine import available_cores

    torch.set_num_threads(num_threads or available_cores())
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    file = find_files(path)
    try:
        if makes_vectors(file):
            return _load_for_vectors(file, dtype, max_model_len, progress, sharding)
        if fallback.is_needed(file):
            return _load_fallback(file, dtype, max_model_len, progress, sharding, reach)
        checkpoint = _read(file, dtype, progress, sharding, packed_as)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error})") from error
    context = context_of(path, max_model_len, checkpoint.config.max_position_embeddings)
    config = checkpoint.config
    positions = context if reach is None else reach(context, config.num_layers, config.heads)
    model = checkpoint.architecture.build(config, checkpoint.tensors, positions)
    return LoadedModel(model, config.architecture, context, checkpoint.fingerprint)


def _load_fallback(
    folder: Path,
    dtype: str,
    max_model_len: int,
    progress: Progress,
    sharding: Sharding,
    reach: Callable[[int, int, Heads], int] | None,
) -> LoadedModel:
    """Load a folder for which `fallback.is_needed` holds."""
    if sharding.world_size > 1:
        raise ModelError(f"{folder}: what modules of transformers compute is not split over ranks; use one rank")
    found = fallback.plan_fallback(folder)
    context = context_of(folder, max_model_len, found.max_context)
    positions = context if reach is None else reach(context, found.num_layers, found.heads)
    model, version = fallback.load_fallback(folder, dtype, positions, found)
    progress(str(folder), 1, 1)
    log.warning("%s: %s", found.architecture, fallback.NOTE)
    return LoadedModel(cast(Model, model), found.architecture, context, version, notes=(fallback.NOTE,))


def _read(file: Path, dtype: str, progress: Progress, sharding: Sharding, packed_as: Quantization | None) -> Checkpoint:
    """Read a folder or a .gguf file."""
    if file.is_dir():
        from octavo.gpu_worker.loading.weights import load_folder

        num_bytes = sum(each.stat().st_size for each in file.glob("*.safetensors"))
        keeps_codes = packed_as is Quantization.NONE and quantization.takes_codes(dtype, num_bytes)
        return load_folder(file, dtype, progress, sharding, may_wait=packed_as is not None, keeps_codes=keeps_codes)
    if sharding.world_size > 1:
        raise ModelError(f"{file}: a GGUF file is not split over ranks; use the safetensors checkpoint, or one rank")
    # Imported late: most models are folders, and start without the gguf package.
    from octavo.gpu_worker.loading.gguf_model import load_gguf

    return load_gguf(file, dtype, progress, packed_as)


def find_files(path: Path) -> Path:
    """Return the folder or the .gguf file to load."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path}: give a .gguf file, or the folder that holds the model")
        return path
    if not path.is_dir():
        raise ModelError(f"{path}: no such file or folder; give a folder with config.json, or a .gguf file")
    if (path / "config.json").exists():
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise ModelError(f"{path}: holds {len(found)} GGUF files; name the one to load")
    return found[0] if found else path


def _load_for_vectors(
    folder: Path, dtype: str, max_model_len: int, progress: Progress, sharding: Sharding
) -> LoadedModel:
    """Load a folder for which `makes_vectors` holds."""
    from octavo.gpu_worker.loading.decoder_heads import read_decoder_pooling
    from octavo.gpu_worker.loading.encoder_files import load_encoder, pooling_digest
    from octavo.gpu_worker.loading.weights import load_folder

    if sharding.world_size > 1:
        raise ModelError(f"{folder}: a model for vectors is not split over ranks; use one rank")
    architecture = architecture_of(folder)
    if architecture in PREFIXES:
        return load_encoder(folder, architecture, dtype, max_model_len, progress)
    checkpoint = load_folder(folder, dtype, progress, has_head=False)
    pooling = read_decoder_pooling(folder, checkpoint.config)
    context = context_of(folder, max_model_len, checkpoint.config.max_position_embeddings)
    model = checkpoint.architecture.build(checkpoint.config, checkpoint.tensors, context)
    version = f"{checkpoint.fingerprint[:8]}{pooling_digest(pooling).hex()[:8]}"
    return LoadedModel(model, checkpoint.config.architecture, context, version, pooling)


def context_of(path: Path, wanted: int, limit: int) -> int:
    """Return the longest context: what is wanted, or all that the model was made for. Raises ModelError."""
    if wanted > limit:
        raise ModelError(f"max_model_len is {wanted}, but {path} was made for at most {limit} tokens; lower it")
    return wanted or limit
