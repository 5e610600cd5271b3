"""The folder that a deployment on one machine keeps its sockets in."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from octavo.services.cli.errors import CommandError

_RUN_PREFIX = "octavo-serve-"
_MAX_BASE_BYTES = 64  # the path of a Unix socket in a run directory has at most 107 bytes
_NEW_S = 60.0


@contextmanager
def run_directory() -> Iterator[Path]:
    """Give a folder for sockets that only this user can enter; remove it at the end.

    It is locked while it is in use, so that a later start can remove what a killed one left.
    """
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if not os.path.isdir(base) or not os.access(base, os.W_OK) or len(base) > _MAX_BASE_BYTES:
        base = tempfile.gettempdir() if len(tempfile.gettempdir()) <= _MAX_BASE_BYTES else "/tmp"  # noqa: S108
    for left in Path(base).glob(f"{_RUN_PREFIX}*"):
        _remove_if_left(left)
    try:
        folder = Path(tempfile.mkdtemp(prefix=_RUN_PREFIX, dir=base))
    except OSError as error:
        raise CommandError(f"cannot make a folder for sockets in {base}: {error.strerror}") from None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def write_secret(path: Path) -> None:
    """Make a file with a new secret that only this user can read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


def _remove_if_left(folder: Path) -> None:
    """Remove a run directory of ours that no process holds; a new one may not be locked yet."""
    with contextlib.suppress(OSError):
        about = folder.lstat()
        if about.st_uid != os.getuid() or time.time() - about.st_mtime < _NEW_S:
            return
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)
