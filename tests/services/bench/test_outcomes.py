"""A run's figures are those of its requests."""

from __future__ import annotations

import math

import numpy as np
import pytest

from octavo.services.bench.outcomes import Objective, Outcome, median_run, percentile, summarise


def request(start: float, *arrivals: float, tokens: int | None = None) -> Outcome:
    return Outcome(start, list(arrivals), arrivals[-1], prompt_tokens=10, output_tokens=tokens or len(arrivals))


def test_times_are_measured_from_the_start_of_each_request_and_between_its_messages() -> None:
    run = summarise("c2", [request(0.0, 0.5, 0.6, 0.8), request(1.0, 1.1, 1.2, 1.3)], seconds=2.0, cpu_s=0.3)

    assert (run.requests, run.failed, run.prompt_tokens, run.output_tokens) == (2, 0, 20, 6)
    assert (run.prompt_rate, run.output_rate) == (10.0, 3.0)
    assert run.ttft_p50 == pytest.approx(0.3)
    assert run.itl_p50 == pytest.approx(0.1)
    assert run.cpu_per_token == pytest.approx(0.05)


def test_a_message_of_several_tokens_counts_as_several_in_the_time_per_token() -> None:
    assert request(0.0, 1.0, 2.0, tokens=11).tpot == pytest.approx(0.1)


def test_a_failed_request_counts_for_nothing_but_as_failed() -> None:
    run = summarise("c2", [request(0.0, 0.5), Outcome(0.0, error="UNAVAILABLE")], seconds=1.0)

    assert (run.failed, run.output_tokens, run.errors) == (1, 1, ("UNAVAILABLE",))
    assert math.isnan(run.cpu_s)


def test_goodput_leaves_out_what_missed_the_objective() -> None:
    outcomes = [request(0.0, 0.1, 0.2), request(0.0, 0.9, 1.0), request(0.0, 0.1, 1.1)]

    assert summarise("c3", outcomes, 1.0, objective=Objective(ttft_s=0.5, tpot_s=0.5)).goodput == 2.0
    assert summarise("c3", outcomes, 1.0).goodput == 6.0


@pytest.mark.parametrize("percent", [1, 50, 99])
def test_percentiles_are_numpys(percent: int) -> None:
    values = [3.0, 1.0, 4.0, 1.5, 9.0]

    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))


def test_the_run_of_median_rate_stands_for_its_repeats() -> None:
    runs = [summarise("c1", [request(0.0, 1.0, 2.0)], seconds) for seconds in (1.0, 4.0, 2.0)]

    assert median_run(runs).seconds == 2.0
