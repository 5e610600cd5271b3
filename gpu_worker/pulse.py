"""A thread that shows that a worker lives while its main thread computes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


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
