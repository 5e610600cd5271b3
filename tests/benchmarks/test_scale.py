"""Routing by prefix and load over many replicas, in simulated time with the real scheduler and the real routing."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scale.py"


@pytest.fixture(scope="module")
def scale() -> Any:
    spec = importlib.util.spec_from_file_location("octavo_benchmarks_scale", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hit_rate(simulation: Any) -> float:
    hits = sum(replica.metrics.cached_tokens for replica in simulation.replicas)
    return hits / sum(replica.metrics.looked_up_tokens for replica in simulation.replicas)


def options_with(deaths: int) -> argparse.Namespace:
    return argparse.Namespace(replicas=12, requests=250, applications=30, rate=2.0, blocks=2048, seed=0, deaths=deaths)


def test_routing_finds_nine_tenths_of_what_one_giant_cache_would_and_others_do_not(scale: Any) -> None:
    options = options_with(deaths=0)
    aware, *others = simulations = [scale.Simulation(options, policy) for policy in scale.POLICIES]
    for simulation in simulations:
        simulation.run()
        assert simulation.num_finished == options.requests
        assert len(simulation.first_token_s) == options.requests
        for replica in simulation.replicas:
            replica.core.check_invariants()

    giant = aware.giant_hits / aware.looked_up
    assert giant > 0.5
    assert hit_rate(aware) >= 0.9 * giant
    assert all(hit_rate(other) < 0.8 * giant for other in others)


@pytest.mark.parametrize("policy", ["aware", "round-robin", "sticky"])
def test_replicas_that_die_and_join_cost_no_request_a_token(scale: Any, policy: str) -> None:
    options = options_with(deaths=6)
    simulation = scale.Simulation(options, policy)

    simulation.run()

    assert len(simulation.replicas) == 18
    assert sum(not replica.alive for replica in simulation.replicas) == 6
    assert simulation.num_moved > 0
    assert simulation.num_finished == options.requests
    for replica in simulation.replicas:
        if replica.alive:
            replica.core.check_invariants()
