"""Predicts how long a step takes: learned from the steps of a worker group."""

from __future__ import annotations

from dataclasses import dataclass, replace

SHAPE_STEPS = 1024  # after so many, a step counts for a third in how the time grows with the tokens
SPEED_STEPS = 24  # and after so many, in how fast the machine is now
LEAST_SIZE = 0.25  # of the mean: what smaller steps take, for which all weights are read, tells no speed of larger ones
OUTLIER = 4.0  # times what was expected: what a step takes longer than that says nothing of others
MIN_SPREAD = 1e-4  # of the sizes' squares: with less, nothing is known of other sizes


@dataclass(slots=True)
class _Sums:
    """Weighted sums over steps; older ones count for less."""

    steps: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0
    tokens_squared: float = 0.0
    product: float = 0.0

    def add(self, num_tokens: int, seconds: float, memory: int) -> None:
        kept = 1 - 1 / memory
        self.steps = kept * self.steps + 1
        self.tokens = kept * self.tokens + num_tokens
        self.seconds = kept * self.seconds + seconds
        self.tokens_squared = kept * self.tokens_squared + num_tokens * num_tokens
        self.product = kept * self.product + num_tokens * seconds


class StepCost:
    """Models a step's time as a fixed part and a part for each token, times the speed of the moment.

    The two parts are a least-squares fit over many steps, because steps of one size say nothing of others. The
    speed is what the latest steps took in proportion to the fit, because a machine is slow for a while when other
    work comes. All values are seconds, and 0 while no step is known.
    """

    def __init__(self) -> None:
        self._shape, self._speed = _Sums(), _Sums()
        self._fixed_s = self._token_s = 0.0

    def copy(self) -> StepCost:
        """Return an independent copy, for a worker that takes the place of this one."""
        other = StepCost()
        other._shape, other._speed = replace(self._shape), replace(self._speed)
        other._fixed_s, other._token_s = self._fixed_s, self._token_s
        return other

    @property
    def is_known(self) -> bool:
        """Whether a step was recorded."""
        return self._shape.steps > 0

    def is_refuted_by(self, num_tokens: int, seconds: float) -> bool:
        """Return whether a step was so much faster than those recorded that they say nothing of it."""
        shrinkage = self._shape.tokens / self._shape.steps / num_tokens
        return OUTLIER * max(shrinkage, 1.0) * seconds < self.seconds(num_tokens)

    def record(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step. One that takes far longer than expected counts as one that takes longer."""
        if self.seconds(num_tokens):
            growth = num_tokens * self._shape.steps / self._shape.tokens  # of larger steps less is known
            seconds = min(seconds, OUTLIER * max(growth, 1.0) * self.seconds(num_tokens))
        self._shape.add(num_tokens, seconds, SHAPE_STEPS)
        shape = self._shape
        if num_tokens * shape.steps >= LEAST_SIZE * shape.tokens:
            self._speed.add(num_tokens, seconds, SPEED_STEPS)
        mean_tokens, mean_s = shape.tokens / shape.steps, shape.seconds / shape.steps
        variance = shape.tokens_squared / shape.steps - mean_tokens**2
        slope = 0.0
        if variance > MIN_SPREAD * mean_tokens**2:
            slope = max(0.0, (shape.product / shape.steps - mean_tokens * mean_s) / variance)
        self._token_s = min(slope, mean_s / mean_tokens) if mean_tokens else 0.0
        self._fixed_s = mean_s - self._token_s * mean_tokens

    @property
    def _slowness(self) -> float:
        expected_s = self._fixed_s * self._speed.steps + self._token_s * self._speed.tokens
        return self._speed.seconds / expected_s if expected_s else 1.0

    @property
    def token_s(self) -> float:
        """What each token adds to a step."""
        return self._token_s * self._slowness

    def seconds(self, num_tokens: float) -> float:
        """Return what a step of so many tokens takes."""
        return (self._fixed_s + self._token_s * num_tokens) * self._slowness

    def most_tokens(self, seconds: float) -> float:
        """Return how many tokens a step of so many seconds can have: 0 if none, infinity if the size is no matter."""
        left_s = seconds / self._slowness - self._fixed_s if self._slowness else seconds
        if left_s <= 0:
            return 0.0
        return left_s / self._token_s if self._token_s else float("inf")

    def efficient_tokens(self, part: float) -> float:
        """Return with how many tokens a step has that part of the highest rate; infinity if that is not known."""
        return part / (1 - part) * self._fixed_s / self._token_s if self._token_s else float("inf")
