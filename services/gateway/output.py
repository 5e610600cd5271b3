"""The text of one candidate: detokenizing, stop strings, and where the output ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from octavo.services.gateway.detokenizer import Detokenizer
from octavo.services.gateway.stop_matcher import StopMatcher, StopStrings


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


class CandidateOutput:
    """Takes the tokens of one candidate, one run after the other. Its texts concatenate to the whole text.

    The text that is out after k tokens depends on those k tokens only.
    """

    __slots__ = ("_detokenizer", "_matcher", "_settings", "num_tokens")

    def __init__(self, settings: OutputSettings) -> None:
        self.num_tokens = 0
        self._settings = settings
        self._matcher = None if settings.stop_strings is None else StopMatcher(settings.stop_strings)
        needs_text = self._matcher is not None or not settings.omit_text
        self._detokenizer = settings.new_detokenizer() if needs_text else None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the output, if one did."""
        return None if self._matcher is None else self._matcher.matched

    def push(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """Take tokens; return the text that is settled now, and how many tokens belong to the output.

        That is all of them, unless a stop string is complete before the last: then `matched` is set.
        """
        detokenizer, matcher, settings = self._detokenizer, self._matcher, self._settings
        if detokenizer is None:
            self.num_tokens += len(token_ids)
            return "", len(token_ids)
        text = ""
        for taken, token_id in enumerate(token_ids, start=1):
            self.num_tokens += 1
            counts = self.num_tokens >= settings.min_new_tokens
            if token_id in settings.ending_token_ids and counts and not settings.include_stop_sequence:
                continue
            piece = detokenizer.push(token_id)
            if matcher is not None and piece:
                piece = matcher.push(piece, counts, settings.include_stop_sequence)
                if matcher.matched is not None:
                    return self._shown(text + piece), taken
            text += piece
        return self._shown(text), len(token_ids)

    def finish(self) -> str:
        """Return the text that was still held back, when the output ended without a stop string."""
        if self._detokenizer is None or self.matched is not None:
            return ""
        tail = self._detokenizer.finish()
        if self._matcher is not None:
            # The tail is no complete character, so no stop string is looked for in it.
            tail = self._matcher.finish() + tail
        return self._shown(tail)

    def _shown(self, text: str) -> str:
        return "" if self._settings.omit_text else text
