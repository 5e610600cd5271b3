"""An exception at any point of the scheduler: what a bug in any of its handlers would do."""

from __future__ import annotations

import inspect
import os
import sys
from types import FrameType

from octavo.services.scheduler import node

_FOLDER = os.path.dirname(node.__file__) + os.sep


class InjectedError(Exception):
    """Raised in a place where no bug is."""


class Bomb:
    """Raises an InjectedError in the scheduler's code, once, after so many calls of its functions.

    Not in generators: one that is closed is called once more, and what it raises then nobody hears.
    """

    def __init__(self, num_calls: int) -> None:
        self._num_calls = num_calls
        self.has_gone_off = False

    def __enter__(self) -> None:
        if not self.has_gone_off:
            sys.setprofile(self._on_call)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _on_call(self, frame: FrameType, what: str, _: object) -> None:
        code = frame.f_code
        if what == "call" and not code.co_flags & inspect.CO_GENERATOR and code.co_filename.startswith(_FOLDER):
            self._num_calls -= 1
            if self._num_calls < 0:
                sys.setprofile(None)
                self.has_gone_off = True
                raise InjectedError(code.co_qualname)
