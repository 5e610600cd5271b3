"""Loaded only where TRITON_INTERPRET=1: makes bfloat16 right in the interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
GPU_WORKER = HERE.parents[1]
sys.path[:0] = [str(HERE), str(GPU_WORKER), str(GPU_WORKER.parent / "kernels/triton/interpreted")]

import bf16_shim  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def _interpreter() -> None:
    torch.set_num_threads(1)
    bf16_shim.install()
