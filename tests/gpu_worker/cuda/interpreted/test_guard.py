"""A step never reads the device from the host and allocates nothing on it: that is what a graph can record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from driver import Driver, Sequence, column, cuda_engine, load
from guard import GuardError, guarded
from test_tokens import FEATURES

from octavo.gpu_worker.devices.cuda import sampling as cuda_sampling


def run_steps(driver: Driver) -> list[Sequence]:
    """Start steps of all kinds, with two in flight: prompts, chunks, decodes, with all sampling settings."""
    sequences = [Sequence([5, 6, 7, 8, 9][: index + 1], FEATURES[place], index + 1) for index, place in
                 enumerate((0, 5, 7, 9, 10))]  # fmt: skip
    for sequence in sequences[:3]:
        driver.open(sequence)
    driver.step([(sequences[0], 1), (sequences[1], 1)])
    driver.step([(sequences[0], 1), (sequences[1], 1), (sequences[2], 3)])
    for sequence in sequences[3:]:
        driver.open(sequence)
    driver.step([(sequences[3], 2), (sequences[4], 5), (sequences[0], 1)])
    driver.step([(sequence, 1) for sequence in sequences[:3]])
    return sequences


@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_no_step_reads_the_device_or_allocates(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(cuda_engine(load(tmp_path, name, num_hidden_layers=1)), seed=0)

    with guarded(monkeypatch) as guard:
        sequences = run_steps(driver)
        driver.collect_all()

    assert guard.num_operations > 100
    assert [len(sequence.tokens) - sequence.num_prompt for sequence in sequences] == [4, 2, 2, 0, 1]


BREACHES: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0, 0].item(),
    "tolist": lambda x: x[0].tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "bool": lambda x: bool(x[0, 0] > 0),
    "nonzero": lambda x: torch.nonzero(x > 0),
    "index by mask": lambda x: x[x > 0],
    "a new tensor": lambda x: torch.zeros(3),
    "a result of its own": lambda x: x + 1,
    "a type of its own": lambda x: x.double(),
}


@pytest.mark.parametrize("name", BREACHES)
def test_the_guard_notices(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(cuda_engine(load(tmp_path, "llama", num_hidden_layers=1)), seed=0)
    sequence = Sequence([5], {"bias_token_ids": column(3), "bias_values": column(1, dtype="<f4")}, 1)
    driver.open(sequence)
    sample = cuda_sampling.sample

    def breach(logits: torch.Tensor, *args: object, **settings: object) -> None:
        BREACHES[name](logits)
        sample(logits, *args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(cuda_sampling, "sample", breach)
    with pytest.raises(GuardError), guarded(monkeypatch):
        driver.step([(sequence, 1)])
