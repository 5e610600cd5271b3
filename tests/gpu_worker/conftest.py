"""What all tests of the worker share: one thread, and codes of small files."""

from __future__ import annotations

import pytest
import torch

from octavo.gpu_worker import quantization


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """More only wait for each other, with tiny models."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _small_files_in_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute tiny quantised models as large ones are: from their codes."""
    monkeypatch.setattr(quantization, "MIN_BYTES_OF_CODES", 0)
