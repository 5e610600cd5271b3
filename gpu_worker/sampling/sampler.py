"""Turns logits into tokens: masks, biases and penalties of each slot, then the device's draw.

The order is fixed: allowed tokens, biases, minimum length, penalties (repetition, frequency,
presence), what the grammar allows, temperature, top-k, top-p, min-p, draw. Log probabilities are of the
raw logits. Each row is worked on alone, so a row's token does not depend on the other rows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from octavo.gpu_worker.ops import Draw, Float32Array, Int32Array, UInt32Array
from octavo.gpu_worker.protocol import NOT_FINITE_TOKEN, NOTHING_ALLOWED_TOKEN
from octavo.gpu_worker.sampling.grammars import Automaton, Grammars, open_automaton, refusals
from octavo.gpu_worker.sampling.settings import SamplingSettings


class Drawer(Protocol):
    """The part of a device that the sampler uses."""

    def argmax(self, logits: Float32Array) -> Int32Array:
        """See `ops.Device.argmax`."""

    def draw(self, logits: Float32Array, draws: list[Draw]) -> Int32Array:
        """See `ops.Device.draw`."""

    def mask(self, row: Float32Array, allowed: UInt32Array) -> None:
        """See `ops.Device.mask`."""


# Columns of most steps. Never written.
_NO_INTEGERS: Final[UInt32Array] = np.empty(0, np.uint32)
_NO_VALUES: Final[Float32Array] = np.empty(0, np.float32)


@dataclass(frozen=True)
class Sampled:
    """Tokens of a step's sampling rows, and log probabilities of those rows that want them.

    token_ids            [R] uint32, or why there is none, as in `StepResult.token_ids`; of the R that are kept
    logprobs             one for each row that wants its own or alternatives
    ranks                as long as `logprobs`; 1 is the best token
    candidate_token_ids  alternatives, best first, row after row
    candidate_logprobs   as long as `candidate_token_ids`
    kept                 [R] whether all that was guessed before the token is right; None: nothing was guessed
    """

    token_ids: UInt32Array
    logprobs: Float32Array
    ranks: UInt32Array
    candidate_token_ids: UInt32Array
    candidate_logprobs: Float32Array
    kept: npt.NDArray[np.bool_] | None = None


def without_logprobs(token_ids: UInt32Array) -> Sampled:
    """Return a step's tokens, none of whose rows wants log probabilities."""
    return Sampled(token_ids, _NO_VALUES, _NO_INTEGERS, _NO_INTEGERS, _NO_VALUES)


NOTHING_SAMPLED = without_logprobs(_NO_INTEGERS)


