"""Writing to a terminal, or to whatever stands in its place."""

from __future__ import annotations

import os
import sys

# A model's output could steer the terminal: only line breaks and tabs are let through.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def is_terminal() -> bool:
    """Return whether a person reads what is printed."""
    return sys.stdout.isatty()


def dim(text: str) -> str:
    """Return `text` in a fainter colour, if there are colours."""
    return f"\x1b[2m{text}\x1b[0m" if is_terminal() and "NO_COLOR" not in os.environ else text


def write(text: str) -> None:
    """Print a piece of a model's output at once."""
    sys.stdout.write(text.translate(_CONTROLS) if is_terminal() else text)
    sys.stdout.flush()


def hint(error: object, reason: str, address: str) -> str:
    """Return one line that tells a person what went wrong and, where it is known, what to do."""
    text = " ".join(str(error).split())
    if reason == "" and "connect" in text.lower():
        return f"no server at {address}: start one with `octavo serve`, or name it with --address"
    return f"{text}; /reset starts over" if reason == "CONTEXT_LENGTH_EXCEEDED" else text
