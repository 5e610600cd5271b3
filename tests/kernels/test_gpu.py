"""The GPU of a machine is told apart by what torch says of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octavo.kernels.gpu import gpu_target


def find(monkeypatch: pytest.MonkeyPatch, hip: str | None = None, **properties: Any) -> str:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="it", **properties))
    return gpu_target()


def test_a_gpu_has_the_target_that_fits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(monkeypatch, major=9, minor=0) == "cuda:90"
    assert find(monkeypatch, major=8, minor=9) == "cuda:89"
    assert find(monkeypatch, major=12, minor=0) == "cuda:120"
    assert find(monkeypatch, hip="7.0", gcnArchName="gfx942:sramecc+:xnack-") == "hip:gfx942"


def test_a_gpu_that_no_kernel_is_made_for_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"it has compute capability 7\.5, 8\.0 or above"):
        find(monkeypatch, major=7, minor=5)
    with pytest.raises(ValueError, match="made for gfx942, this GPU is gfx1100"):
        find(monkeypatch, hip="7.0", gcnArchName="gfx1100")
