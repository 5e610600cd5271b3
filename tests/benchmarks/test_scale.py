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
    hits = sum(replica.tally.cached_tokens for replica in simulation.replicas)
    return hits / sum(replica.tally.looked_up_tokens for replica in simulation.replicas)


def test_routing_finds_nine_tenths_of_what_one_giant_cache_would_and_blind_routing_does_not(scale: Any) -> None:
    options = argparse.Namespace(replicas=12, requests=250, applications=30, rate=2.0, blocks=2048, seed=0)
    aware, blind = (scale.Simulation(options, aware) for aware in (True, False))
    for simulation in (aware, blind):
        simulation.run()
        assert len(simulation.first_token_s) == options.requests
        for replica in simulation.replicas:
            replica.core.check_invariants()

    giant = aware.giant_hits / aware.looked_up
    assert giant > 0.5
    assert hit_rate(aware) >= 0.9 * giant
    assert hit_rate(blind) < 0.8 * giant
