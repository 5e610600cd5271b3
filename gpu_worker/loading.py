"""From a path to a model that can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from octavo.gpu_worker import quantization
from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.devices import choose_device
from octavo.gpu_worker.errors import DeviceError, ModelError
from octavo.gpu_worker.models.encoders import PREFIXES, architecture_of, makes_vectors
from octavo.gpu_worker.ops import EncoderModel, Model
from octavo.gpu_worker.pooler import Pooling
from octavo.gpu_worker.quantization import Quantization
from octavo.gpu_worker.sharding import WHOLE, Sharding
from octavo.gpu_worker.vocabulary import Vocabulary, read_vocabulary, tokenizer_sha256

if TYPE_CHECKING:  # these need torch, which a worker whose weights are packed never imports
    from octavo.gpu_worker.devices.packed_model import PackedModel
    from octavo.gpu_worker.weights import Checkpoint

# Called with a tensor's name, bytes done and bytes in all.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LoadedModel:
    """A model, the longest context it may see, and a fingerprint of its weights and settings.

    pooling  how vectors are made of what it gives; None if that is logits
    """

    model: Model | EncoderModel | PackedModel
    architecture: str
    max_model_len: int
    model_version: str
    pooling: Pooling | None = None


def load_for_device(config: WorkerConfig, progress: Progress, sharding: Sharding = WHOLE) -> LoadedModel:
    """Load the model of `config` for its device: packed already, for the cpu device, if it makes tokens.

    Raises ModelError or DeviceError.
    """
    device = choose_device(config.device)
    if problem := quantization.problem(config.quantization, device):
        raise DeviceError(problem)
    has_vectors = makes_vectors(_find(Path(config.model)))
    if device == "cuda" and architecture_of(Path(config.model)).startswith("ModernBert"):
        raise DeviceError("device cuda does not run ModernBERT; serve this model with device cpu")
    if has_vectors and config.quantization != Quantization.NONE:
        raise ModelError(f"{config.model}: models for vectors are not quantised; take quantization away")
    if device == "cpu" and not has_vectors:
        loaded = _load_packed(config, progress)
    else:
        loaded = load_model(
            Path(config.model), config.dtype, config.max_model_len, progress, sharding, num_threads=config.num_threads
        )
    if config.quantization == Quantization.NONE:
        return loaded
    return replace(loaded, model_version=f"{loaded.model_version}-{config.quantization}")


def vocabulary_reader(path: Path, vocab_size: int) -> Callable[[], Vocabulary] | None:
    """Return what reads the tokens of a model, which takes a while and may raise ModelError; None if it has none."""
    try:
        file = _find(path)
    except ModelError:  # the model did not come from there
        return None
    if file.is_dir() and not (file / "tokenizer.json").exists():
        return None
    return lambda: read_vocabulary(file, vocab_size)


def tokenizer_of(path: Path) -> str:
    """Return what gateways compare a model's tokens by; empty if its files do not say. Takes a while."""
    try:
        return tokenizer_sha256(_find(path))
    except ModelError:  # the model did not come from there
        return ""


def _load_packed(config: WorkerConfig, progress: Progress) -> LoadedModel:
    """Take the packed weights of an earlier start, or pack them now and keep them."""
    from octavo.gpu_worker.devices.packed_model import PackedModel
    from octavo.gpu_worker.packed_cache import PackedCache, cache_key
    from octavo.kernels.cpu.runtime import Runtime

    runtime = Runtime(num_threads=config.num_threads)
    file = _find(Path(config.model))
    cache = PackedCache.of(config)
    try:
        key = cache_key(file, [config.dtype, str(config.max_model_len), config.quantization], runtime)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error})") from error
    if cache is not None and (found := cache.load(key, runtime)) is not None:
        progress(str(file), 1, 1)
        return found
    scheme = Quantization(config.quantization)
    loaded = load_model(
        file, config.dtype, config.max_model_len, progress, num_threads=config.num_threads, codes_of=scheme
    )
    # Imported late: it needs torch, which is there by now.
    from octavo.gpu_worker.devices.recorder import record

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
    codes_of: Quantization = Quantization.NONE,
) -> LoadedModel:
    """Load a Hugging Face folder or a .gguf file.

    dtype          "auto", or a name of `DTYPES` that all weights are converted to
    max_model_len  longest context wanted, 0 for all that the model was made for
    progress       called after each tensor
    sharding       which rank's part of it; the model then runs inside a `ParallelModel`
    num_threads    threads of torch, 0: one for each core that this process may use
    codes_of       leave those matrices of a .gguf file in its codes that the cpu device keeps so under this scheme

    Raises ModelError.
    """
    import torch

    from octavo.gpu_worker.weights import DTYPES
    from octavo.kernels.cpu.library import available_cores

    torch.set_num_threads(num_threads or available_cores())
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    file = _find(path)
    try:
        if makes_vectors(file):
            return _load_for_vectors(file, dtype, max_model_len, progress, sharding)
        checkpoint = _read(file, dtype, progress, sharding, codes_of)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error})") from error
    context = context_of(path, max_model_len, checkpoint.config.max_position_embeddings)
    model = checkpoint.architecture.build(checkpoint.config, checkpoint.tensors, context)
    return LoadedModel(model, checkpoint.config.architecture, context, checkpoint.fingerprint)


def _read(file: Path, dtype: str, progress: Progress, sharding: Sharding, codes_of: Quantization) -> Checkpoint:
    """Read a folder or a .gguf file."""
    if file.is_dir():
        from octavo.gpu_worker.weights import load_folder

        return load_folder(file, dtype, progress, sharding)
    if sharding.world_size > 1:
        raise ModelError(f"{file}: a GGUF file is not split over ranks; use the safetensors checkpoint, or one rank")
    # Imported late: most models are folders, and start without the gguf package.
    from octavo.gpu_worker.gguf_model import load_gguf

    return load_gguf(file, dtype, progress, codes_of)


def _find(path: Path) -> Path:
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
    from octavo.gpu_worker.encoder_files import load_encoder, pooling_digest
    from octavo.gpu_worker.pooling_files import read_pooling
    from octavo.gpu_worker.weights import load_folder

    if sharding.world_size > 1:
        raise ModelError(f"{folder}: a model for vectors is not split over ranks; use one rank")
    architecture = architecture_of(folder)
    if architecture in PREFIXES:
        return load_encoder(folder, architecture, dtype, max_model_len, progress)
    checkpoint = load_folder(folder, dtype, progress, has_head=False)
    pooling = read_pooling(folder, checkpoint.config.hidden_size)
    context = context_of(folder, max_model_len, checkpoint.config.max_position_embeddings)
    model = checkpoint.architecture.build(checkpoint.config, checkpoint.tensors, context)
    version = f"{checkpoint.fingerprint[:8]}{pooling_digest(pooling).hex()[:8]}"
    return LoadedModel(model, checkpoint.config.architecture, context, version, pooling)


def context_of(path: Path, wanted: int, limit: int) -> int:
    """Return the longest context: what is wanted, or all that the model was made for. Raises ModelError."""
    if wanted > limit:
        raise ModelError(f"max_model_len is {wanted}, but {path} was made for at most {limit} tokens; lower it")
    return wanted or limit
