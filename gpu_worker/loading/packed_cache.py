"""Keeps packed models on disk, so that the next start reads the weights as the kernels want them.

A file that is damaged is removed and the weights are packed again; one that cannot be written costs a
warning. A file is written under another name, and renamed when all of it is on the disk. A folder or file
that another user may have written is not used: a program is in it.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.devices.cpu import packed_file
from octavo.gpu_worker.devices.cpu.packed_model import PackedModel
from octavo.gpu_worker.errors import ModelError, one_line
from octavo.gpu_worker.formats.checkpoint_files import INDEX_FILE, add_ends, tensor_places
from octavo.gpu_worker.loading.loading import LoadedModel
from octavo.kernels.cpu import build
from octavo.kernels.cpu.build import cache_folder, sync_folder
from octavo.kernels.cpu.runtime import Runtime

log = logging.getLogger("octavo.worker")

_PLACES = 256  # that are hashed in a file that does not say at once where its tensors are
_SUFFIX, _UNFINISHED_SUFFIX = ".packed", ".unfinished"
_PACKAGE = Path(__file__).parent.parent  # the worker


def cache_key(file: Path, settings: Iterable[str], runtime: Runtime) -> str:
    """Return a name for what packing a folder or .gguf file with this release and these settings gives.

    A weight file counts as the same while its path, size, time of change and both ends of each tensor are.
    Raises OSError.
    """
    digest = hashlib.sha256()
    for part in (packed_file.FORMAT.decode(), sources_digest(), runtime.identity, str(file.resolve()), *settings):
        digest.update(f"{len(part)} {part}".encode())
    for path in [file / "config.json", file / INDEX_FILE]:
        if path.is_file():
            text = path.read_bytes()
            digest.update(f"{path.name} {len(text)} ".encode() + text)
    weight_files = sorted(file.glob("*.safetensors")) if file.is_dir() else [file]
    for path in weight_files:
        if path.is_file():  # to open a pipe may take for ever
            digest.update(f"{path.name} {path.stat().st_mtime_ns} ".encode())
            add_ends(digest, path, _places(path))
    return digest.hexdigest()[:32]


@functools.cache
def sources_digest() -> str:
    """Return what changes with the Python code that loads and packs models: tables, scales and programs come of it.

    All of the worker's code counts. To leave some out would save packing anew after some updates, and to leave out a
    file too many would go on serving what a mended release no longer computes.
    """
    digest = hashlib.sha256()
    for path in sorted(path for folder in (_PACKAGE, Path(build.__file__).parent) for path in folder.rglob("*.py")):
        text = path.read_bytes()
        digest.update(f"{path.parent.name} {path.name} {len(text)} ".encode() + text)
    return digest.hexdigest()


def _places(path: Path) -> list[int]:
    """Return where a file's tensors begin, or places all over it."""
    if path.suffix == ".safetensors":
        with suppress(ModelError):  # told when it is loaded, if it is
            return tensor_places(path)
    size = path.stat().st_size
    return [size * index // _PLACES for index in range(_PLACES)]


class PackedCache:
    """The files of one folder, at most `limit` bytes; those that were not used for longest go first."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit

    @classmethod
    def of(cls, config: WorkerConfig) -> PackedCache | None:
        """Return the cache that a worker is told to use, if any."""
        if not config.packed_cache:
            return None
        folder = Path(config.packed_cache_dir) if config.packed_cache_dir else cache_folder() / "packed"
        return cls(folder, config.packed_cache_limit)

    def path(self, key: str) -> Path:
        """Return where the model of `key` is kept."""
        return self._folder / (key + _SUFFIX)

    def load(
        self, key: str, runtime: Runtime, is_enough: Callable[[LoadedModel], bool] = lambda _: True
    ) -> LoadedModel | None:
        """Return the model of `key`, or None if there is none that is whole, and enough for what is wanted now."""
        path = self.path(key)
        try:
            self._remove_unfinished()
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("packed weights %s cannot be read (%s); packing them again", path, error)
            return None
        try:
            if problem := _problem_of(self._folder.stat()):
                log.warning("packed weights in %s are not used: %s; packing them again", self._folder, problem)
                return None
            if problem := _problem_of(os.fstat(file)):
                raise packed_file.DamagedError(problem)
            facts, packed = packed_file.read(file, key, runtime)
            loaded = LoadedModel(packed, **facts)
            with suppress(OSError):  # says that it was used; a cache that is read-only stays as it is
                os.utime(path)
            if is_enough(loaded):
                return loaded
            log.info("packed weights %s are for shorter contexts; packing them again", path)
        except Exception as error:  # whatever is in the file, the weights can be packed again
            log.warning("packed weights %s are damaged (%s); packing them again", path, one_line(error))
        finally:
            os.close(file)
        with suppress(OSError):
            path.unlink()
        return None

    def store_in_background(self, key: str, loaded: LoadedModel) -> threading.Thread:
        """Store a packed model while the worker goes on; the thread does not keep the process alive."""
        thread = threading.Thread(target=self.store, args=(key, loaded), name="store packed weights", daemon=True)
        thread.start()
        return thread

    def store(self, key: str, loaded: LoadedModel) -> bool:
        """Store a packed model; False, with a warning, if that cannot be done."""
        assert isinstance(loaded.model, PackedModel), "only packed models are kept"
        size = packed_file.size_of(loaded.model)
        if size > self._limit:
            log.warning("packed weights of %d bytes are not kept: packed_cache_limit is %d", size, self._limit)
            return False
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if problem := _problem_of(self._folder.stat()):
                raise PermissionError(f"{problem}; name a folder of its own with packed_cache_dir")
            return self._store(key, loaded, loaded.model, size)
        except OSError as error:
            log.warning("packed weights are not kept in %s (%s); the next start packs them again", self._folder, error)
            return False

    def _store(self, key: str, loaded: LoadedModel, packed: PackedModel, size: int) -> bool:
        unfinished = self._folder / (key + _UNFINISHED_SUFFIX)
        file = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            if not _lock(file, unfinished) or _is_file(self.path(key)):
                return False  # another worker stores the same model, or has just done so
            try:
                self._make_room(size)
                os.ftruncate(file, 0)
                written = packed_file.write(
                    file, key, {name: getattr(loaded, name) for name in packed_file.FACTS}, packed
                )
                assert written <= size, f"{written} bytes written, {size} expected"
                unfinished.rename(self.path(key))
            except OSError:
                with suppress(OSError):
                    unfinished.unlink()
                raise
        finally:
            os.close(file)
        sync_folder(self._folder)
        return True

    def _make_room(self, size: int) -> None:
        """Remove what was used longest ago until `size` bytes more fit. Raises OSError."""
        self._remove_unfinished()
        room = self._limit - size
        kept = []
        for path in self._folder.glob("*" + _SUFFIX):
            with suppress(FileNotFoundError):  # another worker has just removed it
                kept.append((path.lstat(), path))
        for about, path in sorted(kept, key=lambda each: -each[0].st_mtime):
            room -= about.st_size
            if room < 0:
                log.info("removing packed weights %s: packed_cache_limit is reached", path)
                path.unlink(missing_ok=True)
        disk = os.statvfs(self._folder)
        if disk.f_bavail * disk.f_frsize < size:
            raise OSError(errno.ENOSPC, f"{size} bytes are needed, {disk.f_bavail * disk.f_frsize} are free")

    def _remove_unfinished(self) -> None:
        """Remove what killed workers left: not what one writes, which is locked."""
        for left in self._folder.glob("*" + _UNFINISHED_SUFFIX):
            _remove_if_left(left)


def _problem_of(about: os.stat_result) -> str:
    """Return why a folder or a file is not to be trusted; empty if only this user and root can have written it."""
    if about.st_uid not in (0, os.geteuid()):
        return f"user {about.st_uid} owns it"
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "other users may write to it"
    return ""


def _is_file(path: Path) -> bool:
    """Tell whether there is a file, which no link leads to."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _lock(file: int, path: Path) -> bool:
    """Lock an open file; False if another process holds it, or has renamed or removed it meanwhile."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(file).st_ino == path.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def _remove_if_left(path: Path) -> None:
    """Remove an unfinished file that nobody writes any more."""
    with suppress(OSError):
        if not _is_file(path):
            path.unlink(missing_ok=True)
            return
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if _lock(file, path):
                path.unlink()
        finally:
            os.close(file)
