"""Models that several kinds of tests use."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def load_tiny() -> ModuleType:
    """The module that makes tiny checkpoints; loaded by path, since tests are no package."""
    path = Path(__file__).parent / "gpu_worker" / "tiny.py"
    spec = importlib.util.spec_from_file_location("octavo_tests_tiny", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
