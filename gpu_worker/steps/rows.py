"""The rows of a step: which slots it computes, and how many tokens of each. Steps of one batch share them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from octavo.gpu_worker.ops import Int32Array

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Rows:
    """S rows, T tokens. What follows from them is computed once and never written.

    slots          [S] slot of each row
    query_lengths  [S] tokens to compute, at least 1
    samples        [S] whether a token is drawn from the row's last position, or the sequence's vector is made
    follows        [S] whether the row's last token is the one that was sampled last for its slot; drafts come after it
    num_drafts     [S] how many of the row's last tokens are guesses. A token is drawn after each of them, and after
                   the one before them. None: there are no guesses
    """

    slots: Int64Array
    query_lengths: Int64Array
    samples: BoolArray
    follows: BoolArray
    num_drafts: Int64Array | None = None

    @cached_property
    def query_ends(self) -> Int64Array:
        """Where each row's tokens end among those of the step, [S]."""
        return np.cumsum(self.query_lengths)

    @cached_property
    def row_of_token(self) -> Int64Array:
        """The row of each token, [T]."""
        return np.repeat(np.arange(len(self.slots)), self.query_lengths)

    @cached_property
    def offset_of_token(self) -> Int64Array:
        """How many tokens of its row come before each token, [T]."""
        starts = self.query_ends - self.query_lengths
        return np.arange(len(self.row_of_token)) - starts[self.row_of_token]

    @cached_property
    def num_sent(self) -> int:
        """How many of the tokens are known to who planned the step."""
        return len(self.row_of_token) - int(np.count_nonzero(self.follows))

    @cached_property
    def drawn_tokens(self) -> Int64Array:
        """The R tokens of the step that others are drawn after, ascending."""
        ends = self.query_ends[self.samples]
        if self.num_drafts is None:
            return ends - 1
        counts = self.num_drafts[self.samples] + 1
        return np.repeat(ends - np.cumsum(counts), counts) + np.arange(counts.sum())

    @cached_property
    def sampled_slots(self) -> Int32Array:
        """The slot that each of the R tokens is drawn for."""
        return self.slots[self.row_of_token[self.drawn_tokens]].astype(np.int32)

    @cached_property
    def sampled_follow(self) -> BoolArray:
        """Whether it is drawn for a row that ends with the token that was sampled last for its slot, [R]."""
        return self.follows[self.row_of_token[self.drawn_tokens]]

    def with_drafts(self, num_drafts: Int64Array) -> Rows:
        """Return the rows with so many draft tokens more, [S]."""
        return dataclasses.replace(self, query_lengths=self.query_lengths + num_drafts, num_drafts=num_drafts)
