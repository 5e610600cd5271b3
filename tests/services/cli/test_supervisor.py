"""The supervisor with stand-ins for its children: small shell scripts that print what happens to them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import os
import signal
import sys
import types
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import psutil
import pytest

from octavo.services.cli import supervisor
from octavo.services.cli.child import ChildSpec, describe_exit
from octavo.services.cli.supervisor import Limits, Supervisor, UsableTime

QUICK = Limits(backoff_s=0.01, max_backoff_s=0.02, start_s=20, grace_s=20)
# `sleep & wait`: a shell handles a signal only between commands, and `wait` can be interrupted.
FOREVER = "sleep 1000 & wait"


def shell(name: str, script: str, stop_order: int = 0, progress_flag: str = "") -> ChildSpec:
    return ChildSpec(name, ("sh", "-c", script, name), stop_order, progress_flag=progress_flag)


class Run:
    """A supervisor that runs in this process, and what it said."""

    def __init__(self, *specs: ChildSpec, limits: Limits = QUICK, ready_after: int = 0) -> None:
        """It is ready after `ready_after` lines of its children; a negative number means never."""
        self.said: list[str] = []
        self.lines: list[str] = []
        self.progress: list[Mapping[str, object]] = []
        self.ready = asyncio.Event()
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready_after = ready_after
        self.supervisor = Supervisor(
            specs,
            limits,
            is_ready=self._is_ready,
            on_ready=self.ready.set,
            say=self._say,
            on_line=self._on_line,
            on_progress=lambda name, event: self.progress.append(event),
        )
        self.task = asyncio.create_task(self.supervisor.run())

    async def _is_ready(self) -> None:
        if self._ready_after < 0:
            await asyncio.Event().wait()
        await self.until(lambda: len(self.lines) >= self._ready_after)

    def _on_line(self, name: str, text: str) -> None:
        self.lines.append(f"{name}: {text}")
        self._wake()

    def _say(self, text: str) -> None:
        self.said.append(text)
        self._wake()

    def _wake(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        task = asyncio.create_task(notify())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(condition)

    def pids(self) -> list[int]:
        """Return the numbers that children printed as `pid N`."""
        return [int(line.split()[-1]) for line in self.lines if " pid " in line]


@pytest.fixture(autouse=True)
async def nothing_is_left() -> AsyncIterator[None]:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert left == []


def assert_gone(pid: int) -> None:
    """Wait for the end of a process that has been killed already."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        process.wait(timeout=10)


async def test_a_stop_signal_ends_children_in_order_with_status_0() -> None:
    script = f"trap 'echo stopped; exit 0' TERM; echo up; {FOREVER}"
    run = Run(shell("c", script, 2), shell("a", script, 0), shell("b", script, 1), ready_after=3)
    await run.ready.wait()

    os.kill(os.getpid(), signal.SIGTERM)

    assert await run.task == 0
    assert run.lines[3:] == ["a: stopped", "b: stopped", "c: stopped"]
    assert run.said == ["stopping (again to stop at once)"]


