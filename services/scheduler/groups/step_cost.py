"""The cost of a step is fitted to the steps of a worker group, and predicts how long others take."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

SHAPE_STEPS = 1024  # after which one counts for a third in how the time grows with tokens and context
SPEED_STEPS = 24  # after which one counts for a third in how fast the machine is now
LEAST_SIZE = 0.25  # of the mean: what smaller steps take, for which all weights are read, tells no speed of larger ones
OUTLIER = 4.0  # times what was expected: what a step takes longer than that says nothing of others
MIN_SPREAD = 1e-4  # of a mean's square: with a smaller variance, nothing is known of other sizes
MIN_CONTEXT = 0.5  # tokens: steps whose contexts differ by less tell little of what context costs


@dataclass(slots=True)
class _Sums:
    """Weighted sums over steps, and of the products of two of their numbers; older ones count for less."""

    steps: float = 0.0
    tokens: float = 0.0
    context: float = 0.0
    seconds: float = 0.0
    tokens_tokens: float = 0.0
    tokens_context: float = 0.0
    context_context: float = 0.0
    tokens_seconds: float = 0.0
    context_seconds: float = 0.0

    def add(self, tokens: float, context: float, seconds: float, memory: int) -> None:
        kept = 1 - 1 / memory
        self.steps = kept * self.steps + 1
        self.tokens = kept * self.tokens + tokens
        self.context = kept * self.context + context
        self.seconds = kept * self.seconds + seconds
        self.tokens_tokens = kept * self.tokens_tokens + tokens * tokens
        self.tokens_context = kept * self.tokens_context + tokens * context
        self.context_context = kept * self.context_context + context * context
        self.tokens_seconds = kept * self.tokens_seconds + tokens * seconds
        self.context_seconds = kept * self.context_seconds + context * seconds

    def slopes(self) -> tuple[float, float]:
        """Return what a token adds, and what one of context does: least squares, and nothing below 0."""
        steps = self.steps
        tokens, context, seconds = self.tokens / steps, self.context / steps, self.seconds / steps
        tt = self.tokens_tokens / steps - tokens**2
        tc = self.tokens_context / steps - tokens * context
        cc = self.context_context / steps - context**2
        ts = self.tokens_seconds / steps - tokens * seconds
        cs = self.context_seconds / steps - context * seconds
        cc += MIN_CONTEXT**2  # ridge regression
        if tt > MIN_SPREAD * tokens**2:
            determinant = tt * cc - tc * tc
            token_s, context_s = (ts * cc - cs * tc) / determinant, (cs * tt - ts * tc) / determinant
            if token_s >= 0 and context_s >= 0:
                return token_s, context_s
            if token_s >= 0:
                return max(ts / tt, 0.0), 0.0
        return 0.0, max(cs / cc, 0.0)


class StepCost:
    """Models a step's time: a fixed part, one for each token and one for their context, times the speed of the moment.

    The parts are a least-squares fit over many steps, because steps of one size say nothing of others. The speed is
    what the latest steps took in proportion to the fit, because a machine is slow for a while when other work comes.
    All values are seconds, and 0 while no step is known.

    Sequences that begin together have a short context together and then a long one: what their steps take now is not
    what they will take. So what is predicted is for tokens with the context that they have on average while they run.
    """

    def __init__(self) -> None:
        self._shape, self._speed = _Sums(), _Sums()
        self._fixed_s = self._token_s = self._context_s = 0.0

    def copy(self) -> StepCost:
        """Return an independent copy, for a worker that takes the place of this one."""
        other = StepCost()
        other._shape, other._speed = replace(self._shape), replace(self._speed)
        other._fixed_s, other._token_s, other._context_s = self._fixed_s, self._token_s, self._context_s
        return other

    @property
    def is_known(self) -> bool:
        """Whether a step was recorded."""
        return self._shape.steps > 0

    def is_refuted_by(self, num_tokens: int, seconds: float, context: float = 0.0) -> bool:
        """Return whether a step was so much faster than those recorded that they say nothing of it."""
        shrinkage = self._shape.tokens / self._shape.steps / num_tokens
        return OUTLIER * max(shrinkage, 1.0) * seconds < self.seconds_with(num_tokens, context)

    def record(self, num_tokens: int, seconds: float, context: float = 0.0) -> None:
        """Learn from a step. One that takes far longer than expected counts as one that takes longer.

        context  what its tokens attend to, in tokens that might take as long to compute
        """
        shape = self._shape
        if expected_s := self.seconds_with(num_tokens, context):
            growth = num_tokens * shape.steps / shape.tokens  # of larger steps less is known
            seconds = min(seconds, OUTLIER * max(growth, 1.0) * expected_s)
        shape.add(num_tokens, context, seconds, SHAPE_STEPS)
        if num_tokens * shape.steps >= LEAST_SIZE * shape.tokens:
            self._speed.add(num_tokens, context, seconds, SPEED_STEPS)
        token_s, context_s = shape.slopes()
        varying_s = token_s * shape.tokens + context_s * shape.context
        part = min(shape.seconds / varying_s, 1.0) if varying_s else 1.0
        self._token_s, self._context_s = part * token_s, part * context_s
        self._fixed_s = max(shape.seconds - part * varying_s, 0.0) / shape.steps

    @property
    def _slowness(self) -> float:
        speed = self._speed
        expected_s = self._fixed_s * speed.steps + self._token_s * speed.tokens + self._context_s * speed.context
        return speed.seconds / expected_s if expected_s else 1.0

    def seconds_with(self, num_tokens: float, context: float) -> float:
        """Return what a step takes whose tokens have this context together."""
        return (self._fixed_s + self._token_s * num_tokens + self._context_s * context) * self._slowness

    def usual(self, context: float) -> UsualCost:
        """Return what steps take whose tokens attend to so much each, in tokens that might take as long to compute."""
        return UsualCost(self.is_known, self._fixed_s, self._token_s, self._context_s * context, self._slowness)


class UsualCost(NamedTuple):
    """What steps take now whose tokens have the context that is usual. All values are 0 while no step is known."""

    is_known: bool
    fixed_s: float  # of a step; this and what follows at the usual speed
    own_s: float  # of each token
    context_s: float  # of each token's context
    slowness: float  # of the moment

    @property
    def token_s(self) -> float:
        """What each token adds to a step, its context apart."""
        return self.own_s * self.slowness

    def seconds(self, num_tokens: float) -> float:
        """Return what a step takes."""
        return (self.fixed_s + (self.own_s + self.context_s) * num_tokens) * self.slowness

    def most_tokens(self, seconds: float) -> float:
        """Return how many tokens a step can have that takes `seconds`: 0 if none, infinity if the size is no matter."""
        left_s = seconds / self.slowness - self.fixed_s if self.slowness else seconds
        if left_s <= 0:
            return 0.0
        token_s = self.own_s + self.context_s
        return left_s / token_s if token_s else math.inf

    def efficient_tokens(self, part: float) -> float:
        """Return with how many tokens a step has that part of the highest rate; infinity if that is not known."""
        token_s = self.own_s + self.context_s
        return part / (1 - part) * self.fixed_s / token_s if token_s else math.inf
