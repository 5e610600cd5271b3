"""The cuda device with quantised weights makes the tokens of the weights that they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driver import Driver, cuda_engine, load, reference_engine
from guard import guarded
from quantised import quantise_folder
from safetensors.torch import load_file, save_file
from test_bits import PROMPT, logits_of
from test_tokens import GREEDY, SEEDED, check_equal

from octavo.gpu_worker.devices.cuda import model as cuda_model
from octavo.gpu_worker.devices.cuda.runner import CudaRunner
from octavo.gpu_worker.errors import DeviceError
from octavo.gpu_worker.loading.loading import load_model
from octavo.gpu_worker.ops import Model
from octavo.kernels.quantized_linear import quantize_weight

TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
# Of a log probability, from that of the weights as they were.
TOLERANCE = {"int8": 0.1, "fp8": 0.3}


def dequantized(folder: Path, scheme: str) -> Model:
    """Return the model of `folder` with each weight of a linear layer replaced by what its quantised one stands for."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "_proj.weight" in name:
            values, scales = quantize_weight(tensor, TYPES[scheme])
            tensors[name] = (values.float() * scales[:, None]).to(tensor.dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    return load_model(folder, "auto", 96, lambda *_: None).model


@pytest.mark.parametrize(("name", "scheme"), [("llama_biased", "int8"), ("llama_biased", "fp8"), ("qwen3_moe", "int8")])
def test_the_tokens_are_those_of_the_weights_that_the_quantised_ones_stand_for(
    name: str, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tmp_path, name, num_hidden_layers=1)
    sampling: list[dict[str, Any]] = [GREEDY, {"logprobs": 2}, {**SEEDED, "logprobs": 1}]

    driver = Driver(cuda_engine(model, quantization=scheme), seed=3)
    with guarded(monkeypatch):
        found = driver.run(sampling, num_steps=6)

    check_equal(found, Driver(reference_engine(dequantized(tmp_path, scheme)), seed=3).run(sampling, num_steps=6))


@pytest.mark.parametrize("scheme", TYPES)
def test_quantised_weights_give_about_the_log_probabilities_of_the_others(scheme: str, tmp_path: Path) -> None:
    model = load(tmp_path, "qwen3", dtype="bfloat16", num_hidden_layers=1)
    sampling = [{"logprobs": 1, "allowed_token_ids": np.array([token], "<u4").tobytes()} for token in (4, 5, 6)]
    engines = [cuda_engine(model, quantization=scheme), cuda_engine(model)]
    quantised, whole = (engine.runner for engine in engines)
    assert isinstance(quantised, CudaRunner)
    assert isinstance(whole, CudaRunner)

    found, expected = (Driver(engine, seed=3).run(sampling, num_steps=4) for engine in engines)

    differences = [
        np.abs(np.frombuffer(one.logprobs, "<f4") - np.frombuffer(two.logprobs, "<f4")).max(initial=0)
        for one, two in zip(found, expected, strict=True)
    ]
    assert 0 < max(differences) < TOLERANCE[scheme]
    assert quantised.memory.weights < 0.8 * whole.memory.weights  # the embeddings are not quantised


@pytest.mark.parametrize("scheme", TYPES)
def test_a_row_has_the_same_bits_alone_in_a_batch_and_in_chunks(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tmp_path, "llama", dtype="bfloat16", num_hidden_layers=1)

    alone = logits_of(model, [len(PROMPT)], [], monkeypatch, quantization=scheme)
    crowded = logits_of(model, [13, 17], [[3, 12]], monkeypatch, quantization=scheme)

    assert alone.keys() == crowded.keys()
    assert all(torch.equal(logits, crowded[position]) for position, logits in alone.items())


def test_what_is_not_quantised_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tmp_path, "llama", num_hidden_layers=1)
    monkeypatch.setattr(cuda_model, "LINEAR_KINDS", {"cuda:90": cuda_model.LINEAR_KINDS["cuda:80"]})
    with pytest.raises(DeviceError, match=r"needs a GPU of compute capability 8.9 or above; use none or int8"):
        cuda_engine(model, quantization="fp8")


@pytest.mark.parametrize("method", ["gptq, zero points", "w8a8", "fp8, blocks"])
def test_a_checkpoint_that_a_tool_quantised_gives_the_tokens_of_its_numbers(tmp_path: Path, method: str) -> None:
    load(tmp_path, "llama", num_hidden_layers=1)
    values = quantise_folder(tmp_path, method)
    model = load_model(tmp_path, "float32", 96, lambda *_: None).model
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(values, tmp_path / "model.safetensors", metadata={"format": "pt"})
    plain = load_model(tmp_path, "float32", 96, lambda *_: None).model

    found = Driver(cuda_engine(model), seed=3).run([GREEDY] * 2, num_steps=4)

    check_equal(found, Driver(reference_engine(plain), seed=3).run([GREEDY] * 2, num_steps=4))
