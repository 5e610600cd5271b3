"""Step times are learned here, for each worker group: a step's cost, the tokens a second, and the time of a hang."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from octavo.services.scheduler.groups.step_cost import StepCost

MIN_PATIENCE_S = 1.0
PATIENCE = 10.0  # times what the slowest steps take
NUM_STEPS = 256  # that are remembered
NUM_WARM_UP_STEPS = 8  # first steps compile, allocate and fault pages in
RUNNING_STEPS = 64  # after this many steps, one counts for a third in the mean of what runs
FIXED_TOKENS = 16  # a step of one token reads all weights: it takes as long as one of 16
# Reading the keys and values of 256 tokens takes at most as long as computing one: where memory is slow, and a
# model has few weights for its heads. With several queries the products of each with each key count as well.
CONTEXT_TOKENS = 256
PAIRS = 4096


def context_size(num_context: float, num_pairs: float | None = None) -> float:
    """Return a context in tokens that are computed without one; it has as many pairs if it is of single tokens."""
    return num_context / CONTEXT_TOKENS + (num_context if num_pairs is None else num_pairs) / PAIRS


class StepSize(NamedTuple):
    """What a step has to do: tokens to compute, cached tokens that they attend to, pairs of the one and the other."""

    num_tokens: int
    num_context: int = 0
    num_pairs: int = 0

    @property
    def context(self) -> float:
        """What its tokens attend to, in tokens without a context."""
        return context_size(self.num_context, self.num_pairs)

    @property
    def work(self) -> float:
        """In tokens without a context."""
        return self.num_tokens + FIXED_TOKENS + self.context


class StepTimes:
    """Learns from the steps that were answered; knows no time of its own.

    What a step costs is taken to grow with its tokens and their context, from a fixed part on, so that
    a step of 2,000 prompt tokens after many of 8, or one over a long context, is not held for a hang.
    Its patience is for workers that do not tell how they get on within a step; of others see `liveness.py`.

    cost          the fit that predicts a step; `is_guess` while it is of a step that warmed the worker up
    tokens_per_s  moving average over steps; 0 until measured
    mean_running  sequences in a step, over the latest ones
    row_tokens    tokens that a step makes of a sequence: moving average
    """

    def __init__(self, longest_s: float) -> None:
        """`longest_s` bounds every step, and is the only bound of the first ones."""
        self.cost = StepCost()
        self.is_guess = False
        self.tokens_per_s = 0.0
        self.mean_running = 0.0
        self.row_tokens = 1.0
        self._longest_s = longest_s
        self._seconds_per_work: deque[float] = deque(maxlen=NUM_STEPS)
        self._num_steps = 0
        self._p99 = 0.0

    def record(self, size: StepSize, seconds: float, num_running: int = 0) -> None:
        """Learn from a step, and from how many sequences run after it."""
        self._num_steps += 1
        is_warm_up = self._num_steps <= NUM_WARM_UP_STEPS
        if not is_warm_up:
            self._record_slowest(seconds / size.work)
        self.mean_running += (num_running - self.mean_running) / RUNNING_STEPS
        if self.is_guess and self.cost.is_refuted_by(size.num_tokens, seconds, size.context):
            self.cost = StepCost()
        if not self.cost.is_known or not is_warm_up:
            self.is_guess = is_warm_up
            self.cost.record(size.num_tokens, seconds, size.context)
        if seconds > 0:
            rate = size.num_tokens / seconds
            self.tokens_per_s += 0.1 * (rate - self.tokens_per_s) if self.tokens_per_s else rate

    def _record_slowest(self, seconds_per_work: float) -> None:
        slowest = self._seconds_per_work
        slowest.append(seconds_per_work)
        if seconds_per_work > self._p99 or self._num_steps % 32 == 0:
            self._p99 = sorted(slowest)[int(0.99 * len(slowest))]

    def record_rows(self, num_tokens: int, num_rows: int) -> None:
        """Learn how many tokens a step made of each of its sequences, of a worker that may make several."""
        if num_rows:
            self.row_tokens += 0.02 * (max(num_tokens / num_rows, 1.0) - self.row_tokens)

    def seconds(self, size: StepSize) -> float:
        """Return how long a step of this size takes; 0 if nothing is known."""
        return self.cost.seconds_with(size.num_tokens, size.context)

    def patience_s(self, size: StepSize) -> float:
        """Return how long a step of this size may take."""
        if not self._seconds_per_work:
            return self._longest_s
        return min(max(MIN_PATIENCE_S, PATIENCE * self._p99 * size.work), self._longest_s)
