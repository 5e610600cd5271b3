"""Estimators are averages that the forecast learns from the requests that come, run and end."""

from __future__ import annotations

import math
from typing import NamedTuple

MEAN_MEMORY = 64  # sequences, after which one counts for a third in the mean lengths
MIN_MARGIN, FIRST_MARGIN, MAX_MARGIN = 1.05, 1.1, 1.6
LATE_PART = 0.01  # of the admitted requests: the margin stays where this part misses its deadline
MARGIN_STEP = 0.02  # by which a late one raises the margin
MARGIN_MEMORY_S = 20.0  # after which a raised margin is back at a third
DEMAND_WINDOW_S = 3.0
MAX_DEMANDING = 10_000  # tenants in a window: those beyond are not limited by turns
MAX_OUTDATED = 2.0  # times what is asked for would take now, it may have been thought to take
BIAS_MEMORY = 64  # sequences that waited, after which one counts for a third
MAX_BIAS = 2.0
PACE_PART, PACE_STEP = 0.1, 0.1  # the part of requests that may need a smaller pace; how fast that is learned
MAX_STALLED = 10_000  # tenants whose refusals are remembered
STALL_MEMORY_S = 120.0  # after the last refusal: twice the longest time after which one is asked to come again


class Margin:
    """Learns what predicted times have to be multiplied with, so that few of the admitted are late."""

    def __init__(self) -> None:
        self._value = FIRST_MARGIN
        self._at = -math.inf

    def value(self, now: float) -> float:
        """Return the factor."""
        if self._value <= FIRST_MARGIN or now <= self._at:
            return self._value
        return FIRST_MARGIN + (self._value - FIRST_MARGIN) * math.exp((self._at - now) / MARGIN_MEMORY_S)

    def ended(self, was_late: bool, now: float) -> None:
        """Learn whether an admitted request met its deadline."""
        change = MARGIN_STEP * (was_late - LATE_PART)
        self._value = min(max(self.value(now) + change, MIN_MARGIN), MAX_MARGIN)
        self._at = now


class MeanLengths:
    """Tokens of a sequence on average, the latest ones counting most: of its prompt, uncached, and of its output."""

    def __init__(self) -> None:
        self._weight = self._prompt = self._output = self._context = 0.0

    def add(self, num_prompt_tokens: int, num_output_tokens: int, num_known: int) -> None:
        """Learn from a sequence that begins to run, of which `num_known` tokens are known."""
        kept = 1 - 1 / MEAN_MEMORY
        self._weight = kept * self._weight + 1
        self._prompt = kept * self._prompt + num_prompt_tokens
        self._output = kept * self._output + num_output_tokens
        self._context = kept * self._context + num_output_tokens * (num_known + num_output_tokens / 2)

    @property
    def prompt(self) -> float:
        """Tokens to compute before the first one of the output; 0 if nothing is known."""
        return self._prompt / self._weight if self._weight else 0.0

    @property
    def output(self) -> float:
        """Tokens of the output; 1 if nothing is known."""
        return self._output / self._weight if self._weight else 1.0

    @property
    def context(self) -> float:
        """Tokens that each token of a step attends to, if as many begin as end; those of prompts count as none."""
        return self._context / (self._prompt + self._output) if self._weight else 0.0


class UsualPace:
    """The seconds for each token that nine in ten of the requests that come have at least, refused ones included.

    A group that ran more at once than this allows would be full of requests that have time, and refuse all others.
    """

    def __init__(self) -> None:
        self.seconds = math.inf

    def came(self, seconds: float) -> None:
        """Learn from a request; `seconds` is infinity if it has no deadline."""
        if math.isinf(self.seconds):
            self.seconds = seconds
        elif seconds < self.seconds:  # a stochastic approximation of the quantile
            self.seconds *= (1 - PACE_STEP) ** (1 - PACE_PART)
        else:
            self.seconds /= (1 - PACE_STEP) ** PACE_PART


