"""Reads a Hugging Face folder: config.json and safetensors files, mapped into memory and not copied."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.loading import Progress
from octavo.gpu_worker.models.config import ModelConfig, from_json
from octavo.gpu_worker.models.registry import Architecture, find_architecture
from octavo.gpu_worker.sharding import WHOLE, Part, Sharding

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth")
_HASHED_BYTES = 4096  # of each end of a tensor
_HASHING_THREADS = 16


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, read and checked: exactly the tensors that its architecture wants.

    For a rank of several, `config` and `tensors` are that rank's parts.
    """

    config: ModelConfig
    architecture: Architecture
    tensors: dict[str, torch.Tensor]
    fingerprint: str


def load_folder(
    folder: Path, dtype: str, progress: Progress, sharding: Sharding = WHOLE, *, has_head: bool = True
) -> Checkpoint:
    """Load a folder, of each tensor the part that `sharding` says and no more of the file.

    dtype     a name of DTYPES, or "auto" to keep what is stored
    has_head  whether it is to give logits; else the tensors' names may lack "model." at their beginning

    Raises ModelError.
    """
    config_path = folder / "config.json"
    values = read_json(config_path)
    name = architecture_of(values)
    if not has_head and name.endswith("Model"):
        name = name.removesuffix("Model") + "ForCausalLM"
    architecture = find_architecture(name, str(config_path))
    config = replace(from_json(values, name, architecture.traits, str(config_path)), has_head=has_head)
    files = weight_files(folder)
    owners = tensor_files(files)
    wanted = architecture.tensor_shapes(config)
    stored = {tensor: tensor if has_head or tensor in owners else tensor.removeprefix("model.") for tensor in wanted}
    shapes = {stored[tensor]: shape for tensor, shape in wanted.items()}
    _check_names(shapes, owners, config, folder)
    # Sums over ranks round in another order: results are the same only with as many ranks.
    ranks = [f"ranks {sharding.world_size}".encode()] if sharding.world_size > 1 else []
    fingerprint = fingerprint_of_folder([config_path.read_bytes(), dtype.encode(), *ranks], files)
    local = sharding.local_config(config)
    parts = {tensor: sharding.part(tensor, config, wanted) for tensor in architecture.tensor_shapes(local)}
    parts = {tensor: replace(part, source=stored[part.source]) for tensor, part in parts.items()}
    return Checkpoint(local, architecture, read_tensors(shapes, parts, owners, dtype, progress), fingerprint)


def architecture_of(values: Mapping[str, Any]) -> str:
    """Return the architecture that a parsed config.json names."""
    return str((values.get("architectures") or ["(none named)"])[0])


def fingerprint_of(settings: Iterable[bytes], files: Iterable[tuple[Path, Iterable[int]]]) -> str:
    """Return 16 hex digits that change with settings, tensor names, shapes, types, file sizes and weights.

    files  each with the place of each of its tensors

    Both ends of each tensor are hashed, not all of it: gigabytes would take longer than loading them, and a fine-tune
    changes a matrix everywhere.
    """
    digest = hashlib.sha256()
    for part in settings:
        digest.update(len(part).to_bytes(8, "little") + part)
    for path, places in files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as handle, ThreadPoolExecutor(_HASHING_THREADS) as threads:  # a disk far away is slow
            for piece in threads.map(partial(_digest_at, handle.fileno()), [*sorted(places), size]):
                digest.update(piece)
    return digest.hexdigest()[:16]


def _digest_at(file: int, place: int) -> bytes:
    """Hash what is around a place: the end of one tensor, the beginning of the next one."""
    start = max(place - _HASHED_BYTES, 0)
    return hashlib.sha256(os.pread(file, place - start + _HASHED_BYTES, start)).digest()


def tensor_places(path: Path) -> tuple[bytes, list[int]]:
    """Return the head of a safetensors file, its own list of its tensors, and where they begin. Raises ModelError."""
    try:
        with path.open("rb") as handle:
            head = handle.read(int.from_bytes(handle.read(8), "little"))
        places = [each["data_offsets"][0] for name, each in json.loads(head).items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error}); download it again") from error
    return head, [8 + len(head) + place for place in places]


def fingerprint_of_folder(settings: Iterable[bytes], files: Iterable[Path]) -> str:
    """Return the fingerprint of safetensors files. Raises ModelError."""
    found = {path: tensor_places(path) for path in files}
    heads = [head for head, _ in found.values()]
    return fingerprint_of([*settings, *heads], [(path, places) for path, (_, places) in found.items()])


