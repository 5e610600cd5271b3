from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest


def _load(path: Path) -> Any:
    """Import a file by its path: in pytest's importlib mode tests cannot import each other."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake() -> Any:
    """The module fake_gateway."""
    return _load(Path(__file__).with_name("fake_gateway.py"))


@pytest.fixture
async def gateway(fake: Any) -> AsyncIterator[Any]:
    async with fake.serve() as gateway:
        yield gateway