class Sampler:
    """Settings, penalty state and grammar of every slot."""

    def __init__(self, drawer: Drawer, vocab_size: int, max_running: int, grammars: Grammars | None = None) -> None:
        """grammars: what reads those of slots; None: no slot may have one."""
        self._drawer = drawer
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._slots: list[_Slot | None] = [None] * max_running

    def open_slot(self, slot: int, settings: SamplingSettings) -> None:
        """Give a slot its settings; what it held before is forgotten. Raises PlanError for a grammar without reader."""
        self._slots[slot] = _Slot(settings, self._vocab_size, open_automaton(self._grammars, settings))

    def free_slot(self, slot: int) -> None:
        """Forget a slot."""
        self._slots[slot] = None

    def automaton_of(self, slot: int) -> Automaton | None:
        """Return where a slot is in its grammar; None without one."""
        state = self._slots[slot]
        return None if state is None else state.automaton

    def sample(
        self,
        logits: Float32Array,
        slots: Int32Array,
        positions: Int32Array,
        follows: npt.NDArray[np.bool_] | None = None,
        guesses: Int32Array | None = None,
    ) -> Sampled:
        """Draw the token at `positions[i]` of `slots[i]` from row i of `logits`; changes `logits`.

        logits     [R, vocab_size]
        slots      [R], all open
        positions  [R] absolute position of the token to be drawn
        follows    [R] whether the row's last token was taken to be what was drawn last for its slot; None: nowhere
        guesses    [R] the token that row i + 1, of the same slot, was computed after; -1: there is none. What comes
                   after a wrong guess is not drawn. None: nothing was guessed
        """
        best_ids = self._drawer.argmax(logits)
        if guesses is None:
            return _pack(*self._sample(logits, slots, positions, follows, best_ids))
        if all(state is not None and state.is_plain for state in map(self._slots.__getitem__, slots.tolist())):
            token_ids, _ = self._sample(logits, slots, positions, follows, best_ids)
            kept = _after_right_guesses(token_ids, guesses)
            return dataclasses.replace(without_logprobs(token_ids[kept]), kept=kept)
        return self._sample_in_turn(logits, slots, positions, follows, guesses, best_ids)

    def _sample_in_turn(
        self,
        logits: Float32Array,
        slots: Int32Array,
        positions: Int32Array,
        follows: npt.NDArray[np.bool_] | None,
        guesses: Int32Array,
        best_ids: Int32Array,
    ) -> Sampled:
        """Draw the first token of each slot, then the second of those whose guess was right, and so on.

        So penalties and grammars have taken what was drawn before, as if it had been in a step of its own.
        """
        token_ids, kept = np.zeros(len(slots), np.uint32), np.zeros(len(slots), np.bool_)
        logprobs: dict[int, TokenLogprobs] = {}
        now = np.flatnonzero(np.concatenate([[True], guesses[:-1] < 0]))
        waited_s = 0.0
        while len(now):
            rows = logits[now[0] : now[0] + 1] if len(now) == 1 else logits[now]
            followers = None if follows is None or kept.any() else follows[now]
            token_ids[now], entries = self._sample(rows, slots[now], positions[now], followers, best_ids[now])
            logprobs |= {int(now[i]): entry for i, entry in entries.items()}
            kept[now] = True
            now = now[token_ids[now] == guesses[now].astype(np.int64)] + 1
            automata = [self.automaton_of(slot) for slot in slots[now].tolist()]
            if self._grammars is not None:
                waited_s = self._grammars.are_ready([each for each in automata if each is not None], waited_s)
            now = now[[each is None or each.ready.done() for each in automata]] if len(now) else now
        entries = dict(sorted(logprobs.items()))
        return dataclasses.replace(_pack(token_ids[kept], entries), kept=kept)

    def _sample(
        self,
        logits: Float32Array,
        slots: Int32Array,
        positions: Int32Array,
        follows: npt.NDArray[np.bool_] | None,
        best_ids: Int32Array,
    ) -> tuple[UInt32Array, dict[int, TokenLogprobs]]:
        """Draw a token from each row, see `sample`; return the log probabilities by row, too.

        best_ids  [R] the token with the highest logit; -1 where a row is not finite
        """
        if all(state is not None and state.takes_best for state in map(self._slots.__getitem__, slots.tolist())):
            return best_ids.view(np.uint32), {}  # -1 is NOT_FINITE_TOKEN
        rows = [self._row(slot, position) for slot, position in zip(slots.tolist(), positions.tolist(), strict=True)]
        finite = best_ids >= 0
        if finite.all() and all(row.slot.is_plain for row in rows):
            draws = [row.slot.settings.draw_at(row.position) for row in rows]
            return self._drawer.draw(logits, draws).astype(np.uint32), {}
        refused = self._refused(rows, follows)
        refused = {i: code for i, code in refused.items() if finite[i]}
        drawn = finite.copy()
        drawn[list(refused)] = False
        changed = [i for i, row in enumerate(rows) if drawn[i] and row.slot.changes_logits(row.position)]
        if not changed and all(row.greedy for row in rows):
            token_ids = best_ids.astype(np.uint32)
            raw = {i: logits[i] for i, row in enumerate(rows) if row.slot.settings.wants_logprobs}
        else:
            raw = {i: logits[i].copy() for i, row in enumerate(rows) if row.slot.settings.wants_logprobs}
            for i in changed:
                rows[i].slot.change_logits(logits[i], rows[i].position, self._drawer)
                drawn[i] = np.isfinite(logits[i].max())
            token_ids = self._draw(logits, rows, drawn)
        for i in np.flatnonzero(~drawn).tolist():
            is_constrained = rows[i].slot.automaton is not None
            nothing = NOTHING_ALLOWED_TOKEN if finite[i] and is_constrained else NOT_FINITE_TOKEN
            token_ids[i] = refused.get(i, nothing)
        for i in np.flatnonzero(drawn).tolist():
            rows[i].slot.count(int(token_ids[i]))
        wanted = {
            i: logprobs_of(raw[i], int(token_ids[i]), row.slot.settings.logprobs)
            if drawn[i]
            else _no_logprobs(row.slot.settings.logprobs)
            for i, row in enumerate(rows)
            if row.slot.settings.wants_logprobs
        }
        return token_ids, wanted

    def _refused(self, rows: list[_Row], follows: npt.NDArray[np.bool_] | None) -> dict[int, int]:
        """Wait for what grammars allow; return the rows that get no token, and why."""
        constrained = [(i, row.slot.automaton) for i, row in enumerate(rows) if row.slot.automaton is not None]
        if not constrained:
            return {}
        is_follower = [follows is not None and bool(follows[i]) for i, _ in constrained]
        patience_s = None if self._grammars is None else self._grammars.patience_s
        codes = refusals([automaton for _, automaton in constrained], is_follower, patience_s)
        return {i: code for (i, _), code in zip(constrained, codes, strict=True) if code}

    def _row(self, slot: int, position: int) -> _Row:
        state = self._slots[slot]
        assert state is not None, f"slot {slot} is not open"
        return _Row(state, position)

    def _draw(self, logits: Float32Array, rows: list[_Row], finite: npt.NDArray[np.bool_]) -> UInt32Array:
        """Draw for the finite rows; the others get 0."""
        token_ids = np.zeros(len(rows), np.uint32)
        chosen = np.flatnonzero(finite)
        if len(chosen):
            picked = logits if len(chosen) == len(rows) else logits[chosen]
            draws = [rows[i].slot.settings.draw_at(rows[i].position) for i in chosen]
            token_ids[chosen] = self._drawer.draw(picked, draws).astype(np.uint32)
        return token_ids


