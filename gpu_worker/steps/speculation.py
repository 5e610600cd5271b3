"""Computes several tokens of a row in one step where what comes next can be guessed (`proposers.py`).

A step of few rows takes about as long as it takes to read the weights: tokens more cost little. So what is likely to
come next is taken as a draft, and computed in the same step. A draft token is right if it is what is drawn at its
place. As a row's bits do not depend on what else is computed, and a draw depends on its seed and position and on the
tokens before it alone, the tokens are those that would have been drawn one by one, greedily or not.

A draft token is computed if it is likely to be right, measured by the time that it takes. Both are learned: how
often a token of its kind is right, how often the proposer is in this sequence, and what a token more costs in a step.

Who plans steps learns from a step's result how many tokens a row got. It may have planned the next step before: a
row that follows what was drawn last for its slot goes on after that, wherever it stands.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np

from octavo.gpu_worker.ops import Int32Array, UInt32Array
from octavo.gpu_worker.protocol import BLOCK_SIZE
from octavo.gpu_worker.sampling.grammars import Automaton
from octavo.gpu_worker.sampling.sampler import Sampled
from octavo.gpu_worker.steps.batch import LAST_TOKEN, Step
from octavo.gpu_worker.steps.proposers import Forced, Proposer, Repetition
from octavo.gpu_worker.steps.rows import Rows
from octavo.gpu_worker.steps.runner import Guesses

_LEAST_CHANCE: Final = 0.05  # of a draft token that is computed
_OTHERS_TIME: Final = 2.0  # of a draft token, which they wait for and gain nothing by, counts so many times
MOST_TOKENS: Final = 12  # in a step with drafts, unless the kernels multiply more rows in little more time than one


class _Draft(NamedTuple):
    """A draft token of a row: how likely it is right, and all of the row before it."""

    chance: float
    row: int
    token_id: int


class _Choice(NamedTuple):
    """Which proposer's tokens a row has, of which kinds, and how many of them are thought to be right."""

    proposer: int
    kinds: list[int]
    chances: list[float]
    token_ids: list[int]


