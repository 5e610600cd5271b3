"""Loaded only where TRITON_INTERPRET=1: makes bfloat16 right in the interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import bf16_shim


@pytest.fixture(autouse=True, scope="session")
def _interpreter() -> None:
    torch.set_num_threads(1)
    bf16_shim.install()
