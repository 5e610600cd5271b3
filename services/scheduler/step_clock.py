"""How long steps take, and when one has taken so long that its worker must hang."""

from __future__ import annotations

from collections import deque

MIN_PATIENCE_S = 1.0
PATIENCE = 10.0  # times what the slowest steps take
NUM_STEPS = 256  # that are remembered
NUM_WARM_UP_STEPS = 8  # first steps compile, allocate and fault pages in
FIXED_TOKENS = 16  # a step of one token reads all weights: it takes as long as one of so many


class StepClock:
    """Learns from the steps that were answered; knows no time of its own.

    What a step costs is taken to grow with its tokens, from a fixed part on, so that a step of
    2,000 prompt tokens after many of 8 is not held for a hang.
    """

    def __init__(self, longest_s: float) -> None:
        """`longest_s` bounds every step, and is the only bound of the first ones."""
        self._longest_s = longest_s
        self._costs: deque[float] = deque(maxlen=NUM_STEPS)  # seconds for each token
        self._num_steps = 0
        self._p99 = 0.0

    def record(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step."""
        self._num_steps += 1
        if self._num_steps <= NUM_WARM_UP_STEPS:
            return
        cost = seconds / (num_tokens + FIXED_TOKENS)
        self._costs.append(cost)
        if cost > self._p99 or self._num_steps % 32 == 0:
            self._p99 = sorted(self._costs)[int(0.99 * len(self._costs))]

    def patience_s(self, num_tokens: int) -> float:
        """Return how long a step of so many tokens may take."""
        if not self._costs:
            return self._longest_s
        expected_s = self._p99 * (num_tokens + FIXED_TOKENS)
        return min(max(MIN_PATIENCE_S, PATIENCE * expected_s), self._longest_s)
