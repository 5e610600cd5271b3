"""The files of an adapter in PEFT's layout, and what names their content for every process that reads them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
MAX_WEIGHTS_BYTES = 8 << 30
_PIECE = 1 << 20
_PICKLED = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")


class AdapterError(Exception):
    """A folder holds no adapter that can be served. The message names the file, and what was expected.

    It does not say where the folder is: that is nothing to a client who asks for the adapter.
    """


@dataclass(frozen=True)
class AdapterFiles:
    """The bytes of both files, and their SHA-256 in hex."""

    config: bytes
    weights: bytearray
    sha256: str


def read_files(folder: Path, max_weights_bytes: int = MAX_WEIGHTS_BYTES) -> AdapterFiles:
    """Read an adapter's files whole: what is checked later is what was hashed. Raises AdapterError."""
    config = _read_config(folder)
    with _opened(folder / WEIGHTS_FILE, max_weights_bytes) as (handle, size):
        weights = bytearray(size)
        for _ in _pieces(handle, memoryview(weights), folder / WEIGHTS_FILE):
            pass
    digest = _digest_of(config)
    digest.update(weights)
    return AdapterFiles(config, weights, digest.hexdigest())


def sha256_of(folder: Path) -> str:
    """Return `AdapterFiles.sha256`; a piece of the weights at a time is in memory. Raises AdapterError."""
    digest = _digest_of(_read_config(folder))
    with _opened(folder / WEIGHTS_FILE, MAX_WEIGHTS_BYTES) as (handle, size):
        piece = memoryview(bytearray(min(size, _PIECE)))
        while size:
            for part in _pieces(handle, piece[: min(size, _PIECE)], folder / WEIGHTS_FILE):
                digest.update(part)
                size -= len(part)
    return digest.hexdigest()


def _read_config(folder: Path) -> bytes:
    """Read the config of an adapter whose weights are no pickle."""
    with _opened(folder / CONFIG_FILE, MAX_CONFIG_BYTES) as (handle, size):
        config = bytearray(size)
        for _ in _pieces(handle, memoryview(config), folder / CONFIG_FILE):
            pass
    if not os.path.exists(folder / WEIGHTS_FILE):
        for name in _PICKLED:
            if os.path.exists(folder / name):
                raise AdapterError(
                    f"{name}: is a pickle file, which can run any code and is never read; save the adapter "
                    f"as {WEIGHTS_FILE} (save_pretrained with safe_serialization=True)"
                )
    return bytes(config)


def _digest_of(config: bytes) -> hashlib._Hash:
    return hashlib.sha256(len(config).to_bytes(8, "little") + config)


def times_of(folder: Path) -> tuple[tuple[int, int, int], ...]:
    """Return what changes when a file of a folder is written. Raises OSError."""
    return tuple(
        (about.st_mtime_ns, about.st_size, about.st_ino)
        for about in (os.stat(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE))
    )


@contextlib.contextmanager
def _opened(path: Path, most: int) -> Iterator[tuple[FileIO, int]]:
    """Open a regular file of at most `most` bytes; yield it and its size. Raises AdapterError."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # to open a pipe may take for ever
    except FileNotFoundError:
        raise AdapterError(
            f"{path.name}: no such file; an adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
        ) from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path.name}: cannot be read ({_why(error)})") from None
    with FileIO(file, "rb") as handle:
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode):
            raise AdapterError(f"{path.name}: is no file")
        if about.st_size > most:
            raise AdapterError(f"{path.name}: has {about.st_size} bytes, at most {most} are read")
        yield handle, about.st_size


def _pieces(handle: FileIO, buffer: memoryview, path: Path) -> Iterator[memoryview]:
    """Fill a buffer, and yield each part of it that has just been read. Raises AdapterError."""
    at = 0
    while at < len(buffer):
        try:
            count = handle.readinto(buffer[at : at + _PIECE])
        except OSError as error:
            raise AdapterError(f"{path.name}: cannot be read ({_why(error)})") from None
        if not count:
            raise AdapterError(f"{path.name}: was cut off while it was read")
        yield buffer[at : at + count]
        at += count


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
