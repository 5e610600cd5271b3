"""Sets logging up for a process: lines for people on a terminal, JSON lines for machines."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from typing import Literal, TextIO

from octavo.services.common.output import QueuedWriter, descriptor_of

Format = Literal["auto", "text", "json"]
LEVELS = ("debug", "info", "warning", "error")

ACCESS = "octavo.access"
"""The logger of one line for each generate call: these are accounts, and never left out."""

current_request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The call that runs now, for every line that is logged in it; empty outside of calls."""

# What would move a terminal's cursor, or begin a line that nobody wrote: control characters and the like.
_CONTROLS = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (*range(32), *range(127, 160), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}
_BELOW = {code: text for code, text in _CONTROLS.items() if chr(code) not in "\n\t"}

_MAX_KEYS = 1024  # how many different warnings a RateLimiter remembers
_MAX_LINES, _LINES_S = 50, 10.0  # of one message, whatever its arguments


def setup(level: str, process: str, *, fmt: Format = "auto", stream: TextIO | None = None) -> None:
    """Send every log record of this process to `stream`, in place of what was set up before.

    By default that is stderr, through a thread: nothing of this process waits for whoever reads it, and what is not
    read in time is left out and counted. `logging.shutdown`, at the process's end, waits a little for the rest.

    `level` is one of LEVELS; `process` names the process in each JSON line. "auto" means text if
    `stream` is a terminal, else JSON.
    """
    if fmt == "auto":
        is_terminal = sys.stderr is not None and sys.stderr.isatty() if stream is None else stream.isatty()
        fmt = "text" if is_terminal else "json"
    formatter = TextFormatter() if fmt == "text" else JsonFormatter(process)
    handler = _StderrHandler(formatter) if stream is None else logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    handler.addFilter(RepeatFilter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    set_level(level)


def set_level(level: str) -> None:
    """Log what is as severe as `level`, one of LEVELS, from now on."""
    logging.getLogger().setLevel(level.upper())
    # Libraries report each request or connection at "info": that is our debug.
    for chatty in ("asyncio", "grpc", "httpx", "urllib3", "filelock", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.DEBUG if level == "debug" else logging.WARNING)


class _StderrHandler(logging.StreamHandler[QueuedWriter]):
    """Writes to the process's stderr without waiting for it."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__(
            QueuedWriter(descriptor_of(sys.stderr), lambda count: f"{formatter.format(_left_out(count))}\n")
        )

    def close(self) -> None:
        """Wait for what is not written yet, as long as somebody reads."""
        self.stream.drain()
        super().close()


def _left_out(count: int) -> logging.LogRecord:
    message = "%d lines of this log are missing: they were not read in time"
    return logging.LogRecord(__name__, logging.WARNING, "", 0, message, (count,), None)


class TextFormatter(logging.Formatter):
    """`2026-02-01 14:03:07.123 message`, with the level before the message unless it is info."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line, and its traceback, if any, below it."""
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        line = f"{clock}.{int(record.msecs):03d} {level}{record.getMessage()}"
        request_id, fields = current_request_id.get(), getattr(record, "fields", {})
        if request_id and request_id not in line:
            fields = {"request_id": request_id, **fields}
        if fields:
            line += " " + " ".join(f"{name}={value}" for name, value in fields.items())
        line = line.translate(_CONTROLS)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info).translate(_BELOW)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, process, logger, message, request_id, exception.

    What a record has in `fields` (`extra={"fields": {...}}`) is added as it is.
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := current_request_id.get():
            line["request_id"] = request_id
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class RepeatFilter(logging.Filter):
    """Lets no message through more than 50 times in ten seconds, and says then how many were left out.

    A message is known by its text before arguments are filled in, so that a flood of wrong calls cannot fill a disk.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._windows: OrderedDict[tuple[str, object], list[float]] = OrderedDict()  # began at, lines, left out

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to write the record."""
        if record.name == ACCESS:
            return True
        now, key = self._clock(), (record.name, record.msg if isinstance(record.msg, str) else type(record.msg))
        window = self._windows.get(key)
        if window is None or now - window[0] >= _LINES_S:
            if window is not None and window[2]:
                record.msg = f"{record.getMessage()} (and {int(window[2])} more like this)"
                record.args = ()
            self._windows[key] = [now, 1, 0]
            self._windows.move_to_end(key)
            if len(self._windows) > _MAX_KEYS:
                self._windows.popitem(last=False)
            return True
        window[1] += 1
        if window[1] <= _MAX_LINES:
            return True
        window[2] += 1
        return False


class RateLimiter:
    """Lets a warning that can repeat without end through once per interval, and says how many were left out."""

    def __init__(
        self, logger: logging.Logger, interval_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._logger = logger
        self._interval_s = interval_s
        self._clock = clock
        self._seen: OrderedDict[str, tuple[float, int]] = OrderedDict()  # key -> (last logged, left out since)

    def warning(self, key: str, message: str, *args: object) -> None:
        """Log `message % args` as a warning, unless one with the same key was logged within the interval."""
        now = self._clock()
        last, left_out = self._seen.get(key, (None, 0))
        if last is not None and now - last < self._interval_s:
            self._seen[key] = (last, left_out + 1)
            return
        self._seen[key] = (now, 0)
        self._seen.move_to_end(key)
        if len(self._seen) > _MAX_KEYS:
            self._seen.popitem(last=False)
        if left_out:
            message, args = message + " (and %d more like this)", (*args, left_out)
        self._logger.warning(message, *args)
