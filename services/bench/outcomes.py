"""What one request and one run came to, and how runs are summarised."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Outcome:
    """One request. Times are seconds of a monotonic clock.

    arrivals       when each message with output came
    output_tokens  tokens it made, as the server counts them
    error          why it failed; empty if it did not
    """

    started_at: float
    arrivals: list[float] = field(default_factory=list)
    ended_at: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.arrivals[0] - self.started_at

    @property
    def gaps(self) -> list[float]:
        """Times between two messages with output: the inter-token latencies, if a message is a token."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def tpot(self) -> float:
        """Time per output token after the first; 0 if there is none."""
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


@dataclass(frozen=True)
class Objective:
    """A service level objective: a request is good if it keeps both. Seconds."""

    ttft_s: float = math.inf
    tpot_s: float = math.inf


@dataclass(frozen=True)
class Run:
    """Measurements of one run of one case. Rates are tokens a second of wall time, times are seconds.

    goodput  output tokens a second of the requests that kept the objective
    cpu_s    processor seconds of the server's processes during the run; nan if it is not ours
    """

    case: str
    requests: int
    failed: int
    seconds: float
    prompt_tokens: int
    output_tokens: int
    prompt_rate: float
    output_rate: float
    goodput: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    tpot_p50: float
    latency_p50: float
    cpu_s: float
    errors: tuple[str, ...] = ()

    @property
    def cpu_per_token(self) -> float:
        """Processor seconds for each output token."""
        return self.cpu_s / self.output_tokens if self.output_tokens else math.nan


def summarise(
    case: str, outcomes: Sequence[Outcome], seconds: float, cpu_s: float = math.nan, objective: Objective | None = None
) -> Run:
    """Return the measurements of a run's outcomes. Failed requests count as such and for nothing else."""
    objective = objective or Objective()
    good = [outcome for outcome in outcomes if not outcome.error and outcome.arrivals]
    kept = [outcome for outcome in good if outcome.ttft <= objective.ttft_s and outcome.tpot <= objective.tpot_s]
    ttfts = [outcome.ttft for outcome in good]
    gaps = [gap for outcome in good for gap in outcome.gaps]
    return Run(
        case=case,
        requests=len(outcomes),
        failed=len(outcomes) - len(good),
        seconds=seconds,
        prompt_tokens=sum(outcome.prompt_tokens for outcome in good),
        output_tokens=sum(outcome.output_tokens for outcome in good),
        prompt_rate=sum(outcome.prompt_tokens for outcome in good) / seconds,
        output_rate=sum(outcome.output_tokens for outcome in good) / seconds,
        goodput=sum(outcome.output_tokens for outcome in kept) / seconds,
        ttft_p50=percentile(ttfts, 50),
        ttft_p99=percentile(ttfts, 99),
        itl_p50=percentile(gaps, 50),
        itl_p99=percentile(gaps, 99),
        tpot_p50=percentile([outcome.tpot for outcome in good if outcome.output_tokens > 1], 50),
        latency_p50=percentile([outcome.ended_at - outcome.started_at for outcome in good], 50),
        cpu_s=cpu_s,
        errors=tuple(sorted({outcome.error for outcome in outcomes if outcome.error}))[:5],
    )


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the percentile by linear interpolation, as numpy does; nan of nothing."""
    if not values:
        return math.nan
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def median_run(runs: Sequence[Run]) -> Run:
    """Return the run of median output rate, or of median prompt rate where one token was asked for."""
    one_token = all(run.output_tokens <= run.requests for run in runs)
    ordered = sorted(runs, key=lambda run: run.prompt_rate if one_token else run.output_rate)
    return ordered[(len(ordered) - 1) // 2]
