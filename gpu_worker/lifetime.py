"""When a process of a worker ends, and how it shows that it has not stopped moving."""

from __future__ import annotations

import threading
import time
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
