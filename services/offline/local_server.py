"""A server of this process's own: `octavo serve`, on ports that nothing else uses, until the context is left."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

# From the end: a model's name, which stands before the places, may hold anything.
_READY = re.compile(r"^ready in .*?((?:, \w+ [^,]+)+) \(Ctrl-C stops\)$")
_ADVICE = re.compile("(octavo serve: )?`octavo model check ")  # what it says last of a model that it refuses
_FAILED = re.compile(r"octavo serve: (\S+) failed .*: giving up$")
# What stands before the message in a child's line, as `octavo serve` shows it: name, time, level.
_PREFIX = re.compile(r"^\S+ +\| (?:[\d-]+ [\d:.]+ (?:(?:warning|error|critical): )?)?")
_PLACE = re.compile(r", (\w+) ([^,]+)")
_STOP_S = 40.0
_KEPT_LINES = 20


class LocalServerError(Exception):
    """The server did not start. One line."""


class LocalServer:
    """`with LocalServer("demo") as server: Client(server.address)`.

    model    as for `octavo serve`
    flags    further options of `octavo serve`, such as "--device=cpu"
    verbose  what the server says is passed on to stderr
    """

    def __init__(self, model: str, flags: Sequence[str] = (), *, verbose: bool = False) -> None:
        self._command = [sys.executable, "-P", "-m", "octavo.services.cli", "serve", model, *flags]
        # In this order: the last of two equal options counts.
        self._command += ["--grpc-address=127.0.0.1:0", "--http-address=127.0.0.1:0"]
        self._command += [f"--parent-pid={os.getpid()}"]
        self._verbose = verbose
        self._is_closed = False
        self._last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._reader: threading.Thread
        self._process: subprocess.Popen[str]
        self.address = ""
        """Where it serves gRPC: host:port."""
        self.url = ""
        """Where it serves HTTP, without /v1."""
        self.scheduler_address = ""
        """Where gateways elsewhere reach its scheduler, if it was given --scheduler-address."""
        self.metrics: list[str] = []
        """host:port of each process's metrics, if it was given --metrics-address."""

    @property
    def is_running(self) -> bool:
        """Whether `octavo serve` has not ended."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id of `octavo serve`."""
        return self._process.pid

    def __enter__(self) -> Self:
        """Return once it serves. Raises LocalServerError."""
        if importlib.util.find_spec("zmq") is None or importlib.util.find_spec("tokenizers") is None:
            raise LocalServerError('what a server needs is not installed: pip install -e ".[serve]" in a checkout')
        # A session of its own: Ctrl-C goes to this process, which stops the server when it has finished.
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            self._wait_ready()
        except BaseException:
            self.close()
            raise
        self._reader = threading.Thread(target=self._read_on, name="octavo-server-output", daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop it. Nothing happens the second time: the number of its process may be another one's by then."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._process.poll() is None:
            self._process.terminate()  # not SIGINT: whoever started this process may block that in its children
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _wait_ready(self) -> None:
        for line in self._lines():
            if ready := _READY.search(line):
                places = dict(_PLACE.findall(ready[1]))
                self.address, self.scheduler_address = places.get("grpc", ""), places.get("scheduler", "")
                self.url = f"http://{places['http']}" if "http" in places else ""
                self.metrics = places.get("metrics", "").split()
                return
        self._process.wait(_STOP_S)
        raise LocalServerError(f"the server did not start: {self._reason()}")

    def _reason(self) -> str:
        """Return what it ended for: its last words, or those of the process that failed."""
        lines = [line for line in self._last_lines if line.strip() and not _ADVICE.match(line)] or ["it said nothing"]
        if failed := _FAILED.match(lines[-1]):
            said = [_PREFIX.sub("", line) for line in lines if line.split(" ")[0] == failed[1]]
            return said[-1].strip() if said else lines[-1]
        return lines[-1].removeprefix("octavo serve: ")

    def _read_on(self) -> None:
        for _ in self._lines():
            pass

    def _lines(self) -> Iterator[str]:
        assert self._process.stdout is not None, "started with a pipe"
        for line in self._process.stdout:
            self._last_lines.append(line.rstrip())
            if self._verbose:
                print(line, end="", file=sys.stderr, flush=True)
            yield line
