"""Turns output tokens into text as they come.

The text that is out after k tokens depends on those k tokens only, not on how they arrived, and
never ends inside a character. All texts of an output, `finish` included, concatenate to what the
tokenizer would decode at once.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from typing import Protocol

from tokenizers import Tokenizer

from octavo.services.vocabulary.token_bytes import to_bytes_of

_REPLACEMENT = "\ufffd"
_PRIMING_TOKENS = 6  # of the prompt, before the output: enough to decide about a leading blank
_MAX_HELD_TOKENS = 8  # a character has four bytes; longer runs are no text, and are not waited for


class Detokenizer(Protocol):
    """The text of one output."""

    def push(self, token_id: int) -> str:
        """Take the next token; return the text it settles, often that of earlier tokens, or ""."""

    def finish(self) -> str:
        """Return the text of what is still held: U+FFFD for a character that was never completed."""


class DetokenizerFactory:
    """Makes the detokenizers of one model. Token texts are computed once, on first use."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        decoder = tokenizer.decoder
        to_bytes = None if decoder is None else to_bytes_of(json.loads(decoder.__getstate__()))  # as in tokenizer.json
        self._table = None if to_bytes is None else _TokenTable(tokenizer, to_bytes)

    def new(self, prompt_token_ids: Sequence[int]) -> Detokenizer:
        """Return the detokenizer of an output that follows this prompt."""
        if self._table is not None:
            return _ByteDetokenizer(self._table)
        return _WindowDetokenizer(self._tokenizer, prompt_token_ids[-_PRIMING_TOKENS:])

    def token_bytes(self, token_id: int) -> bytes:
        """Return the text of one token by itself, which may be part of a character; a special token's is its name."""
        if self._table is not None:
            data, _ = self._table.entries.get(token_id) or self._table.load(token_id)
            return data or (self._tokenizer.id_to_token(token_id) or "").encode()
        return self._tokenizer.decode([token_id], skip_special_tokens=False).encode()

    @property
    def has_token_bytes(self) -> bool:
        """Whether the bytes of an output are those of its tokens, one after the other."""
        return self._table is not None

    def special_token_ids(self) -> list[int]:
        """Return the tokens that are no text."""
        return sorted(index for index, token in self._tokenizer.get_added_tokens_decoder().items() if token.special)


class _TokenTable:
    """The bytes of each token, and its text where the bytes are whole characters."""

    def __init__(self, tokenizer: Tokenizer, to_bytes: Callable[[str], bytes]) -> None:
        self.entries: dict[int, tuple[bytes, str | None]] = {}
        self._tokenizer = tokenizer
        self._to_bytes = to_bytes
        self._special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    def load(self, token_id: int) -> tuple[bytes, str | None]:
        """Compute and keep the entry of a token; special and unknown tokens have no text."""
        token = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        data = b"" if token is None else self._to_bytes(token)
        try:
            entry: tuple[bytes, str | None] = (data, data.decode())
        except UnicodeDecodeError:
            entry = (data, None)
        self.entries[token_id] = entry
        return entry


class _ByteDetokenizer:
    """For tokenizers whose tokens stand for bytes: the output is those bytes, decoded as they come."""

    __slots__ = ("_decode", "_holds", "_table")

    def __init__(self, table: _TokenTable) -> None:
        self._table = table
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._holds = False

    def push(self, token_id: int) -> str:
        data, text = self._table.entries.get(token_id) or self._table.load(token_id)
        if text is not None and not self._holds:
            return text
        if not data:
            return ""
        # The decoder may hold bytes from here on, until a token made of whole characters follows:
        # that one completes or breaks whatever is held.
        released = self._decode(data)
        self._holds = text is None
        return released

    def finish(self) -> str:
        self._holds = False
        return self._decode(b"", True)


class _WindowDetokenizer:
    """For all other tokenizers: decodes a short window of tokens with and without the new ones."""

    __slots__ = ("_ids", "_read", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, priming: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(priming)
        self._read = len(self._ids)  # tokens of the window whose text is out

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        known, text = self._texts()
        held = len(self._ids) - self._read
        if len(text) <= len(known) or (text.endswith(_REPLACEMENT) and held < _MAX_HELD_TOKENS):
            return ""
        del self._ids[: self._read]  # the tokens just settled are the next window's context
        self._read = len(self._ids)
        return text[len(known) :]

    def finish(self) -> str:
        known, text = self._texts()
        self._read = len(self._ids)
        return text[len(known) :]

    def _texts(self) -> tuple[str, str]:
        decode = self._tokenizer.decode
        return decode(self._ids[: self._read], skip_special_tokens=True), decode(self._ids, skip_special_tokens=True)
