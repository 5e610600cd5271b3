"""`octavo model ACTION FOLDER`: models in folders that several machines read, sealed with checksums.

A folder is sealed by `octavo-manifest.json`, written last: whoever finds it finds all files there, and
`verify` compares their sizes and SHA-256 before anything reads them.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from octavo.services.cli import model_source
from octavo.services.cli.demo_model import sha256_of
from octavo.services.cli.errors import CommandError
from octavo.services.common import config as config_loader

MANIFEST = "octavo-manifest.json"
EXIT_CORRUPT = 78  # sysexits.h: EX_CONFIG. Trying again does not help
_THREADS = 8
_POLL_S = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Settings of `octavo model`."""

    action: str = field(
        metadata={
            "positional": True,
            "help": "fetch: put the model --source into FOLDER and seal it, unless that is done; seal: write down "
            "the checksums of what is in FOLDER; verify: compare it with them (exit status 78 if it differs)",
            "choices": ("fetch", "seal", "verify"),
        }
    )
    folder: Path = field(metadata={"positional": True, "help": "the model's folder"})
    source: str = field(default="", metadata={"help": "what to fetch: a folder, a .gguf file, a hub id, or demo"})
    only: tuple[str, ...] = field(
        default=(), metadata={"help": "verify these files only, for example *.json; empty: all", "metavar": "GLOB"}
    )
    wait_s: float = field(default=0.0, metadata={"help": "how long to wait for a folder that is being filled"})

    def __post_init__(self) -> None:
        if (self.action == "fetch") != bool(self.source):
            raise ValueError("--source goes with fetch, and only with it")


def main(argv: Sequence[str]) -> int:
    """Do it; `argv[0]` is the command's name. Return the exit status."""
    config = config_loader.load(ModelConfig, argv[1:], prog="octavo model", description="Looks after a model's folder.")
    try:
        if config.action == "fetch":
            _fetch(config.source, config.folder)
        elif config.action == "seal":
            _seal(config.folder)
        else:
            return _verify(config)
    except (CommandError, OSError) as error:
        print(f"octavo model: {error}", file=sys.stderr)
        return 1
    return 0


def _fetch(source: str, folder: Path) -> None:
    """Copy a model into `folder` and seal it. A folder that is sealed is left alone."""
    if (folder / MANIFEST).exists():
        print(f"{folder} is sealed already: nothing to fetch")
        return
    model = model_source.find(source, lambda _what, _done, _total: None)
    folder.mkdir(parents=True, exist_ok=True)
    for file in [model.path] if model.path.is_file() else _files(model.path):
        target = folder / ("model.gguf" if file is model.path else file.relative_to(model.path))
        target.parent.mkdir(exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        shutil.copyfile(file, partial)
        with partial.open("rb+") as copy:
            os.fsync(copy.fileno())
        partial.rename(target)
    _seal(folder)


def _files(folder: Path) -> list[Path]:
    """Return a model's files: those of the folder, and of folders that sentence-transformers numbers (1_Pooling)."""
    found = (path for glob in ("*", "[0-9]*/*") for path in folder.glob(glob))
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def _seal(folder: Path) -> None:
    """Write the manifest of all files in a folder."""
    files = [path for path in _files(folder) if path.name != MANIFEST]
    if not files:
        raise CommandError(f"there are no files in {folder}")
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(sha256_of, files)
    entries = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256}
        for path, sha256 in zip(files, sums, strict=True)
    }
    partial = folder / f".{MANIFEST}.partial"
    partial.write_text(json.dumps({"files": entries}, indent=1) + "\n", encoding="utf-8")
    partial.rename(folder / MANIFEST)
    print(f"{folder}: {len(entries)} files sealed")


def _verify(config: ModelConfig) -> int:
    """Compare a folder with its manifest; return the exit status."""
    deadline = time.monotonic() + config.wait_s
    manifest = config.folder / MANIFEST
    while not manifest.exists():
        if time.monotonic() >= deadline:
            raise CommandError(f"{config.folder} is not sealed: there is no {MANIFEST} (`octavo model seal` writes it)")
        time.sleep(_POLL_S)
    try:
        entries = dict(json.loads(manifest.read_text(encoding="utf-8"))["files"])
        expected = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError):
        print(f"octavo model: {manifest} is damaged", file=sys.stderr)
        return EXIT_CORRUPT
    chosen = {
        name: entry
        for name, entry in expected.items()
        if not config.only or any(fnmatch(name, glob) for glob in config.only)
    }
    with ThreadPoolExecutor(_THREADS) as pool:
        checks = pool.map(lambda item: _difference(config.folder / item[0], *item[1]), chosen.items())
    differences = [difference for difference in checks if difference]
    for difference in differences:
        print(f"octavo model: {difference}", file=sys.stderr)
    if differences:
        return EXIT_CORRUPT
    print(f"{config.folder}: {len(chosen)} files are as sealed")
    return 0


def _difference(path: Path, size: int, sha256: str) -> str:
    """Return how a file differs from what was sealed, or nothing."""
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != size:
        return f"{path} has {path.stat().st_size} bytes, not {size}"
    return "" if sha256_of(path) == sha256 else f"{path} has another SHA-256 than was sealed"