async def test_a_child_that_dies_is_started_again(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    script = f"echo up; test -e {mark} && {{ {FOREVER}; }}; touch {mark}; read line < {tmp_path}/go; kill -9 $$"
    os.mkfifo(tmp_path / "go")
    run = Run(shell("a", script), ready_after=1)
    await run.ready.wait()

    (tmp_path / "go").write_text("now\n")
    await run.until(lambda: len(run.lines) == 2)
    os.kill(os.getpid(), signal.SIGINT)

    assert await run.task == 0
    assert run.said[0] == "a ended (killed by SIGKILL); restarting it in 0.01 s"


async def test_a_child_that_fails_while_starting_stops_all_and_its_words_are_shown_once() -> None:
    run = Run(shell("good", f"echo up; {FOREVER}"), shell("bad", "echo one; echo two >&2; exit 3"), ready_after=-1)

    assert await run.task == 1
    assert run.said == ["bad failed while starting (exit status 3): giving up"]
    assert [line for line in run.lines if line.startswith("bad")] == ["bad: one", "bad: two"]
    assert not run.ready.is_set()


async def test_a_child_that_keeps_failing_is_given_up() -> None:
    run = Run(shell("good", f"echo up; {FOREVER}"), shell("bad", "read line; echo boom; exit 1"), limits=QUICK)

    assert await run.task == 1
    assert run.said[-1] == "bad failed 12 times in a row (exit status 1): giving up"
    assert run.lines.count("bad: boom") == 12


async def test_a_child_that_fails_is_given_up_however_long_each_start_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    hours = itertools.count(0.0, 3600.0)
    monkeypatch.setattr(supervisor, "time", types.SimpleNamespace(monotonic=lambda: next(hours)))
    limits = dataclasses.replace(QUICK, steady_s=1e6, untold_steady_s=1e6)

    run = Run(shell("good", f"echo up; {FOREVER}"), shell("bad", "exit 1"), limits=limits)

    assert await run.task == 1
    assert run.said[-1] == "bad failed 12 times in a row (exit status 1): giving up"


async def test_a_child_that_worked_in_between_has_its_failures_forgiven(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    limits = dataclasses.replace(QUICK, steady_s=0.0, max_failures=3)
    run = Run(shell("a", f"echo up; read line < {tmp_path}/go; exit 1"), limits=limits, ready_after=1)
    await run.ready.wait()
    run.supervisor.trust("a")

    for lives in range(1, 13):
        if lives % 3 == 0:  # every third one gets ready
            run.supervisor.trust("a")
        (tmp_path / "go").write_text("now\n")
        await run.until(lambda lives=lives: len(run.lines) == lives + 1)  # type: ignore[misc]
    os.kill(os.getpid(), signal.SIGINT)

    assert await run.task == 0


async def test_what_cannot_be_started_is_given_up() -> None:
    run = Run(ChildSpec("ghost", ("/nonexistent/program",)))

    assert await run.task == 1
    assert run.said[0].startswith("ghost cannot be started: ")


async def test_children_that_do_not_get_ready_in_time_are_given_up() -> None:
    run = Run(shell("slow", FOREVER), limits=Limits(start_s=0.1), ready_after=-1)

    assert await run.task == 1
    assert run.said == ["not ready after 0.1 s: giving up"]


async def test_a_child_that_does_not_stop_in_time_is_killed() -> None:
    run = Run(shell("a", "trap '' TERM; echo up; sleep 1000"), limits=Limits(grace_s=0.1), ready_after=1)
    await run.ready.wait()

    os.kill(os.getpid(), signal.SIGTERM)

    assert await run.task == 0
    assert run.said[-1] == "a did not stop in time: killing it"


async def test_a_second_signal_kills_at_once() -> None:
    script = "trap 'echo asked' TERM; echo up; while true; do sleep 1000 & wait; done"
    run = Run(shell("a", script, 0), shell("b", script, 1), limits=Limits(grace_s=1000), ready_after=2)
    await run.ready.wait()

    os.kill(os.getpid(), signal.SIGINT)
    await run.until(lambda: "a: asked" in run.lines)
    os.kill(os.getpid(), signal.SIGINT)

    assert await run.task == 0
    assert run.said == ["stopping (again to stop at once)", "stopping at once"]


async def test_what_a_child_started_ends_with_it() -> None:
    run = Run(shell("a", "sleep 1000 & echo pid $!; read line; exit 1"), ready_after=-1)

    assert await run.task == 1
    (pid,) = run.pids()
    assert_gone(pid)


async def test_progress_arrives_and_a_broken_line_does_not_matter() -> None:
    code = 'import os, sys; os.write(int(sys.argv[1].split(\'=\')[1]), b\'{"phase": "load", "done": 1}\\n[]\\n{"x\')'
    run = Run(ChildSpec("a", (sys.executable, "-Sc", code), progress_flag="--progress-fd"), ready_after=-1)

    assert await run.task == 1
    assert run.progress == [{"phase": "load", "done": 1}]


async def test_output_without_line_breaks_is_cut() -> None:
    run = Run(shell("a", "head -c 40000 /dev/zero | tr '\\0' x; exit 1"), ready_after=-1)

    assert await run.task == 1
    assert all(len(line) <= 16_384 + len("a: ") for line in run.lines)


def test_exits_in_words() -> None:
    assert [describe_exit(status) for status in (0, 3, -9, -99)] == [
        "exit status 0",
        "exit status 3",
        "killed by SIGKILL",
        "killed by signal 99",
    ]


async def test_children_of_a_unit_end_and_start_together(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    stubborn = f"test -e {tmp_path}/again || trap '' TERM; echo up; {FOREVER}"
    fragile = f"echo up; test -e {tmp_path}/again && {{ {FOREVER}; }}; touch {tmp_path}/again; read x < {tmp_path}/go"
    unit = [
        ChildSpec(name, ("sh", "-c", script, name), unit="u")
        for name, script in (("a", stubborn), ("b", f"{fragile}; exit 3"))
    ]
    limits = dataclasses.replace(QUICK, unit_grace_s=0.1)
    run = Run(*unit, shell("c", f"echo up; {FOREVER}"), limits=limits, ready_after=3)
    await run.ready.wait()

    (tmp_path / "go").write_text("now\n")
    await run.until(lambda: len(run.lines) == 5)
    os.kill(os.getpid(), signal.SIGINT)

    assert await run.task == 0
    assert sorted(run.lines[3:]) == ["a: up", "b: up"]
    assert run.said[0] == "b ended (exit status 3); restarting all of u in 0.01 s"


async def test_a_child_that_hangs_is_killed_and_started_again_unless_it_shows_life() -> None:
    script = f"echo pid $$; {FOREVER}"
    limits = Limits(backoff_s=0.01, max_backoff_s=0.02, start_s=20, grace_s=20, hung_s=0.0)
    run = Run(shell("hangs", script), shell("lives", script), limits=limits, ready_after=2)
    await run.ready.wait()
    hung = next(int(line.split()[-1]) for line in run.lines if line.startswith("hangs"))

    for name in ("lives", "hangs"):
        run.supervisor.joins(name)
    run.supervisor.doubt("lives")
    run.supervisor.trust("lives")
    run.supervisor.doubt("hangs")
    run.supervisor.doubt("nobody")

    await run.until(lambda: len(run.lines) == 3)
    assert_gone(hung)
    assert run.lines[2].startswith("hangs: pid")
    assert run.said[0] == "hangs hangs: killing it"
    os.kill(os.getpid(), signal.SIGINT)
    assert await run.task == 0


async def test_a_unit_that_hangs_is_started_again_if_its_first_child_has_joined() -> None:
    unit = [ChildSpec(name, ("sh", "-c", f"echo up; {FOREVER}", name), unit="u") for name in ("a", "b")]
    run = Run(*unit, limits=dataclasses.replace(QUICK, start_s=20, grace_s=20, hung_s=0.0), ready_after=2)
    await run.ready.wait()
    run.supervisor.joins("a")

    run.supervisor.doubt("u")

    await run.until(lambda: len(run.lines) == 4)
    os.kill(os.getpid(), signal.SIGINT)
    assert await run.task == 0
    assert run.said[0] == "a hangs: killing it"


async def test_what_is_said_of_the_process_before_does_not_kill_one_that_was_just_started(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    limits = Limits(backoff_s=0.01, max_backoff_s=0.02, start_s=20, grace_s=20, hung_s=0.0)
    run = Run(shell("a", f"echo up; read line < {tmp_path}/go; exit 1"), limits=limits, ready_after=1)
    await run.ready.wait()
    run.supervisor.joins("a")
    run.supervisor.trust("a")
    (tmp_path / "go").write_text("now\n")
    await run.until(lambda: len(run.lines) == 2)

    run.supervisor.doubt("a")  # about the one that has ended
    (tmp_path / "go").write_text("now\n")
    await run.until(lambda: len(run.lines) == 3)
    run.supervisor.joins("a")
    run.supervisor.doubt("a")
    await run.until(lambda: len(run.lines) == 4)
    os.kill(os.getpid(), signal.SIGINT)

    assert await run.task == 0
    assert sum("hangs: killing it" in line for line in run.said) == 1
    assert [line.split(" (")[1].split(")")[0] for line in run.said[:-1] if "ended" in line] == [
        "exit status 1", "exit status 1", "killed by SIGKILL"
    ]  # fmt: skip


async def test_a_child_that_has_worked_is_started_again_at_once_however_often_it_dies(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    limits = Limits(backoff_s=1000.0, max_backoff_s=1000.0, start_s=20, grace_s=20, steady_s=0.0)
    run = Run(shell("a", f"echo up; read line < {tmp_path}/go; kill -9 $$"), limits=limits, ready_after=1)
    await run.ready.wait()
    run.supervisor.trust("a")

    for lives in range(1, 2 * limits.max_failures):
        await run.until(lambda lives=lives: len(run.lines) == lives)  # type: ignore[misc]
        run.supervisor.trust("a")  # it is ready
        (tmp_path / "go").write_text("now\n")
    await run.until(lambda: len(run.lines) == 2 * limits.max_failures)
    os.kill(os.getpid(), signal.SIGINT)

    assert await run.task == 0
    assert set(run.said[:-1]) == {"a ended (killed by SIGKILL); restarting it"}


async def test_a_child_that_says_again_that_it_is_ready_has_worked_since_the_first_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(supervisor, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    os.mkfifo(tmp_path / "go")
    limits = dataclasses.replace(QUICK, steady_s=50.0)
    run = Run(shell("a", f"echo up; read line < {tmp_path}/go; exit 1"), limits=limits, ready_after=1)
    await run.ready.wait()

    for now[0] in (0.0, 100.0):
        run.supervisor.trust("a")
    now[0] = 101.0
    (tmp_path / "go").write_text("now\n")
    await run.until(lambda: len(run.lines) == 2)
    os.kill(os.getpid(), signal.SIGINT)

    assert await run.task == 0
    assert run.said[0] == "a ended (exit status 1); restarting it"


async def test_a_child_that_dies_before_it_is_ready_again_waits_longer_each_time(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "go")
    limits = Limits(backoff_s=0.01, max_backoff_s=0.04, start_s=20, grace_s=20, steady_s=0.0)
    run = Run(shell("a", f"echo up; read line < {tmp_path}/go; exit 1"), limits=limits, ready_after=1)
    await run.ready.wait()
    run.supervisor.trust("a")

    for lives in range(1, 5):
        (tmp_path / "go").write_text("now\n")
        await run.until(lambda lives=lives: len(run.lines) == lives + 1)  # type: ignore[misc]
    os.kill(os.getpid(), signal.SIGINT)

    assert await run.task == 0
    assert [line.rpartition("; ")[2] for line in run.said[:4]] == [
        "restarting it",
        "restarting it in 0.01 s",
        "restarting it in 0.02 s",
        "restarting it in 0.04 s",
    ]


def test_time_in_which_others_have_the_processor_is_not_a_childs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(supervisor, "_PROC", tmp_path)
    (tmp_path / "7").mkdir()

    def seconds(state: str, processor_s: float, waited_s: float, passes_s: float = 1.0) -> float:
        """Let time pass and return what of it counts."""
        ticks = round(processor_s * os.sysconf("SC_CLK_TCK"))
        (tmp_path / "7" / "stat").write_text(f"7 (a (b) c) {state} {'0 ' * 10}{ticks} 0 0 0")
        (tmp_path / "7" / "schedstat").write_text(f"0 {round(waited_s * 1e9)} 5")
        now[0] += passes_s
        return usable.seconds()

    usable = UsableTime(7)
    seconds("S", 0.0, 0.0)
    usable = UsableTime(7)
    totals = [
        seconds("S", 0.0, 0.0),  # it sleeps
        seconds("S", 0.0, 0.75),  # it waited for a processor most of the time
        seconds("R", 0.3, 0.75),  # it waits now, which is in no book yet
        seconds("R", 0.3, 0.75),  # at least a tenth counts
        seconds("T", 0.3, 0.75),  # it is stopped
    ]
    parts = [after - before for before, after in itertools.pairwise([0.0, *totals])]
    assert parts == pytest.approx([1.0, 0.25, 0.3, 0.1, 1.0])
