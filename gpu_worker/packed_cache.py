"""Keeps packed models on disk, so that the next start reads the weights as the kernels want them.

A file that is damaged is removed and the weights are packed again; one that cannot be written costs a
warning. A file is written under another name, and renamed when all of it is on the disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.devices import packed_file
from octavo.gpu_worker.devices.packed_model import PackedModel
from octavo.gpu_worker.loading import LoadedModel
from octavo.kernels.cpu.build import cache_folder
from octavo.kernels.cpu.runtime import Runtime

log = logging.getLogger("octavo.worker")

_ENDS_HASHED_BYTES = 4096
_VERSIONS = "both ends of each tensor"  # what model versions are made of; another way is another version
_FACTS = ("architecture", "max_model_len", "model_version")
_SUFFIX, _UNFINISHED_SUFFIX = ".packed", ".unfinished"


def cache_key(file: Path, settings: Iterable[str], runtime: Runtime) -> str:
    """Return a name for what packing a folder or .gguf file with these kernels and settings gives.

    A weight file counts as the same while its path, size, time of change and both ends are. Raises OSError.
    """
    digest = hashlib.sha256()
    for part in (packed_file.FORMAT.decode(), _VERSIONS, runtime.identity, str(file.resolve()), *settings):
        digest.update(f"{len(part)} {part}".encode())
    weight_files = sorted(file.glob("*.safetensors")) if file.is_dir() else [file]
    for path in [*sorted(file.glob("*.json")), *weight_files]:
        about = path.stat()
        digest.update(f"{path.name} {about.st_size} {about.st_mtime_ns} ".encode())
        with path.open("rb") as handle:
            digest.update(handle.read(_ENDS_HASHED_BYTES))
            handle.seek(max(about.st_size - _ENDS_HASHED_BYTES, 0))
            digest.update(handle.read())
    return digest.hexdigest()[:32]


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

    def load(self, key: str, runtime: Runtime) -> LoadedModel | None:
        """Return the model of `key`, or None if there is none that is whole."""
        path = self.path(key)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("packed weights %s cannot be read (%s); packing them again", path, error)
            return None
        try:
            facts, packed = packed_file.read(file, key, runtime)
            with suppress(OSError):  # says that it was used; a cache that is read-only stays as it is
                os.utime(path)
            return LoadedModel(packed, **facts)
        except (OSError, packed_file.DamagedError) as error:
            log.warning("packed weights %s are damaged (%s); packing them again", path, error)
            with suppress(OSError):
                path.unlink()
            return None
        finally:
            os.close(file)

    def store_in_background(self, key: str, loaded: LoadedModel) -> threading.Thread:
        """Store a packed model while the worker goes on; the thread does not keep the process alive."""
        thread = threading.Thread(target=self.store, args=(key, loaded), name="store packed weights", daemon=True)
        thread.start()
        return thread

    def store(self, key: str, loaded: LoadedModel) -> bool:
        """Store a packed model; False, with a warning, if that cannot be done."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return self._store(key, loaded)
        except OSError as error:
            log.warning("packed weights are not kept in %s (%s); the next start packs them again", self._folder, error)
            return False

    def _store(self, key: str, loaded: LoadedModel) -> bool:
        assert isinstance(loaded.model, PackedModel), "only packed models are kept"
        unfinished = self._folder / (key + _UNFINISHED_SUFFIX)
        file = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not _lock(file, unfinished) or self.path(key).exists():
                return False  # another worker stores the same model, or has just done so
            try:
                os.ftruncate(file, 0)
                facts = {name: getattr(loaded, name) for name in _FACTS}
                size = packed_file.write(file, key, facts, loaded.model)
                if size > self._limit:
                    log.warning("packed weights of %d bytes are not kept: packed_cache_limit is %d", size, self._limit)
                    unfinished.unlink()
                    return False
                self._evict(self._limit - size)
                unfinished.rename(self.path(key))
            except OSError:
                with suppress(OSError):
                    unfinished.unlink()
                raise
        finally:
            os.close(file)
        _sync_folder(self._folder)
        return True

    def _evict(self, room: int) -> None:
        """Remove what was used longest ago until all takes at most `room` bytes, and what killed workers left."""
        for left in self._folder.glob("*" + _UNFINISHED_SUFFIX):  # not ours: that is locked
            _remove_if_left(left)
        kept = sorted(((path.stat(), path) for path in self._folder.glob("*" + _SUFFIX)), key=lambda f: -f[0].st_mtime)
        for about, path in kept:
            room -= about.st_size
            if room < 0:
                log.info("removing packed weights %s: packed_cache_limit is reached", path)
                path.unlink(missing_ok=True)


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
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if _lock(file, path):
                path.unlink()
        finally:
            os.close(file)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` outlive a power failure."""
    file = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
