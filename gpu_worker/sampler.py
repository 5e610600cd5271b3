"""Turns logits into tokens: masks, biases and penalties of each slot, then the device's draw.

The order is fixed: allowed tokens, biases, minimum length, penalties (repetition, frequency,
presence), temperature, top-k, top-p, min-p, draw. Log probabilities are of the raw logits. Each row
is worked on alone, so a row's token does not depend on the other rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from octavo.gpu_worker.ops import Draw, Float32Array, Int32Array
from octavo.gpu_worker.protocol import NOT_FINITE_TOKEN
from octavo.gpu_worker.sampling_settings import SamplingSettings

UInt32Array = npt.NDArray[np.uint32]


class Drawer(Protocol):
    """The part of a device that the sampler uses."""

    def draw(self, logits: Float32Array, draws: list[Draw]) -> Int32Array:
        """See `ops.Device.draw`."""


@dataclass(frozen=True)
class Sampled:
    """Tokens of a step's sampling rows, and log probabilities of those rows that want them.

    token_ids            [R] uint32, NOT_FINITE_TOKEN where the logits were not finite
    logprobs             one for each row that wants its own or alternatives
    ranks                as long as `logprobs`; 1 is the best token
    candidate_token_ids  alternatives, best first, row after row
    candidate_logprobs   as long as `candidate_token_ids`
    """

    token_ids: UInt32Array
    logprobs: Float32Array
    ranks: UInt32Array
    candidate_token_ids: UInt32Array
    candidate_logprobs: Float32Array


NOTHING_SAMPLED = Sampled(
    np.empty(0, np.uint32),
    np.empty(0, np.float32),
    np.empty(0, np.uint32),
    np.empty(0, np.uint32),
    np.empty(0, np.float32),
)


class Sampler:
    """Settings and penalty state of every slot."""

    def __init__(self, drawer: Drawer, vocab_size: int, max_running: int) -> None:
        self._drawer = drawer
        self._vocab_size = vocab_size
        self._slots: list[_Slot | None] = [None] * max_running

    def open_slot(self, slot: int, settings: SamplingSettings) -> None:
        """Give a slot its settings; what it held before is forgotten."""
        self._slots[slot] = _Slot(settings, self._vocab_size)

    def free_slot(self, slot: int) -> None:
        """Forget a slot."""
        self._slots[slot] = None

    def sample(self, logits: Float32Array, slots: Int32Array, positions: Int32Array) -> Sampled:
        """Draw the token at `positions[i]` of `slots[i]` from row i of `logits`; changes `logits`.

        logits     [R, vocab_size]
        slots      [R], all open
        positions  [R] absolute position of the token to be drawn
        """
        if len(slots) == 0:
            return _pack(np.empty(0, np.uint32), [])
        rows = [self._row(slot, position) for slot, position in zip(slots.tolist(), positions.tolist(), strict=True)]
        best_ids = logits.argmax(axis=1)  # the first of equal ones, and the first NaN if there is one
        # A best logit is NaN, +inf or -inf exactly if the row has a NaN, a +inf or nothing else than -inf.
        finite = np.isfinite(logits[np.arange(len(rows)), best_ids])
        changed = [i for i, row in enumerate(rows) if finite[i] and row.slot.changes_logits(row.position)]
        if not changed and all(row.greedy for row in rows):
            token_ids = best_ids.astype(np.uint32)
            raw = {i: logits[i] for i, row in enumerate(rows) if row.slot.settings.wants_logprobs}
        else:
            raw = {i: logits[i].copy() for i, row in enumerate(rows) if row.slot.settings.wants_logprobs}
            for i in changed:
                rows[i].slot.change_logits(logits[i], rows[i].position)
                finite[i] = np.isfinite(logits[i].max())
            token_ids = self._draw(logits, rows, finite)
        token_ids[~finite] = NOT_FINITE_TOKEN
        for i in np.flatnonzero(finite).tolist():
            rows[i].slot.count(int(token_ids[i]))
        wanted = [
            _logprobs(raw[i], int(token_ids[i]), row.slot.settings.logprobs)
            if finite[i]
            else _no_logprobs(row.slot.settings.logprobs)
            for i, row in enumerate(rows)
            if row.slot.settings.wants_logprobs
        ]
        return _pack(token_ids, wanted)

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
    """One sequence's settings, and what its penalties must remember.

    counts  [vocab_size] how often each token was produced; None without penalties
    seen    [vocab_size] whether it is in the prompt or the output; None without penalties
    """

    def __init__(self, settings: SamplingSettings, vocab_size: int) -> None:
        self.settings = settings
        self._counts: Float32Array | None = None
        self._seen: npt.NDArray[np.bool_] | None = None
        if settings.has_penalties:
            history = settings.history_token_ids
            counts = np.bincount(history[settings.prompt_length :], minlength=vocab_size)
            self._counts = counts.astype(np.float32)
            self._seen = np.zeros(vocab_size, np.bool_)
            self._seen[history] = True

    def changes_logits(self, position: int) -> bool:
        """Tell whether anything is to do before the draw."""
        settings = self.settings
        always = settings.forbidden is not None or len(settings.bias_token_ids) > 0 or self._counts is not None
        return always or self._bans(position)

    def change_logits(self, row: Float32Array, position: int) -> None:
        """Apply masks, biases, minimum length and penalties to `row` [vocab_size], in place."""
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
        if self._counts is not None and self._seen is not None:
            self._counts[token_id] += 1
            self._seen[token_id] = True

    def _bans(self, position: int) -> bool:
        output_length = position - self.settings.prompt_length
        return len(self.settings.banned_token_ids) > 0 and output_length < self.settings.min_new_tokens


@dataclass(frozen=True)
class _Row:
    """One row of a step."""

    slot: _Slot
    position: int

    @property
    def greedy(self) -> bool:
        """Whether the highest logit wins."""
        return self.slot.settings.temperature == 0


@dataclass(frozen=True)
class _Logprobs:
    """A token's log probability and rank, and the best alternatives."""

    logprob: float
    rank: int
    candidate_token_ids: UInt32Array
    candidate_logprobs: Float32Array


def _logprobs(raw: Float32Array, token_id: int, num_candidates: int) -> _Logprobs:
    """Return log probabilities of unchanged logits [vocab_size]."""
    best = raw.max().astype(np.float64)
    log_sum = best + np.log(np.exp(raw - best).sum())
    candidates = _best(raw, num_candidates)
    return _Logprobs(
        float(raw[token_id] - log_sum),
        int((raw >= raw[token_id]).sum()),
        candidates.astype(np.uint32),
        (raw[candidates] - log_sum).astype(np.float32),
    )


def _no_logprobs(num_candidates: int) -> _Logprobs:
    """Return the placeholders of a row whose logits were not finite."""
    return _Logprobs(
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


def _pack(token_ids: UInt32Array, wanted: list[_Logprobs]) -> Sampled:
    """Join rows to columns."""
    empty = (np.empty(0, np.uint32), np.empty(0, np.float32))
    return Sampled(
        token_ids=token_ids,
        logprobs=np.array([row.logprob for row in wanted], np.float32),
        ranks=np.array([row.rank for row in wanted], np.uint32),
        candidate_token_ids=np.concatenate([empty[0], *(row.candidate_token_ids for row in wanted)]),
        candidate_logprobs=np.concatenate([empty[1], *(row.candidate_logprobs for row in wanted)]),
    )