class Speculation:
    """Where the text of each slot stands, and what is guessed of it."""

    def __init__(
        self,
        max_running: int,
        max_model_len: int,
        most_draft_tokens: int,
        max_batch_tokens: int,
        rows_at_once: int,
        num_blocks: int,
        automaton_of: Callable[[int], Automaton | None] = lambda _: None,
    ) -> None:
        """No position from max_model_len on is computed.

        most_draft_tokens  of one sequence in one step; at least 1
        rows_at_once       that the kernels multiply in little more time than one row
        automaton_of       tells where a slot is in its grammar
        """
        self.max_row_tokens = most_draft_tokens + 1
        self._most_tokens = min(max(MOST_TOKENS, rows_at_once), max_batch_tokens)
        self._max_model_len = max_model_len
        self._positions = np.zeros(max_running, np.int64)  # of the token that was drawn last for a slot
        self._automaton_of = automaton_of
        self._repetition = Repetition(num_blocks)
        self._proposers: list[Proposer] = [self._repetition, Forced(automaton_of)]
        self._accuracy = [Accuracy(proposer.priors) for proposer in self._proposers]
        self._records: dict[tuple[int, int], Record] = {}  # by slot and proposer
        self._choices: dict[int, _Choice] = {}  # of the step that is computed, by slot
        self._cost = StepCost(max_running)
        self._drafted = [0] * len(self._proposers)  # by proposer; these and the next are of the step
        self._right = [0] * len(self._proposers)
        self._spent_s = [0.0] * len(self._proposers)  # since its last guess
        self._draft_s = 0.0  # what one token is thought to take of the step
        self.copy_blocks, self.computed = self._repetition.copy_blocks, self._repetition.computed

    def forget(self, step: Step) -> None:
        """Forget the texts of slots that are freed or opened."""
        for slot in (*step.freed_slots.tolist(), *step.opened_slots):
            for index, proposer in enumerate(self._proposers):
                proposer.forget(slot)
                self._records.pop((slot, index), None)

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

    def with_drafts(self, step: Step, last_token_ids: Int32Array, block_tables: Int32Array) -> Step:
        """Return the step with draft tokens after those of rows of one token."""
        self._choices = {}
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
            if length == 1 and samples:
                token_id = int(last_token_ids[slot]) if token_id == LAST_TOKEN else token_id
                most = self._room(block_tables[slot], position + 1, min(self.max_row_tokens - 1, spare))
                choice = self._choice(slot, position, token_id, block_tables[slot], most, least) if most else None
                if choice is not None:
                    self._choices[slot] = choice
                    drafts += map(_Draft, choice.chances, [row] * len(choice.chances), choice.token_ids)
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

    def _choice(
        self, slot: int, position: int, token_id: int, block_table: Int32Array, most: int, least: float
    ) -> _Choice | None:
        """Return the proposal that is likely to bring most, as far as its tokens are likelier right than `least`."""
        best: _Choice | None = None
        best_gain = 0.0
        automaton = self._automaton_of(slot)
        for index, proposer in enumerate(self._proposers):
            record = self._records.get((slot, index), _NO_RECORD)
            began = time.perf_counter()
            proposal = proposer.propose(slot, position, token_id, block_table, most)
            self._spent_s[index] += time.perf_counter() - began
            if proposal is None:
                continue
            chances = self._accuracy[index].chances(proposal.kinds, least, record.factor)
            if chances and automaton is not None and not proposer.keeps_to_grammar:
                chances = chances[: automaton.num_allowed(proposal.token_ids[: len(chances)])]
            gain = sum(chances) - least * len(chances)
            if gain > best_gain:
                best = _Choice(index, proposal.kinds, chances, proposal.token_ids[: len(chances)])
                best_gain = gain
            elif not chances:
                record.pass_over()
        return best

    def accepted(self, planned: Rows, step: Step, sampled: Sampled) -> UInt32Array | None:
        """Return how many tokens each of the rows that were planned has of those that were drawn; None: one each.

        step  what was computed of them
        """
        rows = step.rows
        slots = rows.slots[rows.samples]
        starts = (step.context_lengths + rows.query_lengths)[rows.samples]  # of what was drawn
        counts: UInt32Array | None = None
        if rows.num_drafts is not None:
            num_drafts = rows.num_drafts[rows.samples]
            starts -= num_drafts
            assert sampled.kept is not None, "guesses were sampled"
            firsts = np.cumsum(num_drafts + 1) - num_drafts - 1
            counts = np.add.reduceat(sampled.kept, firsts, dtype=np.uint32)
            for slot, count, length in zip(slots.tolist(), counts.tolist(), num_drafts.tolist(), strict=True):
                if length:
                    self._learn(slot, count - 1, length)
        at, token_ids = 0, sampled.token_ids.tolist()
        each = np.ones(len(slots), np.uint32) if counts is None else counts
        for slot, start, count in zip(slots.tolist(), starts.tolist(), each.tolist(), strict=True):
            for proposer in self._proposers:
                proposer.follow(slot, start, token_ids[at : at + count])
            at += count
        self._positions[slots] = starts + each - 1
        num_planned = int(np.count_nonzero(planned.samples))
        if len(slots) < num_planned:  # some had no room
            of_planned = np.zeros(num_planned, np.uint32)
            of_planned[np.isin(planned.slots[planned.samples], slots)] = each
            counts = of_planned
        return counts

    def _learn(self, slot: int, num_right: int, length: int) -> None:
        """Learn that so many tokens of a slot's draft were right."""
        choice = self._choices[slot]
        self._drafted[choice.proposer] += length
        self._right[choice.proposer] += num_right
        self._accuracy[choice.proposer].learn(choice.kinds[:length], num_right)
        record = self._records.setdefault((slot, choice.proposer), Record())
        record.learn(sum(choice.chances[:length]) / record.factor, num_right)

    def took(self, step: Step, seconds: float) -> None:
        """Learn what a step takes, if it has no tokens but those of rows of one token and drafts."""
        rows, num_tokens = step.rows, len(step.token_ids)
        num_drafts = 0 if rows.num_drafts is None else int(rows.num_drafts.sum())
        if 0 < num_tokens - num_drafts == len(rows.slots) and num_tokens <= self._most_tokens:
            self._cost.learn(len(rows.slots), num_drafts, seconds)
        part = self._cost.of_draft(len(rows.slots)) if num_drafts else 0.0
        self._draft_s = seconds * part / (1 + num_drafts * part)

    def take_guesses(self) -> tuple[Guesses, ...]:
        """Return what was guessed in the step that was computed, and count anew."""
        if not any(self._drafted):
            return ()
        taken = []
        for index, proposer in enumerate(self._proposers):
            if drafted := self._drafted[index]:
                seconds = self._spent_s[index] + drafted * self._draft_s
                taken.append(Guesses(proposer.name, drafted, self._right[index], round(seconds * 1e6)))
                self._drafted[index], self._right[index], self._spent_s[index] = 0, 0, 0.0
        return tuple(taken)

    def _room(self, block_table: Int32Array, position: int, most: int) -> int:
        """Return for how many tokens from `position` on a sequence has blocks, up to `most`."""
        end = min(position + most, self._max_model_len)
        while end > position and block_table[(end - 1) // BLOCK_SIZE] == 0:
            end = (end - 1) // BLOCK_SIZE * BLOCK_SIZE
        return max(end - position, 0)


class Accuracy:
    """How often the next token of a draft is right, by its kind."""

    _PRIOR_WEIGHT: Final = 8.0
    _MOST_TRIES: Final = 1000.0  # then older ones count half

    def __init__(self, priors: Sequence[float]) -> None:
        self._tries = [self._PRIOR_WEIGHT] * len(priors)
        self._right = [self._PRIOR_WEIGHT * rate for rate in priors]

    def chances(self, kinds: Sequence[int], least: float, factor: float = 1.0) -> list[float]:
        """Return how likely each token of a draft is right, and all before it, as long as it is more than `least`.

        factor  of all chances, in this sequence
        """
        chances: list[float] = []
        chance = factor
        for kind in kinds:
            chance *= self._right[kind] / self._tries[kind]
            if chance <= least:
                break
            chances.append(chance)
        return chances

    def learn(self, kinds: Sequence[int], num_right: int) -> None:
        """Learn that so many tokens of a draft were right."""
        for i, kind in enumerate(kinds[: num_right + 1]):
            self._tries[kind] += 1
            self._right[kind] += i < num_right
            if self._tries[kind] > self._MOST_TRIES:
                self._tries[kind] /= 2
                self._right[kind] /= 2


class Record:
    """How well a proposer does in one sequence: right tokens, of those that were expected."""

    _PRIOR_WEIGHT: Final = 4.0
    _KEPT: Final = 0.9  # of older drafts with each one
    _FORGOTTEN: Final = 0.01  # with each that was not computed, so that it is tried again some day

    def __init__(self) -> None:
        self._expected = self._right = 0.0

    @property
    def factor(self) -> float:
        """By which its chances differ from those in all sequences; at most 1."""
        return min((self._right + self._PRIOR_WEIGHT) / (self._expected + self._PRIOR_WEIGHT), 1.0)

    def learn(self, expected: float, num_right: int) -> None:
        """Learn that so many tokens of a draft were right."""
        self._expected = self._KEPT * self._expected + expected
        self._right = self._KEPT * self._right + num_right

    def pass_over(self) -> None:
        """Forget a little: nothing was worth its time."""
        self._expected *= 1 - self._FORGOTTEN
        self._right *= 1 - self._FORGOTTEN


_NO_RECORD: Final = Record()


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
