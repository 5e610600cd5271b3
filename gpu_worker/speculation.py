"""Computes tokens before their step while one or two sequences run (speculative decoding by prompt lookup, Saxena).

A step of few rows takes about as long as it takes to read the weights: rows more cost little. So what followed a
sequence's last two tokens where they stood before is taken as a draft of what follows them now, and computed in the
same step. A draft token is right if it is what is drawn at its place. As a row's bits do not depend on what else
is computed, and a draw depends on its seed and position alone, the tokens are those that would have been drawn
one by one, greedily or not.

A token that is known before its step is the result of that step, which then computes nothing. So who plans steps
knows nothing of all this: each step still makes one token of each row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from octavo.gpu_worker.batch import LAST_TOKEN, Step
from octavo.gpu_worker.ops import Int32Array, StepInput, UInt32Array
from octavo.gpu_worker.protocol import BLOCK_SIZE, FIRST_NO_TOKEN
from octavo.gpu_worker.rows import Rows

MOST_SEQUENCES: Final = 2  # in a step; with more, it is rare that all of them are ahead
MOST_TOKENS: Final = 16  # in a step, drafts included
_FIRST_DRAFT: Final = 3
_NO_TOKEN: Final = -1  # in a history: what was in the cache, so it was never sent


@dataclass
class _Ahead:
    """Tokens of a slot that are known and were not asked for yet.

    position     where the first of them stands
    token_ids    the last one may be one of those that say why there is none
    is_accepted  of each, whether it was drawn after a draft token: it took no step of its own
    """

    position: int
    token_ids: list[int] = field(default_factory=list)
    is_accepted: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """What a step computes of one sequence.

    position   of the first token
    token_ids  the last known token and the drafts after it
    """

    slot: int
    position: int
    token_ids: list[int]


@dataclass
class _Slot:
    """How far a slot is ahead, and how much is tried: more where drafts were right."""

    draft_length: int = _FIRST_DRAFT
    ahead: _Ahead = field(default_factory=lambda: _Ahead(0))

    @property
    def has_ended(self) -> bool:
        """Whether the last thing known is that there is no token."""
        return bool(self.ahead.token_ids) and self.ahead.token_ids[-1] >= FIRST_NO_TOKEN


class Speculation:
    """What is known of each slot's tokens, and how far it is ahead of the plans."""

    def __init__(self, max_running: int, max_model_len: int, most_draft_tokens: int, max_batch_tokens: int) -> None:
        """most_draft_tokens: of one sequence in one step; at least 1. No position from max_model_len on is computed."""
        self._most_draft_tokens = most_draft_tokens
        self._most_tokens = min(MOST_TOKENS, max_batch_tokens)
        self._max_model_len = max_model_len
        # Of a slot from when it is opened; the token drawn after the last position has a place, too.
        self._histories = np.empty((max_running, max_model_len + 1), np.int32)
        self._slots: dict[int, _Slot] = {}

    def open_slots(self, slots: Sequence[int]) -> None:
        """Forget what slots held before."""
        for slot in slots:
            self._histories[slot] = _NO_TOKEN
            self._slots.pop(slot, None)

    def computed(self, rows: Rows, batch: StepInput) -> None:
        """Remember the tokens of a step that was computed as it was planned."""
        self._histories[rows.slots[rows.row_of_token], batch.positions] = batch.token_ids

    def takes(self, step: Step) -> bool:
        """Tell whether a step has the form for this: few rows, each of one token that another is drawn after."""
        rows = step.rows
        return (
            0 < len(rows.slots) <= MOST_SEQUENCES
            and len(step.token_ids) == len(rows.slots)
            and bool(rows.samples.all())
        )

    def plan(self, step: Step, last_token_ids: Int32Array, block_tables: Int32Array) -> list[Row]:
        """Return what to compute: nothing if the tokens of all rows are known.

        A row whose token is known goes on from its last known token, so that it gets further ahead.
        """
        slots, contexts = step.rows.slots.tolist(), step.context_lengths.tolist()
        for slot, context, token in zip(slots, contexts, step.token_ids.tolist(), strict=True):
            token_id = int(last_token_ids[slot]) if token == LAST_TOKEN else token
            state = self._slots.setdefault(slot, _Slot())
            if state.ahead.position != context + 1 or self._histories[slot, context] != token_id:
                state.ahead = _Ahead(context + 1)
                self._histories[slot, context] = token_id
        states = [self._slots[slot] for slot in slots]
        if all(state.ahead.token_ids for state in states):
            return []
        most = min(self._most_draft_tokens, self._most_tokens // len(slots) - 1)
        planned = []
        for slot, state in zip(slots, states, strict=True):
            position = state.ahead.position - 1 + len(state.ahead.token_ids)
            room = self._room(block_tables[slot], position)
            if room == 0 or state.has_ended:  # its blocks end here, or its tokens: it waits for the plans
                continue
            history = self._histories[slot, : position + 1]
            drafts = draft(history, min(state.draft_length, most, room - 1))
            planned.append(Row(slot, position, [int(history[-1]), *drafts]))
        return planned

    def drawn(self, rows: list[Row], token_ids: list[int]) -> None:
        """Keep what was drawn after each token of `rows`, as far as the drafts were right."""
        begin = 0
        for row in rows:
            drawn = token_ids[begin : begin + len(row.token_ids)]
            begin += len(drawn)
            drafts = row.token_ids[1:]
            num_right = next((i for i, token in enumerate(drafts) if token != drawn[i]), len(drafts))
            state = self._slots[row.slot]
            self._keep(row, drawn[: num_right + 1])
            if drafts:
                grown = 2 * state.draft_length if num_right == len(drafts) else num_right + 1
                state.draft_length = min(grown, self._most_draft_tokens)

    def _keep(self, row: Row, drawn: list[int]) -> None:
        """Keep tokens that stand after a row's first one, which is the last that was known."""
        ahead = self._slots[row.slot].ahead
        for i, token_id in enumerate(drawn):
            ahead.token_ids.append(token_id)
            ahead.is_accepted.append(i > 0)
            if token_id >= FIRST_NO_TOKEN:
                return
            self._histories[row.slot, row.position + 1 + i] = token_id

    def take(self, step: Step) -> tuple[UInt32Array, bytes]:
        """Return the token of each row, all of which are known now, and of each whether it was accepted."""
        aheads = [self._slots[slot].ahead for slot in step.rows.slots.tolist()]
        token_ids = np.array([ahead.token_ids.pop(0) for ahead in aheads], np.uint32)
        is_accepted = bytes(ahead.is_accepted.pop(0) for ahead in aheads)
        for ahead in aheads:
            ahead.position += 1
        return token_ids, is_accepted if any(is_accepted) else b""

    def _room(self, block_table: Int32Array, position: int) -> int:
        """Return for how many tokens from `position` on a sequence has blocks, up to the most that are computed."""
        columns = np.arange(position, min(position + self._most_tokens, self._max_model_len)) // BLOCK_SIZE
        return int(np.count_nonzero(block_table[columns]))  # they are without gaps: 0 stands for none


def step_of(rows: list[Row], planned: Step) -> Step:
    """Return the step that computes `rows` in place of those that were planned, and draws after each."""
    every = np.ones(len(rows), np.bool_)
    lengths = np.array([len(row.token_ids) for row in rows], np.int64)
    return dataclasses.replace(
        planned,
        rows=Rows(np.array([row.slot for row in rows], np.int64), lengths, samples=every, follows=~every),
        context_lengths=np.array([row.position for row in rows], np.int64),
        token_ids=np.array([token_id for row in rows for token_id in row.token_ids], np.int32),
    )


def draft(history: Int32Array, length: int) -> list[int]:
    """Return what followed the last two tokens of `history` where they stood last before: `length` tokens, or none.

    Where fewer followed than are wanted, the draft goes on as if they were repeated.
    """
    if length <= 0 or len(history) < 3:
        return []
    first, second = history[-2], history[-1]
    places = np.flatnonzero((history[1:-1] == second) & (history[:-2] == first))
    if not len(places) or _NO_TOKEN in (first, second):
        return []
    following = history[places[-1] + 2 :].tolist()
    drafts = [following[i % len(following)] for i in range(length)]
    return drafts[: drafts.index(_NO_TOKEN)] if _NO_TOKEN in drafts else drafts
