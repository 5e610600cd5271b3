"""What every process does at its start: its name, its death with its parent, its log."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from octavo.services.common import logging as log_setup

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="prctl and /proc are Linux's")


@pytest.fixture
def keep_root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@linux_only
def test_a_process_shows_its_name_and_command_line() -> None:
    code = """
from octavo.services.common.process import set_name
set_name("octavo gateway", ["--reflection"])
print(open("/proc/self/comm").read(), open("/proc/self/cmdline").read().rstrip("\\0").split("\\0"))
set_name("octavo " + "x" * 5000)  # longer than there is room for: cut
"""
    run = subprocess.run([sys.executable, "-c", code, "padding" * 9], capture_output=True, text=True, check=True)

    assert run.stdout == "octavo gateway\n ['octavo', 'gateway', '--reflection']\n"


@linux_only
def test_a_child_dies_with_its_parent() -> None:
    child = """
import os, sys, time
from octavo.services.common.process import die_with_parent
die_with_parent(os.getppid())
print(os.getpid(), flush=True)
time.sleep(1000)
"""
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    grandchild = psutil.Process(int(process.stdout.readline()))

    process.kill()

    assert process.wait(30) == -signal.SIGKILL
    assert process.stdout.read() == ""  # the end of the pipe: nobody holds it any more
    _, alive = psutil.wait_procs([grandchild], timeout=30)  # the pipe closes a little before the exit is complete
    assert not alive or grandchild.status() == psutil.STATUS_ZOMBIE


@linux_only
def test_a_child_whose_parent_is_gone_already_exits() -> None:
    code = "from octavo.services.common.process import die_with_parent; die_with_parent(1 << 30); print('alive')"

    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert (run.returncode, run.stdout) == (1, "")


def test_a_log_is_json_unless_a_person_reads_it(keep_root_logger: None) -> None:
    stream = io.StringIO()
    log_setup.setup("info", "gateway", stream=stream)

    logging.getLogger("octavo.test").info("hello %s", "world")
    logging.getLogger("octavo.test").debug("not shown")
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("octavo.test").exception("failed")

    first, second = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert (first["level"], first["process"], first["message"]) == ("info", "gateway", "hello world")
    assert first["time"].endswith("Z")
    assert "ValueError: boom" in second["exception"]


def test_a_log_for_people_is_a_time_and_a_message(keep_root_logger: None) -> None:
    stream = io.StringIO()
    log_setup.setup("warning", "gateway", fmt="text", stream=stream)

    logging.getLogger("octavo.test").info("not shown")
    logging.getLogger("octavo.test").warning("careful")

    (line,) = stream.getvalue().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} warning: careful", line)
    assert os.linesep not in line


def test_a_repeated_warning_is_logged_once_an_interval(keep_root_logger: None) -> None:
    stream = io.StringIO()
    log_setup.setup("info", "x", fmt="text", stream=stream)
    now = 0.0
    limiter = log_setup.RateLimiter(logging.getLogger("octavo.test"), 10.0, lambda: now)

    for now in (0.0, 1.0, 2.0, 11.0):  # the clock reads it
        limiter.warning("slow", "a peer is slow: %s", "p1")
        limiter.warning(f"other {now}", "once")

    lines = [line for line in stream.getvalue().splitlines() if "slow" in line]
    assert [line.split("warning: ")[1] for line in lines] == [
        "a peer is slow: p1",
        "a peer is slow: p1 (and 2 more like this)",
    ]
