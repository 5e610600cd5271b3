"""Takes apart an output that is made of messages in channels, as gpt-oss writes it (the format "harmony").

A message is a header, `<|message|>`, and a body that ends with `<|end|>`, `<|call|>` or `<|return|>`. The header names
the channel and whom the message is for: `<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json`.
The first header begins in the prompt. Source: OpenAI's harmony response format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from octavo.services.gateway.output.formats import has_channels
from octavo.services.gateway.output.parser import OutputParser, ParserSettings, Section
from octavo.services.gateway.output.stop_matcher import StopMatcher, StopStrings
from octavo.services.gateway.output.tool_call_reader import CallState, ToolCallReader

_HEADER_END = StopStrings(["<|message|>"])
_BODY_END = StopStrings(["<|end|>", "<|call|>", "<|return|>", "<|start|>"])
_HEADER_BEGINS = ("<|channel|>", "<|start|>", "to=")
_ANALYSIS = re.compile(r"<\|channel\|>\s*analysis\b")
_RECIPIENT = re.compile(r"\bto=([\w.-]+)")
_FUNCTIONS = "functions."
_READERS = frozenset({"", "assistant", "user", "all"})
_CUT_OFF = ("<|channel|>", "<|start|>", f"to={_FUNCTIONS}")
_MAX_HEADER = 512
_BETWEEN_MESSAGES = "\n\n"


class ChannelParser(OutputParser):
    """The parser of one candidate.

    A message to a function is a call, whatever its channel. One to another tool, or in the channel analysis, is
    reasoning. All others are text.
    """

    def __init__(self, settings: ParserSettings, make_id: Callable[[int], str]) -> None:
        super().__init__(settings, make_id)
        self._body: list[str] = []  # of a call, in pieces: text, if it turns out to be none
        self._begun: set[bool] = set()  # whether reasoning, and whether text, has begun
        if self.in_reasoning:
            self._begin_body(Section.REASONING)

    def push(self, text: str) -> None:
        """Take the next piece of text."""
        while text and not self.is_complete:
            if self._section is Section.START:
                text = self._read_first(text)
            elif self._matcher is None:  # no message: there was no header
                self._add(text)
                return
            elif self._section is Section.HEADER:
                text = self._read_header(text, self._matcher)
            else:
                text = self._read_body(text, self._matcher)

    def finish(self) -> None:
        """Take the end of the output. What was held back is text, unless it is a header that was cut off."""
        if self._section is Section.HEADER:
            if not any(each in self._held for each in _CUT_OFF) and self._matcher is not None:
                self._section = Section.TEXT
                self._add(self._held + self._matcher.finish())
        elif self._matcher is not None:
            self._take_body(self._matcher.finish())
            self._end_body()
        else:
            self._add(self._held)
        if self._section in (Section.START, Section.TEXT) and not self._is_section_new:
            self._text.append(self._blank)
        self._held = self._blank = ""

    def _read_first(self, text: str) -> str:
        """See whether the output goes on with a header: what a constraint made of it does not."""
        text = self._held + text
        begin = text.lstrip()
        self._held = ""
        if begin.startswith(_HEADER_BEGINS):
            self._begin_header()
        elif any(each.startswith(begin) for each in _HEADER_BEGINS):
            self._held = text
            return ""
        else:
            self._section = Section.TEXT
        return text

    def _begin_header(self) -> None:
        self._matcher = StopMatcher(_HEADER_END)
        self._section = Section.HEADER

    def _read_header(self, text: str, matcher: StopMatcher) -> str:
        self._held += matcher.push(text, True, False)
        if matcher.matched is None and len(self._held) <= _MAX_HEADER:
            return ""
        header, self._held = self._held, ""
        if matcher.matched is None:
            self._begin_body(Section.TEXT)
            return header + matcher.finish()
        to = _RECIPIENT.search(header)
        recipient = "" if to is None else to[1]
        name = recipient.removeprefix(_FUNCTIONS)  # which the model leaves out now and then
        is_function = name != recipient or name in self._settings.tool_names
        if name and is_function and self._settings.tool_calls is not None:
            self._begin_body(Section.CALL)
            self._reader = ToolCallReader(None, may_be_named=False)
            self._reader.push(f'{{"name": {json.dumps(name)}, "arguments": ')
            self._is_announced = False
        elif self._settings.reasoning is not None and (recipient not in _READERS or _ANALYSIS.search(header)):
            self._begin_body(Section.REASONING)
        else:
            self._begin_body(Section.TEXT)
        return matcher.rest

    def _begin_body(self, section: Section) -> None:
        self._matcher = StopMatcher(_BODY_END)
        self._section = section
        self._is_section_new = True
        self._body = []
        self._blank = _BETWEEN_MESSAGES if self.in_reasoning in self._begun else ""

    def _read_body(self, text: str, matcher: StopMatcher) -> str:
        self._take_body(matcher.push(text, True, False))
        if matcher.matched is None:
            return ""
        self._end_body()
        self._begin_header()
        return matcher.rest if matcher.matched != "<|start|>" else matcher.matched + matcher.rest

    def _take_body(self, text: str) -> None:
        """Take a piece of what a message says."""
        if self._reader is not None:
            self._body.append(text)
            taken = self._reader.push(text)
            if self._reader.has_arguments:
                self._reader.push("}")
            self._settle_call(self._reader, text[taken:])
        elif self._section is not Section.CALL and text:
            self._add(text)
            if not self._is_section_new:
                self._begun.add(self.in_reasoning)

    def _settle_call(self, reader: ToolCallReader, rest: str) -> None:
        """Send what is known of a call. What turns out to be none is text."""
        is_sent = bool(reader.name) and not self._settings.whole_tool_calls
        is_done = reader.state is CallState.DONE
        if is_done or is_sent:
            self._send(reader)
        if is_done:
            self._reader = None  # blanks may follow, and nothing else counts
            self.num_calls += 1
            self.is_complete = self._settings.single_tool_call
        elif reader.state is CallState.FAILED:
            self._reader = None
            self._section = Section.TEXT
            self._take_body(rest if self._is_announced else "".join(self._body))

    def _end_body(self) -> None:
        """Take the end of a message. Of a call that was cut off nothing more comes."""
        if self._reader is not None and not self._is_announced:
            self._section = Section.TEXT
            self._reader = None
            self._take_body("".join(self._body))
        self._reader = None
        if self._section is not Section.TEXT:
            self._blank = ""


def new_parser(settings: ParserSettings, make_id: Callable[[int], str]) -> OutputParser:
    """Return the parser of a candidate; `make_id` returns the id of a call by its index."""
    kind = ChannelParser if has_channels(settings.tool_calls, settings.reasoning) else OutputParser
    return kind(settings, make_id)
