"""When a process of a worker ends, and how it shows how far it is and that it still moves."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.errors import SettingError

_TOUCH_S = 1.0


class Lifetime:
    """Asked in every turn of a process's loop, which therefore is what `alive_file` shows the life of.

    Whoever stops a pod tells all of its processes at once, and a worker that obeyed would take the
    tokens from the requests that its scheduler still lets end. So with `drain_s` a worker that has a
    scheduler goes on until that one is gone or the time is up.
    """

    def __init__(self, config: WorkerConfig, stop: threading.Event) -> None:
        """`stop` is set by a signal. Raises SettingError if `alive_file` cannot be made."""
        self._stop = stop
        self._drain_s = config.drain_s
        self._leave_at: float | None = None
        self._alive_file = Path(config.alive_file) if config.alive_file else None
        self._touched_at = float("-inf")
        try:
            self._touch()
        except OSError as error:
            raise SettingError(f"alive_file {config.alive_file} cannot be made: {error.strerror}") from None

    def is_over(self, is_needed: bool) -> bool:
        """Return whether the loop ends now; `is_needed`: somebody may still send plans."""
        self._touch()
        if not self._stop.is_set():
            return False
        now = time.monotonic()
        if self._leave_at is None:
            self._leave_at = now + self._drain_s
        return not is_needed or now >= self._leave_at

    def _touch(self) -> None:
        now = time.monotonic()
        if self._alive_file is not None and now - self._touched_at >= _TOUCH_S:
            self._touched_at = now
            self._alive_file.touch()


class Pulse:
    """Calls `beat` again and again, from a thread of its own, while the main thread is in `computing()`.

    The two are never at work at once: outside `computing()` all that the worker has is the main
    thread's alone, and inside it is `beat`'s. Kernels and torch's operations let go of the interpreter,
    so the thread runs beside them; what never lets go of it falls silent.
    """

    def __init__(self, beat: Callable[[], None], interval_s: float) -> None:
        """`start` starts the thread; `close` may be called without it."""
        self._beat = beat
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._in_use = threading.Lock()
        self._in_use.acquire()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Leave the worker's state and its link to `beat`; the block must touch neither."""
        self._in_use.release()
        try:
            yield
        finally:
            self._in_use.acquire()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._interval_s):
            if self._in_use.acquire(blocking=False):
                try:
                    self._beat()
                finally:
                    self._in_use.release()


_INTERVAL_S = 0.1


class Progress:
    """Writes lines like {"phase": "load", "done": 1048576, "total": 269060552}.

    Phases: "load" (bytes), "join" (waits for a scheduler, or prepares for it), "ready" (with the
    device in use). With a descriptor of -1, or once the reader is gone, nothing is written.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._next_at = 0.0

    def loaded(self, _name: str, done: int, total: int) -> None:
        """Report a tensor that was loaded, not more often than a person can see."""
        now = time.monotonic()
        if now >= self._next_at or done >= total:
            self._next_at = now + _INTERVAL_S
            self.emit("load", done, total)

    def emit(self, phase: str, done: int, total: int, **facts: str) -> None:
        """Write one line; `facts` are added to it."""
        if self._descriptor < 0:
            return
        line = json.dumps({"phase": phase, "done": done, "total": total, **facts}) + "\n"
        try:
            os.write(self._descriptor, line.encode())
        except OSError:  # the reader is gone, which is no reason to stop
            self._descriptor = -1
