"""Which device quantises weights how, and what one is told who asks for something else."""

from __future__ import annotations

import pytest

from octavo.gpu_worker import quantization
from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.quantization import problem
from octavo.services.cli.serve_config import ServeConfig


@pytest.fixture(autouse=True)
def schemes(monkeypatch: pytest.MonkeyPatch) -> None:
    int8, int4, fp8 = quantization.Quantization.INT8, quantization.Quantization.INT4, quantization.Quantization.FP8
    monkeypatch.setattr(quantization, "_SCHEMES", {"cuda": (int8, fp8), "cpu": (int8, int4), "reference": ()})


def test_a_device_is_asked_for_what_it_can_do() -> None:
    assert [problem("int8", device) for device in ("cuda", "cpu", "auto")] == [""] * 3
    assert [problem("none", device) for device in ("cuda", "cpu", "reference", "auto")] == [""] * 4


@pytest.mark.parametrize(
    ("scheme", "device", "advice"),
    [
        ("fp8", "cpu", "quantization fp8 is not for device cpu: use none or int8 or int4, or device cuda"),
        ("int4", "cuda", "quantization int4 is not for device cuda: use none or int8 or fp8, or device cpu"),
        ("int8", "reference", "quantization int8 is not for device reference: use none, or device cuda or cpu"),
        ("int3", "cpu", "quantization 'int3' is not one of none, int8, int4, fp8"),
    ],
)
def test_what_a_device_cannot_do_is_told_with_what_it_can(scheme: str, device: str, advice: str) -> None:
    assert problem(scheme, device) == advice
    with pytest.raises(ValueError, match=advice):
        WorkerConfig(model="m", device=device, quantization=scheme)
    with pytest.raises(ValueError, match=advice):
        ServeConfig(model="m", device=device, quantization=scheme)
