"""From a path to a model that can run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.ops import Model
from octavo.gpu_worker.sharding import WHOLE, Sharding
from octavo.gpu_worker.weights import DTYPES, Checkpoint, Progress, load_folder


@dataclass(frozen=True)
class LoadedModel:
    """A model, the longest context it may see, and a fingerprint of its weights and settings."""

    model: Model
    architecture: str
    max_model_len: int
    model_version: str


def load_model(
    path: Path, dtype: str, max_model_len: int, progress: Progress, sharding: Sharding = WHOLE
) -> LoadedModel:
    """Load a Hugging Face folder or a .gguf file.

    dtype          "auto", or a name of `DTYPES` that all weights are converted to
    max_model_len  longest context wanted, 0 for all that the model was made for
    progress       called after each tensor
    sharding       which rank's part of it; the model then runs inside a `ParallelModel`

    Raises ModelError.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    try:
        checkpoint = _read(_find(path), dtype, progress, sharding)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error})") from error
    limit = checkpoint.config.max_position_embeddings
    if max_model_len > limit:
        raise ModelError(f"max_model_len is {max_model_len}, but {path} was made for at most {limit} tokens; lower it")
    context = max_model_len or limit
    model = checkpoint.architecture.build(checkpoint.config, checkpoint.tensors, context)
    return LoadedModel(model, checkpoint.config.architecture, context, checkpoint.fingerprint)


def _read(file: Path, dtype: str, progress: Progress, sharding: Sharding) -> Checkpoint:
    """Read a folder or a .gguf file."""
    if file.is_dir():
        return load_folder(file, dtype, progress, sharding)
    if sharding.world_size > 1:
        raise ModelError(f"{file}: a GGUF file is not split over ranks; use the safetensors checkpoint, or one rank")
    # Imported late: most models are folders, and start without the gguf package.
    from octavo.gpu_worker.gguf_model import load_gguf

    return load_gguf(file, dtype, progress)


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
