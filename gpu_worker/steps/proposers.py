"""What may come next in a sequence: proposals, each token of a kind that is right so and so often.

`Repetition` takes what followed a sequence's last tokens where they stood before (prompt lookup decoding, Saxena);
`Forced` what its grammar leaves little choice of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

import numpy as np

from octavo.gpu_worker.ops import Int32Array, StepInput
from octavo.gpu_worker.protocol import BLOCK_SIZE, FIRST_NO_TOKEN
from octavo.gpu_worker.sampling.grammars import Automaton

MOST_MATCHED: Final = 16  # equal tokens before a draft that are told apart


class Proposal(NamedTuple):
    """Draft tokens of a sequence, and the kind of each."""

    token_ids: list[int]
    kinds: list[int]


class Proposer(Protocol):
    """Guesses what comes next.

    name              in metrics
    priors            how often a token of each kind is thought to be right, if those before it are
    keeps_to_grammar  whether a sequence's grammar allows whatever it proposes
    """

    name: str
    priors: tuple[float, ...]
    keeps_to_grammar: bool

    def propose(self, slot: int, position: int, token_id: int, block_table: Int32Array, most: int) -> Proposal | None:
        """Return what may follow `token_id`, which stands at `position`; None if nothing is likely to."""

    def forget(self, slot: int) -> None:
        """Forget what is known of a slot."""

    def follow(self, slot: int, position: int, token_ids: list[int]) -> None:
        """Take the tokens that were drawn, the first of them for `position`."""


class Repetition:
    """Proposes what followed the last tokens where they stood before."""

    name = "repetition"
    keeps_to_grammar = False
    priors: tuple[float, ...] = (0.0, 0.2, 0.5, 0.65, 0.75, 0.75, 0.8, *[0.85] * (MOST_MATCHED - 6))  # by equal tokens

    def __init__(self, num_blocks: int) -> None:
        # The tokens whose keys and values are in the cache, where those are.
        self._cached_token_ids = np.zeros((num_blocks, BLOCK_SIZE), np.int32)
        self._texts: dict[int, Text] = {}

    def copy_blocks(self, pairs: Int32Array) -> None:
        """Copy blocks, [P, 2] (from, to)."""
        self._cached_token_ids[pairs[:, 1]] = self._cached_token_ids[pairs[:, 0]]

    def computed(self, batch: StepInput) -> None:
        """Remember the tokens of a step, where their keys and values are now."""
        self._cached_token_ids.reshape(-1)[batch.slot_mapping] = batch.token_ids

    def propose(self, slot: int, position: int, token_id: int, block_table: Int32Array, most: int) -> Proposal | None:
        """See `Proposer`; so are the others."""
        text = self._text(slot, position, token_id, block_table)
        if not text.match:
            return None
        return Proposal(text.draft(most), [min(text.match + i, MOST_MATCHED) for i in range(most)])

    def forget(self, slot: int) -> None:
        """Forget the text."""
        self._texts.pop(slot, None)

    def follow(self, slot: int, position: int, token_ids: list[int]) -> None:
        """Extend the text, if it is kept."""
        text = self._texts.get(slot)
        if text is not None:
            if len(text) == position and token_ids[-1] < FIRST_NO_TOKEN:
                text.extend(token_ids)
            else:
                del self._texts[slot]

    def _text(self, slot: int, position: int, token_id: int, block_table: Int32Array) -> Text:
        """Return the text of a slot up to `token_id`, which stands at `position`."""
        text = self._texts.get(slot)
        if text is None or len(text) != position + 1 or text.last != token_id:
            blocks = block_table[: -(-position // BLOCK_SIZE)]
            before = self._cached_token_ids[blocks].reshape(-1)[:position]
            text = self._texts[slot] = Text([*before.tolist(), token_id])
        return text


class Forced:
    """Proposes what a grammar forces, or nearly so. What it knows is the automaton's."""

    name = "grammar"
    keeps_to_grammar = True
    priors: tuple[float, ...] = (0.9, 0.75, 0.5)  # by `forced.FORCED`, `CHOSEN`, `LAST`

    def __init__(self, automaton_of: Callable[[int], Automaton | None]) -> None:
        self._automaton_of = automaton_of

    def propose(self, slot: int, position: int, token_id: int, block_table: Int32Array, most: int) -> Proposal | None:
        """See `Proposer`; so are the others."""
        del position, token_id, block_table
        automaton = self._automaton_of(slot)
        guess = None if automaton is None else automaton.propose(most)
        return None if guess is None else Proposal(guess.token_ids, guess.kinds)

    def forget(self, slot: int) -> None:
        """Nothing is kept."""

    def follow(self, slot: int, position: int, token_ids: list[int]) -> None:
        """The automaton is told of every token."""


class Text:
    """A sequence's tokens, and where what followed each of them, and each two, stood last.

    match  how many of the last tokens are equal to those before the draft, at most MOST_MATCHED; 0: there is no draft
    """

    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids = token_ids
        self._after_one = dict(zip(token_ids, range(1, len(token_ids)), strict=False))
        pairs = map(_pair, token_ids, token_ids[1:])
        self._after_two = dict(zip(pairs, range(2, len(token_ids)), strict=False))
        self._find()

    def __len__(self) -> int:
        return len(self._token_ids)

    @property
    def last(self) -> int:
        """Its last token."""
        return self._token_ids[-1]

    def extend(self, token_ids: list[int]) -> None:
        """Append tokens."""
        tokens = self._token_ids
        for token_id in token_ids:
            self._after_one[tokens[-1]] = len(tokens)
            if len(tokens) > 1:
                self._after_two[_pair(tokens[-2], tokens[-1])] = len(tokens)
            tokens.append(token_id)
        self._find()

    def draft(self, length: int) -> list[int]:
        """Return what followed the last two tokens where they stood last before, or else the last one.

        Where fewer followed than are wanted, the draft goes on as if they were repeated.
        """
        tokens, place = self._token_ids, self._place
        period = len(tokens) - place
        return [tokens[place + i % period] for i in range(length)]

    def _find(self) -> None:
        """Find where the draft begins."""
        tokens = self._token_ids
        place = self._after_two.get(_pair(tokens[-2], tokens[-1]), 0) if len(tokens) > 1 else 0
        match = 2
        if place:
            while match < min(MOST_MATCHED, place) and tokens[place - 1 - match] == tokens[-1 - match]:
                match += 1
        else:
            place = self._after_one.get(tokens[-1], 0)
            match = 1 if place else 0
        self._place, self.match = place, match


def _pair(first: int, second: int) -> int:
    """Return two token ids as one number: it takes less memory than a tuple, for each token of all that run."""
    return first << 32 | second
