"""Writes text to a descriptor that somebody may not read: whoever writes never waits for that."""

from __future__ import annotations

import contextlib
import io
import os
import select
import threading
from collections import deque
from collections.abc import Callable
from typing import TextIO

MAX_BYTES = 1 << 20
_CHUNK_BYTES = 4096  # so that a slow reader is seen to read
_IDLE_S = 1.0  # at the end: how long a reader may take without reading anything


class QueuedWriter(io.TextIOBase):
    """A stream whose text is written by a thread of its own, and left out while too much of it waits.

    A pipe that nobody reads and a terminal that is paused keep the thread waiting, and nobody else. What is given to
    `write` at once is written as a whole or not at all; once there is room again, a line says how many times text was
    left out. A descriptor that is closed takes everything and shows nothing.

    descriptor  where to write to; -1: nowhere
    left_out    makes the line, with its end, of the number
    """

    def __init__(
        self,
        descriptor: int,
        left_out: Callable[[int], str] = lambda count: f"({count} lines left out: they were not read in time)\n",
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._descriptor = descriptor
        self._left_out = left_out
        self._max_bytes = max_bytes
        self._waiting: deque[bytes] = deque()
        self._num_bytes = 0  # of what waits; what the thread has taken comes to as much at most
        self._num_left_out = 0
        self._num_written = 0  # bytes, ever
        self._busy = False  # the thread writes what it has taken
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def write(self, text: str, /) -> int:
        """Take the text, or leave it out if too much waits. Never waits."""
        data = text.encode(errors="backslashreplace")
        with self._changed:
            if self._num_bytes + len(data) > self._max_bytes:
                self._num_left_out += 1
                return len(text)
            self._waiting.append(data)
            self._num_bytes += len(data)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="octavo-output", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return len(text)

    def writable(self) -> bool:
        """It is."""
        return True

    def isatty(self) -> bool:
        """Whether the descriptor is a terminal."""
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def drain(self, idle_s: float = _IDLE_S) -> bool:
        """Wait until all is written, as long as it gets on; return whether it is."""
        with self._changed:
            while self._waiting or self._busy:
                before = self._num_written
                if not self._changed.wait_for(lambda before=before: self._is_further(before), idle_s):  # type: ignore[misc]
                    return False
        return True

    def _is_further(self, num_written: int) -> bool:
        """Return whether more has been written since, or nothing is left."""
        return self._num_written != num_written or not (self._waiting or self._busy)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                data = b"".join(self._waiting)
                self._waiting.clear()
                self._num_bytes = 0
                if self._num_left_out:  # after what is written now: it came while that waited
                    data += self._left_out(self._num_left_out).encode(errors="backslashreplace")
                    self._num_left_out = 0
                self._busy = True
            with contextlib.suppress(OSError):  # nobody is there to read it
                self._write(memoryview(data))
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _write(self, data: memoryview) -> None:
        while data:
            # Not through Python's stream: its lock would be held while nobody reads, and wanted when the process ends.
            try:
                num = os.write(self._descriptor, data[:_CHUNK_BYTES])
            except BlockingIOError:  # whoever shares the descriptor made it so
                select.select([], [self._descriptor], [])
                continue
            data = data[num:]
            with self._changed:
                self._num_written += num
                self._changed.notify_all()


def descriptor_of(stream: TextIO | None) -> int:
    """Return the descriptor of a standard stream, which is None if the process was started without: then -1."""
    return -1 if stream is None else stream.fileno()
