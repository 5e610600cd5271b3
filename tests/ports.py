"""Ports for the servers of tests, of which no two processes of tests get the same."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

# Below those that Linux gives to connections and to port 0 (from 32768 on): nobody takes one by chance.
_FIRST, _LAST = 20_000, 32_000
_FOLDER = Path(tempfile.gettempdir()) / f"octavo-test-ports-{os.getuid()}"
_HELD: list[int] = []  # locks, which end with this process


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free, and that no other test gets while this process lives."""
    _FOLDER.mkdir(mode=0o700, exist_ok=True)
    for port in random.SystemRandom().sample(range(_FIRST, _LAST), 1000):
        lock = os.open(_FOLDER / str(port), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.create_server(("127.0.0.1", port)):
                pass
        except OSError as error:
            os.close(lock)
            if error.errno not in (errno.EWOULDBLOCK, errno.EADDRINUSE):
                raise
            continue
        _HELD.append(lock)
        return port
    raise AssertionError(f"no port from {_FIRST} to {_LAST} is free")