class _Slot:
    """One sequence's settings, and what its penalties and its grammar must remember.

    automaton   where it is in its grammar; None without one
    is_plain    a token is drawn from the logits as they are, wherever it is, and nothing is remembered of it
    takes_best  that token is the one with the highest logit
    counts      [vocab_size] how often each token was produced; None without penalties
    seen        [vocab_size] whether it is in the prompt or the output; None without penalties
    """

    def __init__(self, settings: SamplingSettings, vocab_size: int, automaton: Automaton | None) -> None:
        self.settings = settings
        self.automaton = automaton
        self._counts: Float32Array | None = None
        self._seen: npt.NDArray[np.bool_] | None = None
        if settings.has_penalties:
            history = settings.history_token_ids
            counts = np.bincount(history[settings.prompt_length :], minlength=vocab_size)
            self._counts = counts.astype(np.float32)
            self._seen = np.zeros(vocab_size, np.bool_)
            self._seen[history] = True
        self._always_changes = (
            settings.forbidden is not None
            or len(settings.bias_token_ids) > 0
            or self._counts is not None
            or automaton is not None
        )
        may_change = self._always_changes or len(settings.banned_token_ids) > 0
        self.is_plain = not settings.wants_logprobs and not may_change
        self.takes_best = self.is_plain and settings.draw.temperature == 0

    def changes_logits(self, position: int) -> bool:
        """Tell whether anything is to do before the draw."""
        return self._always_changes or self._bans(position)

    def change_logits(self, row: Float32Array, position: int, drawer: Drawer) -> None:
        """Apply masks, biases, minimum length and penalties to `row` [vocab_size], in place."""
        self._change_logits(row, position)
        if self.automaton is not None:
            drawer.mask(row, self.automaton.allowed)

    def _change_logits(self, row: Float32Array, position: int) -> None:
        settings = self.settings
        if settings.forbidden is not None:
            row[settings.forbidden] = -np.inf
        np.add.at(row, settings.bias_token_ids, settings.bias_values)
        if self._bans(position):
            row[settings.banned_token_ids] = -np.inf
        if self._counts is None or self._seen is None:
            return
        if settings.repetition_penalty != 1:
            penalty = np.float32(settings.repetition_penalty)
            row[:] = np.where(self._seen, np.where(row > 0, row / penalty, row * penalty), row)
        if settings.frequency_penalty != 0:
            row -= self._counts * np.float32(settings.frequency_penalty)
        if settings.presence_penalty != 0:
            row -= (self._counts > 0) * np.float32(settings.presence_penalty)

    def count(self, token_id: int) -> None:
        """Remember a produced token."""
        if self.automaton is not None:
            self.automaton.advance(token_id)
        if self._counts is not None and self._seen is not None:
            self._counts[token_id] += 1
            self._seen[token_id] = True

    def _bans(self, position: int) -> bool:
        if self.automaton is not None and self.automaton.is_complete:
            return False  # there is no longer output
        output_length = position - self.settings.prompt_length
        return len(self.settings.banned_token_ids) > 0 and output_length < self.settings.min_new_tokens


