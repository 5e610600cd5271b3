"""Answers of the real model to over 300 schemas validate."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from .stack import Stack

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark that has the schemas."""
    monkeypatch.syspath_prepend(str(ROOT))
    assert "benchmarks" not in sys.modules or str(ROOT) in str(sys.modules["benchmarks"].__path__)
    return importlib.import_module("benchmarks.structured_output")


async def test_what_ends_by_itself_is_valid(stack: Stack, benchmarks: Any) -> None:
    async with stack.client() as client:
        counts = await benchmarks.check_schemas(client, benchmarks.schemas.everything(300))

    assert counts["valid"] >= 300
