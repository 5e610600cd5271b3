"""What the scheduler's operations cost does not grow with what it knows of."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "growth.py"

OPERATIONS = [
    ("plan a step", "waiting"),
    ("plan a step", "waiting tenants"),
    ("plan a step", "past tenants"),
    ("admit", "waiting"),
    ("admit", "waiting tenants"),
    ("admit", "past tenants"),
    ("refuse", "waiting"),
    ("refuse", "waiting tenants"),
    ("cancel", "waiting"),
    ("cancel by id", "waiting"),
    ("tick", "waiting"),
    ("tick", "waiting tenants"),
    ("report the load", "waiting tenants"),
    ("list 10 requests", "waiting"),
    ("evict a block", "cached blocks"),
    ("evict a block", "caching tenants"),
    ("place a request", "waiting"),
]


@pytest.fixture(scope="module")
def growth() -> Any:
    spec = importlib.util.spec_from_file_location("octavo_benchmarks_growth", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "axis"), OPERATIONS)
def test_an_operation_costs_about_the_same_with_three_thousand_as_with_thirty(
    growth: Any, name: str, axis: str
) -> None:
    ((setup, operation),) = [each[2:] for each in growth.OPERATIONS if each[:2] == (name, axis)]
    few_us = growth.measure(setup, operation, 30)
    many_us = min(growth.measure(setup, operation, 3000) for _ in range(2))  # CPU time; a busy machine adds to it
    assert many_us < 5 * few_us + 20, (few_us, many_us)
