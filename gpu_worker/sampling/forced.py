"""Guesses the text that a grammar forces, or hardly leaves a choice of: braces, keys and what is between them.

Nothing is decided here: each token is still drawn among all that the grammar allows. A text can be put into tokens in
several ways, and between the parts of JSON there may be white space. So the longest tokens are guessed, and where two
or three bytes can follow, the one that followed there last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from octavo.gpu_worker.ops import UInt32Array

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

FORCED, CHOSEN, LAST = range(3)
"""Kinds of tokens that differ in how often they are right: wholly forced; with a choice; the last of a text."""

_BYTES_PER_TOKEN: Final = 6
_MOST_OPTIONS: Final = 3
_MOST_HABITS: Final = 1024  # then all are learned anew
_ASCII: Final = [chr(code) for code in range(32, 127)]

_Choice = tuple[bytes, bytes]  # the byte before it, and the bytes that it is between


class Guess(NamedTuple):
    """A text: its bytes, its tokens with their kinds, and the choices that were made, by place."""

    data: bytes
    token_ids: list[int]
    kinds: list[int]
    choices: dict[int, _Choice]


_NOTHING: Final = Guess(b"", [], [], {})


class ForcedTexts:
    """What is guessed of a vocabulary's texts, and what usually follows where there is a choice."""

    def __init__(self, tokenizer: LLTokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._num_words = vocab_size // 32 + 1
        found = [(ord(text), tokenizer.greedy_tokenize(text)) for text in _ASCII]
        alone = [(code, token_ids[0]) for code, token_ids in found if len(token_ids) == 1]
        self._codes = np.array([code for code, _ in alone], np.uint8)
        self._ids = np.array([token_id for _, token_id in alone], np.int64)
        self._habits: dict[_Choice, int] = {}

    def guess(self, matcher: LLMatcher, allowed: UInt32Array, before: bytes, most: int) -> Guess:
        """Return what comes next, up to `most` tokens; for any thread.

        matcher  is advanced, and goes back, unless it comes to a limit
        allowed  the tokens that it allows, as bits
        before   the last byte of the text so far; b"" if there is none
        """
        data, choices, words = bytearray(), {}, allowed
        num_taken = 0
        while len(data) < most * _BYTES_PER_TOKEN:
            forced = matcher.compute_ff_bytes()
            if forced:
                token_ids = self._tokens_of(forced)
            else:
                if data:
                    words = np.zeros(self._num_words, np.uint32)
                    matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
                choice = bytes(data[-1:]) or before, self._options(words)
                code = self._chosen(choice)
                if code < 0:
                    break
                choices[len(data)] = choice
                forced, token_ids = bytes([code]), [int(self._ids[self._codes == code][0])]
            taken = matcher.try_consume_tokens(token_ids)
            num_taken += taken
            if taken < max(len(token_ids), 1):
                break
            data += forced
        matcher.rollback(num_taken)
        return self._in_tokens(bytes(data), choices, most) if data else _NOTHING

    def leaves_little(self, allowed: UInt32Array) -> bool:
        """Tell whether `guess` may find anything: what is forced begins with one byte."""
        return len(self._options(allowed)) <= _MOST_OPTIONS

    def learn(self, guess: Guess, drawn: list[int]) -> None:
        """Learn from what was drawn after a guess what follows where there is a choice."""
        text = self._tokenizer.decode_bytes(drawn)
        place = next((i for i, (ours, its) in enumerate(zip(guess.data, text, strict=False)) if ours != its), -1)
        choice = guess.choices.get(place)
        if choice is not None and text[place] in choice[1]:
            if len(self._habits) >= _MOST_HABITS:
                self._habits.clear()
            self._habits[choice] = text[place]

    def last_byte(self, token_ids: list[int]) -> bytes:
        """Return the last byte of tokens."""
        return bytes(self._tokenizer.decode_bytes(token_ids)[-1:])

    def _in_tokens(self, data: bytes, choices: dict[int, _Choice], most: int) -> Guess:
        token_ids = self._tokens_of(data)
        kinds, start = [], 0
        for token_id in token_ids:
            end = start + len(self._tokenizer.decode_bytes([token_id]))
            kinds.append(
                LAST if end >= len(data) else CHOSEN if any(p in choices for p in range(start, end)) else FORCED
            )
            start = end
        return Guess(data, token_ids[:most], kinds[:most], choices)

    def _tokens_of(self, data: bytes) -> list[int]:
        return self._tokenizer.greedy_tokenize(data.decode("utf-8", "ignore"))

    def _options(self, words: UInt32Array) -> bytes:
        """Return the bytes of ASCII that may follow, ascending."""
        is_allowed = (words[self._ids // 32] >> (self._ids % 32).astype(np.uint32)) & 1
        return self._codes[is_allowed.astype(np.bool_)].tobytes()

    def _chosen(self, choice: _Choice) -> int:
        """Return the byte that is likely to follow, or -1."""
        before, options = choice
        if not 0 < len(options) <= _MOST_OPTIONS:
            return -1
        habit = self._habits.get(choice)
        if habit is not None:
            return habit
        if before in (b":", b",") and b" " in options:  # as JSON is mostly written
            return ord(" ")
        others = options.replace(b" ", b"")
        return others[0] if len(others) == 1 else -1