class Bias:
    """How long sequences wait, in proportion to what was predicted: what the prediction does not know of."""

    def __init__(self) -> None:
        self._predicted = self._actual = float(BIAS_MEMORY)  # as if it had been right

    def add(self, predicted_s: float, actual_s: float) -> None:
        """Learn from a sequence; `predicted_s` was not corrected."""
        kept = 1 - 1 / BIAS_MEMORY
        ratio = min(max(actual_s / predicted_s, 1 / MAX_BIAS), MAX_BIAS)
        self._predicted = kept * self._predicted + 1
        self._actual = kept * self._actual + ratio

    @property
    def value(self) -> float:
        """Return the factor."""
        return max(self._actual / self._predicted, 1.0)


class Stalls:
    """For how long requests have been refused while nothing that waits began to run.

    Where nothing is known of step times, or of when a worker comes that can run what waits, this is all that tells
    when to try again. A client that comes again after as long has to wait twice as long the next time.
    """

    def __init__(self) -> None:
        self._refused: dict[str | None, tuple[float, float]] = {}  # the first and the last one, the latest last

    def refused(self, tenant: str | None, now: float) -> float:
        """Learn of a refusal, for what a tenant has in the queue or all have (None); return the seconds so far."""
        since, latest = self._refused.pop(tenant, (now, now))
        if now - latest > STALL_MEMORY_S:
            since = now
        if len(self._refused) >= MAX_STALLED:
            del self._refused[next(iter(self._refused))]
        self._refused[tenant] = since, now
        return now - since

    def opened(self, tenant: str) -> None:
        """Learn that a sequence of a tenant begins to run."""
        if self._refused:
            self._refused.pop(tenant, None)
            self._refused.pop(None, None)


class Asked(NamedTuple):
    """What is asked for: tokens of prompts and of outputs, and the seconds that they were thought to take."""

    prompt: float
    output: float
    seconds: float

    def plus(self, other: Asked) -> Asked:
        """Return both together."""
        return Asked(self.prompt + other.prompt, self.output + other.output, self.seconds + other.seconds)


_NOTHING = Asked(0.0, 0.0, 0.0)


class Demand:
    """The machine time a second that each tenant asks for, refused requests included: of this window and the last.

    Where that is more than there is, a part of the requests is turned away by turns, whatever their lengths: else
    short ones would take every place that becomes free, and long ones none.
    """

    def __init__(self) -> None:
        self._since = 0.0
        self._now: dict[str, Asked] = {}
        self._before: dict[str, Asked] = {}
        self._turns: dict[str, float] = {}  # of each tenant, what is left of the part that it may try

    def came(self, tenant: str, asked: Asked, now: float) -> None:
        """Learn what a tenant asks for."""
        if now - self._since > DEMAND_WINDOW_S:
            is_next = now - self._since < 2 * DEMAND_WINDOW_S
            self._before, self._now, self._since = (self._now if is_next else {}), {}, now
            self._turns = {name: turn for name, turn in self._turns.items() if name in self._before}
        if tenant in self._now or len(self._now) < MAX_DEMANDING:
            self._now[tenant] = self._now.get(tenant, _NOTHING).plus(asked)

    def per_s(self, tenant: str, token_s: float, output_s: float, now: float) -> float:
        """Return the seconds a second that a tenant asks for.

        What a token takes of a prompt and of an output is known better now than when it was asked for.
        """
        asked = self._before.get(tenant, _NOTHING).plus(self._now.get(tenant, _NOTHING))
        seconds = min(asked.seconds, MAX_OUTDATED * (asked.prompt * token_s + asked.output * output_s))
        return seconds / (DEMAND_WINDOW_S + now - self._since)

    def take_turn(self, tenant: str, part: float) -> bool:
        """Take a tenant's turn, of which there is one for this part of its requests."""
        turn = self._turns.get(tenant, 1.0) + part
        may = turn >= 1.0
        if tenant in self._now:
            self._turns[tenant] = turn - may
        return may