@dataclass(slots=True)
class _Row:
    """One row of a step."""

    slot: _Slot
    position: int

    @property
    def greedy(self) -> bool:
        """Whether the highest logit wins."""
        return self.slot.settings.draw.temperature == 0


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's log probability and rank, and the best alternatives."""

    logprob: float
    rank: int
    candidate_token_ids: UInt32Array
    candidate_logprobs: Float32Array


def logprobs_of(raw: Float32Array, token_id: int, num_candidates: int) -> TokenLogprobs:
    """Return log probability and rank of a token, and the best alternatives, from unchanged logits [vocab_size]."""
    best = raw.max().astype(np.float64)
    log_sum = best + np.log(np.exp(raw - best).sum())
    candidates = _best(raw, num_candidates)
    return TokenLogprobs(
        float(raw[token_id] - log_sum),
        int((raw >= raw[token_id]).sum()),
        candidates.astype(np.uint32),
        (raw[candidates] - log_sum).astype(np.float32),
    )


def with_logprobs_before(sampled: Sampled, scores: list[TokenLogprobs]) -> Sampled:
    """Return a step's tokens with further entries before those of its rows in all columns but `token_ids`."""
    before = _pack(sampled.token_ids, dict(enumerate(scores)))
    names = ("logprobs", "ranks", "candidate_token_ids", "candidate_logprobs")
    joined = {name: np.concatenate([getattr(before, name), getattr(sampled, name)]) for name in names}
    return dataclasses.replace(sampled, **joined)


def _no_logprobs(num_candidates: int) -> TokenLogprobs:
    """Return the placeholders of a row whose logits were not finite."""
    return TokenLogprobs(
        float("nan"),
        0,
        np.full(num_candidates, NOT_FINITE_TOKEN, np.uint32),
        np.full(num_candidates, np.nan, np.float32),
    )


def _best(raw: Float32Array, count: int) -> npt.NDArray[np.intp]:
    """Return the ids of the `count` highest logits, best first, lower ids first on a tie."""
    if count == 0:
        return np.empty(0, np.intp)
    last = np.partition(raw, -count)[-count]
    token_ids = np.flatnonzero(raw >= last)
    return token_ids[np.argsort(-raw[token_ids], kind="stable")][:count]


def _after_right_guesses(token_ids: UInt32Array, guesses: Int32Array) -> npt.NDArray[np.bool_]:
    """Return which rows, see `Sampler.sample`, begin a slot's or come after right guesses only."""
    kept: list[bool] = []
    is_right = True
    for token_id, guess in zip(token_ids.tolist(), guesses.tolist(), strict=True):
        kept.append(is_right)
        is_right = guess < 0 or (is_right and token_id == guess)
    return np.array(kept, np.bool_)


def _pack(token_ids: UInt32Array, entries: dict[int, TokenLogprobs]) -> Sampled:
    """Join the log probabilities of rows to columns."""
    if not entries:
        return without_logprobs(token_ids)
    wanted, empty = list(entries.values()), (np.empty(0, np.uint32), np.empty(0, np.float32))
    return Sampled(
        token_ids=token_ids,
        logprobs=np.array([row.logprob for row in wanted], np.float32),
        ranks=np.array([row.rank for row in wanted], np.uint32),
        candidate_token_ids=np.concatenate([empty[0], *(row.candidate_token_ids for row in wanted)]),
        candidate_logprobs=np.concatenate([empty[1], *(row.candidate_logprobs for row in wanted)]),
    )
