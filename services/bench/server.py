"""A server under measurement: started here, with its start-up time, processor time and memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
import psutil

_POLL_S = 0.02
_MEMORY_POLL_S = 0.5
_STOP_S = 40.0


class ServerError(Exception):
    """The server did not come up."""


class Server:
    """A server's process and its children, as a context. Entering it raises ServerError.

    ready_url  answers with status 200 once requests can be sent, and nothing answers there before
    log        gets what the processes print
    """

    def __init__(
        self,
        command: Sequence[str],
        ready_url: str,
        log: Path,
        environment: Mapping[str, str] | None = None,
        start_timeout_s: float = 600.0,
    ) -> None:
        self._command = list(command)
        self._ready_url = ready_url
        self._log = log
        self._environment = {**os.environ, **(environment or {})}
        self._start_timeout_s = start_timeout_s
        self._usage: ProcessTree
        self._process: subprocess.Popen[bytes]
        self._watching: asyncio.Task[None]
        self.ready_s = 0.0

    @property
    def peak_memory(self) -> int:
        """Most bytes that all its processes had at once so far, shared pages counted once."""
        return self._usage.peak_memory

    def cpu_seconds(self) -> float:
        """Processor seconds of all its processes so far."""
        return self._usage.cpu_seconds()

    async def __aenter__(self) -> Self:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            if await self._status(session) is not None:
                raise ServerError(f"something answers at {self._ready_url} already: stop it, or it is what is measured")
            started = time.monotonic()
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
                    self._command, stdout=log, stderr=log, env=self._environment, start_new_session=True
                )
            self._usage = ProcessTree(self._process.pid)
            self._watching = asyncio.create_task(self._usage.watch())
            try:
                await self._wait_ready(session, started + self._start_timeout_s)
            except BaseException:
                await self._stop()
                raise
            self.ready_s = time.monotonic() - started
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stop()

    async def _wait_ready(self, session: aiohttp.ClientSession, deadline: float) -> None:
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerError(f"{self._command[0]} ended with {self._process.returncode}; see {self._log}")
            if await self._status(session) == 200:
                return
            await asyncio.sleep(_POLL_S)
        raise ServerError(f"{self._command[0]} was not ready in {self._start_timeout_s:.0f} s; see {self._log}")

    async def _status(self, session: aiohttp.ClientSession) -> int | None:
        """Return the status of an answer of `ready_url`, None if there is none."""
        try:
            async with session.get(self._ready_url) as response:
                return response.status
        except (aiohttp.ClientError, TimeoutError):
            return None

    async def _stop(self) -> None:
        self._watching.cancel()
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._process.wait, _STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


class ProcessTree:
    """Processor time and memory of a process and all below it."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._seconds: dict[int, float] = {}  # by process id; those that have ended stay
        self.peak_memory = 0

    def cpu_seconds(self) -> float:
        """Return the processor seconds so far."""
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self._seconds[process.pid] = times.user + times.system
        return sum(self._seconds.values())

    async def watch(self) -> None:
        """Follow the memory until cancelled."""
        while True:
            self.peak_memory = max(self.peak_memory, await asyncio.to_thread(self._memory))
            await asyncio.sleep(_MEMORY_POLL_S)

    def _memory(self) -> int:
        total = 0
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                info = process.memory_full_info()
                total += getattr(info, "pss", info.rss)
        return total

    def _processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return [self._root, *self._root.children(recursive=True)]
        return []
