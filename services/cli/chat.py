"""`octavo chat`: a conversation in the terminal, or with whatever is piped in: one line, one turn."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.services.cli import server_options, terminal
from octavo.services.cli.server_options import ClientConfig

if TYPE_CHECKING:
    from octavo.services.client import Client, OctavoError, Stream

_HISTORY_LINES = 1000
_LEAST_DECODE_S = 0.25
HELP = """/help          show this
/reset         forget the conversation
/system TEXT   tell the model something first, and start over; without TEXT, nothing
/exit          end (or Ctrl-D)
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one; pasted lines are one question."""
_CONTEXT_FULL = "CONTEXT_LENGTH_EXCEEDED"


@dataclass(frozen=True, kw_only=True)
class ChatConfig(ClientConfig):
    """Settings of `octavo chat`."""


def main(argv: Sequence[str]) -> int:
    """Chat until the input ends; `argv[0]` is the command's name.

    Return 0, or 1 if no server answers or if a turn of a piped conversation fails.
    """
    config = server_options.load(
        ChatConfig, argv[1:], prog="octavo chat", description="Talks to a server in the terminal."
    )
    # One loop for all turns, run only while an answer comes: between turns the terminal is readline's.
    with asyncio.Runner() as runner:
        chat = Chat(config, runner)
        try:
            return chat.run()
        finally:
            runner.run(chat.close())


class Chat:
    """A conversation. Its turns are kept here; the server remembers nothing but cached prefixes."""

    def __init__(self, config: ChatConfig, runner: asyncio.Runner) -> None:
        self._config = config
        self._runner = runner
        self._system = config.system
        self._turns: list[dict[str, str]] = []
        self._client: Client | None = None
        self._model = ""
        self._interactive = sys.stdin.isatty() and terminal.is_terminal()

    def run(self) -> int:
        """Read lines and answer them until the input ends."""
        if not self._connect():
            return 1
        if self._interactive:
            _start_readline()
            print(terminal.dim(f"{self._model} at {self._config.address}. /help lists the commands, Ctrl-D ends."))
        while True:
            try:
                line = _ask() if self._interactive else terminal.read_line()
            except KeyboardInterrupt:  # at the prompt it only clears the line
                print()
                continue
            except EOFError:
                if self._interactive:
                    print()
                return 0
            if line.startswith("/"):
                if not self._command(line):
                    return 0
            elif line and not self._turn(line) and not self._interactive:
                return 1

    async def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            await self._client.close()

    def _connect(self) -> bool:
        """Find the server and its model; say so and return False if that fails."""
        from octavo.services.client import OctavoError

        try:
            self._model = self._runner.run(self._open())
        except (OctavoError, ValueError) as error:
            self._complain(error)
            return False
        return True

    async def _open(self) -> str:
        self._client = self._config.client()
        models = await self._client.models()
        wanted = [m for m in models if not self._config.model or self._config.model in (m.name, *m.aliases)]
        names = ", ".join(model.name for model in models) or "none"
        if len(wanted) != 1:
            what = f"there is no model {self._config.model}" if self._config.model else "say which --model"
            raise ValueError(f"{what}: the server has {names}")
        if "chat" not in wanted[0].features:
            raise ValueError(f"{wanted[0].name} has no chat template: use octavo generate --raw")
        return wanted[0].name

    def _command(self, line: str) -> bool:
        """Do what a line that starts with a slash says; return False to end."""
        name, _, text = line.partition(" ")
        match name:
            case "/exit" | "/quit":
                return False
            case "/reset":
                self._turns.clear()
                print(terminal.dim("The conversation is forgotten."))
            case "/system":
                self._system = text.strip()
                self._turns.clear()
                print(terminal.dim("Set; the conversation starts over."))
            case "/help":
                print(terminal.dim(HELP))
            case _:
                print(terminal.dim(f"There is no {name}: /help lists the commands."))
        return True

    def _turn(self, line: str) -> bool:
        """Answer a line; return whether that went well. A turn that failed is not remembered."""
        from octavo.services.client import OctavoError

        assert self._client is not None, "not connected"
        system = [{"role": "system", "content": self._system}] if self._system else []
        messages = [*system, *self._turns, {"role": "user", "content": line}]
        stream = self._client.stream(messages=messages, model=self._model, **self._config.options())
        pieces: list[str] = []
        answer = terminal.Answer()
        stream.on_retry = lambda error: self._say_retry(answer, error)
        started = time.monotonic()
        try:
            self._runner.run(_print_answer(stream, pieces, answer))
        except KeyboardInterrupt:
            print("\n" + terminal.dim("stopped"))
        except (OctavoError, ValueError, TypeError) as error:
            if pieces:
                print()
            self._complain(error)
            return False
        else:
            print()
            if terminal.is_terminal():
                print(terminal.dim(summary(stream, time.monotonic() - started)))
        self._turns += [{"role": "user", "content": line}, {"role": "assistant", "content": "".join(pieces)}]
        return True

    def _say_retry(self, answer: terminal.Answer, error: OctavoError) -> None:
        if self._interactive:
            what = terminal.one_line(error.message) if error.reason else "connection lost"
            answer.remark(f"{what}; trying again (Ctrl-C stops)")

    def _complain(self, error: Exception) -> None:
        is_full = getattr(error, "reason", "") == _CONTEXT_FULL
        print(f"octavo chat: {self._config.explain(error)}{'; /reset starts over' if is_full else ''}", file=sys.stderr)


async def _print_answer(stream: Stream, pieces: list[str], answer: terminal.Answer) -> None:
    """Print the answer as it comes, and collect it in `pieces`. Cancelling this ends the call."""
    async with stream:
        async for delta in stream:
            answer.write(delta.text)
            pieces.append(delta.text)


def summary(stream: Stream, wall_s: float) -> str:
    """Return a finished answer's tokens and speed in one line."""
    assert stream.completed is not None, "the answer has not ended"
    usage, timing = stream.completed.usage, stream.completed.timing
    decode_s = timing.decode_us / 1e6
    # The first token comes out of the prompt's computation: its time is not the decoding's. A moment has no rate.
    rate = f" ({(usage.output_tokens - 1) / decode_s:.1f} tokens/s)" if decode_s >= _LEAST_DECODE_S else ""
    cached = f", {usage.cached_prompt_tokens} of them cached" if usage.cached_prompt_tokens else ""
    return f"{usage.output_tokens} tokens in {wall_s:.1f} s{rate}; prompt {usage.prompt_tokens} tokens{cached}"


def _ask() -> str:
    """Return what a person types, or pastes, as a question. Raises EOFError."""
    line = input("> ")
    while line.endswith("\\"):
        line = f"{line[:-1]}\n{input('. ')}"
    return terminal.as_text(line).strip()


def _start_readline() -> None:
    """Give the prompt line editing and a history that the next chat has too."""
    try:
        import atexit
        import readline
    except ImportError:  # a Python without it can still chat
        return
    if "libedit" not in (readline.__doc__ or ""):
        readline.parse_and_bind("set enable-bracketed-paste on")  # which Python switches off
    folder = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "octavo"
    path = folder / "chat_history"
    readline.set_history_length(_HISTORY_LINES)
    with contextlib.suppress(OSError):  # the first time, or nowhere to keep it
        folder.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.read_history_file(path)

    def save() -> None:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)

    atexit.register(save)
