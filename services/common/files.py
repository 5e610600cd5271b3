"""A small file that an operator may replace while we run: keys, certificates, lists."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")
_log = logging.getLogger(__name__)
_LOOK_S = 1.0
_MAX_BYTES = 4 << 20


class WatchedFile(Generic[T]):
    """The parsed content of a file, read again when the file changes.

    A new content that cannot be read or parsed is logged, and the last good one stays in force: a
    half-written file must neither let anybody in nor lock everybody out.
    """

    def __init__(self, path: Path, parse: Callable[[bytes], T], clock: Callable[[], float] = time.monotonic) -> None:
        """Read it. Raises ValueError, with the path in the message, if that fails now."""
        self._path = path
        self._parse = parse
        self._clock = clock
        self._looked_at = clock()
        self._version, self._value = self._read()
        self._failed: object = None

    def get(self) -> T:
        """Return the content; looks at the file at most once a second."""
        now = self._clock()
        if now - self._looked_at >= _LOOK_S:
            self._looked_at = now
            self._look()
        return self._value

    def _look(self) -> None:
        try:
            version = version_of(self._path)
            if version in (self._version, self._failed):
                return
            self._failed = version
            self._version, self._value = self._read()
            _log.info("%s has changed and was read again", self._path)
        except (OSError, ValueError) as error:
            _log.error("%s was not read again, what it held before stays in force: %s", self._path, error)

    def _read(self) -> tuple[object, T]:
        try:
            version = version_of(self._path)
            with self._path.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except OSError as error:
            raise ValueError(f"cannot read {self._path}: {error.strerror}") from None
        if len(data) > _MAX_BYTES:
            raise ValueError(f"{self._path} is longer than {_MAX_BYTES} bytes")
        try:
            return version, self._parse(data)
        except ValueError as error:
            raise ValueError(f"{self._path}: {error}") from None


def version_of(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file is replaced or written. Raises OSError."""
    about = path.stat()  # follows links: Kubernetes replaces a link when a Secret changes
    return about.st_mtime_ns, about.st_size, about.st_ino
