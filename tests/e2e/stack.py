"""A real deployment for tests: `octavo serve` as a user would start it, and helpers to talk to it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from octavo.services.client import Client
from octavo.services.client.stream import Stream
from tests.ports import free_port

REFERENCES = Path(__file__).resolve().parent.parent / "data" / "reference_smollm2.jsonl"
NEAR_TIE = 0.25  # logits closer than this may change places between float32 and bfloat16
START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 60
# With two threads each product of the reference device waits for both: beside another test, mostly for a processor.
DEVICE_FLAGS = {"cpu": ("--device", "cpu"), "reference": ("--device", "reference", "--num-threads", "1")}


class Stack:
    """`octavo serve` in a process of its own."""

    def __init__(self, model: Path | str, *flags: str) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.http_port = free_port()
        self.http_url = f"http://127.0.0.1:{self.http_port}"
        command = [sys.executable, "-m", "octavo.services.cli", "serve", str(model), "--grpc-address", self.address]
        # A test run that is killed leaves no server behind.
        command += ["--http-address", f"127.0.0.1:{self.http_port}", f"--parent-pid={os.getpid()}"]
        self.process = subprocess.Popen(
            [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        self.lines: list[str] = []
        self._new_lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._wait_ready()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            self._new_lines.put(line)
        self._new_lines.put(None)

    def wait_for_line(self, text: str, timeout_s: float = START_TIMEOUT_S) -> str:
        """Return the next line that contains `text`; fail if the process ends or is too slow."""
        deadline = time.monotonic() + timeout_s
        while True:
            line = self._new_lines.get(timeout=max(deadline - time.monotonic(), 0.01))
            assert line is not None, "octavo serve ended:\n" + "\n".join(self.lines)
            if text in line:
                return line

    def _wait_ready(self) -> None:
        try:
            self.wait_for_line("ready in ")  # the processes log other things that are ready
        except BaseException:
            self.kill()
            raise

    def wait_for_restart(self, name: str, old_pid: int, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until the one process `name` is another than `old_pid`, and the gateway's port takes connections."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.children(name) not in ([], [old_pid]):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    return
            time.sleep(0.05)
        raise AssertionError(f"{name} did not come back")

    def client(self) -> Client:
        return Client(self.address)

    def stop(self) -> int:
        """Stop it as Ctrl-C does; return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        finally:
            self.kill()

    def kill(self) -> None:
        """Make sure that nothing is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(STOP_TIMEOUT_S)
        self._reader.join(STOP_TIMEOUT_S)

    def children(self, name: str) -> list[int]:
        """The process ids of its processes called `octavo NAME`."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.cmdline()[:2] == ["octavo", name]:
                    found.append(process.pid)
        return found


@dataclass(frozen=True)
class Reference:
    """What transformers made of a prompt in float32, greedily."""

    id: str
    prompt: str
    prompt_ids: list[int]
    eos_ids: list[int]
    ids: list[int]
    gaps: list[float]

    def check(self, ids: list[int]) -> None:
        """Assert that `ids` equal the reference, up to the first near tie that fell the other way."""
        for place, (mine, theirs) in enumerate(zip(ids, self.ids, strict=False)):
            if mine != theirs:
                gap = self.gaps[place]
                assert gap <= NEAR_TIE, f"{self.id}: token {place} is {mine}, not {theirs}, with a gap of {gap}"
                return
        assert len(ids) == len(self.ids), f"{self.id}: {len(ids)} tokens, not {len(self.ids)}"


def references() -> list[Reference]:
    rows = [json.loads(line) for line in REFERENCES.read_text().splitlines()]
    fields = ("id", "prompt", "prompt_ids", "eos_ids", "ids", "gaps")
    return [Reference(**{name: row[name] for name in fields}) for row in rows]


@dataclass
class Answer:
    """Everything that a stream brought."""

    ids: list[int]
    text: str
    stream: Stream

    @cached_property
    def preemptions(self) -> int:
        assert self.stream.completed is not None
        return self.stream.completed.timing.preemptions

    @cached_property
    def cached_tokens(self) -> int:
        assert self.stream.completed is not None
        return self.stream.completed.usage.cached_prompt_tokens


def open_stream(client: Client, *args: Any, **options: Any) -> Stream:
    return client.stream(*args, return_token_ids=True, **options)


async def answer(client: Client, *args: Any, **options: Any) -> Answer:
    """Stream one answer to its end, with token ids; the client checks offsets and endings."""
    return await read(open_stream(client, *args, **options))


async def read(stream: Stream) -> Answer:
    ids: list[int] = []
    text: list[str] = []
    async for delta in stream:
        ids += delta.token_ids
        text.append(delta.text)
    return Answer(ids, "".join(text), stream)


async def greedy(client: Client, reference: Reference, max_new_tokens: int = 64, **options: Any) -> Answer:
    prompt = reference.prompt_ids
    return await answer(client, token_ids=prompt, max_new_tokens=max_new_tokens, temperature=0, **options)


async def until_running(client: Client) -> None:
    """Wait until there is a request."""
    while True:
        (load,) = await client.load()
        if load.running or load.waiting:
            return


async def until_idle(client: Client) -> None:
    """Wait until no request is left, then assert that every block is free."""
    while True:
        (load,) = await client.load()
        if load.running == load.waiting == 0 and load.kv_blocks_free == load.kv_blocks_total > 0:
            return
