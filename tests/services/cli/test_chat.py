"""`octavo chat` and `octavo generate` as a person runs them, against a gateway without a model."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from octavo.inference.v1 import model_pb2

OCTAVO = (sys.executable, "-m", "octavo.services.cli")


async def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
    """Run the command; return its exit status, stdout and stderr."""
    process = await asyncio.create_subprocess_exec(*OCTAVO, *arguments, stdin=-1, stdout=-1, stderr=-1)
    out, err = await process.communicate(stdin.encode())
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def make_error(code: grpc.StatusCode, message: str, reason: str) -> tuple[status_pb2.Status, bool]:
    status = status_pb2.Status(code=code.value[0], message=message)
    packed = any_pb2.Any()
    packed.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="octavo"))
    status.details.append(packed)
    return status, False


class Terminal:
    """A command in a pseudo-terminal: what a person types, what a person sees."""

    def __init__(self, *arguments: str, home: Path, kind: str = "dumb") -> None:
        self._fd, other = pty.openpty()
        # The new session takes its standard input as its terminal, so that a typed Ctrl-C is a signal; and it
        # takes that signal as a person's shell would, also where the tests run in the background.
        code = (
            "import fcntl, os, signal, sys, termios; signal.signal(signal.SIGINT, signal.SIG_DFL); "
            "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-Sc", code, *OCTAVO, *arguments],
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
            env={**os.environ, "XDG_STATE_HOME": str(home), "NO_COLOR": "1", "TERM": kind},
        )
        os.close(other)
        os.set_blocking(self._fd, False)
        self.seen = ""
        self._from = 0
        self._changed = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._fd, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._fd, 65_536)
        except OSError:  # the other side is closed
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._fd)
        self.seen += data.decode(errors="replace")
        self._changed.set()

    async def press_until(self, key: str, text: str) -> None:
        """Press a key, again if nothing happens for a second, until `text` is seen."""
        for _ in range(20):
            self.type(key)
            with contextlib.suppress(TimeoutError):
                await self.until(text, timeout_s=1)
                return
        raise AssertionError(f"{key!r} brought no {text!r}: {self.seen!r}")

    async def until(self, text: str, timeout_s: float = 30) -> None:
        """Wait until `text` is seen after what was waited for before."""
        try:
            async with asyncio.timeout(timeout_s):
                while (at := self.seen.find(text, self._from)) < 0:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise TimeoutError(f"no {text!r} after {self.seen[self._from :]!r}") from None
        self._from = at + len(text)

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())


@pytest.fixture
async def terminal(gateway: Any, tmp_path: Path) -> AsyncIterator[Terminal]:
    terminal = Terminal("chat", "--address", gateway.address, home=tmp_path)
    try:
        yield terminal
        assert await asyncio.to_thread(terminal.process.wait, 30) == 0
    finally:
        terminal.process.kill()


async def test_piped_lines_are_turns_of_one_conversation(gateway: Any) -> None:
    status, out, err = await run(
        "chat", "--address", gateway.address, "--system", "Be brief.", "--temperature=0", "--max-tokens=7",
        stdin="Hi\n\nAnd then?\n",
    )  # fmt: skip

    assert (status, out, err) == (0, "Hello, world!\nHello, world!\n", "")
    first, second = gateway.requests
    assert [m.role for m in first.chat.messages] == ["system", "user"]
    assert [(m.role, m.parts[0].text) for m in second.chat.messages] == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello, world!"),
        ("user", "And then?"),
    ]
    assert second.stop.max_new_tokens == 7
    assert second.sampling.temperature == 0


async def test_commands_change_the_conversation(gateway: Any) -> None:
    lines = "one\n/reset\ntwo\n/system Be kind.\nthree\n/what\n/help\n/exit\nnever\n"

    status, out, _ = await run("chat", "--address", gateway.address, stdin=lines)

    assert status == 0
    turns = [[m.parts[0].text for m in request.chat.messages] for request in gateway.requests]
    assert turns == [["one"], ["two"], ["Be kind.", "three"]]
    assert "There is no /what" in out
    assert "Ctrl-C stops an answer" in out


async def test_a_piped_conversation_ends_at_the_first_error(gateway: Any) -> None:
    gateway.errors = [make_error(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", "QUEUE_FULL")]

    status, out, err = await run("chat", "--address", gateway.address, stdin="one\ntwo\n")

    assert (status, out) == (1, "")
    assert err == "octavo chat: the queue is full (QUEUE_FULL)\n"
    assert len(gateway.requests) == 1


@pytest.mark.parametrize("command", [("chat",), ("generate", "Hi")])
async def test_without_a_server_one_line_says_so(command: tuple[str, ...]) -> None:
    status, out, err = await run(*command, "--address", "127.0.0.1:1", stdin="Hi\n")

    assert (status, out) == (1, "")
    assert (
        err
        == f"octavo {command[0]}: no server at 127.0.0.1:1: start one with `octavo serve`, or name it with --address\n"
    )


async def test_a_model_without_a_template_cannot_chat(gateway: Any) -> None:
    gateway.models = [model_pb2.Model(name="base", features=["generate"])]

    status, _, err = await run("chat", "--address", gateway.address, stdin="Hi\n")

    assert status == 1
    assert err == "octavo chat: base has no chat template: use octavo generate --raw\n"


async def test_of_several_models_one_must_be_chosen(gateway: Any) -> None:
    gateway.models.append(model_pb2.Model(name="other", aliases=["o"], features=["chat"]))

    status, _, err = await run("chat", "--address", gateway.address, stdin="Hi\n")
    assert (status, err) == (1, "octavo chat: say which --model: the server has fake, other\n")

    status, _, _ = await run("chat", "--address", gateway.address, "--model", "o", stdin="Hi\n")
    assert status == 0
    assert gateway.requests[0].model == "other"


async def test_in_a_terminal_an_answer_is_followed_by_its_usage(gateway: Any, terminal: Terminal) -> None:
    await terminal.until("> ")
    terminal.type("Hi\n")
    await terminal.until("Hello, world!")
    await terminal.until("4 tokens in ")
    await terminal.until("prompt 5 tokens")
    await terminal.until("> ")
    terminal.type("\x04")


async def test_pasted_lines_are_one_question(gateway: Any, tmp_path: Path) -> None:
    terminal = Terminal("chat", "--address", gateway.address, home=tmp_path, kind="xterm")
    try:
        await terminal.until("> ")
        terminal.type("\x1b[200~one\rtwo\rthree\x1b[201~")
        await terminal.until("three")
        terminal.type("\r")
        await terminal.until("Hello, world!")
        await terminal.until("> ")
        terminal.type("four\\\r")
        await terminal.until(". ")
        terminal.type("five\r")
        await terminal.until("Hello, world!")
        await terminal.until("> ")
        terminal.type("/exit\r")
        assert await asyncio.to_thread(terminal.process.wait, 30) == 0
    finally:
        terminal.process.kill()
    asked = [request.chat.messages[-1].parts[0].text for request in gateway.requests]
    assert asked == ["one\ntwo\nthree", "four\nfive"]


async def test_a_connection_that_is_lost_is_told_at_once(gateway: Any, fake: Any, terminal: Terminal) -> None:
    told = asyncio.Event()

    async def stream(generation: Any, context: Any) -> AsyncIterator[Any]:
        del generation
        if len(gateway.requests) == 1:
            yield gateway.answer[0]
            await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        await told.wait()
        for event in gateway.answer:
            yield event

    gateway.stream = stream
    await terminal.until("> ")
    terminal.type("Hi\n")
    await terminal.until("connection lost; trying again (Ctrl-C stops)")
    told.set()
    await terminal.until("Hello, world!")
    await terminal.until("> ")
    terminal.type("/exit\n")


async def test_ctrl_c_ends_the_waiting_for_a_server_that_does_not_come_back(gateway: Any, terminal: Terminal) -> None:
    async def stream(generation: Any, context: Any) -> AsyncIterator[Any]:
        del generation
        yield gateway.answer[0]
        await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    gateway.stream = stream
    await terminal.until("> ")
    terminal.type("Hi\n")
    await terminal.until("connection lost; trying again (Ctrl-C stops)")
    await terminal.press_until("\x03", "stopped")
    await terminal.until("> ")
    terminal.type("/exit\n")


async def test_bytes_that_are_no_utf_8_are_replaced(gateway: Any) -> None:
    command = [*OCTAVO, "chat", "--address", gateway.address]
    process = await asyncio.create_subprocess_exec(*command, stdin=-1, stdout=-1, stderr=-1)
    out, err = await process.communicate(b"caf\xe9 \xc3\xa9\n")
    assert (out, err) == (b"Hello, world!\n", b"")
    assert gateway.requests[0].chat.messages[0].parts[0].text == "caf\ufffd \u00e9"


async def test_a_prompt_in_another_alphabet_needs_no_locale(gateway: Any, fake: Any) -> None:
    gateway.answer = fake.events(["d\u00e9j\u00e0"])
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [*OCTAVO, "generate", "\u00e9t\u00e9", "--address", gateway.address]
    process = await asyncio.create_subprocess_exec(*command, stdout=-1, stderr=-1, env=environment)
    out, err = await process.communicate()
    assert (process.returncode, out, err) == (0, b"d\\xe9j\\xe0\n", b"")
    assert gateway.requests[0].chat.messages[0].parts[0].text == "\u00e9t\u00e9"


async def test_ctrl_c_stops_the_answer_and_not_the_chat(gateway: Any, fake: Any, terminal: Terminal) -> None:
    await terminal.until("> ")
    gateway.answer, complete = fake.events(["Well", "..."], finish=False), gateway.answer
    gateway.hang = True
    terminal.type("Hi\n")
    await terminal.until("Well...")
    terminal.type("\x03")
    await gateway.cancelled.wait()
    await terminal.until("stopped")
    gateway.answer, gateway.hang = complete, False
    await terminal.until("> ")

    # At the prompt it only clears the line. Python's input() can miss a signal that comes just
    # before it waits for a key, until there is a key: so a person, too, would press it again.
    terminal.type("draft")
    await terminal.until("draft")
    await terminal.press_until("\x03", "> ")
    terminal.type("Again\n")
    await terminal.until("Hello, world!")
    assert [m.parts[0].text for m in gateway.requests[1].chat.messages] == ["Hi", "Well...", "Again"]
    await terminal.until("> ")
    terminal.type("/exit\n")


async def test_a_model_cannot_steer_the_terminal(gateway: Any, fake: Any, terminal: Terminal) -> None:
    gateway.answer = fake.events(["a\x1b]0;title\x07b", "\x9b2Jc\n", "d"])
    await terminal.until("> ")
    terminal.type("Hi\n")
    await terminal.until("a]0;titleb2Jc\r\nd")
    terminal.type("/exit\n")


async def test_generate_answers_a_chat_or_continues_a_text(gateway: Any) -> None:
    status, out, err = await run(
        "generate", "Hi", "--address", gateway.address, "--system=Short.", "--stop=,", "--seed=3"
    )
    assert (status, out, err) == (0, "Hello, world!\n", "")
    assert [m.parts[0].text for m in gateway.requests[0].chat.messages] == ["Short.", "Hi"]
    assert gateway.requests[0].stop.stop_sequences == [","]

    status, out, _ = await run("generate", "-", "--raw", "--address", gateway.address, stdin="Once upon")
    assert (status, out) == (0, "Hello, world!\n")
    assert gateway.requests[1].text == "Once upon"


async def test_generate_fails_with_one_line(gateway: Any, fake: Any) -> None:
    gateway.errors = [make_error(grpc.StatusCode.NOT_FOUND, "there is no model x", "MODEL_NOT_FOUND")]
    assert await run("generate", "Hi", "--model=x", "--address", gateway.address) == (
        1,
        "",
        "octavo generate: there is no model x (MODEL_NOT_FOUND)\n",
    )

    gateway.answer = fake.events(["Half"], finish=False)  # the stream ends in the middle
    assert await run("generate", "Hi", "--address", gateway.address) == (
        1,
        "Half\n",
        "octavo generate: the stream ended without Completed (PROTOCOL_ERROR)\n",
    )

    status, _, err = await run("generate", "Hi", "--raw", "--system=x")
    assert (status, err) == (2, "octavo generate: --system needs a chat: leave --raw out\n")


async def test_a_reader_that_leaves_is_no_error_on_the_screen(gateway: Any, fake: Any) -> None:
    gateway.answer = fake.events(["word "] * 5000)
    command = f"{' '.join(OCTAVO)} generate Hi --address {gateway.address} | head -c 10"

    process = await asyncio.create_subprocess_exec("sh", "-c", command, stdout=-1, stderr=-1)
    out, err = await process.communicate()

    assert (out, err) == (b"word word ", b"")
