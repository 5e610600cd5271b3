"""Tells whoever started the worker how far it is: JSON lines on a file descriptor."""

from __future__ import annotations

import json
import os
import time

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
