"""Gateways die at any place, and the machine too: a stored batch has one result for each request."""

from __future__ import annotations

from pathlib import Path

import pytest

from .batch_kills import run


@pytest.mark.parametrize("seed", [1, 2])
def test_every_request_of_a_batch_has_one_result_whatever_dies(tmp_path: Path, seed: int) -> None:
    killed = run(tmp_path, requests=200, kills=8, seed=seed)
    assert sum(killed.values()) >= 4, killed
