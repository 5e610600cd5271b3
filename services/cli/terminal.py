"""Writing to a terminal, or to whatever stands in its place."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata

# A model's output could steer the terminal: only line breaks and tabs are let through.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def is_terminal() -> bool:
    """Return whether a person reads what is printed."""
    return sys.stdout.isatty()


def dim(text: str) -> str:
    """Return `text` in a fainter colour, if there are colours."""
    return f"\x1b[2m{text}\x1b[0m" if is_terminal() and "NO_COLOR" not in os.environ else text


def as_text(text: str) -> str:
    """Return text as UTF-8 has it. Python keeps bytes of a terminal that are none as halves of characters."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def read_all() -> str:
    """Return all of standard input. Bytes that are no UTF-8 become U+FFFD."""
    return sys.stdin.buffer.read().decode(errors="replace")


def read_line() -> str:
    """Return the next line of standard input, without its end. Raises EOFError."""
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return line.decode(errors="replace").strip()


def one_line(text: object) -> str:
    """Return what a server says as one line, without what could steer the terminal."""
    return " ".join(str(text).split()).translate(_CONTROLS)


def write(text: str) -> None:
    """Print a piece of a model's output at once."""
    sys.stdout.write(text.translate(_CONTROLS) if is_terminal() else text)
    sys.stdout.flush()


class Answer:
    """Writes an answer to standard output as it comes. On a terminal, words that its edge would cut begin a new line.

    What has been written of such a word is erased and written again, so that nothing is held back. Blocks of code
    (between lines of three backticks) are left to the terminal: whoever copies them wants their own lines.
    """

    def __init__(self) -> None:
        self._wraps = is_terminal() and os.environ.get("TERM", "dumb") != "dumb"
        self._width = 0
        self._column = 0
        self._word = ""  # what the line ends with, since its last blank
        self._line_begins = ""
        self._in_code = False
        self._last_remark = ""

    def write(self, text: str) -> None:
        """Write the next piece."""
        self._last_remark = ""
        if not self._wraps:
            self._column = 0 if text.endswith("\n") else self._column + len(text)
            write(text)
            return
        self._width = shutil.get_terminal_size().columns - 1  # where the cursor stands in a full line, terminals differ
        sys.stdout.write("".join(self._placed(char) for char in text.translate(_CONTROLS)))
        sys.stdout.flush()

    def remark(self, text: str) -> None:
        """Write a line of one's own between, unless it is the one that was written last."""
        if text == self._last_remark:
            return
        self._last_remark = text
        print(("\n" if self._column else "") + dim(text), flush=True)
        self._column, self._word = 0, ""

    def _placed(self, char: str) -> str:
        """Return what is written for a character."""
        if char == "\n":
            self._in_code ^= self._line_begins.startswith("```")
            self._column, self._word, self._line_begins = 0, "", ""
            return char
        if len(self._line_begins) < 3:
            self._line_begins += char
        size = 8 - self._column % 8 if char == "\t" else columns(char)
        before = ""
        if self._column + size > self._width:
            word = "" if self._in_code else self._word
            back = sum(map(columns, word))
            if 0 < back < self._column and not char.isspace():
                before = f"\x1b[{back}D\x1b[K\n{word}"
                self._column = back
            else:
                before, self._column, self._word = "\n" if not self._in_code else "", 0, ""
            if char == " " and not self._in_code:
                return before
        self._column += size
        self._word = "" if char.isspace() or size == 2 else self._word + char
        return before + char


def columns(char: str) -> int:
    """Return how many columns of a terminal a character takes."""
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
