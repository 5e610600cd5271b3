"""One child process of `octavo serve`: its start, its output, its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

_MAX_LINE_BYTES = 16_384
_DRAIN_S = 1.0


@dataclass(frozen=True)
class ChildSpec:
    """What to run. Children stop in the order of `stop_order`, those with the same number together.

    Children of one `unit` (by default each is its own) live together: if one ends, the others are
    stopped, and all are started again.

    `progress_flag`: the option that tells the child a descriptor to write its progress to, as JSON
    lines with "phase", "done" and "total"; empty if it has none.
    """

    name: str
    command: tuple[str, ...]
    stop_order: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    progress_flag: str = ""
    unit: str = ""


class Child:
    """A process that can be started again after it ended. It leads a process group of its own."""

    def __init__(
        self,
        spec: ChildSpec,
        on_line: Callable[[str, str], None],
        on_progress: Callable[[str, Mapping[str, object]], None],
    ) -> None:
        self.spec = spec
        self._on_line = on_line
        self._on_progress = on_progress
        self._process: asyncio.subprocess.Process | None = None
        self._has_group = False  # there may be processes in its group
        self._output: _LineReader | None = None

    @property
    def running(self) -> bool:
        """It has been started and has not ended."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        """Its process id, or that of its last process; 0 before the first."""
        return 0 if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the process; OSError if that cannot be done."""
        assert not self.running, f"{self.spec.name} is running"
        self._output = _LineReader(self._take_line)
        command = list(self.spec.command)
        write_ends = [self._output.write_end]
        if self.spec.progress_flag:
            write_ends.append(_LineReader(self._take_progress).write_end)
            command.append(f"{self.spec.progress_flag}={write_ends[-1]}")
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                # A pipe of our own: asyncio's would hold back the news of the end while a grandchild keeps it open.
                stdout=self._output.write_end,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, **self.spec.environment},
                pass_fds=write_ends[1:],
                start_new_session=True,  # Ctrl-C in the terminal is the supervisor's to pass on, in order
            )
            self._has_group = True
        finally:
            for write_end in write_ends:
                os.close(write_end)

    async def wait(self) -> int:
        """Return the exit status, negative for a signal, once the process has ended and its output is read."""
        assert self._process is not None, f"{self.spec.name} was never started"
        assert self._output is not None
        status = await self._process.wait()
        self.kill()  # what it started itself, if anything, is still in its group
        self._has_group = False  # the number may be another group's from now on
        # A grandchild that left the group can hold the output open: it is not waited for.
        await asyncio.wait({self._output.ended}, timeout=_DRAIN_S)
        self._output.close()
        return status

    def terminate(self) -> None:
        """Ask the process to end. What it started itself is its own to end."""
        if self._process is not None and self.running:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    def kill(self) -> None:
        """End the process, if it has not ended, and all that it started."""
        if self._process is not None and self._has_group:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _take_line(self, line: bytes) -> None:
        self._on_line(self.spec.name, line.decode(errors="replace").rstrip())

    def _take_progress(self, line: bytes) -> None:
        with contextlib.suppress(ValueError):  # half a line of a child that was killed
            event = json.loads(line)
            if isinstance(event, dict):
                self._on_progress(self.spec.name, event)


class _LineReader:
    """A pipe whose lines go to a function as they come, cut to a limit. The caller closes `write_end`.

    ended   done once the last writer has closed its end
    """

    def __init__(self, take: Callable[[bytes], None]) -> None:
        self._take = take
        self._rest = b""
        self._read_end, self.write_end = os.pipe()
        os.set_blocking(self._read_end, False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._read_end, self._read)
        self.ended: asyncio.Future[None] = self._loop.create_future()

    def close(self) -> None:
        """Stop reading; a line without an end is passed on too."""
        if self.ended.done():
            return
        self._loop.remove_reader(self._read_end)
        os.close(self._read_end)
        if self._rest:
            self._take(self._rest)
        self.ended.set_result(None)

    def _read(self) -> None:
        chunk = os.read(self._read_end, _MAX_LINE_BYTES)
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            self._take(line[:_MAX_LINE_BYTES])
        if len(self._rest) >= _MAX_LINE_BYTES:
            self._take(self._rest[:_MAX_LINE_BYTES])
            self._rest = b""
        if not chunk:
            self.close()


def describe_exit(status: int) -> str:
    """Return an exit status in words."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
