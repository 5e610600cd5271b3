"""Shows on stderr how far a start-up has come: a bar on a terminal, a few plain lines elsewhere.

Whoever shows something does not wait until it is read.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, Protocol, cast

from octavo.services.common.output import QueuedWriter, descriptor_of


class Display(Protocol):
    """Where `octavo serve` shows progress and the lines of its children."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` of a task is done; a task is known by its text.

        A total of 1 is a task whose progress nobody knows.
        """

    def line(self, text: str) -> None:
        """Print a line, above any bar."""

    def close(self) -> None:
        """Take the bars away; lines can still be printed."""


class PlainDisplay:
    """Prints a line, made by `form`, when a task begins and when it is done."""

    def __init__(self, stream: QueuedWriter, form: Callable[[str], str] = str) -> None:
        self._stream = stream
        self._form = form
        self._done: dict[str, bool] = {}

    def progress(self, what: str, done: int, total: int) -> None:
        """Print the task when it is seen first, and again once it is done."""
        if what not in self._done:
            self._done[what] = False
            self.line(self._form(f"{what} ..."))
        if done >= total and not self._done[what]:
            self._done[what] = True
            self.line(self._form(f"{what}: done"))

    def line(self, text: str) -> None:
        """Print a line."""
        self._stream.write(text + "\n")

    def close(self) -> None:
        """Do nothing: there are no bars."""


class RichDisplay:
    """Draws a bar for each task that is not done."""

    def __init__(self, stream: QueuedWriter) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns: list[Any] = [
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        ]
        self._stream = stream
        self._bars = Progress(*columns, console=Console(file=cast(IO[str], stream)), transient=True)
        self._tasks: dict[str, Any] = {}
        self._closed = False

    def progress(self, what: str, done: int, total: int) -> None:
        """Move the task's bar, and take it away at the end."""
        if self._closed:
            return
        if what not in self._tasks:
            self._bars.start()
            self._tasks[what] = self._bars.add_task(what)
        known = total if total > 1 else None  # rich lets a bar without a total pulse
        self._bars.update(self._tasks[what], completed=done, total=known, visible=done < total)

    def line(self, text: str) -> None:
        """Print a line above the bars."""
        if self._tasks and not self._closed:
            self._bars.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
        else:
            self._stream.write(text + "\n")

    def close(self) -> None:
        """Take the bars away."""
        self._closed = True
        self._bars.stop()


@contextmanager
def open_display(as_json: bool = False) -> Iterator[Display]:
    """Give the display that suits stderr, and close it at the end."""
    form: Callable[[str], str] = json_line if as_json else str
    stream = QueuedWriter(
        descriptor_of(sys.stderr), lambda count: form(f"{count} lines are missing: they were not read in time") + "\n"
    )
    display: Display = PlainDisplay(stream, form)
    if not as_json and stream.isatty() and _have_rich():
        display = RichDisplay(stream)
    try:
        yield display
    finally:
        display.close()
        stream.drain()


def json_line(text: str, process: str = "serve") -> str:
    """Return a line for machines, like those that the processes log."""
    return json.dumps({"process": process, "message": text})


def _have_rich() -> bool:
    return importlib.util.find_spec("rich") is not None
