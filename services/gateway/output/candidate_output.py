"""The text of one candidate: detokenizing, stop strings, reasoning and tool calls, and where the output ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from octavo.services.gateway.output.channels import new_parser
from octavo.services.gateway.output.parser import NOTHING, OutputPiece, ParserSettings
from octavo.services.gateway.output.stop_matcher import StopMatcher, StopStrings
from octavo.services.gateway.tokenization.detokenizer import Detokenizer


@dataclass(frozen=True, slots=True)
class OutputSettings:
    """What the candidates of a request share."""

    new_detokenizer: Callable[[], Detokenizer]
    stop_strings: StopStrings | None
    include_stop_sequence: bool
    min_new_tokens: int
    ending_token_ids: frozenset[int]
    """Tokens that end the output; their text is left out, unless `include_stop_sequence`."""
    omit_text: bool
    parser: ParserSettings | None = None
    """How reasoning and tool calls are taken out; None: not at all."""
    marks: Mapping[int, str] = field(default_factory=dict)
    """Special tokens that have text for the parser."""


class CandidateOutput:
    """Takes the tokens of one candidate, one run after the other. Its texts concatenate to the whole text.

    The text that is out after k tokens depends on those k tokens only.
    """

    __slots__ = ("_detokenizer", "_matcher", "_parser", "_settings", "num_reasoning_tokens", "num_tokens")

    def __init__(self, settings: OutputSettings, make_call_id: Callable[[int], str]) -> None:
        """`make_call_id` returns the id of a tool call by its index."""
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self._settings = settings
        self._matcher = None if settings.stop_strings is None else StopMatcher(settings.stop_strings)
        needs_text = self._matcher is not None or not settings.omit_text
        self._detokenizer = settings.new_detokenizer() if needs_text else None
        self._parser = None if settings.parser is None else new_parser(settings.parser, make_call_id)

    @property
    def matched(self) -> str | None:
        """The stop string that ended the output, if one did."""
        return None if self._matcher is None else self._matcher.matched

    @property
    def is_complete(self) -> bool:
        """Nothing can follow: a stop string ended the output, or a tool call, if one is all that may be."""
        return self.matched is not None or (self._parser is not None and self._parser.is_complete)

    @property
    def has_tool_calls(self) -> bool:
        """There is a complete tool call."""
        return self._parser is not None and self._parser.num_calls > 0

    def push(self, token_ids: Sequence[int]) -> tuple[OutputPiece, int]:
        """Take tokens; return what is settled now, and how many tokens belong to the output.

        That is all of them, unless it `is_complete` before the last.
        """
        detokenizer, matcher, settings, parser = self._detokenizer, self._matcher, self._settings, self._parser
        if detokenizer is None:
            self.num_tokens += len(token_ids)
            return NOTHING, len(token_ids)
        text = ""
        ends = False
        for taken, token_id in enumerate(token_ids, start=1):
            self.num_tokens += 1
            counts = self.num_tokens >= settings.min_new_tokens
            if token_id in settings.ending_token_ids and counts and not settings.include_stop_sequence:
                continue
            piece = settings.marks.get(token_id) or detokenizer.push(token_id)
            if matcher is not None and piece:
                piece = matcher.push(piece, counts, settings.include_stop_sequence)
                ends = matcher.matched is not None
            if parser is None:
                text += piece
            else:
                parser.push(piece)
                self.num_reasoning_tokens += parser.in_reasoning
                if ends:
                    parser.finish()
                ends = ends or parser.is_complete
            if ends:
                return self._settled(text), taken
        return self._settled(text), len(token_ids)

    def finish(self) -> OutputPiece:
        """Return what was still held back, when the output ended by itself."""
        if self._detokenizer is None or self.is_complete:
            return NOTHING
        tail = self._detokenizer.finish()
        if self._matcher is not None:
            # The tail is no complete character, so no stop string is looked for in it.
            tail = self._matcher.finish() + tail
        if self._parser is not None:
            self._parser.push(tail)
            self._parser.finish()
        return self._settled(tail)

    def _settled(self, text: str) -> OutputPiece:
        """Return new text as it is shown: `text` itself, unless the parser has taken it."""
        if self._parser is not None:
            return self._parser.take()
        return NOTHING if self._settings.omit_text else OutputPiece(text)
