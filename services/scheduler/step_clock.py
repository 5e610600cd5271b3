"""How long steps take, and when one has taken so long that its worker must hang."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

MIN_PATIENCE_S = 1.0
PATIENCE = 10.0  # times what the slowest steps take
NUM_STEPS = 256  # that are remembered
NUM_WARM_UP_STEPS = 8  # first steps compile, allocate and fault pages in
FIXED_TOKENS = 16  # a step of one token reads all weights: it takes as long as one of so many
# Reading the keys and values of so many tokens takes at most as long as computing one: where memory is slow, and a
# model has few weights for its heads. With several queries the products of each with each key count as well.
CONTEXT_TOKENS = 256
PAIRS = 4096


class StepSize(NamedTuple):
    """What a step has to do: tokens to compute, cached tokens that they attend to, pairs of the one and the other."""

    num_tokens: int
    num_context: int = 0
    num_pairs: int = 0

    @property
    def work(self) -> float:
        """In tokens without a context."""
        return self.num_tokens + FIXED_TOKENS + self.num_context / CONTEXT_TOKENS + self.num_pairs / PAIRS


class StepClock:
    """Learns from the steps that were answered; knows no time of its own.

    What a step costs is taken to grow with its tokens and their context, from a fixed part on, so that
    a step of 2,000 prompt tokens after many of 8, or one over a long context, is not held for a hang.
    This is for workers that do not tell how they get on within a step; of others see `pulse.py`.
    """

    def __init__(self, longest_s: float) -> None:
        """`longest_s` bounds every step, and is the only bound of the first ones."""
        self._longest_s = longest_s
        self._costs: deque[float] = deque(maxlen=NUM_STEPS)  # seconds for each token of work
        self._num_steps = 0
        self._p99 = 0.0

    def record(self, size: StepSize, seconds: float) -> None:
        """Learn from a step."""
        self._num_steps += 1
        if self._num_steps <= NUM_WARM_UP_STEPS:
            return
        cost = seconds / size.work
        self._costs.append(cost)
        if cost > self._p99 or self._num_steps % 32 == 0:
            self._p99 = sorted(self._costs)[int(0.99 * len(self._costs))]

    def patience_s(self, size: StepSize) -> float:
        """Return how long a step of this size may take."""
        if not self._costs:
            return self._longest_s
        expected_s = self._p99 * size.work
        return min(max(MIN_PATIENCE_S, PATIENCE * expected_s), self._longest_s)
