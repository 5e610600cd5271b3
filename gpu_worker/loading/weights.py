"""Reads a Hugging Face folder: config.json and safetensors files, mapped into memory and not copied."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.formats.checkpoint_files import fingerprint_of_folder, read_json
from octavo.gpu_worker.loading.folder import (
    check_stored,
    match_tensors,
    read_config,
    read_quantization,
    weight_files,
)
from octavo.gpu_worker.loading.loading import Progress
from octavo.gpu_worker.loading.quantised_tensors import QuantisedMatrix, add_quantised, check_needless
from octavo.gpu_worker.loading.sharding import WHOLE, Pairs, Part, Sharding
from octavo.gpu_worker.loading.stacked_experts import unstacked_handles
from octavo.gpu_worker.loading.tensor_names import is_packed_alone, pairs_of
from octavo.gpu_worker.memory import FilePages
from octavo.gpu_worker.models.config import ModelConfig
from octavo.gpu_worker.models.registry import Architecture
from octavo.kernels.cpu.coded_rows import Coded, CodedRows, Unread
from octavo.kernels.group_codes import GroupCodes

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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
    folder: Path,
    dtype: str,
    progress: Progress,
    sharding: Sharding = WHOLE,
    *,
    has_head: bool = True,
    may_wait: bool = False,
    keeps_codes: bool = False,
) -> Checkpoint:
    """Load a folder, of each tensor the part that `sharding` says and no more of the file.

    dtype     a name of DTYPES, or "auto" to keep what is stored
    has_head  whether it is to give logits; else the tensors' names may lack "model." at their beginning
    may_wait, keeps_codes  as `read_tensors` has it

    Raises ModelError.
    """
    config, architecture, wrapper = read_config(folder, has_head=has_head)
    files = weight_files(folder)
    owners, needless = tensor_files(files), set[str]()
    if architecture.traits.has_stacked_experts:
        owners = unstacked_handles(owners)
    if (settings := read_quantization(folder)) is not None:
        owners, needless = add_quantised(settings, owners, _type_of_numbers(folder, dtype), str(folder))
    wanted, places = match_tensors(folder, config, architecture, wrapper, owners, needless)
    check_needless((needless & owners.keys()) - {place.name for place in places.values()}, owners)
    shapes = {place.name: place.shape for place in places.values()}
    # Sums over ranks round in another order: results are the same only with as many ranks.
    ranks = [f"ranks {sharding.world_size}".encode()] if sharding.world_size > 1 else []
    fingerprint = fingerprint_of_folder([(folder / "config.json").read_bytes(), dtype.encode(), *ranks], files)
    local = sharding.local_config(config)
    parts = {tensor: sharding.part(tensor, config, wanted) for tensor, _ in architecture.tensor_shapes(local)}
    parts = {tensor: places[part.source].of(part, pairs_of(tensor, config)) for tensor, part in parts.items()}
    tensors = read_tensors(
        shapes,
        parts,
        owners,
        dtype,
        progress,
        may_wait=may_wait,
        keeps_codes=keeps_codes,
    )
    return Checkpoint(local, architecture, tensors, fingerprint)


def open_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder's safetensors files. Raises ModelError."""
    return {name: handle.get_tensor(name) for name, (_, handle) in tensor_files(weight_files(folder)).items()}


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


