"""Takes the reasoning and the calls of tools out of a candidate's text, as it comes.

What is out after some characters depends on those characters only, not on how they came. Nothing is lost but blanks
between the sections: what turns out to be no call is text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from octavo.inference.v1 import generation_pb2
from octavo.services.gateway.output.formats import ReasoningFormat, ToolCallFormat
from octavo.services.gateway.output.stop_matcher import StopMatcher, StopStrings
from octavo.services.gateway.output.tool_call_reader import CallState, ToolCallReader


class OutputPiece(NamedTuple):
    """New output of a candidate."""

    text: str
    reasoning: str = ""
    tool_calls: tuple[generation_pb2.ToolCall, ...] = ()

    def followed_by(self, other: OutputPiece) -> OutputPiece:
        """Return both in one."""
        return OutputPiece(self.text + other.text, self.reasoning + other.reasoning, self.tool_calls + other.tool_calls)


NOTHING = OutputPiece("")


@dataclass(frozen=True)
class ParserSettings:
    """What the candidates of a request share."""

    tool_calls: ToolCallFormat | None
    reasoning: ReasoningFormat | None
    tool_names: frozenset[str]
    single_tool_call: bool
    whole_tool_calls: bool
    starts_in_reasoning: bool
    call_begin: StopStrings | None = field(init=False)
    reasoning_end: StopStrings | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "call_begin", None if self.tool_calls is None else StopStrings([self.tool_calls.begin])
        )
        object.__setattr__(self, "reasoning_end", None if self.reasoning is None else StopStrings([self.reasoning.end]))


class Section(Enum):
    """What is being read."""

    START = auto()
    HEADER = auto()
    REASONING = auto()
    TEXT = auto()
    CALL = auto()
    AFTER_CALL = auto()


class OutputParser:
    """The parser of one candidate. Each `_read_...` takes a text and returns what is left of it for the next one."""

    def __init__(self, settings: ParserSettings, make_id: Callable[[int], str]) -> None:
        """`make_id` returns the id of a call by its index."""
        self._settings = settings
        self._make_id = make_id
        self._matcher: StopMatcher | None = None
        self._reader: ToolCallReader | None = None
        self._held = ""  # read, but not yet known what it is
        self._blank = ""  # at the end of the section so far: left out if no text follows
        self._is_section_new = False  # blanks at its start are left out
        self._in_list = False
        self._is_announced = False
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[generation_pb2.ToolCall] = []
        self._section = Section.START
        self.num_calls = 0
        """Calls that are complete, and correct."""
        self._num_begun = 0
        self.is_complete = False
        """Nothing may follow: the one call that may be is there."""
        if settings.starts_in_reasoning and settings.reasoning is not None:
            self._begin_reasoning()

    @property
    def in_reasoning(self) -> bool:
        """The reasoning section has begun and has not ended."""
        return self._section is Section.REASONING

    def push(self, text: str) -> None:
        """Take the next piece of text."""
        while text:
            match self._section:
                case Section.START:
                    text = self._read_start(text)
                case Section.REASONING:
                    text = self._read_reasoning(text)
                case Section.TEXT:
                    text = self._read_text(text)
                case Section.CALL:
                    text = self._read_call(text)
                case Section.AFTER_CALL:
                    text = self._read_after_call(text)

    def finish(self) -> None:
        """Take the end of the output: nothing is held back any more."""
        if self._matcher is not None:
            self._add(self._matcher.finish())
        if self._reader is not None and not self._is_announced:
            self._section = Section.TEXT
            self._add(self._held + self._reader.raw)
        elif self._reader is None and (self._held.strip() or self._section is Section.START):
            self._add(self._held)
        if self._section in (Section.START, Section.TEXT) and not self._is_section_new:
            self._text.append(self._blank)
        self._held = self._blank = ""

    def take(self) -> OutputPiece:
        """Return what is new since the last time."""
        piece = OutputPiece("".join(self._text), "".join(self._reasoning), tuple(self._calls))
        self._text.clear()
        self._reasoning.clear()
        self._calls.clear()
        return piece

    def _add(self, text: str) -> None:
        """Add text to the section of now."""
        if self._is_section_new:
            text = text.lstrip()
            self._is_section_new = not text
        text = self._blank + text
        kept = text.rstrip()
        self._blank = text[len(kept) :]
        if kept:
            (self._reasoning if self.in_reasoning else self._text).append(kept)

    def _read_start(self, text: str) -> str:
        """See whether the output begins with the reasoning section, or with a call without a mark."""
        text = self._held + text
        begin = text.lstrip()
        self._held = ""
        reasoning = self._settings.reasoning
        if reasoning is not None and not self._is_section_new:
            if begin.startswith(reasoning.begin):
                self._begin_reasoning()
                return begin[len(reasoning.begin) :]
            if reasoning.begin.startswith(begin):
                self._held = text
                return ""
        if not begin:
            self._held = text
            return ""
        calls = self._settings.tool_calls
        if calls is not None and calls.is_bare and (begin[0] == "{" or (begin[0] == "[" and calls.is_list)):
            self._begin_call(text[: -len(begin)])
            return begin
        self._begin_text()
        return text

    def _begin_reasoning(self) -> None:
        assert self._settings.reasoning_end is not None, "no reasoning format"
        self._matcher = StopMatcher(self._settings.reasoning_end)
        self._is_section_new = True
        self._section = Section.REASONING

    def _read_reasoning(self, text: str) -> str:
        matcher = self._matcher
        assert matcher is not None, "in the reasoning section without its end"
        self._add(matcher.push(text, True, False))
        if matcher.matched is None:
            return ""
        self._matcher = None
        self._blank = ""
        self._is_section_new = True
        self._section = Section.START
        return matcher.rest

    def _begin_text(self) -> None:
        begin = self._settings.call_begin
        self._matcher = None if begin is None else StopMatcher(begin)
        self._reader = None
        self._in_list = False
        self._section = Section.TEXT

    def _read_text(self, text: str) -> str:
        matcher = self._matcher
        if matcher is None:
            self._add(text)
            return ""
        self._add(matcher.push(text, True, False))
        if matcher.matched is None:
            return ""
        self._begin_call(matcher.matched)
        return matcher.rest

    def _begin_call(self, before: str) -> None:
        """Expect a call; `before` is what was read of it, which is text if none comes."""
        calls = self._settings.tool_calls
        assert calls is not None, "a call without a format"
        self._held = before
        self._matcher = None
        must_be_known = calls.only_known or (calls.is_bare and not before.strip())
        known = self._settings.tool_names if must_be_known else None
        self._reader = ToolCallReader(known, calls.is_named and not self._in_list)
        self._is_announced = False
        self._section = Section.CALL

    def _read_call(self, text: str) -> str:
        reader, calls = self._reader, self._settings.tool_calls
        assert reader is not None, "no call is read"
        assert calls is not None, "a call without a format"
        if calls.is_list and not self._in_list and reader.is_blank:
            before = text[: len(text) - len(text.lstrip())]
            if text[len(before) :].startswith("["):
                self._in_list = True
                self._begin_call(self._held + reader.raw + before + "[")
                return text[len(before) + 1 :]
        taken = reader.push(text)
        rest = text[taken:]
        # Once the arguments have begun it is a call that is sent as it comes, whatever becomes of it.
        is_sent = bool(reader.name) and not self._settings.whole_tool_calls
        if reader.state is CallState.FAILED and not is_sent:
            again = reader.raw + rest
            held, self._held = self._held, ""
            self._begin_text()
            self._add(held)
            return again
        if is_sent or reader.state is CallState.DONE:
            self._send(reader)
        if reader.state is CallState.READING:
            return ""
        self._reader = None
        self._held = ""
        self._is_section_new = True
        if reader.state is CallState.FAILED:
            self._begin_text()
            return rest
        self.num_calls += 1
        if self._settings.single_tool_call:
            self.is_complete = True
            return ""
        self._section = Section.AFTER_CALL
        return rest

    def _send(self, reader: ToolCallReader) -> None:
        """Send what is new of a call."""
        arguments = reader.take_arguments()
        if self._is_announced:
            if self._calls and self._calls[-1].index == self._num_begun - 1:
                self._calls[-1].arguments_json += arguments
            elif arguments:
                self._calls.append(generation_pb2.ToolCall(index=self._num_begun - 1, arguments_json=arguments))
            return
        self._is_announced = True
        index = self._num_begun
        self._num_begun += 1
        call = generation_pb2.ToolCall(index=index, id=self._make_id(index), name=reader.name, arguments_json=arguments)
        self._calls.append(call)

    def _read_after_call(self, text: str) -> str:
        """See what follows a call: its end mark, another call without a mark of its own, or anything else."""
        calls = self._settings.tool_calls
        assert calls is not None, "a call without a format"
        text = self._held + text
        begin = text.lstrip()
        self._held = ""
        if not begin or (len(begin) < len(calls.end) and calls.end.startswith(begin)):
            self._held = text
            return ""
        if self._in_list and begin[0] in ",]":
            if begin[0] == ",":
                self._begin_call(",")
            else:
                self._in_list = False
            return begin[1:]
        if calls.separator and begin[0] == calls.separator:
            self._begin_call(calls.separator)
            return begin[1:]
        self._begin_text()
        return begin.removeprefix(calls.end) if calls.end else begin
