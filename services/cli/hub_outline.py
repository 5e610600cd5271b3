"""Makes an outline of a model of the hub: a folder that looks like the model's, at the price of its small files.

Weights are there by their heads alone, in sparse files of the right length: whoever reads names, types and shapes
finds what the model's own folder would say. Other files that are needed are there by name.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from octavo.gpu_worker.formats.checkpoint_files import INDEX_FILE
from octavo.gpu_worker.loading.folder import weight_files
from octavo.services.cli.errors import CommandError
from octavo.services.cli.model_source import HUB_FILES, HUB_FILES_NEVER, hub_errors

_READ = {
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "modules.json",
    "adapter_config.json",
    INDEX_FILE,
}
_MAX_FILE_BYTES = 32 << 20
_MAX_FILES = 10_000
_THREADS = 8


@dataclass(frozen=True)
class HubModel:
    """What the hub says of a model. `gated`: "" if anybody may fetch it, else how one is let in."""

    repo: str
    revision: str
    licence: str
    gated: str
    total_bytes: int  # of the files that would be downloaded


def look_up(repo: str, revision: str) -> tuple[HubModel, dict[str, int]]:
    """Return what the hub says, and the size of each file. Raises CommandError."""
    with hub_errors(repo, revision):
        from huggingface_hub import HfApi
        from huggingface_hub.utils import filter_repo_objects

        info: Any = HfApi().model_info(repo, revision=revision or None, files_metadata=True, timeout=10)
        sizes = {str(each.rfilename): int(each.size or 0) for each in info.siblings or []}
        wanted = filter_repo_objects(sizes, allow_patterns=HUB_FILES, ignore_patterns=HUB_FILES_NEVER)
        card = info.card_data or {}
        licence = str(card.get("license_name") or card.get("license") or "")
        model = HubModel(repo, str(info.sha), licence, str(info.gated or ""), sum(sizes[name] for name in wanted))
    return model, sizes


def fetch_settings(model: HubModel, sizes: dict[str, int], folder: Path) -> None:
    """Put the small files into an empty folder, and empty ones for the others. Raises CommandError."""
    paths = [path for path in map(PurePosixPath, sizes) if not any(part.startswith(".") for part in path.parts)]
    paths = [path for path in paths if len(path.parts) == 1 or (len(path.parts) == 2 and path.parts[0][0].isdigit())]
    if len(paths) > _MAX_FILES:
        raise CommandError(f"{model.repo} has {len(paths)} files, at most {_MAX_FILES} are looked at")
    for path in paths:
        (folder / path.parent).mkdir(exist_ok=True)
        (folder / path).touch()
    small = [path for path in paths if path.name in _READ and sizes[str(path)] <= _MAX_FILE_BYTES]
    _in_threads(model, small, lambda path: _fetch(model, path, folder))


def fetch_heads(model: HubModel, folder: Path) -> None:
    """Give the files with weights their heads and lengths. Raises CommandError, ModelError."""
    files = [*weight_files(folder), *folder.glob("[0-9]*/*.safetensors")]
    paths = [PurePosixPath(file.relative_to(folder)) for file in files]
    _in_threads(model, paths, lambda path: _head(model, path, folder))


def _in_threads(model: HubModel, paths: list[PurePosixPath], work: Any) -> None:
    with hub_errors(model.repo, model.revision), ThreadPoolExecutor(_THREADS) as threads:
        for _ in threads.map(work, paths):
            pass


def _fetch(model: HubModel, path: PurePosixPath, folder: Path) -> None:
    from huggingface_hub import hf_hub_download

    (folder / path).unlink()
    hf_hub_download(model.repo, str(path), revision=model.revision, local_dir=folder)


def _head(model: HubModel, path: PurePosixPath, folder: Path) -> None:
    from huggingface_hub import HfApi

    found: Any = HfApi().parse_safetensors_file_metadata(model.repo, str(path), revision=model.revision)
    tensors = {
        name: {"dtype": each.dtype, "shape": list(each.shape), "data_offsets": list(each.data_offsets)}
        for name, each in found.tensors.items()
    }
    head = json.dumps(tensors).encode()
    with (folder / path).open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + max((each["data_offsets"][1] for each in tensors.values()), default=0))
