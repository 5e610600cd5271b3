"""`octavo model ACTION FOLDER`: models in folders that several machines read, sealed with checksums.

A folder is sealed by `octavo-manifest.json`, written last: whoever finds it finds all files there, and
`verify` compares their sizes and SHA-256 before anything reads them. It says what the model is, too: the
source that was fetched, and its revision. A folder holds one model for good; another one gets a folder of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
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
            "help": "fetch: put the model --source into FOLDER and seal it, unless that is done (exit status 78 if "
            "another model is there); seal: write down the checksums of what is in FOLDER; verify: compare it with "
            "them (exit status 78 if it differs)",
            "choices": ("fetch", "seal", "verify"),
        }
    )
    folder: Path = field(metadata={"positional": True, "help": "the model's folder"})
    source: str = field(
        default="",
        metadata={
            "help": "what to fetch: a folder, a .gguf file, a hub id such as org/name@revision, or demo; with seal: "
            "what is there; with verify: what must be there"
        },
    )
    only: tuple[str, ...] = field(
        default=(), metadata={"help": "verify these files only, for example *.json; empty: all", "metavar": "GLOB"}
    )
    wait_s: float = field(default=0.0, metadata={"help": "how long to wait for a folder that is being filled"})

    def __post_init__(self) -> None:
        if self.action == "fetch" and not self.source:
            raise ValueError("--source is missing: what is to be fetched")


@dataclass(frozen=True)
class _Manifest:
    """What a sealed folder says: where the model is from, and size and SHA-256 of each file."""

    source: str
    revision: str
    files: dict[str, tuple[int, str]]


class _WrongFolderError(Exception):
    """A folder holds something else than it has to. One line, which says what to change."""


def main(argv: Sequence[str]) -> int:
    """Do it; `argv[0]` is the command's name. Return the exit status."""
    config = config_loader.load(ModelConfig, argv[1:], prog="octavo model", description="Looks after a model's folder.")
    try:
        if config.action == "fetch":
            _fetch(config.source, config.folder)
        elif config.action == "seal":
            _seal(config.folder, {"source": config.source} if config.source else {})
        else:
            _verify(config)
    except _WrongFolderError as error:
        print(f"octavo model: {error}", file=sys.stderr)
        return EXIT_CORRUPT
    except (CommandError, OSError) as error:
        print(f"octavo model: {error}", file=sys.stderr)
        return 1
    return 0


def _fetch(source: str, folder: Path) -> None:
    """Copy a model into `folder` and seal it. A folder that is sealed is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if (folder / MANIFEST).exists():
            manifest = _read_manifest(folder)
            _check_source(folder, manifest, source)
            print(f"{folder} is sealed already, with {_origin(manifest)}: nothing to fetch")
            return
        model = model_source.find(source, lambda _what, _done, _total: None)
        found = [model.path] if model.path.is_file() else _files(model.path)
        files = {
            folder / ("model.gguf" if file is model.path else file.relative_to(model.path)): file
            for file in found
            if file.name != MANIFEST
        }
        if others := [path for path in _files(folder) if path not in files]:
            raise _WrongFolderError(f"{others[0]} is no file of {source}: fetch it into a folder of its own")
        for target, file in files.items():
            target.parent.mkdir(exist_ok=True)
            partial = target.with_name(f".{target.name}.partial")
            shutil.copyfile(file, partial)
            with partial.open("rb+") as copy:
                os.fsync(copy.fileno())
            partial.rename(target)
            _sync_folder(target.parent)
        _seal(folder, {"source": source, "revision": model.revision})


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other fetches into a folder waiting."""
    with (folder / ".octavo-fetch.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder} is being filled: waiting for that", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_source(folder: Path, manifest: _Manifest, source: str) -> None:
    """Raise if what a manifest says is not `source`. A hub id may name the revision that was found without one."""
    name = manifest.source
    if not name or source not in (name, f"{name.split('@')[0]}@{manifest.revision}"):
        advice = "choose another folder for another model or revision"
        if not name:
            advice += f", or, if it is that, say so: octavo model seal {folder} --source={source}"
        raise _WrongFolderError(f"{folder} is sealed with {_origin(manifest)}, not {source}: {advice}")


def _origin(manifest: _Manifest) -> str:
    """Return what a manifest says of the model, for people."""
    revision = f" ({manifest.revision})" if manifest.revision else ""
    return f"{manifest.source}{revision}" if manifest.source else "a model whose source is not known"


def _files(folder: Path) -> list[Path]:
    """Return a model's files: those of the folder, and of folders that sentence-transformers numbers (1_Pooling)."""
    found = (path for glob in ("*", "[0-9]*/*") for path in folder.glob(glob))
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def _seal(folder: Path, origin: dict[str, str]) -> None:
    """Write the manifest of all files in a folder. `origin`: where they are from, as far as it is known."""
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
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps({**origin, "files": entries}, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder / MANIFEST)
    _sync_folder(folder)
    print(f"{folder}: {len(entries)} files sealed")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_manifest(folder: Path) -> _Manifest:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (int(each["size"]), str(each["sha256"])) for name, each in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _WrongFolderError(f"{folder / MANIFEST} is damaged") from None
    return _Manifest(str(manifest.get("source", "")), str(manifest.get("revision", "")), files)


def _verify(config: ModelConfig) -> None:
    """Compare a folder with its manifest."""
    deadline = time.monotonic() + config.wait_s
    while not (config.folder / MANIFEST).exists():
        if time.monotonic() >= deadline:
            raise CommandError(f"{config.folder} is not sealed: there is no {MANIFEST} (`octavo model seal` writes it)")
        time.sleep(_POLL_S)
    manifest = _read_manifest(config.folder)
    if config.source:
        _check_source(config.folder, manifest, config.source)
    chosen = {
        name: entry
        for name, entry in manifest.files.items()
        if not config.only or any(fnmatch(name, glob) for glob in config.only)
    }
    with ThreadPoolExecutor(_THREADS) as pool:
        checks = pool.map(lambda item: _difference(config.folder / item[0], *item[1]), chosen.items())
        differences = [difference for difference in checks if difference]
    if differences:
        raise _WrongFolderError("\noctavo model: ".join(differences))
    print(f"{config.folder}: {len(chosen)} files are as sealed")


def _difference(path: Path, size: int, sha256: str) -> str:
    """Return how a file differs from what was sealed, or nothing."""
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != size:
        return f"{path} has {path.stat().st_size} bytes, not {size}"
    return "" if sha256_of(path) == sha256 else f"{path} has another SHA-256 than was sealed"
