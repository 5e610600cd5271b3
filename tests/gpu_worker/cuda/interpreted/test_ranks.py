"""A model that is split over two processes makes the tokens of one, on the cuda device."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from driver import Driver, Sequence, cuda_engine, load
from guard import guarded
from test_tokens import GREEDY, SEEDED, check_equal

from octavo.gpu_worker.devices.cuda.parallel import largest_over_ranks, over_ranks
from octavo.gpu_worker.distributed.collectives import Collectives
from octavo.gpu_worker.distributed.rendezvous import open_store
from octavo.gpu_worker.loading.loading import load_model
from octavo.gpu_worker.loading.sharding import Sharding
from octavo.worker.v1 import worker_pb2

SETTINGS = [GREEDY, {**SEEDED, "logprobs": 2}, {"logprobs": 3}] * 2
TIMEOUT_S = 60.0


def run_ragged(driver: Driver) -> list[worker_pb2.StepResult]:
    return driver.run(SETTINGS, num_steps=5)


def run_padded(driver: Driver) -> list[worker_pb2.StepResult]:
    """Run a prompt in chunks, without logits in the first step, and decodes of three in a captured step of four."""
    sequences = [Sequence([token, 7, 8], {"logprobs": 2}, 3) for token in (5, 6, 9)]
    for sequence in sequences:
        driver.open(sequence)
    driver.step([(sequence, 2) for sequence in sequences])
    for _ in range(3):
        driver.step([(sequence, 1) for sequence in sequences])
    driver.collect_all()
    return driver.results


def rank_driver(folder: Path, store: str, rank: int, quantization: str) -> Driver:
    collectives = Collectives(open_store(store, 2, TIMEOUT_S), rank, 2, "127.0.0.1", TIMEOUT_S)
    model = load_model(folder, "auto", 96, lambda *_: None, Sharding(rank, 2)).model
    over = {"wrap": over_ranks(collectives, model.vocab_size), "largest": largest_over_ranks(collectives)}
    return Driver(cuda_engine(model, quantization=quantization, **over), seed=3)


def follow(folder: Path, store: str, output: Path, quantization: str) -> None:
    """Be rank 1, in a process of its own: the interpreter runs in one thread of a process."""
    driver = rank_driver(folder, store, 1, quantization)
    run_padded(driver)
    run_ragged(driver)
    output.write_bytes(worker_pb2.StepResult.SerializeToString(driver.results[-1]))


# The last piece of a vocabulary of 321 is shorter than the first.
@pytest.mark.parametrize(
    ("name", "vocab_size", "quantization"),
    [("llama_biased", 321, "none"), ("qwen3_moe", 320, "none"), ("llama_biased", 320, "int8")],
)
def test_two_ranks_make_the_tokens_of_one_process(
    name: str, vocab_size: int, quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tmp_path, name, num_hidden_layers=1, vocab_size=vocab_size)
    store, output = f"file:{tmp_path / 'store'}", tmp_path / "rank1"
    other = multiprocessing.get_context("spawn").Process(target=follow, args=(tmp_path, store, output, quantization))
    other.start()
    try:
        driver = rank_driver(tmp_path, store, 0, quantization)
        with guarded(monkeypatch):
            run_padded(driver)
        found = run_ragged(driver)
        other.join(TIMEOUT_S)
    finally:
        other.kill()

    whole = Driver(cuda_engine(model, quantization=quantization), seed=3)
    run_padded(whole)
    check_equal(found, run_ragged(whole))
    last = worker_pb2.StepResult.FromString(output.read_bytes())
    for timed in ("forward_us", "sample_us"):
        last.ClearField(timed)
        found[-1].ClearField(timed)
    assert last == found[-1], "ranks draw different tokens"
