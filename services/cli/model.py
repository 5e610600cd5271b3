"""`octavo model ACTION FOLDER`: models in folders that several machines read, sealed with checksums.

`octavo model check` is in `model_check.py`.

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
import threading
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
from octavo.services.common.folders import sync

MANIFEST = "octavo-manifest.json"
EXIT_CORRUPT = 78  # sysexits.h: EX_CONFIG. Trying again does not help
_DESCRIPTION = (
    "Looks after a model's folder. `octavo model check PATH|ID` says whether a model is served, and what it takes, "
    "before it is fetched or loaded: see octavo model check --help."
)
_THREADS = 8
_POLL_S = 1.0
_TELL_S = 30.0
_TELL_WAIT_S = 60.0


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
    sizes_only: bool = field(
        default=False, metadata={"help": "verify sizes only: files are not read, as they were when they were sealed"}
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
    if argv[1:2] == ["check"]:  # about models that need no folder here: it has options of its own
        from octavo.services.cli import model_check

        return model_check.main(argv[1:])
    config = config_loader.load(ModelConfig, argv[1:], prog="octavo model", description=_DESCRIPTION)
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
        with _progress(folder):
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
            partial.unlink(missing_ok=True)
            _link_or_copy(file, partial)
            with partial.open("rb+") as copy:
                os.fsync(copy.fileno())
            partial.rename(target)
            sync(target.parent)
        _seal(folder, {"source": source, "revision": model.revision})


def _link_or_copy(file: Path, target: Path) -> None:
    """Make `target` the same file, if it was downloaded onto the same disk, so that it takes its space once."""
    downloads = os.environ.get("HF_HOME", "")
    file = file.resolve()
    if downloads and file.is_relative_to(Path(downloads).resolve()):
        with contextlib.suppress(OSError):  # another disk, or one without links
            target.hardlink_to(file)
            return
    shutil.copyfile(file, target)


@contextlib.contextmanager
def _progress(folder: Path) -> Iterator[None]:
    """Say every half a minute how much is on the disk that downloads go to, for whoever reads the log."""
    where = Path(os.environ.get("HF_HOME") or folder)
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(_TELL_S):
            print(f"downloading: {_size(where) / 1e9:.1f} GB in {where}", flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def _size(folder: Path) -> int:
    """Return the bytes of all files in a folder; some may go meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_size
    return total


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
    sync(folder)
    print(f"{folder}: {len(entries)} files sealed")


def _read_manifest(folder: Path) -> _Manifest:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (int(each["size"]), str(each["sha256"])) for name, each in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _WrongFolderError(f"{folder / MANIFEST} is damaged") from None
    return _Manifest(str(manifest.get("source", "")), str(manifest.get("revision", "")), files)


def _verify(config: ModelConfig) -> None:
    """Compare a folder with its manifest."""
    _wait_until_sealed(config.folder, config.wait_s)
    manifest = _read_manifest(config.folder)
    if config.source:
        _check_source(config.folder, manifest, config.source)
    chosen = {
        name: entry
        for name, entry in manifest.files.items()
        if not config.only or any(fnmatch(name, glob) for glob in config.only)
    }
    with ThreadPoolExecutor(_THREADS) as pool:
        checks = pool.map(
            lambda item: _difference(config.folder / item[0], *item[1], sizes_only=config.sizes_only), chosen.items()
        )
        differences = [difference for difference in checks if difference]
    if differences:
        raise _WrongFolderError("\noctavo model: ".join(differences))
    print(f"{config.folder}: {len(chosen)} files are as sealed")


def _wait_until_sealed(folder: Path, wait_s: float) -> None:
    """Wait for a folder's manifest, and say so at once and every minute. Raises CommandError."""
    deadline = time.monotonic() + wait_s
    tell_at = float("-inf")
    while not (folder / MANIFEST).exists():
        now = time.monotonic()
        if now >= deadline:
            raise CommandError(f"{folder} is not sealed: there is no {MANIFEST} (`octavo model seal` writes it)")
        if now >= tell_at:
            tell_at = now + _TELL_WAIT_S
            print(f"waiting up to {deadline - now:.0f} s for {folder / MANIFEST}, which is written last", flush=True)
        time.sleep(_POLL_S)


def _difference(path: Path, size: int, sha256: str, *, sizes_only: bool) -> str:
    """Return how a file differs from what was sealed, or nothing."""
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != size:
        return f"{path} has {path.stat().st_size} bytes, not {size}"
    return "" if sizes_only or sha256_of(path) == sha256 else f"{path} has another SHA-256 than was sealed"
