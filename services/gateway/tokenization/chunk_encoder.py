"""Encodes a text chunk by chunk, and remembers what became of recent chunks: prompts often begin alike.

A text is cut only between a letter and the space before the next word, and only for tokenizers that let no token
reach across such a place and look at nothing behind it. Then the tokens of the chunks, one after the other, are those
of the text. Such are the byte-level ones whose rules for cutting words are known here: GPT-2's and its successors'.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from octavo.services.gateway.tokenization.gguf_tokenizer import WORD_PATTERNS

CHUNK_CHARS: Final = 512  # of a chunk, at least
MAX_REMEMBERED_CHARS: Final = CHUNK_CHARS + 128  # of a chunk; most English ones are shorter
_MAX_CHUNKS: Final = 4096  # 5 MiB of English, at most 50 of what takes four tokens a character
_CUT: Final = re.compile("[A-Za-z](?= [A-Za-z])")
_SEARCH_CHARS: Final = 1 << 18
_SLICE_CHARS: Final = 1 << 15  # of what is only counted: a character may be four tokens, and one takes 300 bytes
_BORDER_TOKENS: Final = 1024  # far more than a cut between two slices may add


class TooManyTokensError(Exception):
    """A text has more tokens than may be: at least `count`."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.count = count


class ChunkEncoder:
    """Encodes texts with a tokenizer; any thread may."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        around = _added_around(tokenizer) if cuts_at_words(tokenizer) else None
        self._cuts = around is not None
        self._before, self._after = around or ([], [])
        self._remembered = lru_cache(_MAX_CHUNKS)(self._encode_in_scope)

    def encode(self, text: str, add_special_tokens: bool, scope: str, limit: int | None = None) -> list[int]:
        """Return the token ids of a text. What is remembered serves texts of the same `scope` only.

        Raises TooManyTokensError if there are more than `limit`, as soon as that is known.
        """
        if not self._cuts or len(text) <= CHUNK_CHARS:
            return self._encode(text, add_special_tokens, limit)
        token_ids = list(self._before) if add_special_tokens else []
        count = len(token_ids) + (len(self._after) if add_special_tokens else 0)
        *chunks, last = chunks_of(text)
        for chunk in [*chunks, last]:
            is_long = chunk is last or len(chunk) > MAX_REMEMBERED_CHARS
            try:
                new = self._encode(chunk, False, limit) if is_long else self._remembered(scope, chunk)
            except TooManyTokensError as error:
                raise TooManyTokensError(count + error.count) from None
            count += len(new)
            token_ids.extend(new)
            if limit is not None and count > limit:
                raise TooManyTokensError(count)
        if add_special_tokens:
            token_ids.extend(self._after)
        return token_ids

    def _encode_in_scope(self, scope: str, chunk: str) -> array[int]:  # noqa: ARG002
        return array("I", self._encode(chunk, False))

    def _encode(self, text: str, add_special_tokens: bool, limit: int | None = None) -> list[int]:
        if limit is not None and len(text) > max(limit, _SLICE_CHARS):
            self._refuse_long(text, limit)
        # A batch lets go of the GIL, and need not know where its tokens stand in the text: a fifth of the time.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        if limit is not None and len(encoding) > limit:
            raise TooManyTokensError(len(encoding))
        return encoding.ids

    def _refuse_long(self, text: str, limit: int) -> None:
        """Raise TooManyTokensError for a text far beyond a limit, the tokens of which there is no memory for."""
        count = 0
        for start in range(0, len(text), _SLICE_CHARS):
            piece = text[start : start + _SLICE_CHARS]
            (encoding,) = self._tokenizer.encode_batch_fast([piece], add_special_tokens=False)
            count += max(0, len(encoding) - _BORDER_TOKENS)
            if count > limit:
                raise TooManyTokensError(count)


def chunks_of(text: str) -> Iterator[str]:
    """Cut a text. Texts that begin alike have the chunks in common that end before they differ."""
    start = 0
    while end := _next_cut(text, start + CHUNK_CHARS - 1):
        yield text[start:end]
        start = end
    yield text[start:]


def _next_cut(text: str, start: int) -> int:
    """Return where a text is cut first from a place on; 0 if nowhere. No search takes long: it holds the GIL."""
    for at in range(start, len(text), _SEARCH_CHARS):
        if cut := _CUT.search(text, at, at + _SEARCH_CHARS + 2):  # what follows a letter decides, and is two long
            return cut.end()
    return 0


def cuts_at_words(tokenizer: Tokenizer) -> bool:
    """Return whether a text's tokens are those of its chunks."""
    model, normalizer = tokenizer.model, _state(tokenizer.normalizer)
    return (
        isinstance(model, BPE)
        and not model.dropout
        and (normalizer is None or normalizer["type"] == "NFC")
        and _pre_tokenizer_cuts(_state(tokenizer.pre_tokenizer))
        and not any(map(_reaches_across, tokenizer.get_added_tokens_decoder().values()))
    )


def _state(part: Any) -> dict[str, Any] | None:
    """Return a part of a tokenizer as tokenizer.json describes it."""
    state: dict[str, Any] | None = None if part is None else json.loads(part.__getstate__())
    return state


def _pre_tokenizer_cuts(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Return whether one step of a pre-tokenizer cuts at words, and all others look at what lies between cuts only."""
    if pre_tokenizer is None:
        return False
    is_sequence = pre_tokenizer["type"] == "Sequence"
    steps = pre_tokenizer["pretokenizers"] if is_sequence else [pre_tokenizer]
    kinds = {_kind(step) for step in steps}
    return "words" in kinds and None not in kinds


def _kind(step: dict[str, Any]) -> str | None:
    if step["type"] == "ByteLevel":
        return "words" if step.get("use_regex", True) else "bytes"
    if step["type"] == "Digits":
        return "digits"
    is_known = step["type"] == "Split" and step["pattern"].get("Regex") in WORD_PATTERNS
    return "words" if is_known and step["behavior"] == "Isolated" and not step["invert"] else None


def _reaches_across(added: AddedToken) -> bool:
    """Return whether an added token may begin before a cut and end behind it."""
    takes_next_space = added.rstrip and re.search("[A-Za-z]$", added.content)
    return bool(takes_next_space or re.search("[A-Za-z] ", added.content))


def _added_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]] | None:
    """Return the special tokens that are put before a text and after it; None if that is not what is done."""
    alone = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(alone) + 1):
        if alone and whole[start : start + len(alone)] == alone:
            return whole[:start], whole[start + len(alone) :]
    return None
