"""Clients that nobody here wrote, each in its own way through the same server."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .stack import Stack

FOLDER = Path(__file__).resolve().parent / "third_party"
PYTHON = Path(__file__).resolve().parents[2] / "build" / "third-party" / "bin" / "python"
MODEL = "smollm2-135m-instruct"
TIMEOUT_S = 240
# Nothing is fetched while tests run, and nothing is told to anybody.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="the clients are not installed: make third-party")


def use(name: str, stack: Stack, *arguments: str | Path) -> Any:
    """Run one of the programs in the folder; return what it printed last."""
    command = [PYTHON, FOLDER / f"use_{name}.py", stack.http_url, MODEL, *arguments]
    done = subprocess.run(command, env={**os.environ, **OFFLINE}, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_litellm(stack: Stack) -> None:
    got = use("litellm", stack)

    assert "Paris" in got["whole"]
    assert got["streamed"] == got["later"] == got["whole"]
    assert 0 < got["usage"] <= 24
    assert json.loads(got["structured"]) == {"city": "Paris"}
    assert got["text"].startswith(" Paris")
    assert "temperature" in got["refusal"]


def test_langchain(stack: Stack) -> None:
    got = use("langchain", stack)

    assert "Paris" in got["whole"]
    assert got["batch"] == [got["whole"]] * 2
    assert got["streamed"] == got["whole"]
    assert 0 < got["usage"] <= 24
    assert isinstance(got["person"]["age"], int)
    assert got["tool"] == "get_weather"
    assert got["text"].startswith(" Paris")


def test_llama_index(stack: Stack) -> None:
    got = use("llama_index", stack)

    assert "Paris" in got["whole"]
    assert got["streamed"] == got["whole"]
    assert got["text"].startswith(" Paris")
    assert got["text_streamed"] == got["text"]


# -- lm-eval ---------------------------------------------------------------------------------------

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "Egypt": "Cairo",
    "Russia": "Moscow", "China": "Beijing", "Greece": "Athens", "Portugal": "Lisbon", "Austria": "Vienna",
    "Poland": "Warsaw", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Canada": "Ottawa", "Peru": "Lima", "Cuba": "Havana", "Kenya": "Nairobi", "Turkey": "Ankara", "Iran": "Tehran",
    "Thailand": "Bangkok", "Vietnam": "Hanoi",
}  # fmt: skip
TASK = """\
task: capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def questions() -> list[dict[str, Any]]:
    cities = list(CAPITALS.values())
    rows = []
    for index, country in enumerate(CAPITALS):
        choices = [cities[(index + step) % len(cities)] for step in (5, 0, 11, 17)]
        rows.append({"question": f"The capital city of {country} is", "choices": choices, "answer": 1})
    return rows


def true_model(path: Path) -> Any:
    """The model of a GGUF file in transformers, in float32; its own way to load one needs another package."""
    import torch
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    settings = load_gguf_checkpoint(str(path))["config"]
    settings.pop("model_type")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing = model.load_state_dict({name: torch.as_tensor(value) for name, value in tensors.items()}, strict=False)
    assert missing.missing_keys == ["lm_head.weight"]  # which is the embedding
    return model.eval()


def true_logprobs(tokenizer: Any, model: Any) -> list[list[float]]:
    """What transformers says of each choice of each question, after it."""
    import torch

    found = []
    for row in questions():
        values = []
        for choice in row["choices"]:
            prompt, ids = (tokenizer.encode(text) for text in (row["question"], f"{row['question']} {choice}"))
            with torch.no_grad():
                logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
            targets = range(len(prompt), len(ids))
            values.append(sum(float(logprobs[at - 1, ids[at]]) for at in targets))
        found.append(values)
    return found


def test_lm_eval_gives_the_score_of_transformers(stack: Stack, smollm2: Path, tmp_path: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    true = true_logprobs(tokenizer, true_model(smollm2))
    (tmp_path / "task").mkdir()
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in questions()))
    (tmp_path / "task" / "capitals.yaml").write_text(TASK.format(path=path))

    got = use("lm_eval", stack, tmp_path / "tokenizer", tmp_path / "task", "capitals")

    accuracy = sum(max(values) == values[1] for values in true) / len(true)
    standard_error = math.sqrt(accuracy * (1 - accuracy) / (len(true) - 1))
    assert abs(got["accuracy"] - accuracy) <= standard_error
    for mine, theirs in zip(got["logprobs"], true, strict=True):
        assert mine == pytest.approx(theirs, abs=0.3)


# -- a load generator ------------------------------------------------------------------------------


def test_aiperf(stack: Stack, smollm2: Path, tmp_path: Path) -> None:
    import transformers

    transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name).save_pretrained(tmp_path)
    command: list[str | Path] = [PYTHON.parent / "aiperf", "profile", "--model", MODEL, "--url", stack.http_url]
    command += ["--endpoint-type", "chat", "--streaming", "--request-count", "12", "--concurrency", "3"]
    command += ["--isl", "40", "--osl", "12", "--tokenizer", tmp_path, "--random-seed", "1", "--ui", "none"]
    command += ["--output-artifact-dir", tmp_path / "results"]
    # Its own count is that of the text split anew, which may have more tokens than were drawn.
    command += ["--use-server-token-count"]
    # What says that the hub is off makes it take folders for names there.
    environment = {name: value for name, value in {**os.environ, **OFFLINE}.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)

    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (report,) = (tmp_path / "results").rglob("profile_export_aiperf.json")
    measured = json.loads(report.read_text())
    assert measured["request_count"]["avg"] == 12
    assert not measured.get("error_request_count")
    assert measured["time_to_first_token"]["avg"] > 0
    assert 0 < measured["output_sequence_length"]["avg"] <= 12