def check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...], where: str) -> None:
    """Raise ModelError if a tensor's shape is not what the config says."""
    if found != wanted:
        raise ModelError(f"{where}: {name} has shape {list(found)}, the config asks for {list(wanted)}")


def name_list(names: Iterable[str]) -> str:
    """Return some of `names` for a message."""
    ordered = sorted(names)
    return ", ".join(ordered[:4]) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ModelError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; give a folder that holds a whole checkpoint") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return values


def read_list(path: Path) -> list[dict[str, Any]]:
    """Read a JSON list of objects. Raises ModelError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ModelError(f"{path}: expected a list of JSON objects")
    return values


def open_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder's safetensors files. Raises ModelError."""
    return {name: handle.get_tensor(name) for name, (_, handle) in tensor_files(weight_files(folder)).items()}


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, from its index if it has one. Raises ModelError."""
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{folder / INDEX_FILE}: weight_map is missing or empty")
        names = sorted({str(name) for name in weight_map.values()})
        if any(Path(name).name != name for name in names):
            raise ModelError(f"{folder / INDEX_FILE}: names a file outside its folder")
    elif (folder / SINGLE_FILE).is_file():
        names = [SINGLE_FILE]
    elif pickled := [path.name for path in folder.iterdir() if path.suffix in _PICKLED_SUFFIXES]:
        raise ModelError(
            f"{folder}: holds only pickled weights ({name_list(pickled)}), which can run any code when loaded "
            "and are refused; download the safetensors files, or convert them: load them with transformers where you "
            "trust them and call save_pretrained"
        )
    else:
        raise ModelError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ModelError(f"{folder}: {INDEX_FILE} names files that are not there: {name_list(missing)}")
    return [folder / name for name in names]


def _open(path: Path) -> Any:
    """Map a safetensors file. Its header and its length are checked here."""
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error}); download it again") from error


def tensor_files(files: list[Path]) -> dict[str, tuple[Path, Any]]:
    """Return for each tensor its file and the open handle. Raises ModelError."""
    owners: dict[str, tuple[Path, Any]] = {}
    for path in files:
        handle = _open(path)
        for name in handle.keys():  # noqa: SIM118 - not a dict
            if name in owners:
                raise ModelError(f"{path}: {name} is also in {owners[name][0].name}")
            owners[name] = (path, handle)
    return owners


def _check_names(wanted: Mapping[str, object], found: Mapping[str, object], config: ModelConfig, folder: Path) -> None:
    """Raise ModelError if tensors are missing, or there that the architecture does not know."""
    if missing := wanted.keys() - found.keys():
        raise ModelError(
            f"{folder}: tensors of {config.architecture} are missing: {name_list(missing)}; "
            "the checkpoint is incomplete or config.json is of another model"
        )
    unknown = {name for name in found.keys() - wanted.keys() if not name.endswith(".rotary_emb.inv_freq")}
    if config.tie_word_embeddings or not config.has_head:
        unknown.discard("lm_head.weight")
    if unknown:
        raise ModelError(
            f"{folder}: holds tensors that {config.architecture} does not have: {name_list(unknown)}; "
            "config.json is of another model, or the checkpoint is of a variant that is not supported"
        )


def read_tensors(
    wanted: Mapping[str, tuple[int, ...]],
    parts: Mapping[str, Part],
    owners: Mapping[str, tuple[Path, Any]],
    dtype: str,
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """Return the parts, still in the mapped files if they are in one piece there and their type is kept."""
    tensors: dict[str, torch.Tensor] = {}
    in_files = sum(path.stat().st_size for path in {path for path, _ in owners.values()})
    share = sum(math.prod(part.shape) for part in parts.values()) / sum(map(math.prod, wanted.values()))
    done = 0
    for name, part in parts.items():
        path, handle = owners[part.source]
        stored = handle.get_slice(part.source)
        check_shape(part.source, tuple(stored.get_shape()), wanted[part.source], str(path))
        whole = part.shape == wanted[part.source]
        tensor: torch.Tensor = handle.get_tensor(part.source) if whole else stored[part.index]
        if tensor.dtype not in (*DTYPES.values(), torch.float64):
            raise ModelError(f"{path}: {part.source} is of type {tensor.dtype}; supported are {', '.join(DTYPES)}")
        done += tensor.nbytes
        kept = torch.float32 if tensor.dtype is torch.float64 else tensor.dtype
        tensor = tensor.to(DTYPES.get(dtype, kept)).contiguous()
        tensors[name] = torch.zeros_like(tensor) if part.is_zero else tensor
        progress(name, done, round(in_files * share))
    return tensors