def read_tensors(
    wanted: Mapping[str, tuple[int, ...]],
    parts: Mapping[str, Part],
    owners: Mapping[str, tuple[Path, Any]],
    dtype: str,
    progress: Progress,
    *,
    may_wait: bool = False,
    keeps_codes: bool = False,
) -> dict[str, torch.Tensor]:
    """Return the parts, still in the mapped files if they are in one piece there and their type is kept.

    may_wait     leave matrices unread (`CodedRows`), for a device that packs them
    keeps_codes  and those that are quantised in their codes
    """
    pages: dict[Path, FilePages] = {}
    tensors: dict[str, torch.Tensor] = {}
    in_files = sum(path.stat().st_size for path in {path for path, _ in owners.values()})
    share = sum(math.prod(part.shape) for part in parts.values()) / sum(map(math.prod, wanted.values()))
    done = 0
    for name, part in parts.items():
        path, handle = owners[part.source]
        stored = handle.get_slice(part.source)
        check_stored(part.source, stored.get_dtype(), tuple(stored.get_shape()), wanted[part.source], str(path))
        if isinstance(stored, QuantisedMatrix) and may_wait and is_packed_alone(name, 2):
            tensors[name] = _in_codes(stored, part, keeps_codes=keeps_codes)
            done += stored.plan.num_bytes
            progress(name, done, round(in_files * share))
            continue
        whole = part.shape == wanted[part.source]
        tensor: torch.Tensor = handle.get_tensor(part.source) if whole else stored[part.index]
        in_one_piece = whole or (part.shape[1:] == wanted[part.source][1:] and tensor.is_contiguous())
        done += tensor.nbytes
        kept = torch.float32 if tensor.dtype is torch.float64 else tensor.dtype
        if path not in pages:
            pages[path] = FilePages(path)
        release = partial(pages[path].drop, tensor.data_ptr(), tensor.nbytes)
        target = DTYPES.get(dtype, kept)
        arrange = partial(_halves, pairs=part.pairs) if part.pairs else None
        if may_wait and in_one_piece and not part.is_zero and is_packed_alone(name, tensor.dim()):
            read = partial(_as_packed, tensor, target, release, arrange)
            tensors[name] = CodedRows([Unread(len(tensor), read, release)], tensor.shape[1], target)
        else:
            converted = (tensor if arrange is None else arrange(tensor)).to(target).contiguous()
            if converted.data_ptr() != tensor.data_ptr():
                release()
            tensors[name] = torch.zeros_like(converted) if part.is_zero else converted
        progress(name, done, round(in_files * share))
    return tensors


def _in_codes(matrix: QuantisedMatrix, part: Part, *, keeps_codes: bool) -> torch.Tensor:
    """Return a part of a quantised matrix that is read when it is packed: its codes, or else its numbers."""
    rows, columns = part.index
    order = np.arange(rows.start, rows.stop)
    if part.pairs:
        order = _halves(torch.from_numpy(order), part.pairs).numpy()

    def codes(some: slice) -> GroupCodes:
        if part.pairs:  # few rows, in another order than the file has them
            return matrix.codes(rows).rows(order[some] - rows.start)
        return matrix.codes(slice(rows.start + some.start, rows.start + some.stop))

    def numbers() -> torch.Tensor:
        return matrix[rows, columns][order - rows.start]

    is_whole = columns.stop - columns.start == matrix.plan.shape[1]
    if keeps_codes and is_whole:
        one: Coded | Unread = Coded(len(order), matrix.plan.codes, codes, matrix.release)
    else:
        one = Unread(len(order), numbers, matrix.release)
    return CodedRows([one], part.shape[1], matrix.dtype)


def _type_of_numbers(folder: Path, dtype: str) -> torch.dtype:
    """Return the type in which quantised matrices become numbers: that of the model, by its config.json."""
    values = read_json(folder / "config.json")
    values = {**values, **(text if isinstance(text := values.get("text_config"), dict) else {})}
    own = values.get("dtype", values.get("torch_dtype"))
    return DTYPES.get(dtype) or DTYPES.get(own if isinstance(own, str) else "", torch.bfloat16)


def _halves(tensor: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Return the rows of heads with the dimensions that lie in pairs half of those apart."""
    heads = tensor.view(-1, pairs.head_dim, *tensor.shape[1:])
    first, end = pairs.first, pairs.first + pairs.count
    kept, behind = heads[:, :first], heads[:, end:]
    return torch.cat([kept, heads[:, first:end:2], heads[:, first + 1 : end : 2], behind], dim=1).flatten(0, 1)


def _as_packed(
    tensor: torch.Tensor,
    target: torch.dtype,
    release: Callable[[], None],
    arrange: Callable[[torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor:
    """Return a tensor with the values that it has in another type, of which packing makes the same weights."""
    if arrange is not None:
        arranged = arrange(tensor).to(target)
        release()
        return arranged
    if tensor.dtype is target or (target is torch.float32 and tensor.dtype in DTYPES.values()):
        return tensor  # float32 has all values of the others
    converted = tensor.to(target)
    release()
    return converted
