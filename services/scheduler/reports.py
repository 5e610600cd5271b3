"""What the scheduler tells the process that supervises it and its workers."""

from __future__ import annotations

import contextlib
import json
import os


class Reports:
    """Writes JSON lines to a descriptor, the way workers report their progress; -1 for nowhere."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        if descriptor >= 0:
            os.set_blocking(descriptor, False)  # a supervisor that does not read loses lines, and holds nothing up

    def fenced(self, worker_id: str, reason: str) -> None:
        """A worker was given up. If it does not say hello soon, its process hangs and should be killed."""
        self._write({"phase": "fenced", "worker_id": worker_id, "reason": reason})

    def _write(self, event: dict[str, str]) -> None:
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.write(self._descriptor, json.dumps(event).encode() + b"\n")
