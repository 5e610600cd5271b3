"""What a gateway and a scheduler tell the process that supervises them."""

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

    def ready(self) -> None:
        """The process is up: from now on it works."""
        self._write({"phase": "ready"})

    def draining(self, num_requests: int, seconds: float) -> None:
        """The process ends, and waits so long for the end of so many requests."""
        self._write({"phase": "draining", "requests": num_requests, "seconds": seconds})

    def fenced(self, worker_id: str, reason: str) -> None:
        """A worker was given up. If it does not say hello soon, its process hangs and should be killed."""
        self._write({"phase": "fenced", "worker_id": worker_id, "reason": reason})

    def _write(self, event: dict[str, object]) -> None:
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.write(self._descriptor, json.dumps(event).encode() + b"\n")
