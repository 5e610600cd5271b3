"""The cuda device makes the tokens that the reference device makes, whatever is in a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driver import VOCABULARY, Driver, Sequence, column, cuda_engine, load, reference_engine

from octavo.gpu_worker.devices.cuda import ops as cuda_ops
from octavo.gpu_worker.devices.cuda.runner import CudaRunner
from octavo.worker.v1 import worker_pb2

GREEDY: dict[str, Any] = {}
SEEDED = {"temperature": 0.9, "seed": 2**63 + 5, "candidate_index": 3}
ALLOWED = np.packbits(np.arange(VOCABULARY) % 3 == 0, bitorder="little").tobytes()
FEATURES: list[dict[str, Any]] = [
    GREEDY,
    SEEDED,
    {**SEEDED, "top_k": 7, "logprobs": 3, "chosen_logprob": True},
    {**SEEDED, "top_p": 0.6},
    {**SEEDED, "min_p": 0.2, "chosen_logprob": True},
    {**SEEDED, "repetition_penalty": 1.4, "frequency_penalty": 0.3, "presence_penalty": 0.4, "seed": 9},
    {"frequency_penalty": 1.5, "logprobs": 20},
    {"bias_token_ids": column(3, 4, 300), "bias_values": column(5, 6, -2, dtype="<f4"), "temperature": 1.5},
    {"allowed_token_ids": column(*range(100, 130)), "allowed_token_mask": ALLOWED, **SEEDED},
    {"banned_until_min_token_ids": column(*range(0, VOCABULARY, 2)), "min_new_tokens": 2},
    {**SEEDED, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 0.8, "logprobs": 1, "seed": 77},
]


def check_equal(found: list[worker_pb2.StepResult], expected: list[worker_pb2.StepResult]) -> None:
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        for name in ("step_id", "slot_indexes", "token_ids", "ranks", "candidate_token_ids"):
            assert getattr(one, name) == getattr(two, name), (one.step_id, name)
        for name in ("logprobs", "candidate_logprobs"):
            values = [np.frombuffer(getattr(result, name), "<f4") for result in (one, two)]
            np.testing.assert_allclose(*values, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "qwen2_moe",
        "glm4_moe",
        "gemma2",
        "gemma3",
        "phi3",
        "granite",
        "smollm3",
        "glm4",
        "olmo2",
        "gpt_oss",
    ],
)
def test_ragged_chunked_and_preempted_sequences_get_the_same_tokens(name: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"sliding_window": 12} if name in ("qwen2", "mistral") else {}  # shorter than prompts
    if name in ("gemma2", "gemma3"):
        settings = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
    model = load(tmp_path, name, **settings)
    sampling = [GREEDY, {"logprobs": 2}] * 3
    cuda = cuda_engine(model)

    found = Driver(cuda, seed=3).run(sampling, num_steps=10)

    check_equal(found, Driver(reference_engine(model), seed=3).run(sampling, num_steps=10))
    assert sum(len(result.token_ids) // 4 for result in found) > 10
    assert isinstance(cuda.runner, CudaRunner)
    assert cuda.runner._launched, "no step was padded to a captured size"


def test_norms_of_queries_and_keys_keep_the_float32_that_an_offset_was_added_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tmp_path, "gemma3", "bfloat16", num_hidden_layers=1, layer_types=["full_attention"])
    types = []
    launch = cuda_ops.rotary_write_kv

    def record(*tensors: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor, **settings: Any) -> None:
        types.extend([q_norm.dtype, k_norm.dtype])
        launch(*tensors, q_norm=q_norm, k_norm=k_norm, **settings)

    monkeypatch.setattr(cuda_ops, "rotary_write_kv", record)

    cuda_engine(model)

    assert set(types) == {torch.float32}


def test_all_sampling_settings_beside_each_other(tmp_path: Path) -> None:
    model = load(tmp_path, "llama", num_hidden_layers=1)

    found = Driver(cuda_engine(model), seed=5).run(FEATURES, num_steps=24)

    check_equal(found, Driver(reference_engine(model), seed=5).run(FEATURES, num_steps=24))
    slots = [len(result.slot_indexes) for result in found]
    assert sum(slots) // 4 > 40


def test_padding_touches_no_slot(tmp_path: Path) -> None:
    model = load(tmp_path, "llama", num_hidden_layers=1)
    results = []
    for engine in (cuda_engine(model), reference_engine(model)):
        driver = Driver(engine, seed=0)
        sequences = [Sequence([token, 7], {"presence_penalty": 1.0}, 2) for token in (5, 6, 9)]
        for sequence in sequences:
            driver.open(sequence)
        driver.step([(sequence, 2) for sequence in sequences])
        for _ in range(3):  # three decodes in a captured step of four
            driver.step([(sequence, 1) for sequence in sequences])
        driver.collect_all()
        results.append(driver.results)
    check_equal(*results)


@pytest.mark.parametrize("num_own", [1, 9])
def test_a_sequence_may_read_a_block_that_another_one_fills_in_the_same_step(num_own: int, tmp_path: Path) -> None:
    model = load(tmp_path, "llama")
    outputs = []
    for shares in (True, False):
        driver = Driver(cuda_engine(model), seed=0)
        writer = Sequence(list(range(5, 23)), {"logprobs": 4}, 18)
        reader = Sequence([*writer.tokens[:16], *range(40, 40 + num_own)], {"logprobs": 4}, 16 + num_own)
        driver.open(writer)
        driver.open(reader)
        if shares:
            driver.share_block(writer, reader)
            driver.step([(reader, num_own), (writer, 18)])
        else:
            driver.step([(writer, 18)])
            driver.step([(reader, 16 + num_own)])
        for _ in range(3):
            driver.step([(reader, 1), (writer, 1)])
        driver.collect_all()
        outputs.append((writer.tokens, reader.tokens, [result.logprobs for result in driver.results[-3:]]))

    assert outputs[0] == outputs[1]


def test_a_slot_that_is_used_again_remembers_nothing(tmp_path: Path) -> None:
    model = load(tmp_path, "llama", num_hidden_layers=1)
    driver = Driver(cuda_engine(model), seed=0)
    made = []
    for settings in ({"allowed_token_ids": column(1), "presence_penalty": 2.0, "min_p": 0.5, **SEEDED}, {}, {}):
        other = Sequence([5, 6, 7], settings, 3)
        driver.open(other)
        for count in (3, 1, 1):
            driver.step([(other, count)])
        driver.collect_all()
        driver.close(other)
        made.append(other.tokens[3:])
    assert made[0] == [1, 1, 1]
    assert made[1] == made[2]
    assert made[1] != made[0]


def test_bfloat16_weights_give_about_the_same_log_probabilities(tmp_path: Path) -> None:
    model = load(tmp_path, "qwen3", dtype="bfloat16")
    sampling = [{"logprobs": 1, "allowed_token_ids": column(token)} for token in (4, 5, 6)]

    results = [Driver(make(model), seed=3).run(sampling, num_steps=5) for make in (cuda_engine, reference_engine)]

    for one, two in zip(*results, strict=True):
        values = [np.frombuffer(result.logprobs, "<f4") for result in (one, two)]
        np.testing.assert_allclose(*values, rtol=0, atol=0.15)


def test_an_fp8_cache_gives_about_the_same_log_probabilities(tmp_path: Path) -> None:
    model = load(tmp_path, "llama", num_hidden_layers=1)
    sampling = [{"logprobs": 1, "allowed_token_ids": column(token)} for token in (4, 5, 6)]
    cuda = cuda_engine(model, kv_cache_dtype="fp8")
    assert isinstance(cuda.runner, CudaRunner)
    assert cuda.runner.kv_cache.dtype == torch.float8_e4m3fn

    found = Driver(cuda, seed=3).run(sampling, num_steps=5)

    expected = Driver(reference_engine(model), seed=3).run(sampling, num_steps=5)
    for one, two in zip(found, expected, strict=True):
        values = [np.frombuffer(result.logprobs, "<f4") for result in (one, two)]
        np.testing.assert_allclose(*values, rtol=0, atol=0.5)


def test_logits_that_are_not_finite_end_only_their_row(tmp_path: Path) -> None:
    model = load(tmp_path, "llama", num_hidden_layers=1)
    engine = cuda_engine(model)
    driver = Driver(engine, seed=0)
    bad, good = Sequence([9, 9, 9], {"logprobs": 2}, 3), Sequence([5, 6, 7], {"logprobs": 2}, 3)
    assert isinstance(engine.runner, CudaRunner)
    driver.open(bad)
    driver.step([(bad, 2)])
    engine.runner.kv_cache[:, bad.blocks[0], 1, :2] = torch.nan
    driver.open(good)
    driver.step([(bad, 1), (good, 3)])
    driver.collect_all()

    result = driver.results[-1]
    assert np.frombuffer(result.token_ids, "<u4")[0] == 0xFFFFFFFF
    assert np.frombuffer(result.ranks, "<u4").tolist() == [0, 1]
    assert np.isnan(np.frombuffer(result.candidate_logprobs, "<f4")).tolist() == [True, True, False, False]
    assert np.frombuffer(result.token_ids, "<u4")[1] < VOCABULARY
