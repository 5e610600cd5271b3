"""Reads what a checkpoint's files say of themselves: JSON, where tensors lie, fingerprints. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from octavo.gpu_worker.errors import ModelError

INDEX_FILE = "model.safetensors.index.json"
_HASHED_BYTES = 4096  # of each end of a tensor
_HASHING_THREADS = 16
# Far above any model. Parsed JSON takes up to thirty times as much memory as its text.
_MAX_JSON_BYTES = {INDEX_FILE: 32 << 20}
_MAX_OTHER_JSON_BYTES = 4 << 20
_MAX_HEAD_BYTES = 32 << 20


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ModelError."""
    values = _parse(path)
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return values


def read_list(path: Path) -> list[dict[str, Any]]:
    """Read a JSON list of objects. Raises ModelError."""
    values = _parse(path)
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ModelError(f"{path}: expected a list of JSON objects")
    return values


def _parse(path: Path) -> Any:
    limit = _MAX_JSON_BYTES.get(path.name, _MAX_OTHER_JSON_BYTES)
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # to open a pipe may take for ever
            raise ModelError(f"{path}: is no file; give a folder that holds a whole checkpoint")
        if about.st_size > limit:
            raise ModelError(f"{path}: has {about.st_size} bytes, at most {limit} are read; download it again")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; give a folder that holds a whole checkpoint") from None
    except RecursionError:
        raise ModelError(f"{path}: cannot be read as JSON (it is nested too deep)") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from error


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
        add_ends(digest, path, places)
    return digest.hexdigest()[:16]


def add_ends(digest: Any, path: Path, places: Iterable[int]) -> None:
    """Add a file's size and both ends of each tensor to a hashlib digest. Raises OSError."""
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with path.open("rb") as handle, ThreadPoolExecutor(_HASHING_THREADS) as threads:  # a disk far away is slow
        for piece in threads.map(partial(_digest_at, handle.fileno()), [*sorted(places), size]):
            digest.update(piece)


def _digest_at(file: int, place: int) -> bytes:
    """Hash what is around a place: the end of one tensor, the beginning of the next one."""
    start = max(place - _HASHED_BYTES, 0)
    return hashlib.sha256(os.pread(file, place - start + _HASHED_BYTES, start)).digest()


def adapter_of(folder: Path) -> str:
    """Return that a folder holds an adapter (PEFT) and no model, and of which one it is; empty if it does not."""
    if (folder / "config.json").is_file() or not (folder / "adapter_config.json").is_file():
        return ""
    try:
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    except ModelError:
        base = None
    of = f" of {base}" if isinstance(base, str) and base else ""
    return f"is an adapter{of} and not a model; serve its model with --adapter NAME=PATH"


class StoredTensor(NamedTuple):
    """A tensor of a safetensors file: its type's name there, and its bytes' place behind the head."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_head(path: Path) -> tuple[bytes, dict[str, StoredTensor]]:
    """Return the head of a safetensors file, and the tensors that it lists. Raises ModelError."""
    try:
        with path.open("rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            if size > _MAX_HEAD_BYTES:
                raise ValueError(f"its head has {size} bytes, at most {_MAX_HEAD_BYTES} are read")
            head = handle.read(size)
        listed = {name: each for name, each in json.loads(head).items() if name != "__metadata__"}
        tensors = {name: _stored_tensor(each) for name, each in listed.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error}); download it again") from error
    return head, tensors


def _stored_tensor(listed: Mapping[str, Any]) -> StoredTensor:
    start, end = listed["data_offsets"]
    return StoredTensor(str(listed["dtype"]), tuple(map(int, listed["shape"])), int(start), int(end))


def tensor_places(path: Path) -> list[int]:
    """Return where the tensors of a safetensors file begin. Raises ModelError."""
    head, tensors = read_head(path)
    return _places(head, tensors)


def _places(head: bytes, tensors: Mapping[str, StoredTensor]) -> list[int]:
    return [8 + len(head) + tensor.start for tensor in tensors.values()]


def fingerprint_of_folder(settings: Iterable[bytes], files: Iterable[Path]) -> str:
    """Return the fingerprint of safetensors files. Raises ModelError, OSError."""
    found = {path: read_head(path) for path in files}
    heads = [head for head, _ in found.values()]
    return fingerprint_of([*settings, *heads], [(path, _places(*each)) for path, each in found.items()])
