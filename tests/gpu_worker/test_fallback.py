"""Modules of transformers compute what transformers computes, over the paged cache, and refuse what they cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.gpu_worker.devices import make_device
from octavo.gpu_worker.devices.reference.device import ReferenceDevice
from octavo.gpu_worker.errors import DeviceError, ModelError
from octavo.gpu_worker.loading.fallback import plan_fallback
from octavo.gpu_worker.loading.loading import check_device, device_of, load_model

from .paged import MAX_BLOCKS, Paged, Sequence
from .tiny import FALLBACKS, make_checkpoint, make_fallback


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def load(folder: Path) -> Paged:
    loaded = load_model(folder, "auto", 0, lambda *_: None, num_threads=1)
    return Paged(make_device("reference", loaded.model, 512, 8, MAX_BLOCKS))


@pytest.mark.parametrize("name", FALLBACKS)
def test_logits_are_those_of_transformers_and_chunks_change_no_bit(name: str, tmp_path: Path) -> None:
    model = make_fallback(tmp_path, name)
    paged = load(tmp_path)
    token_ids = random_tokens(90)  # twice as long as the window
    with torch.no_grad():
        true = model(torch.tensor([token_ids])).logits[0]

    whole = paged.compute(paged.new(token_ids), chunk=90)
    chunked = paged.compute(paged.new(token_ids), chunk=37)

    assert (whole - true).abs().max() < 1e-4 * true.abs().max()
    assert torch.equal(whole, chunked)


@pytest.mark.parametrize("name", ["opt", "starcoder2", "phimoe"])  # of experts, tokens are computed one by one
def test_company_changes_no_bit(name: str, tmp_path: Path) -> None:
    make_fallback(tmp_path, name)
    paged = load(tmp_path)
    alone = paged.compute(paged.new(random_tokens(50)), chunk=50)
    others = [paged.new(random_tokens(40, seed)) for seed in (1, 2, 3)]

    one = paged.new(random_tokens(50))
    paged.step([(others[0], 7), (one, 21), (others[1], 18)])
    paged.step([(others[2], 30), (others[0], 1), (one, 1)])
    paged.step([(one, 28), (others[1], 1)])

    assert torch.equal(torch.stack(one.logits), alone)


def test_a_sequence_reads_what_one_behind_it_writes_in_the_same_step(tmp_path: Path) -> None:
    make_fallback(tmp_path, "opt")
    paged = load(tmp_path)
    token_ids = random_tokens(70)
    alone = paged.compute(paged.new(token_ids), chunk=70)

    writer = paged.new(token_ids)
    reader = Sequence(token_ids, writer.blocks[:4] + paged.new(token_ids).blocks[4:], num_computed=64)
    paged.step([(reader, 6), (writer, 70)])

    assert torch.equal(torch.stack(reader.logits), alone[64:])


def test_weights_of_16_bits_are_computed_in_float32(tmp_path: Path) -> None:
    model = make_fallback(tmp_path, "phi", dtype="bfloat16", shards=3)
    token_ids = random_tokens(40)
    with torch.no_grad():
        true = model.float()(torch.tensor([token_ids])).logits[0]
    paged = load(tmp_path)

    assert (paged.compute(paged.new(token_ids), 40) - true).abs().max() < 1e-4 * true.abs().max()


def test_a_model_that_mixes_tokens_outside_of_attention_is_refused(tmp_path: Path) -> None:
    make_fallback(tmp_path, "opt")
    loaded: Any = load_model(tmp_path, "auto", 0, lambda *_: None, num_threads=1)
    layer = loaded.model._module.model.decoder.layers[1].fc1
    layer.register_forward_hook(lambda module, inputs, output: output.cumsum(-2))

    with pytest.raises(ModelError, match="its tokens depend on each other in more than causal attention"):
        make_device("reference", loaded.model, 512, 8, MAX_BLOCKS)


def test_it_runs_on_the_reference_device_and_no_other(tmp_path: Path) -> None:
    make_fallback(tmp_path / "opt", "opt")
    make_checkpoint(tmp_path / "llama", "llama")

    assert device_of("auto", tmp_path / "opt") == "reference"
    assert device_of("cpu", tmp_path / "llama") == "cpu"
    for device in ("cpu", "cuda"):
        with pytest.raises(DeviceError, match=f"device {device}: OPTForCausalLM has no description of its own"):
            check_device(tmp_path / "opt", device, "none", has_vectors=False)


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    make_fallback(tmp_path, "opt")
    (tmp_path / "modeling_opt.py").write_text("raise SystemExit('run')")
    classes = {name: f"modeling_opt.{kind}" for name, kind in (("AutoConfig", "C"), ("AutoModelForCausalLM", "M"))}
    change(tmp_path, auto_map=classes)
    load(tmp_path)  # transformers has the class: the file beside it is not looked at

    change(tmp_path, architectures=["OursForCausalLM"])
    with pytest.raises(ModelError, match=r"'OursForCausalLM' is not supported; .*\(auto_map\) is never run"):
        load(tmp_path)


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "a recurrent state": (
        {"architectures": ["MambaForCausalLM"], "model_type": "mamba"},
        "MambaForCausalLM keeps a recurrent state",
    ),
    "layers of another kind": ({"layer_types": ["full_attention", "linear_attention"]}, "layers of 'linear_attention'"),
    "layers of no kind": ({"layer_types": 3}, "layer_types is 3, expected a list"),
    "an encoder": (
        {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
        "'T5ForConditionalGeneration' is an encoder and a decoder",
    ),
    "cross attention": ({"add_cross_attention": True}, "has cross attention"),
    "no attention interface": (
        {"architectures": ["BloomForCausalLM"], "model_type": "bloom"},
        "BloomForCausalLM does not attend through transformers' attention interface",
    ),
    "a rotation that grows": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type dynamic"),
    "many layers": ({"num_hidden_layers": 1 << 30}, "num_hidden_layers asks for 1073741824 layers; at most 4096"),
    "many layers of kinds": (
        {"architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2", "num_hidden_layers": 1 << 30},
        "num_hidden_layers asks for 1073741824 layers",
    ),
    "many repeats": (
        {"architectures": ["GPTNeoForCausalLM"], "model_type": "gpt_neo", "attention_types": [[["global"], 1 << 30]]},
        "attention_types asks for 1073741824 layers",
    ),
    "many repeats of many": (
        {"architectures": ["GPTNeoForCausalLM"], "model_type": "gpt_neo", "attention_types": [[["global"] * 5000, 5]]},
        "attention_types asks for 25000 layers",
    ),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "a giant size": ({"ffn_dim": 1 << 40}, "parameters, and the files hold"),
    "a text for a size": ({"hidden_size": "x"}, r"config.json: transformers cannot (read|build) it"),
    "a name without end": (
        {"activation_function": "a\nb" + "z" * 5000},
        r"config.json: transformers cannot (read|build) it \(KeyError: [^\n]{1,1100}\)$",
    ),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "the checkpoint is quantised"),
}


@pytest.mark.parametrize("name", ["adapter_model.bin", "other.safetensors"])
def test_weights_are_those_of_the_files_that_are_checked(name: str, tmp_path: Path) -> None:
    make_fallback(tmp_path, "opt")
    tokens = random_tokens(20)
    checked = load(tmp_path)
    wanted = checked.compute(checked.new(tokens), chunk=20)
    tensors = load_file(tmp_path / "model.safetensors")
    others = {key: torch.ones_like(tensor) for key, tensor in tensors.items()}
    if name.endswith(".bin"):
        torch.save(others, tmp_path / name)
    else:
        save_file(others, tmp_path / name, metadata={"format": "pt"})
    change(tmp_path, transformers_weights=name)
    paged = load(tmp_path)
    assert torch.equal(paged.compute(paged.new(tokens), chunk=20), wanted)


def test_labels_of_a_classifier_are_not_made(tmp_path: Path) -> None:
    make_fallback(tmp_path, "opt")
    change(tmp_path, num_labels=1 << 40)
    load(tmp_path)


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be_served_are_refused_by_name(case: str, tmp_path: Path) -> None:
    values, says = SETTINGS[case]
    make_fallback(tmp_path, "opt")
    change(tmp_path, **values)
    with pytest.raises(ModelError, match=says):
        load(tmp_path)


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_fallback(tmp_path, "opt")
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.fc2.bias"))
    save_file({**tensors, name: tensors[name][:3].clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"tensors of OPTForCausalLM have other shapes: .*layers.1.fc2.bias"):
        load(tmp_path)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"tensors of OPTForCausalLM are missing: .*layers.1.fc2.bias"):
        load(tmp_path)


def test_heads_and_windows_are_known_before_weights_are_read(tmp_path: Path) -> None:
    make_fallback(tmp_path / "a", "starcoder2")
    make_fallback(tmp_path / "b", "minicpm3")
    windows = plan_fallback(tmp_path / "a").traced
    assert windows is not None
    assert [layer.window for layer in windows.layers.values()] == [40, 40, 40]
    for folder in ("a", "b"):
        planned = plan_fallback(tmp_path / folder)
        loaded: Any = load_model(tmp_path / folder, "auto", 0, lambda *_: None, num_threads=1).model
        assert planned.heads == loaded.heads
    assert ReferenceDevice(loaded, 1, 1, 1).kv_block_bytes() == 2 * 3 * 4 * 24 * 4 * 16  # values in as many dimensions
