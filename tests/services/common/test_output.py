"""Text for a descriptor that nobody reads keeps nobody waiting."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from octavo.services.common.output import QueuedWriter


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read_end, write_end = os.pipe()
    yield read_end, write_end
    os.close(read_end)


def _read_all(read_end: int) -> str:
    with open(read_end, "rb", closefd=False) as file:
        return file.read().decode()


def test_what_is_read_arrives_whole_and_in_order(pipe: tuple[int, int]) -> None:
    writer = QueuedWriter(pipe[1])

    for number in range(500):
        writer.write(f"line {number}\n")

    assert writer.drain()
    os.close(pipe[1])
    assert _read_all(pipe[0]).splitlines() == [f"line {number}" for number in range(500)]


def test_what_nobody_reads_is_left_out_whole_and_counted(pipe: tuple[int, int]) -> None:
    writer = QueuedWriter(pipe[1], lambda count: f"{count} left out\n", max_bytes=200_000)
    writer.write("first" * 30_000 + "\n")
    assert not writer.drain(0.1)  # the pipe holds less, and nobody reads it

    for _ in range(5000):
        writer.write("x" * 99 + "\n")

    os.set_blocking(pipe[0], False)
    got = b""
    while not writer.drain(0.01):
        got += _read_some(pipe[0])
    writer.write("again\n")
    assert writer.drain()
    got += _read_some(pipe[0])
    os.close(pipe[1])
    assert got.decode().splitlines()[1:] == ["x" * 99] * 2000 + ["3000 left out", "again"]


def _read_some(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 20)
    except BlockingIOError:
        return b""


def test_a_descriptor_that_does_not_block_gets_everything_too(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    writer = QueuedWriter(pipe[1])
    text = "y" * 300_000

    writer.write(text)

    got = b""
    while len(got) < len(text):
        got += os.read(pipe[0], 1 << 20)
    assert got.decode() == text
    assert writer.drain()
    os.close(pipe[1])


def test_a_reader_that_is_gone_is_no_error() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    writer = QueuedWriter(write_end)

    writer.write("to nobody\n")

    assert writer.drain()
    os.close(write_end)


LOGS = """
import logging, sys
from octavo.services.common.logging import setup
setup("info", "gateway", fmt="text")
for number in range(int(sys.argv[1])):
    logging.getLogger("octavo.access").info("call %d %s", number, "x" * 100)
print("done", flush=True)
"""


def test_a_process_whose_log_nobody_reads_works_on_and_ends() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LOGS, "20000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "done\n"
        assert process.wait(60) == 0
        lines = process.stderr.read().splitlines()
    assert 0 < len(lines) < 20_000


def test_a_log_that_is_read_is_complete_when_the_process_has_ended() -> None:
    run = subprocess.run([sys.executable, "-c", LOGS, "3000"], capture_output=True, text=True, check=True)

    assert [line.split()[3] for line in run.stderr.splitlines()] == [str(number) for number in range(3000)]
