"""A process that tries constraints out, each in a fork of its own that may be killed.

It reads frames from stdin and writes frames to stdout: a length in four bytes, big-endian, and JSON. The
first one says what the vocabulary is. Then each `{"id", "kind", "value", "continued"}`, the last one in base64 of
uint32, is answered with `{"id", "grammar"}` or `{"id", "error", "place"}`, in any order. It ends when stdin does.

A fork begins with the vocabulary in place, so it takes some milliseconds. It has limits of its own on
processor time and memory, little priority, and is killed when it is late.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import json
import os
import random
import resource
import selectors
import signal
import struct
import sys
import time
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.services.gateway.constraint_grammar import (
    HEADER,
    ConstraintError,
    children,
    grammar_of,
    grammar_of_schema,
    read_schema,
    without_format,
)

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_CPU_S = 0.2
MAX_WALL_S = 5.0  # where the processor is somebody else's most of the time
MAX_MEMORY = 512 << 20  # beyond what the process has before
# A third of what a worker's thread weighs. With the lowest policy (SCHED_IDLE) it would do even less harm, but 0.2 s
# of processor time took a second and more beside a worker that computes on all cores.
_NICENESS = 5
_SESSION_NICENESS = Path("/proc/self/autogroup")
_TRIAL_TOKENS = 24
_MAX_MASK_S = 0.05
_MAX_UNKNOWN_FORMATS = 16
_TOO_LONG = f"it takes more than {MAX_CPU_S:g} s of processor time: make it simpler"
_TOO_LARGE = "it takes too much memory, or is nested too deeply: make it simpler"


@dataclass
class _Fork:
    """A fork at work."""

    id: int
    pid: int
    started: float
    answer: bytearray = field(default_factory=bytearray)
    is_late: bool = False


def main() -> None:
    """Serve until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the gateway decides when to end
    _weigh_little()
    frames = _Frames()
    vocabulary = frames.next_blocking()
    tokenizer = make_tokenizer([name.encode("latin-1") for name in vocabulary["tokens"]], vocabulary["special"])
    for kind, value in (("json_schema", '{"type": "object"}'), ("regex", "[a-z]+")):
        try_out(kind, value, [], tokenizer)  # what is made ready once is inherited by forks
    gc.collect()
    gc.freeze()  # forks need not copy what they do not change
    _write({"ready": True})
    _Server(tokenizer, frames).run()


def _weigh_little() -> None:
    """Let the session of this process weigh little beside others.

    Where Linux shares cores out among sessions first (sched_autogroup: on machines, not in containers), a niceness
    means nothing to the processes of other sessions.
    """
    with contextlib.suppress(OSError):  # it leads its session already
        os.setsid()
    with contextlib.suppress(OSError):
        _SESSION_NICENESS.write_text(str(_NICENESS))


class _Frames:
    """Frames from stdin."""

    def __init__(self) -> None:
        self._data = bytearray()

    def read(self) -> bool:
        """Read what is there; False at the end."""
        data = os.read(0, 1 << 20)
        self._data += data
        return bool(data)

    def take(self) -> list[dict[str, Any]]:
        """Return the frames that are complete."""
        frames = []
        while len(self._data) >= 4:
            (size,) = struct.unpack_from(">I", self._data)
            if len(self._data) < 4 + size:
                break
            frames.append(json.loads(self._data[4 : 4 + size]))
            del self._data[: 4 + size]
        return frames

    def next_blocking(self) -> dict[str, Any]:
        """Return the first frame."""
        while True:
            if frames := self.take():
                return frames[0]
            if not self.read():
                sys.exit(0)


class _Server:
    """Forks for each request, and watches the forks."""

    def __init__(self, tokenizer: LLTokenizer, frames: _Frames) -> None:
        self._tokenizer = tokenizer
        self._frames = frames
        self._selector = selectors.DefaultSelector()
        self._selector.register(0, selectors.EVENT_READ)
        self._forks: dict[int, _Fork] = {}  # by the descriptor that its answer comes from

    def run(self) -> None:
        """Serve until stdin ends."""
        while True:
            for key, _ in self._selector.select(0.1 if self._forks else None):
                if key.fd:
                    self._hear(key.fd)
                elif not self._frames.read():
                    for fork in self._forks.values():
                        os.kill(fork.pid, signal.SIGKILL)
                    return
                for request in self._frames.take():
                    self._begin(request)
            self._watch()

    def _begin(self, request: dict[str, Any]) -> None:
        out, into = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.nice(_NICENESS)  # first of all: copying what it touches is work too
            os.close(0)
            os.close(out)
            _limit()
            with os.fdopen(into, "wb") as pipe:
                pipe.write(json.dumps(_answer(request, self._tokenizer)).encode())
            os._exit(0)
        os.close(into)
        self._forks[out] = _Fork(request["id"], pid, time.monotonic())
        self._selector.register(out, selectors.EVENT_READ)

    def _hear(self, fd: int) -> None:
        """Take a piece of an answer; at its end, pass it on."""
        fork = self._forks[fd]
        if data := os.read(fd, 1 << 20):
            fork.answer += data
            return
        self._selector.unregister(fd)
        os.close(fd)
        del self._forks[fd]
        _, status = os.waitpid(fork.pid, 0)
        if status == 0:
            answer = json.loads(fork.answer)
        elif fork.is_late:
            answer = {"busy": True}
        else:
            answer = {"error": _TOO_LONG if os.WTERMSIG(status) == signal.SIGPROF else _TOO_LARGE, "place": ""}
        _write({"id": fork.id, **answer})

    def _watch(self) -> None:
        now = time.monotonic()
        for fork in self._forks.values():
            if not fork.is_late and now - fork.started > MAX_WALL_S:
                fork.is_late = True
                os.kill(fork.pid, signal.SIGKILL)


