"""Runs child processes together: starts them, restarts what dies, stops them in order. Nothing is left behind."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from octavo.services.cli.child import Child, ChildSpec, describe_exit

_PROC = Path("/proc")
_STOPPED = "TtZXx"  # by a signal, by a debugger, or dead: it wants no processor and gets none
_LEAST_SHARE = 0.1  # of the time that passed is counted in any case
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class UsableTime:
    """Counts seconds in which a process ran, or wanted no processor. Where there is no /proc, all seconds.

    A busy machine lets a process wait for a processor, and what it then does not do says nothing about it. At
    least a tenth of the time counts: nobody is waited for longer than ten times.
    """

    def __init__(self, pid: int) -> None:
        self._folder = _PROC / str(pid)
        self._seconds = 0.0
        self._last = self._look()

    def seconds(self) -> float:
        """Return what there was since the start; to be called several times a second."""
        last, now = self._last, self._look()
        passed = now.at - last.at
        if now.state in _STOPPED:
            usable = passed
        elif now.state == "R":  # what it waits for in this moment is counted only when it runs again
            usable = now.processor_s - last.processor_s
        else:
            usable = passed - (now.waited_s - last.waited_s)
        self._seconds += min(passed, max(usable, _LEAST_SHARE * passed))
        self._last = now
        return self._seconds

    def _look(self) -> _Look:
        at = time.monotonic()
        try:
            # After the name, which is in brackets and may hold anything: proc_pid_stat(5), from field 3 on.
            fields = (self._folder / "stat").read_text().rpartition(")")[2].split()
            waited_s = int((self._folder / "schedstat").read_text().split()[1]) / 1e9
        except (OSError, IndexError, ValueError):
            return _Look(at, "T", 0.0, 0.0)
        return _Look(at, fields[0], (int(fields[11]) + int(fields[12])) / _TICKS_PER_S, waited_s)


@dataclass(frozen=True)
class _Look:
    """What the system said: the state of the first thread, processor time of all, how long the first one waited."""

    at: float
    state: str
    processor_s: float
    waited_s: float


_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_KILLED_WAIT_S = 10.0
_LOOK_S = 0.1


@dataclass(frozen=True)
class Limits:
    """How patient a supervisor is. Times are seconds.

    A child that has worked for `steady_s` since it was ready or, if it does not tell that, for `untold_steady_s` since
    its start, is started again at once when it ends. One that ends sooner has failed. Before it is started again there
    is a pause, from `backoff_s` up to `max_backoff_s`, doubling; if it fails `max_failures` times in a row, however
    long each took, it is given up, and all with it.
    `start_s` bounds the first start; `grace_s` bounds how long each child may take to stop, and
    `unit_grace_s` how long after another one of its unit has ended; `hung_s` is how long a child
    that is said to hang may take to show life, in time that other processes leave it.
    """

    max_failures: int = 12  # finding a request that kills workers costs up to ten of them
    backoff_s: float = 0.2
    max_backoff_s: float = 5.0
    steady_s: float = 3.0
    untold_steady_s: float = 30.0  # some of it is the start
    start_s: float = 1800.0
    grace_s: float = 30.0
    unit_grace_s: float = 2.0
    hung_s: float = 1.0


class _GaveUpError(Exception):
    """A child cannot be kept running, or all together did not get ready."""


class Supervisor:
    """Children that live and die together.

    on_line      gets (child's name, line) for everything that children print
    on_progress  gets (child's name, event) for their progress
    is_ready     returns once the children are ready to serve; it runs from their start on
    on_ready     called then, once
    say          prints a line of the supervisor's own

    ready        the first start has succeeded
    """

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        limits: Limits,
        *,
        is_ready: Callable[[], Awaitable[None]],
        on_ready: Callable[[], None],
        say: Callable[[str], None],
        on_line: Callable[[str, str], None],
        on_progress: Callable[[str, Mapping[str, object]], None],
    ) -> None:
        self._children = [Child(spec, on_line, on_progress) for spec in specs]
        self._limits = limits
        self._is_ready = is_ready
        self._on_ready = on_ready
        self._say = say
        self.ready = False
        self._stop = asyncio.Event()
        self._kill = asyncio.Event()
        self._doubts: dict[str, asyncio.Task[None]] = {}  # children that are said to hang
        self._joining: set[str] = set()  # children that have told a scheduler of themselves since their start
        self._ready_at: dict[str, float] = {}  # children that tell when they are ready; infinity: not yet this time

    def joins(self, name: str) -> None:
        """A child is about to tell a scheduler of itself."""
        self._joining.add(name)

    def doubt(self, name: str) -> None:
        """A scheduler says that a child or unit hangs: kill it, and so restart it, unless `trust` is called soon.

        One that has not joined since it was started is not meant: that was the process before.
        """
        child = next((child for child in self._children if name in (child.spec.unit, child.spec.name)), None)
        if child is None or child.spec.name not in self._joining:
            return
        if child.running and name not in self._doubts:
            self._doubts[name] = asyncio.create_task(self._kill_hung(name, child, child.pid))

    def trust(self, name: str) -> None:
        """A child is ready, and so is its unit."""
        # A worker that joins another scheduler, or the same one again, has been at work before.
        self._ready_at[name] = min(time.monotonic(), self._ready_at.get(name, math.inf))
        units = [child.spec.unit for child in self._children if child.spec.name == name]
        for doubted in (name, *units):
            if doubt := self._doubts.pop(doubted, None):
                doubt.cancel()

    async def _kill_hung(self, name: str, child: Child, pid: int) -> None:
        usable = UsableTime(pid)
        while usable.seconds() < self._limits.hung_s:  # noqa: ASYNC110 - what another process does is no event
            await asyncio.sleep(_LOOK_S)
        del self._doubts[name]
        if child.running and child.pid == pid:  # else it has been started again since
            self._say(f"{child.spec.name} hangs: killing it")
            child.kill()

    async def run(self) -> int:
        """Run until SIGINT or SIGTERM (return 0) or until it has to be given up (return 1).

        A second signal kills the children at once. When this returns, none of them is left.
        """
        loop = asyncio.get_running_loop()
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        keepers = [asyncio.create_task(self._keep(unit)) for unit in self._units()]
        starter = asyncio.create_task(self._start_up())
        stop = asyncio.create_task(self._stop.wait())
        status = 0
        try:
            await self._watch([*keepers, starter], stop)
        except _GaveUpError as error:
            self._say(str(error))
            status = 1
        finally:
            for doubt in self._doubts.values():
                doubt.cancel()
            for task in (*keepers, starter, stop):
                task.cancel()
            self._doubts.clear()
            await asyncio.gather(*keepers, starter, stop, return_exceptions=True)
            await self._stop_all()
            for number in _STOP_SIGNALS:
                loop.remove_signal_handler(number)
        return status

    def _on_signal(self) -> None:
        if not self._stop.is_set():
            self._say("stopping (again to stop at once)")
            self._stop.set()
        elif not self._kill.is_set():
            self._say("stopping at once")
            self._kill.set()

    async def _watch(self, tasks: list[asyncio.Task[None]], stop: asyncio.Task[bool]) -> None:
        """Return when it is time to stop; raise what a task raises."""
        pending: set[asyncio.Task[Any]] = set(tasks)
        while not stop.done():
            done, _ = await asyncio.wait({stop, *pending}, return_when=asyncio.FIRST_COMPLETED)
            for task in done & pending:
                pending.remove(task)
                task.result()

    async def _start_up(self) -> None:
        try:
            await asyncio.wait_for(self._is_ready(), self._limits.start_s)
        except TimeoutError:
            raise _GaveUpError(f"not ready after {self._limits.start_s:g} s: giving up") from None
        self.ready = True
        self._on_ready()

    def _units(self) -> list[list[Child]]:
        """Return the children that live together, in the order of their first ones."""
        units: dict[str, list[Child]] = {}
        for child in self._children:
            units.setdefault(child.spec.unit or child.spec.name, []).append(child)
        return list(units.values())

    async def _keep(self, unit: list[Child]) -> None:
        """Start the children of a unit, and start them again whenever one ends."""
        num_failures = 0  # since it last worked
        backoff_s = self._limits.backoff_s
        while True:
            started = time.monotonic()
            for child in unit:
                self._joining.discard(child.spec.name)
                if child.spec.name in self._ready_at:
                    self._ready_at[child.spec.name] = math.inf
                try:
                    await child.start()
                except OSError as error:
                    raise _GaveUpError(f"{child.spec.name} cannot be started: {error}") from None
            child, reason = await self._end_of(unit)
            if not self.ready:
                raise _GaveUpError(f"{child.spec.name} failed while starting ({reason}): giving up")
            what = "it" if len(unit) == 1 else f"all of {unit[0].spec.unit}"
            if self._has_worked(unit, started):
                self._say(f"{child.spec.name} ended ({reason}); restarting {what}")
                num_failures, backoff_s = 0, self._limits.backoff_s
                continue
            num_failures += 1
            if num_failures == self._limits.max_failures:
                raise _GaveUpError(f"{child.spec.name} failed {num_failures} times in a row ({reason}): giving up")
            self._say(f"{child.spec.name} ended ({reason}); restarting {what} in {backoff_s:g} s")
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, self._limits.max_backoff_s)

    def _has_worked(self, unit: list[Child], started: float) -> bool:
        """Return whether a unit that was started then, and has ended now, worked for long enough in between."""
        told = [self._ready_at[child.spec.name] for child in unit if child.spec.name in self._ready_at]
        now = time.monotonic()
        if not told:
            return now - started >= self._limits.untold_steady_s
        return now - max(told) >= self._limits.steady_s

    async def _end_of(self, unit: list[Child]) -> tuple[Child, str]:
        """Wait until a child of a unit ends, and end the others; return which it was and why it ended."""
        waits = {asyncio.create_task(child.wait()): child for child in unit}
        try:
            done, others = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in others:
                waits[wait].terminate()
            if others:
                _, hanging = await asyncio.wait(others, timeout=self._limits.unit_grace_s)
                for wait in hanging:
                    waits[wait].kill()
                await asyncio.wait(others, timeout=_KILLED_WAIT_S)
        finally:
            for wait in waits:
                wait.cancel()
        first = next(wait for wait in waits if wait in done)
        return waits[first], describe_exit(first.result())

    async def _stop_all(self) -> None:
        """Stop the children, group after group; kill those that do not stop in time."""
        children = sorted(self._children, key=lambda child: child.spec.stop_order)
        kill = asyncio.create_task(self._kill.wait())
        for _, group in groupby(children, key=lambda child: child.spec.stop_order):
            await self._stop_group([child for child in group if child.running], kill)
        kill.cancel()

    async def _stop_group(self, children: list[Child], kill: asyncio.Task[bool]) -> None:
        waits = [asyncio.create_task(child.wait()) for child in children]
        if not waits:
            return
        for child in children:
            child.terminate()
        ended: asyncio.Future[Any] = asyncio.gather(*waits)
        await asyncio.wait({ended, kill}, timeout=self._limits.grace_s, return_when=asyncio.FIRST_COMPLETED)
        for child in children:
            if child.running:
                if not kill.done():  # else that is what was asked for
                    self._say(f"{child.spec.name} did not stop in time: killing it")
                child.kill()
        await asyncio.wait({ended}, timeout=_KILLED_WAIT_S)  # SIGKILL can wait for the disk, but not for ever
