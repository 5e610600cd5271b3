"""What can go wrong in a worker that is not a bug."""

from __future__ import annotations

import reprlib


class ModelError(Exception):
    """A model cannot be loaded or held. The message says which file or setting, and what to change."""


class SettingError(Exception):
    """A setting cannot be used. The message says which one, and what to change."""


class DeviceError(Exception):
    """A device is missing, or cannot be used as asked. The message says what to change."""


class PlanError(Exception):
    """A StepPlan, or what it says of one slot, breaks the contract. The message names the field."""


class RankError(Exception):
    """A rank of this process's tensor-parallel group is gone, hangs or does not fit; the group must start anew."""


_MAX_LINE = 1000
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 80


def shown(value: object) -> str:
    """Return what a file holds for a message: a value may be as long and as deep as a file."""
    return _SHOWN.repr(value)


def one_line(error: Exception) -> str:
    """Return an error's message as one line: names that a file holds may be of any length, with line ends in them."""
    text = " ".join(str(error).split())
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= _MAX_LINE else text[:_MAX_LINE] + " ..."
