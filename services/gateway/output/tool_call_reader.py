"""Reads one tool call, character by character, so that its arguments can go out while they are made."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from enum import Enum, auto

_OUTSIDE_STRINGS = frozenset(' \t\r\n{}[]:,"0123456789+-.eEtrufalsn')
_FIRST_KEY = re.compile(r'\s*\{\s*"(?:name|function|type|id|arguments|parameters)"\s*')
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*', re.DOTALL)
_NAMED_HEAD = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*")
_NAMED_CHARACTER = re.compile(r"[\w.\-\[\]\s]")
_MAX_NAMED_HEAD = 512


class CallState(Enum):
    """How far a call is."""

    READING = auto()
    DONE = auto()
    FAILED = auto()
    """This is no call."""


class ToolCallReader:
    """One call. What is known after a character depends on the characters so far, not on how they came."""

    __slots__ = (
        "_arguments",
        "_arguments_at",
        "_arguments_end",
        "_depth",
        "_escaped",
        "_in_string",
        "_is_named",
        "_known",
        "_raw",
        "_sent",
        "name",
        "state",
    )

    def __init__(self, known: Collection[str] | None, may_be_named: bool) -> None:
        """`known`: the names that are possible, None: all; `may_be_named`: `f[ARGS]{...}` is a call, too."""
        self._known = known
        self._is_named = may_be_named  # until an object begins instead
        self._raw: list[str] = []
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._arguments_at = -1  # first and last in `_raw`, once they are known
        self._arguments_end = -1
        self._arguments = ""  # instead, where they had to be written anew
        self._sent = 0
        self.state = CallState.READING
        self.name = ""
        """Known before the arguments where the model wrote it first, else when the call is done."""

    @property
    def raw(self) -> str:
        """All that was read."""
        return "".join(self._raw)

    @property
    def is_blank(self) -> bool:
        """Nothing but blanks was read."""
        return self._depth == 0 and not self.raw.strip()

    @property
    def has_arguments(self) -> bool:
        """The arguments have been read to their end."""
        return self._arguments_end >= 0

    def push(self, text: str) -> int:
        """Read on; return how many characters were read: all, unless the call is done or has failed before."""
        for position, character in enumerate(text):
            if not self._read(character):
                self.state = CallState.FAILED
                return position
            if self.state is not CallState.READING:
                return position + 1
        return len(text)

    def take_arguments(self) -> str:
        """Return the arguments that were read since the last time; nothing as long as there is no name."""
        if not self.name:
            return ""
        if self._arguments_at < 0:
            arguments, self._arguments = self._arguments, ""
            return arguments
        end = len(self._raw) if self._arguments_end < 0 else self._arguments_end
        start = max(self._sent, self._arguments_at)
        self._sent = max(end, start)
        return "".join(self._raw[start:end])

    def _read(self, character: str) -> bool:
        """Read a character; return whether it can be part of a call."""
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif self._depth == 0 and character != "{":
            if not self._read_before(character):
                return False
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            if character == "{" and not self._begin_object():
                return False
            self._depth += 1
        elif character not in _OUTSIDE_STRINGS or (character == ":" and not self._can_be_key()):
            return False
        self._raw.append(character)
        if character in "}]" and self._depth and not self._in_string:
            self._depth -= 1
            self._end_object()
        return True

    def _can_be_key(self) -> bool:
        """Return whether a call can begin with the key that ends here; without a mark, any object could come."""
        return self._depth > 1 or self._known is None or _FIRST_KEY.match(self.raw) is not None

    def _read_before(self, character: str) -> bool:
        """Return whether a character can come before all objects."""
        if character.isspace():
            return True
        can_be = self._is_named and len(self._raw) < _MAX_NAMED_HEAD
        return can_be and _NAMED_CHARACTER.match(character) is not None

    def _begin_object(self) -> bool:
        """See whether the arguments begin here; return whether this can still be a call."""
        if self._depth > 1 or self._arguments_at >= 0:
            return True
        if self._depth == 0:
            before = self.raw
            self._is_named = self._is_named and bool(before.strip())
            if not self._is_named:
                return True
        head = (_NAMED_HEAD if self._is_named else _HEAD).fullmatch(self.raw)
        if head is None:
            return not self._is_named  # the keys of an object may have another order
        name = head[1] if self._is_named else _loads(head[1])
        if not isinstance(name, str) or not self._is_known(name):
            return False
        self.name = name
        self._arguments_at = len(self._raw)
        return True

    def _end_object(self) -> None:
        """See what ends here: the arguments, the call, or nothing."""
        if self._arguments_at >= 0 and self._arguments_end < 0 and self._depth == (0 if self._is_named else 1):
            self._arguments_end = len(self._raw)
        if self._depth:
            return
        text = self.raw if not self._is_named else "".join(self._raw[self._arguments_at :])
        value = _loads(text)
        self.state = CallState.FAILED
        if isinstance(value, dict) and (self.name or self._read_keys(value)):
            self.state = CallState.DONE

    def _read_keys(self, value: dict[str, object]) -> bool:
        """Find name and arguments of a call that has another shape than `_HEAD`; return whether it is one."""
        inner = value.get("function")
        call = inner if isinstance(inner, dict) else value
        name = call.get("name", inner)
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):  # as in OpenAI's API
            arguments = _loads(arguments)
        if not (isinstance(name, str) and isinstance(arguments, dict) and self._is_known(name)):
            return False
        self.name = name
        self._arguments = json.dumps(arguments, ensure_ascii=False)
        return True

    def _is_known(self, name: str) -> bool:
        return bool(name) if self._known is None else name in self._known


def _loads(text: str) -> object:
    """Return the value of a JSON text, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
