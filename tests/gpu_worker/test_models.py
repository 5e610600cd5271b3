"""The Llama family gives the logits that transformers gives."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from octavo.gpu_worker import quantization
from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.devices.cpu.device import CpuDevice
from octavo.gpu_worker.devices.reference.device import ReferenceDevice
from octavo.gpu_worker.errors import DeviceError, ModelError
from octavo.gpu_worker.loading.loading import load_for_device, load_model
from octavo.gpu_worker.loading.sharding import Sharding
from octavo.gpu_worker.loading.stacked_experts import ExpertTensor, unstacked_handles
from octavo.gpu_worker.loading.weights import load_folder
from octavo.gpu_worker.models.decoder import Decoder

from .paged import MAX_BLOCKS, Paged
from .quantised import in_mxfp4
from .test_cpu_device import VARIANTS
from .tiny import ARCHITECTURES, LATENT, make_checkpoint, make_wrapper


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 320, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def load(folder: Path) -> Paged:
    loaded = load_model(folder, "auto", 0, lambda *_: None)
    return Paged(ReferenceDevice(loaded.model, 512, 8, MAX_BLOCKS))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, name)
    paged = load(tmp_path)
    token_ids = random_tokens(150)  # several times as long as the sliding windows
    with torch.no_grad():
        true = model(torch.tensor([token_ids])).logits[0]

    whole = paged.compute(paged.new(token_ids), chunk=150)
    chunked = paged.compute(paged.new(token_ids), chunk=37)

    assert (whole - true).abs().max() < min(2e-4, 1e-4 * true.abs().max())
    assert (chunked - true).abs().max() < min(2e-4, 1e-4 * true.abs().max())


@pytest.mark.parametrize("name", ["llama", "llama_yarn", "mistral", "phi3", "granite"])
def test_a_config_as_written_before_2026_and_shards_mean_the_same(name: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "new", name)
    make_checkpoint(tmp_path / "old", name, legacy=True, shards=3)
    assert len(list((tmp_path / "old").glob("*.safetensors"))) > 1
    token_ids = random_tokens(80)

    new, old = (load(tmp_path / kind) for kind in ("new", "old"))

    assert torch.equal(new.compute(new.new(token_ids), 80), old.compute(old.new(token_ids), 80))


@pytest.mark.parametrize("name", LATENT)
def test_company_and_chunks_change_no_bit_of_latent_attention(name: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, name)
    paged = load(tmp_path)
    alone = paged.compute(paged.new(random_tokens(90)), chunk=90)
    others = [paged.new(random_tokens(60, seed)) for seed in (1, 2)]

    one = paged.new(random_tokens(90))
    paged.step([(others[0], 17), (one, 41), (others[1], 18)])
    for _ in range(3):
        paged.step([(others[1], 1), (one, 1), (others[0], 2)])
    paged.step([(one, 46), (others[0], 30)])

    assert torch.equal(torch.stack(one.logits), alone)


# As published: a head of the cache has 576 dimensions, and more query heads than attend together share it.
PUBLISHED_SIZES = {
    "hidden_size": 320,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("name", "settings"), [("deepseek_v3", {}), ("glm4_moe_lite", PUBLISHED_SIZES)])
def test_the_cpu_device_attends_over_a_latent_cache(
    name: str, settings: dict[str, Any], variant: str, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path, name, dtype="bfloat16", **settings)
    token_ids = random_tokens(300)
    exact = load(tmp_path)
    model = load_model(tmp_path, "auto", 0, lambda *_: None).model
    paged = Paged(CpuDevice(model, 512, 8, MAX_BLOCKS, num_threads=2, variant=variant))
    others = [paged.new(random_tokens(60, seed)) for seed in (1, 2)]

    true = exact.compute(exact.new(token_ids), chunk=300)
    alone = paged.compute(paged.new(token_ids), chunk=300)
    one = paged.new(token_ids)
    paged.step([(others[0], 17), (one, 141), (others[1], 18)])
    paged.step([(others[1], 1), (one, 1), (others[0], 2)])
    paged.step([(one, 158), (others[0], 30)])

    errors = (alone - true).square().mean(dim=-1).sqrt() / true.std()
    assert errors.median() < 0.04  # of numbers in 8 bits, layer after layer
    assert torch.equal(torch.stack(one.logits), alone)
    assert paged.device.kv_block_bytes() * 2 == exact.device.kv_block_bytes()


def test_heads_that_the_kernels_have_no_room_for_are_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v3", qk_nope_head_dim=4096)  # and 16 more that are rotated
    model = load_model(tmp_path, "auto", 0, lambda *_: None).model
    with pytest.raises(DeviceError, match="latent attention with 4112 dimensions, more than 576"):
        CpuDevice(model, 512, 8, MAX_BLOCKS, num_threads=2)


def test_stacked_experts_of_four_bits_are_those_that_transformers_reads(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gpt_oss", hidden_size=96, intermediate_size=64)
    in_mxfp4(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    tensors = load_folder(tmp_path, "float32", lambda *_: None).tensors

    for layer, (name, parts) in product(
        range(2), (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",)))
    ):
        prefix = f"model.layers.{layer}.mlp.experts."
        blocks, scales = (stored[f"{prefix}{name}_{kind}"] for kind in ("blocks", "scales"))
        expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
        for part, expert in product(range(len(parts)), range(len(expected))):
            found = tensors[f"{prefix}{expert}.{parts[part]}.weight"]
            assert torch.equal(found, expected[expert, part :: len(parts)]), (layer, parts[part], expert)


@pytest.mark.parametrize("kind", ["gpt_oss", "mxfp4", "granite_moe"])
def test_some_rows_of_a_stacked_expert_are_those_of_the_whole(kind: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gpt_oss" if kind == "mxfp4" else kind)
    if kind == "mxfp4":
        in_mxfp4(tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, "pt") as handle:
        stacked = unstacked_handles(dict.fromkeys(handle.keys(), (path, handle)))
        parts = {name: part for name, (_, part) in stacked.items() if isinstance(part, ExpertTensor)}
        assert parts
        for name, part in parts.items():
            whole, piece = part.get_tensor(name), part.get_slice(name)
            assert whole.shape == torch.Size(piece.get_shape()), name
            assert torch.equal(piece[3:7, 1:], whole[3:7, 1:]), name
            assert torch.equal(piece[5:], whole[5:]), name


@pytest.mark.parametrize("kind", ["bfloat16", "mxfp4", "codes"])
def test_the_cpu_device_attends_with_sinks_and_takes_experts_with_biases(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path, "gpt_oss", dtype="bfloat16", hidden_size=96, intermediate_size=64)
    if kind != "bfloat16":
        in_mxfp4(tmp_path)
    if kind == "codes":
        monkeypatch.setattr(quantization, "MIN_BYTES_OF_CODES", 0)
    token_ids = random_tokens(300)
    exact = load(tmp_path)
    config = WorkerConfig(str(tmp_path), "cpu", packed_cache=False)
    paged = Paged(CpuDevice(load_for_device(config, lambda *_: None).model, 512, 8, MAX_BLOCKS, num_threads=2))
    others = [paged.new(random_tokens(60, seed)) for seed in (1, 2)]

    true = exact.compute(exact.new(token_ids), chunk=300)
    alone = paged.compute(paged.new(token_ids), chunk=300)
    one = paged.new(token_ids)
    paged.step([(others[0], 17), (one, 141), (others[1], 18)])
    paged.step([(others[1], 1), (one, 1), (others[0], 2)])
    paged.step([(one, 158), (others[0], 30)])

    errors = (alone - true).square().mean(dim=-1).sqrt() / true.std()
    print(kind, errors.median())
    assert errors.median() < (0.05 if kind == "codes" else 0.02)
    assert torch.equal(torch.stack(one.logits), alone)


def test_a_latent_cache_holds_one_key_a_token_for_all_heads(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "deepseek_v3")
    device = load(tmp_path).device
    assert device.kv_block_bytes() == 3 * 16 * (128 + 16) * 4  # layers, tokens, latent and rotated dimensions, bytes


def test_a_multiplier_of_what_layers_add_holds_for_layers_that_read_the_stream_itself(tmp_path: Path) -> None:
    """A norm of what is added with weights w times m is the same as one with w and the multiplier m."""
    make_checkpoint(tmp_path, "olmo2")
    logits = []
    for multiplier, weight in ((0.5, 1.0), (1.0, 0.5)):
        found = load_folder(tmp_path, "auto", lambda *_: None)
        posts = (found.config.norms.attention_post, found.config.norms.mlp_post)
        tensors = {
            name: tensor * weight if name.split(".")[-2] in posts else tensor for name, tensor in found.tensors.items()
        }
        model = Decoder(replace(found.config, residual_multiplier=multiplier), tensors, 64)
        paged = Paged(ReferenceDevice(model, 512, 8, MAX_BLOCKS))
        logits.append(paged.compute(paged.new(random_tokens(60)), 60))

    assert torch.equal(*logits)


def test_bfloat16_weights_are_computed_in_float32(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "qwen3", dtype="bfloat16")
    paged = load(tmp_path)
    token_ids = random_tokens(60)
    with torch.no_grad():
        true = model.float()(torch.tensor([token_ids])).logits[0]

    assert (paged.compute(paged.new(token_ids), 60) - true).abs().max() < 2e-4


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_the_text_part_of_a_checkpoint_for_images_gives_the_logits_of_transformers(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_wrapper(tmp_path, name)
    token_ids = random_tokens(80)
    with torch.no_grad():
        true = model(torch.tensor([token_ids])).logits[0]

    with caplog.at_level(logging.INFO, "octavo.worker"):
        paged = load(tmp_path)

    assert (paged.compute(paged.new(token_ids), 37) - true).abs().max() < 1e-4 * true.abs().max()
    assert "only text is served" in caplog.text
    assert "vision_tower" in caplog.text


def as_wrapper(folder: Path, rename: Callable[[str], str], **config: Any) -> None:
    """Make a checkpoint the text part of one for images, with its tensors under other names."""
    tensors = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file({**tensors, "visual.merger.weight": torch.ones(3)}, folder / "model.safetensors")
    text = json.loads((folder / "config.json").read_text())
    wrapper = {"architectures": ["SomeForConditionalGeneration"], "text_config": {**text, **config}}
    (folder / "config.json").write_text(json.dumps(wrapper))


NAMES_OF_TEXT_PARTS: dict[str, Callable[[str], str]] = {
    "as it was": lambda name: name,
    "a model of its own": lambda name: f"language_model.{name}",
    "beside the others": lambda name: name.replace("model.", "model.language_model.", 1),
}


@pytest.mark.parametrize("rename", NAMES_OF_TEXT_PARTS.values(), ids=NAMES_OF_TEXT_PARTS)
def test_a_text_part_is_found_under_each_of_its_names(rename: Callable[[str], str], tmp_path: Path) -> None:
    for kind in ("plain", "wrapped"):
        make_checkpoint(tmp_path / kind, "mistral")
    as_wrapper(tmp_path / "wrapped", rename)
    plain, wrapped = (load(tmp_path / kind) for kind in ("plain", "wrapped"))
    token_ids = random_tokens(40)

    assert torch.equal(plain.compute(plain.new(token_ids), 40), wrapped.compute(wrapped.new(token_ids), 40))


def test_a_text_part_of_no_known_family_is_refused_with_those_that_are(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    as_wrapper(tmp_path, lambda name: name, model_type="mamba")
    with pytest.raises(ModelError, match=r"config.json: .* model_type 'mamba', which is not supported; .* qwen3"):
        load(tmp_path)


def test_layers_that_predict_further_tokens_are_not_read_and_others_beyond_the_last_are_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "glm4_moe")
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_nextn_predict_layers": 1}))
    tensors = load_file(path)
    save_file({**tensors, "model.layers.3.eh_proj.weight": torch.ones(3), "mtp.norm.weight": torch.ones(3)}, path)
    load(tmp_path)

    save_file({**tensors, "model.layers.4.eh_proj.weight": torch.ones(3)}, path)
    with pytest.raises(ModelError, match=r"does not have: model\.layers\.4\.eh_proj\.weight"):
        load(tmp_path)


BROKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "granite, a multiplier of 0": ("granite", {"residual_multiplier": 0}, "residual_multiplier is 0, expected"),
    "granite, a text": ("granite", {"logits_scaling": "x"}, "logits_scaling is 'x', expected a finite number"),
    "smollm3, too few flags": ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers is \[1\], expected a 0 or 1"),
    "ernie4_5, bias a number": ("ernie4_5", {"use_bias": 3}, "use_bias is 3, expected true or false"),
    "phi3, no factors": ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "short_factor is None, expected a"),
    "phi3, too few factors": (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        "1 short factors, expected 6",
    ),
    "gemma2, a soft cap of 0": (
        "gemma2",
        {"final_logit_softcapping": 0},
        "final_logit_softcapping is 0, expected null or a number between",
    ),
    "glm4_moe, groups that do not fit": ("glm4_moe", {"n_group": 3}, r"8 experts from 2 of 3 groups"),
    "glm4_moe, fewer than no layers": (
        "glm4_moe",
        {"first_k_dense_replace": -1, "mlp_layer_types": None},
        "first_k_dense_replace is -1, expected 0 to 3",
    ),
    "granite_moe, more than all experts": ("granite_moe", {"num_experts_per_tok": 6}, "takes 6 of 5 experts"),
    "granite_moe, no base": (
        "granite_moe",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
        "rope_theta is 0, expected above 0",
    ),
    "granite_moe, an epsilon that is no number": ("granite_moe", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    "granite_moe_shared, less than nothing": (
        "granite_moe_shared",
        {"shared_intermediate_size": -1},
        "an expert of a size below 1",
    ),
    "glm4_moe, layers of no kind": ("glm4_moe", {"mlp_layer_types": ["x"]}, "expected dense or sparse for each layer"),
    "deepseek_v3, layers below none": ("deepseek_v3", {"num_nextn_predict_layers": -1}, "-1 num_nextn_predict_layers"),
    "deepseek_v3, no latent": ("deepseek_v3", {"kv_lora_rank": 0}, "kv_lora_rank is 0, expected 1 to 65536"),
    "deepseek_v3, a latent beyond all": ("deepseek_v3", {"kv_lora_rank": 1 << 30}, "kv_lora_rank is 1073741824"),
    "deepseek_v3, a size that is none": ("deepseek_v3", {"v_head_dim": "x"}, "v_head_dim is 'x', expected an integer"),
    "olmoe, clipped": ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0, expected null"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_config_that_cannot_be_served_names_the_key_and_what_is_expected(case: str, tmp_path: Path) -> None:
    name, values, says = BROKEN[case]
    make_checkpoint(tmp_path, name)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(ModelError, match=says):
        load(tmp_path)


def test_short_contexts_of_a_longrope_use_the_short_factors(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "phi3")
    loaded = load_model(tmp_path, "auto", 64, lambda *_: None)  # the original context
    paged = Paged(ReferenceDevice(loaded.model, 512, 8, MAX_BLOCKS))
    token_ids = random_tokens(60)
    with torch.no_grad():
        true = model(torch.tensor([token_ids])).logits[0]

    assert (paged.compute(paged.new(token_ids), 37) - true).abs().max() < 1e-4 * true.abs().max()


def test_norms_over_all_heads_are_not_split_over_ranks(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "olmo2")
    with pytest.raises(ModelError, match=r"Olmo2ForCausalLM norms queries over all heads at once, .* use one rank"):
        load_model(tmp_path, "auto", 0, lambda *_: None, Sharding(0, 2))
