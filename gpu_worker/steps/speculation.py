"""Computes several tokens of a row in one step where a text repeats itself (prompt lookup decoding, Saxena).

A step of few rows takes about as long as it takes to read the weights: tokens more cost little. So what followed a
sequence's last tokens where they stood before is taken as a draft of what follows them now, and computed in the
same step. A draft token is right if it is what is drawn at its place. As a row's bits do not depend on what else
is computed, and a draw depends on its seed and position alone, the tokens are those that would have been drawn
one by one, greedily or not.

A draft token is computed if it is likely to be right, measured by the time that it takes. Both are learned: how
often a draft is right after so many tokens that are equal, and what a token more costs in a step.

Who plans steps learns from a step's result how many tokens a row got. It may have planned the next step before: a
row that follows what was drawn last for its slot goes on after that, wherever it stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from octavo.gpu_worker.ops import Int32Array, StepInput, UInt32Array
from octavo.gpu_worker.protocol import BLOCK_SIZE, FIRST_NO_TOKEN
from octavo.gpu_worker.steps.batch import LAST_TOKEN, Step
from octavo.gpu_worker.steps.rows import Int64Array, Rows

MOST_MATCHED: Final = 16  # equal tokens before a draft that are told apart
_LEAST_CHANCE: Final = 0.05  # of a draft token that is computed
_OTHERS_TIME: Final = 2.0  # of a draft token, which they wait for and gain nothing by, counts so many times
MOST_TOKENS: Final = 12  # in a step with drafts, unless the kernels multiply more rows in little more time than one


class _Draft(NamedTuple):
    """A draft token of a row: how likely it is right, and all of the row before it."""

    chance: float
    row: int
    token_id: int


class Speculation:
    """The texts of slots, where each stands, and what is guessed of them."""

    def __init__(
        self,
        max_running: int,
        max_model_len: int,
        most_draft_tokens: int,
        max_batch_tokens: int,
        rows_at_once: int,
        num_blocks: int,
    ) -> None:
        """No position from max_model_len on is computed.

        most_draft_tokens  of one sequence in one step; at least 1
        rows_at_once       that the kernels multiply in little more time than one row
        """
        self.max_row_tokens = most_draft_tokens + 1
        self._most_tokens = min(max(MOST_TOKENS, rows_at_once), max_batch_tokens)
        self._max_model_len = max_model_len
        self._positions = np.zeros(max_running, np.int64)  # of the token that was drawn last for a slot
        # The tokens whose keys and values are in the cache, where those are.
        self._cached_token_ids = np.zeros((num_blocks, BLOCK_SIZE), np.int32)
        self._texts: dict[int, Text] = {}
        self._accuracy = Accuracy()
        self._cost = StepCost(max_running)

    def forget(self, step: Step) -> None:
        """Forget the texts of slots that are freed or opened."""
        for slot in (*step.freed_slots.tolist(), *step.opened_slots):
            self._texts.pop(slot, None)

    def copy_blocks(self, pairs: Int32Array) -> None:
        """Copy blocks, [P, 2] (from, to)."""
        self._cached_token_ids[pairs[:, 1]] = self._cached_token_ids[pairs[:, 0]]

    def placed(self, step: Step, block_tables: Int32Array) -> Step:
        """Return the step with each row that follows its slot's last token where that one stands.

        Those whose next token has no block are left out. block_tables: [slots, blocks], 0 where there is none.
        """
        rows = step.rows
        if not rows.follows.any():
            return step
        positions = self._positions[rows.slots]
        columns = np.minimum(positions // BLOCK_SIZE, block_tables.shape[1] - 1)
        has_room = (positions < self._max_model_len) & (block_tables[rows.slots, columns] > 0)
        contexts = np.where(rows.follows, positions - rows.query_lengths + 1, step.context_lengths)
        kept = has_room | ~rows.follows
        if kept.all():
            return dataclasses.replace(step, context_lengths=contexts)
        return dataclasses.replace(
            step,
            rows=Rows(rows.slots[kept], rows.query_lengths[kept], rows.samples[kept], rows.follows[kept]),
            context_lengths=contexts[kept],
            token_ids=step.token_ids[kept[rows.row_of_token]],
        )

    def with_drafts(
        self, step: Step, last_token_ids: Int32Array, block_tables: Int32Array, is_plain: Callable[[int], bool]
    ) -> Step:
        """Return the step with draft tokens after those of rows of one token.

        is_plain: tells of a slot whether its tokens are drawn from the logits as they are, whatever was drawn before
        """
        rows, num_tokens = step.rows, len(step.token_ids)
        spare = self._most_tokens - num_tokens
        if spare <= 0 or not num_tokens:
            return step
        least = max(_LEAST_CHANCE, (1 + _OTHERS_TIME * (len(rows.slots) - 1)) * self._cost.of_draft(len(rows.slots)))
        drafts: list[_Draft] = []
        last_ids = step.token_ids[rows.query_ends - 1]
        columns = rows.slots, rows.query_lengths, rows.samples, step.context_lengths, last_ids
        for row, (slot, length, samples, position, token_id) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            if length == 1 and samples and is_plain(slot):
                token_id = int(last_token_ids[slot]) if token_id == LAST_TOKEN else token_id
                text = self._text(slot, position, token_id, block_tables[slot])
                chances = self._accuracy.chances(text.match, least, self.max_row_tokens - 1)
                if chances:
                    room = self._room(block_tables[slot], position + 1, len(chances))
                    drafts += map(_Draft, chances[:room], [row] * room, text.draft(room))
        if not drafts:
            return step
        if len(drafts) > spare:  # none is likelier than those of its row before it, and the sort is stable
            drafts = sorted(sorted(drafts, key=lambda draft: -draft.chance)[:spare], key=lambda draft: draft.row)
        of_rows = np.array([draft.row for draft in drafts])
        return dataclasses.replace(
            step,
            rows=rows.with_drafts(np.bincount(of_rows, minlength=len(rows.slots))),
            token_ids=np.insert(step.token_ids, rows.query_ends[of_rows], [draft.token_id for draft in drafts]),
        )

    def computed(self, batch: StepInput) -> None:
        """Remember the tokens of a step, where their keys and values are now."""
        self._cached_token_ids.reshape(-1)[batch.slot_mapping] = batch.token_ids

    def accepted(self, planned: Rows, step: Step, drawn: UInt32Array) -> tuple[UInt32Array, UInt32Array | None]:
        """Return the tokens of the rows that were planned, and how many each has; None: one each.

        step   what was computed of them
        drawn  its tokens: after each of its drafts, and after the one before them
        """
        rows = step.rows
        slots = rows.slots[rows.samples]
        starts = (step.context_lengths + rows.query_lengths)[rows.samples]  # of what was drawn
        if rows.num_drafts is None:
            counts, token_ids = None, drawn
            for slot, start, token_id in zip(slots.tolist(), starts.tolist(), drawn.tolist(), strict=True):
                self._follow(slot, start, [token_id])
            self._positions[slots] = starts
        else:
            num_drafts = rows.num_drafts[rows.samples]
            starts -= num_drafts
            before = step.token_ids[rows.drawn_tokens].tolist()  # each token that one was drawn after
            counts, token_ids = self._check(slots, starts, num_drafts, before, drawn.tolist())
            self._positions[slots] = starts + counts - 1
        num_planned = int(np.count_nonzero(planned.samples))
        if len(slots) < num_planned:  # some had no room
            of_planned = np.zeros(num_planned, np.uint32)
            of_planned[np.isin(planned.slots[planned.samples], slots)] = 1 if counts is None else counts
            counts = of_planned
        return token_ids, counts

    def _check(
        self, slots: Int64Array, starts: Int64Array, num_drafts: Int64Array, before: list[int], drawn: list[int]
    ) -> tuple[UInt32Array, UInt32Array]:
        """Return how many tokens of each row count, and which: those drawn after drafts, as far as these are right."""
        counts: list[int] = []
        token_ids: list[int] = []
        at = 0
        for slot, start, length in zip(slots.tolist(), starts.tolist(), num_drafts.tolist(), strict=True):
            num_right = 0
            while num_right < length and before[at + num_right + 1] == drawn[at + num_right]:
                num_right += 1
            if length:
                self._accuracy.learn(self._texts[slot].match, num_right, length)
            kept = drawn[at : at + num_right + 1]
            self._follow(slot, start, kept)
            counts.append(len(kept))
            token_ids += kept
            at += length + 1
        return np.array(counts, np.uint32), np.array(token_ids, np.uint32)

    def took(self, step: Step, seconds: float) -> None:
        """Learn what a step takes, if it has no tokens but those of rows of one token and drafts."""
        rows, num_tokens = step.rows, len(step.token_ids)
        num_drafts = 0 if rows.num_drafts is None else int(rows.num_drafts.sum())
        if 0 < num_tokens - num_drafts == len(rows.slots) and num_tokens <= self._most_tokens:
            self._cost.learn(len(rows.slots), num_drafts, seconds)

    def _text(self, slot: int, position: int, token_id: int, block_table: Int32Array) -> Text:
        """Return the text of a slot up to `token_id`, which stands at `position`."""
        text = self._texts.get(slot)
        if text is None or len(text) != position + 1 or text.last != token_id:
            blocks = block_table[: -(-position // BLOCK_SIZE)]
            before = self._cached_token_ids[blocks].reshape(-1)[:position]
            text = self._texts[slot] = Text([*before.tolist(), token_id])
        return text

    def _follow(self, slot: int, position: int, token_ids: list[int]) -> None:
        """Extend the text of a slot, if it is kept, by tokens that stand at `position`."""
        text = self._texts.get(slot)
        if text is not None:
            if len(text) == position and token_ids[-1] < FIRST_NO_TOKEN:
                text.extend(token_ids)
            else:
                del self._texts[slot]

    def _room(self, block_table: Int32Array, position: int, most: int) -> int:
        """Return for how many tokens from `position` on a sequence has blocks, up to `most`."""
        end = min(position + most, self._max_model_len)
        while end > position and block_table[(end - 1) // BLOCK_SIZE] == 0:
            end = (end - 1) // BLOCK_SIZE * BLOCK_SIZE
        return max(end - position, 0)


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


class Accuracy:
    """How often the next token of a draft is right, by how many tokens before it are equal."""

    _PRIOR_WEIGHT: Final = 8.0
    _MOST_TRIES: Final = 1000.0  # then older ones count half

    def __init__(self) -> None:
        prior = (0.0, 0.2, 0.5, 0.65, 0.75, 0.75, 0.8, 0.85)
        rates = [prior[min(match, len(prior) - 1)] for match in range(MOST_MATCHED + 1)]
        self._tries = [self._PRIOR_WEIGHT] * len(rates)
        self._right = [self._PRIOR_WEIGHT * rate for rate in rates]

    def chances(self, match: int, least: float, most: int) -> list[float]:
        """Return how likely each token of a draft is right, and all before it, as long as it is more than `least`."""
        chances: list[float] = []
        chance = 1.0
        while match and len(chances) < most:
            chance *= self._right[match] / self._tries[match]
            if chance <= least:
                break
            chances.append(chance)
            match = min(match + 1, MOST_MATCHED)
        return chances

    def learn(self, match: int, num_right: int, length: int) -> None:
        """Learn that so many tokens of a draft were right."""
        for i in range(min(num_right + 1, length)):
            at = min(match + i, MOST_MATCHED)
            self._tries[at] += 1
            self._right[at] += i < num_right
            if self._tries[at] > self._MOST_TRIES:
                self._tries[at] /= 2
                self._right[at] /= 2


class StepCost:
    """What a draft token takes in a step of so many rows.

    Rows are not a draft's equal: for the token of each of them other processes work on the same cores.
    """

    _PRIOR_TOKENS: Final = 64.0  # so many more tokens are thought to take as long as a step of none

    def __init__(self, max_rows: int) -> None:
        self._lines = [_Line() for _ in range(max_rows + 1)]

    def learn(self, num_rows: int, num_drafts: int, seconds: float) -> None:
        """Learn what a step took."""
        self._lines[num_rows].add(num_drafts, seconds)

    def of_draft(self, num_rows: int) -> float:
        """Return what part of the time of a step of `num_rows` rows a draft token takes in addition."""
        return self._lines[num_rows].relative_slope(1 / (self._PRIOR_TOKENS + num_rows))


class _Line:
    """y = a + b x through points, of which older ones count less: kept as means and moments."""

    _NEWEST: Final = 0.02
    _PRIOR_WEIGHT: Final = 200.0  # as eight points that are 5 from the mean of x
    _MOST: Final = 3.0  # times the mean of y: with more, something came between

    def __init__(self) -> None:
        self._x = self._y = self._variance = self._covariance = 0.0
        self._num_points = 0

    def add(self, x: float, y: float) -> None:
        """Take a point."""
        self._num_points += 1
        weight = max(self._NEWEST, 1 / self._num_points)
        more_x = x - self._x
        more_y = (min(y, self._MOST * self._y) if self._num_points > 1 else y) - self._y
        self._x += weight * more_x
        self._y += weight * more_y
        self._variance += weight * ((1 - weight) * more_x * more_x - self._variance)
        self._covariance += weight * ((1 - weight) * more_x * more_y - self._covariance)

    def relative_slope(self, prior: float) -> float:
        """Return b / a, which is thought to be `prior` as long as the points do not tell."""
        if not self._num_points:
            return prior
        weight = self._PRIOR_WEIGHT / min(self._num_points, 1 / self._NEWEST)
        thought = self._y * prior / (1 + prior * self._x)
        slope = max((self._covariance + weight * thought) / (self._variance + weight), 0.0)
        return slope / max(self._y - slope * self._x, 0.1 * self._y)