def _limit() -> None:
    """Limit this process; what passes a limit ends it."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MAX_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)  # the last words of native code are answered by `_TOO_LARGE`


def _write(frame: dict[str, Any]) -> None:
    data = json.dumps(frame).encode()
    data = struct.pack(">I", len(data)) + data
    while data:
        data = data[os.write(1, data) :]


# -- in a fork -------------------------------------------------------------------------------------


def _answer(request: dict[str, Any], tokenizer: LLTokenizer) -> dict[str, Any]:
    try:
        continued = array("I", base64.b64decode(request["continued"])).tolist()
        return {"grammar": try_out(request["kind"], request["value"], continued, tokenizer)}
    except ConstraintError as error:
        return {"error": error.message, "place": error.place}
    except (MemoryError, RecursionError):
        return {"error": _TOO_LARGE, "place": ""}


def try_out(kind: str, value: Any, continued: list[int], tokenizer: LLTokenizer) -> str:
    """Return the grammar of a constraint that a worker can keep to. Raises ConstraintError.

    continued  output tokens that must match the beginning
    """
    grammar = grammar_of(kind, value)
    matcher = _matcher(tokenizer, grammar)
    if matcher.is_error() and kind == "json_schema":
        schema = read_schema(value)
        for _ in range(_MAX_UNKNOWN_FORMATS):
            shorter = without_format(schema, matcher.get_error())
            if shorter is None:
                break
            schema, grammar = shorter, grammar_of_schema(shorter)
            matcher = _matcher(tokenizer, grammar)
        if matcher.is_error():
            raise ConstraintError(_words(matcher.get_error()), _place(tokenizer, schema, matcher.get_error()))
    if matcher.is_error():
        message = _words(matcher.get_error())
        raise ConstraintError(message, _line(matcher.get_error()) if kind == "grammar" else "")
    _walk(matcher, continued)
    return grammar


def _matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    from llguidance import LLMatcher

    return LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())


def parser_limits() -> LLParserLimits:
    """Return the limits of the workers (`gpu_worker/grammars.py`): what passes here passes there."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=10_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def _walk(matcher: LLMatcher, continued: list[int]) -> None:
    """Follow the output so far, and then a few tokens at random, to meet what would be slow in a worker."""
    for number in range(_TRIAL_TOKENS):
        began = time.thread_time()
        mask = matcher.compute_bitmask()
        if time.thread_time() - began > _MAX_MASK_S:
            raise ConstraintError("it takes too long to follow: make it simpler")
        if matcher.is_error() and "too " in matcher.get_error():
            raise ConstraintError(f"too complex: {_words(matcher.get_error())}")
        if number == 0 and (matcher.is_error() or not any(mask)):
            raise ConstraintError("no text matches it")
        if number == 0 and continued and not matcher.consume_tokens(continued):
            raise ConstraintError("the output that is continued does not match it", "continue_output")
        if number or not continued:
            token_id = _any_bit(mask)
            if matcher.is_error() or matcher.is_stopped() or token_id is None or not matcher.consume_token(token_id):
                return


_random = random.Random(0)


def _any_bit(mask: bytes) -> int | None:
    """Return a bit that is set, of the first byte that has one from a random place on; None if there is none."""
    start = _random.randrange(len(mask))
    rest = (mask[start:] + mask[:start]).lstrip(b"\0")
    if not rest:
        return None
    place = (start + len(mask) - len(rest)) % len(mask)
    return place * 8 + _random.choice([bit for bit in range(8) if mask[place] >> bit & 1])


def _place(tokenizer: LLTokenizer, schema: dict[str, Any], error: str) -> str:
    """Return the JSON pointer of the innermost schema that has the same error by itself."""
    definitions: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    pointer, part = "#", schema
    while True:
        for at, child in children(part):
            alone = _matcher(tokenizer, grammar_of_schema({**definitions, **child}))
            if at.startswith(("/$defs", "/definitions")):
                alone = _matcher(tokenizer, grammar_of_schema(child))
            if alone.is_error() and _words(alone.get_error()) == _words(error):
                pointer, part = pointer + at, child
                break
        else:
            return pointer


def _words(error: str) -> str:
    """Return an engine's error without the engine's view of the source."""
    text = error.split("<state>")[0].split("\n   1 | ")[0]
    for _ in range(2):
        text = text.split(": ", 1)[1] if text.startswith(("at ", "failed to compile JSON schema: ")) else text
    return " ".join(text.split())[:300]


def _line(error: str) -> str:
    """Return where in the client's own text an engine's error is."""
    if not error.startswith("at "):
        return ""
    line, _, rest = error[3:].partition("(")
    column = rest.partition(")")[0]
    own = int(line) - HEADER.count("\n") if line.isdigit() else 0
    return f"line {own}, column {column}" if own > 0 else ""


def make_tokenizer(tokens: list[bytes], special_token_ids: list[int]) -> LLTokenizer:
    """Return a vocabulary as the engine wants it, with an end of its own after the last token."""
    from llguidance import LLTokenizer, TokenizerWrapper

    class Tokens:
        eos_token_id = len(tokens)
        bos_token_id = None

        def __init__(self) -> None:
            self.tokens = [*tokens, b"<end>"]
            self.special_token_ids = [*special_token_ids, len(tokens)]

        def __call__(self, _text: str | bytes) -> list[int]:
            return []  # never needed: see HEADER

    return LLTokenizer(TokenizerWrapper(Tokens()))


if __name__ == "__main__":
    main()
