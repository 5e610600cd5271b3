"""Texts, and pairs of texts, to the tokens that a vector is made of: cut to what the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Encoding, Tokenizer, normalizers

MAX_LIMITS = 4  # lengths that tokenizers are kept for: that of the workers may change


@dataclass(frozen=True, slots=True)
class EncodedInput:
    """One input.

    second_segment_start  where the second text of a pair starts; 0 if there is one text, or nothing tells them apart
    is_truncated          tokens were left out
    """

    token_ids: Sequence[int]
    second_segment_start: int = 0
    is_truncated: bool = False


class InputEncoder:
    """Encodes with a tokenizer of its own for each length, which is never changed while a thread uses it."""

    def __init__(self, definition: bytes, lower_case: bool = False) -> None:
        """`definition`: tokenizer.json; lower_case: texts are put in lower case first."""
        self._definition = definition
        self._lower_case = lower_case
        self._by_limit: dict[int, Tokenizer] = {}

    def knows(self, limit: int) -> bool:
        """Return whether the tokenizer for a length is there, so that short texts take no time."""
        return limit in self._by_limit

    def encode(self, inputs: Sequence[str | tuple[str, str]], limit: int) -> list[EncodedInput]:
        """Return the tokens of texts or pairs, special tokens included, at most `limit` of each."""
        encodings = self._tokenizer(limit).encode_batch(list(inputs))
        return [EncodedInput(each.ids, _second_segment_start(each), bool(each.overflowing)) for each in encodings]

    def _tokenizer(self, limit: int) -> Tokenizer:
        tokenizer = self._by_limit.get(limit)
        if tokenizer is None:
            tokenizer = Tokenizer.from_buffer(self._definition)
            if self._lower_case:
                given = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
                tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *given])
            tokenizer.no_padding()
            tokenizer.enable_truncation(limit)
            if len(self._by_limit) >= MAX_LIMITS:
                self._by_limit.pop(next(iter(self._by_limit)))
            self._by_limit[limit] = tokenizer
        return tokenizer


def _second_segment_start(encoding: Encoding) -> int:
    return encoding.type_ids.index(1) if 1 in encoding.type_ids else 0
