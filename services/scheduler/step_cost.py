"""What a step costs: learned from the steps of a worker group."""

from __future__ import annotations

MEMORY_STEPS = 256  # after so many a step counts for a third


class StepCost:
    """A fixed time and a time for each token, fitted to the latest steps by least squares. 0 if there were none."""

    def __init__(self) -> None:
        self._weight = self._tokens = self._seconds = self._tokens_squared = self._product = 0.0

    def record(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step."""
        kept = 1 - 1 / MEMORY_STEPS
        self._weight = kept * self._weight + 1
        self._tokens = kept * self._tokens + num_tokens
        self._seconds = kept * self._seconds + seconds
        self._tokens_squared = kept * self._tokens_squared + num_tokens * num_tokens
        self._product = kept * self._product + num_tokens * seconds

    @property
    def mean_s(self) -> float:
        """What a step took on average."""
        return self._seconds / self._weight if self._weight else 0.0

    @property
    def token_s(self) -> float:
        """What each token adds to a step."""
        if not self._weight:
            return 0.0
        mean_tokens = self._tokens / self._weight
        variance = self._tokens_squared / self._weight - mean_tokens**2
        if variance <= 1e-6 * mean_tokens**2:  # all steps were of one size
            return 0.0
        return max(0.0, (self._product / self._weight - mean_tokens * self.mean_s) / variance)

    def seconds(self, num_tokens: int) -> float:
        """Return what a step of so many tokens takes."""
        if not self._weight:
            return 0.0
        return max(0.0, self.mean_s + self.token_s * (num_tokens - self._tokens / self._weight))
