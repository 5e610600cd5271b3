"""Texts, and pairs of texts, to the tokens that a vector is made of: cut to what the model reads."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Encoding, Tokenizer, normalizers

MAX_LIMITS = 4  # lengths that tokenizers are kept for: that of the workers may change
_CHARS_PER_TOKEN = 4  # of a text, so many are looked at first: mostly it has more than enough tokens by then
_MARGIN_CHARS = 1024  # far more than the end of a text can change of the tokens before it
_BATCH_CHARS = 1 << 18  # that are encoded together


@dataclass(frozen=True, slots=True)
class EncodedInput:
    """One input.

    second_segment_start  where the second text of a pair starts; 0 if there is one text, or nothing tells them apart
    is_truncated          tokens were left out
    """

    token_ids: Sequence[int]
    second_segment_start: int = 0
    is_truncated: bool = False


@dataclass(frozen=True, slots=True)
class PairTemplate:
    """What a model's chat template writes around a query and a document."""

    before: str
    between: str
    after: str
    is_document_first: bool = False

    def render(self, query: str, document: str) -> str:
        """Return a pair as the model reads it."""
        first, second = (document, query) if self.is_document_first else (query, document)
        return f"{self.before}{first}{self.between}{second}{self.after}"

    @classmethod
    def of(cls, rendered: str, query: str, document: str) -> PairTemplate | None:
        """Return the template that has rendered marks for the two; None if each is not in it once."""
        if rendered.count(query) != 1 or rendered.count(document) != 1:
            return None
        is_document_first = rendered.index(document) < rendered.index(query)
        first, second = (document, query) if is_document_first else (query, document)
        before, _, rest = rendered.partition(first)
        between, _, after = rest.partition(second)
        return cls(before, between, after, is_document_first)


class InputEncoder:
    """Encodes with a tokenizer of its own for each length, which is never changed while a thread uses it."""

    pair_template: PairTemplate | None = None
    """What pairs are written in; None: the tokenizer joins them."""

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
        if self.pair_template is not None and (pairs := [each for each in inputs if not isinstance(each, str)]):
            encoded_pairs = iter(self._encode_pairs(pairs, limit, self.pair_template))
            alone = [each for each in inputs if isinstance(each, str)]
            encoded_texts = iter(self.encode(alone, limit) if alone else ())
            return [next(encoded_texts if isinstance(each, str) else encoded_pairs) for each in inputs]
        tokenizer = self._tokenizer(limit)
        most = limit * _CHARS_PER_TOKEN + _MARGIN_CHARS
        encoded: list[EncodedInput] = []
        batch: list[str | tuple[str, str]] = []
        size = 0
        for each in inputs:
            texts = [_shortened(tokenizer, text, most) for text in ((each,) if isinstance(each, str) else each)]
            length = sum(map(len, texts))
            if batch and size + length > _BATCH_CHARS:
                encoded += map(_encoded, tokenizer.encode_batch_fast(batch))
                batch, size = [], 0
            batch.append(texts[0] if isinstance(each, str) else (texts[0], texts[1]))
            size += length
        return encoded + list(map(_encoded, tokenizer.encode_batch_fast(batch)))

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]], limit: int, template: PairTemplate) -> list[EncodedInput]:
        """Return the tokens of pairs in a template; the template's end, which asks for the answer, is never cut."""
        tokenizer = self._tokenizer(limit)
        most = limit * _CHARS_PER_TOKEN + _MARGIN_CHARS
        (end,) = tokenizer.encode_batch_fast([template.after], add_special_tokens=False)
        encoded: list[EncodedInput] = []
        batch: list[str] = []
        size = 0

        def flush() -> None:
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                ids, is_truncated = encoding.ids, bool(encoding.overflowing)
                if is_truncated:
                    ids = [*ids[: limit - len(end.ids)], *end.ids][-limit:]
                encoded.append(EncodedInput(array("I", ids), is_truncated=is_truncated))

        for query, document in pairs:
            text = template.render(_shortened(tokenizer, query, most), _shortened(tokenizer, document, most))
            if batch and size + len(text) > _BATCH_CHARS:
                flush()
                batch, size = [], 0
            batch.append(text)
            size += len(text)
        flush()
        return encoded

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


def _shortened(tokenizer: Tokenizer, text: str, most: int) -> str:
    """Return a text without the end of which no token is kept.

    What tokens are made of and then left out has its price: memory, and time with the GIL held.
    """
    while most < len(text):
        start = text[:most]
        if _encoded(*tokenizer.encode_batch_fast([start])).is_truncated:
            return start
        most *= 4
    return text


def _encoded(encoding: Encoding) -> EncodedInput:
    return EncodedInput(array("I", encoding.ids), _second_segment_start(encoding), bool(encoding.overflowing))


def _second_segment_start(encoding: Encoding) -> int:
    return encoding.type_ids.index(1) if 1 in encoding.type_ids else 0
