"""Checkpoints load as they are, and what is wrong with one is told plainly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.formats.checkpoint_files import fingerprint_of
from octavo.gpu_worker.loading.loading import LoadedModel, load_model
from octavo.gpu_worker.loading.weights import load_folder

from .tiny import make_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("made")
    make_checkpoint(path, "llama_biased", shards=2)
    return path


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint in two shards, to break."""
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def load(path: Path, **settings: Any) -> LoadedModel:
    return load_model(path, settings.get("dtype", "auto"), settings.get("max_model_len", 0), lambda *_: None)


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change a checkpoint's tensors; it becomes a single file."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_tensors_are_the_files_bytes_and_progress_counts_them(folder: Path) -> None:
    stored: dict[str, torch.Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        stored |= load_file(shard)
    calls: list[tuple[str, int, int]] = []

    checkpoint = load_folder(folder, "auto", lambda *call: calls.append(call))

    assert checkpoint.tensors.keys() == stored.keys() == {name for name, _, _ in calls}
    assert all(torch.equal(checkpoint.tensors[name], stored[name]) for name in stored)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert calls[-1][1] == sum(tensor.nbytes for tensor in stored.values())


def test_dtype_converts_all_weights(folder: Path) -> None:
    tensors = load_folder(folder, "bfloat16", lambda *_: None).tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_the_version_changes_with_weights_config_and_dtype(folder: Path) -> None:
    first = load(folder).model_version
    assert first == load(folder).model_version
    assert first != load(folder, dtype="bfloat16").model_version
    edit_tensors(folder, lambda tensors: tensors["lm_head.weight"].mul_(2))
    changed = load(folder).model_version
    edit_config(folder, rms_norm_eps=1e-4)
    assert len({first, changed, load(folder).model_version}) == 3


def test_the_version_changes_with_any_matrix(tmp_path: Path) -> None:
    """A merged fine-tune leaves embeddings and the last norm, which are at both ends of a file, as they were."""
    make_checkpoint(tmp_path, "llama_biased")
    stored = load_file(tmp_path / "model.safetensors")
    versions = {load(tmp_path).model_version}
    for name in stored:
        save_file({**stored, name: stored[name] * 2 + 1}, tmp_path / "model.safetensors")
        versions.add(load(tmp_path).model_version)
    assert len(versions) == 1 + len(stored)


def test_both_ends_of_each_tensor_count(tmp_path: Path) -> None:
    size = 3 * 4096 * 8
    (tmp_path / "weights").write_bytes(bytes(size))
    places = [0, size // 8, size // 2]
    found = {fingerprint_of([], [(tmp_path / "weights", places)])}
    for place in (*places, size):
        for changed in {max(place - 1, 0), min(place, size - 1)}:
            data = bytearray(size)
            data[changed] = 1
            (tmp_path / "weights").write_bytes(data)
            found.add(fingerprint_of([], [(tmp_path / "weights", places)]))
    assert len(found) == 1 + 6


@pytest.mark.parametrize("kept", [4, 100, -1])
def test_a_truncated_file_is_named(folder: Path, kept: int) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(ModelError, match=rf"{shard.name}: not a whole safetensors file .* download it again"):
        load(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        load(folder)


def test_an_index_cannot_point_outside_its_folder(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"lm_head.weight": "../other.safetensors"}}))
    with pytest.raises(ModelError, match="outside its folder"):
        load(folder)


def test_missing_unexpected_and_misshaped_tensors_are_named(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.bias"))
    with pytest.raises(ModelError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.bias"):
        load(folder)
    edit_config(folder, mlp_bias=False)
    with pytest.raises(ModelError, match=r"does not have: model\.layers\.0\.mlp\.down_proj\.bias"):
        load(folder)


def test_a_misshaped_tensor_is_named(folder: Path) -> None:
    edit_config(folder, vocab_size=321)
    with pytest.raises(
        ModelError, match=r"embed_tokens\.weight has shape \[320, 64\], the config asks for \[321, 64\]"
    ):
        load(folder)


def test_pickled_weights_are_refused_unopened(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not even opened")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*refused; download the safetensors"):
        load(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"], "auto_map": {"AutoModel": "evil.Model"}},
            "'GPT2LMHeadModel' is not supported; supported are LlamaForCausalLM, MistralForCausalLM",
        ),
        ({"architectures": None}, "none named"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "factor is missing"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3', expected an integer"),
        ({"num_attention_heads": 0}, "0 attention heads"),
        ({"num_key_value_heads": 3}, "do not share"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised as .bitsandbytes."),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(folder: Path, values: dict[str, Any], message: str) -> None:
    edit_config(folder, **values)
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_code_that_a_checkpoint_brings_along_is_ignored(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (folder / "modeling_evil.py").write_text("raise SystemExit('executed')")
    assert load(folder).architecture == "LlamaForCausalLM"


def test_a_config_that_is_no_json_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: cannot be read as JSON"):
        load(folder)


def test_a_context_longer_than_the_model_was_made_for_is_refused(folder: Path) -> None:
    assert load(folder, max_model_len=100).max_model_len == 100
    with pytest.raises(ModelError, match=r"max_model_len is 513, but .* at most 512"):
        load(folder, max_model_len=513)


def test_a_path_that_holds_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        load(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"config\.json: no such file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts_per_tok": 7}, "takes 7 of 6 experts"),
        ({"num_experts_per_tok": 0}, "takes 0 of 6 experts"),
        ({"num_experts": 5000}, "at most 4096 experts"),
        ({"moe_intermediate_size": 0}, "an expert of a size below 1"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1"),
        ({"mlp_only_layers": 1}, "mlp_only_layers a list"),
        ({"num_experts": 7}, r"missing: model\.layers\.1\.mlp\.experts\.6"),
        ({"moe_intermediate_size": 49}, r"experts\.0\.gate_proj\.weight has shape \[48, 64\], .* \[49, 64\]"),
        ({"shared_expert_intermediate_size": 0}, r"does not have: .*shared_expert"),
        ({"mlp_only_layers": [1]}, r"missing: model\.layers\.1\.mlp\.down_proj\.weight"),
    ],
)
def test_a_mixture_that_does_not_fit_its_config_is_refused(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    make_checkpoint(tmp_path, "qwen2_moe")
    edit_config(tmp_path, **values)
    with pytest.raises(ModelError, match=message):
        load(tmp_path)
