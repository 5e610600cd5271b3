"""The ranks' parts are the whole model: nothing is missing, nothing is twice, and heads stay with their key heads."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from safetensors.torch import save_file

from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.devices import device_of_ranks, gpu_of_rank
from octavo.gpu_worker.errors import DeviceError, ModelError
from octavo.gpu_worker.loading.loading import load_model
from octavo.gpu_worker.loading.sharding import Sharding
from octavo.gpu_worker.loading.weights import load_folder
from octavo.gpu_worker.models.config import ExpertsConfig, ModelConfig, RopeConfig
from octavo.gpu_worker.models.decoder import tensor_shapes
from octavo.gpu_worker.ops import Heads

from .tiny import make_checkpoint

TINY = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=10,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    heads=Heads(num_heads=4, num_kv_heads=2, head_dim=2),
    max_position_embeddings=32,
    rms_norm_eps=1e-5,
    activation="silu",
    rope=RopeConfig("default", 1e4, 2),
    windows=(0,),
)


def mixtures(ranks: int) -> st.SearchStrategy[ExpertsConfig]:
    return st.builds(
        ExpertsConfig,
        num_experts=st.just(3),
        num_chosen=st.just(2),
        is_normalized=st.booleans(),
        intermediate_size=st.sampled_from([ranks, 3 * ranks]),
        shared_intermediate_size=st.sampled_from([0, 2 * ranks]),
        in_layer=st.sampled_from([(True,), (False,)]),
    )


@st.composite
def splits(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    """A config, and a number of ranks that it can be split over."""
    ranks = draw(st.integers(1, 6))
    kv_heads = draw(st.sampled_from([n for n in (1, 2, 3, 4, 6, 8, 12) if n % ranks == 0 or ranks % n == 0]))
    num_heads = math.lcm(kv_heads, ranks) * draw(st.integers(1, 3))
    config = dataclasses.replace(
        TINY,
        vocab_size=draw(st.integers(ranks * ranks, 60)),
        hidden_size=ranks * draw(st.integers(1, 5)),
        intermediate_size=ranks * draw(st.integers(1, 5)),
        heads=Heads(num_heads, kv_heads, draw(st.sampled_from([2, 4]))),
        experts=draw(st.none() | mixtures(ranks)),
        architecture=draw(st.sampled_from(["MixtralForCausalLM", "Qwen2MoeForCausalLM"])),
        **{
            name: draw(st.booleans())
            for name in ("tie_word_embeddings", "qkv_bias", "output_bias", "mlp_bias", "qk_norm")
        },
    )
    return config, ranks


def cut(name: str, config: ModelConfig, ranks: int, whole: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Each rank's part of a tensor."""
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    parts = [Sharding(rank, ranks).part(name, config, shapes) for rank in range(ranks)]
    cuts = [whole[part.source][part.index] for part in parts]
    assert [tuple(tensor.shape) for tensor in cuts] == [part.shape for part in parts]
    return [torch.zeros_like(tensor) if part.is_zero else tensor for part, tensor in zip(parts, cuts, strict=True)]


@hypothesis.given(splits())
def test_the_parts_of_all_ranks_are_the_whole(split: tuple[ModelConfig, int]) -> None:
    config, ranks = split
    whole = {name: torch.rand(shape) for name, shape in tensor_shapes(config)}
    heads = config.heads

    for name, _ in tensor_shapes(Sharding(0, ranks).local_config(config)):
        cuts = cut(name, config, ranks, whole)
        source = whole["model.embed_tokens.weight" if name == "lm_head.weight" and name not in whole else name]
        if name.endswith(("norm.weight", ".gate.weight", "expert_gate.weight")):
            assert all(torch.equal(tensor, source) for tensor in cuts)
        elif name.endswith(("o_proj.bias", "down_proj.bias")):
            assert torch.equal(torch.stack(cuts).sum(0), source)
        elif "k_proj" in name or "v_proj" in name:
            copies = max(1, ranks // heads.num_kv_heads)
            assert torch.equal(torch.cat(cuts[::copies]), source)
            assert all(torch.equal(tensor, cuts[rank // copies * copies]) for rank, tensor in enumerate(cuts))
        else:
            columns = name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight", "embed_tokens.weight"))
            assert torch.equal(torch.cat(cuts, dim=1 if columns else 0), source)


@hypothesis.given(splits())
def test_a_query_head_is_with_its_key_head(split: tuple[ModelConfig, int]) -> None:
    config, ranks = split
    heads = config.heads
    # Each row holds the number of the key head it belongs to.
    shared = heads.num_heads // heads.num_kv_heads
    of_queries = torch.arange(heads.num_heads).repeat_interleave(heads.head_dim) // shared
    of_keys = torch.arange(heads.num_kv_heads).repeat_interleave(heads.head_dim)
    shapes = dict(tensor_shapes(config))

    for rank in range(ranks):
        sharding = Sharding(rank, ranks)
        local = sharding.local_config(config).heads
        layer = "model.layers.0.self_attn."
        queries = of_queries[sharding.part(f"{layer}q_proj.weight", config, shapes).index[0]]
        keys = of_keys[sharding.part(f"{layer}k_proj.weight", config, shapes).index[0]]
        assert (len(queries), len(keys)) == (local.num_heads * local.head_dim, local.num_kv_heads * local.head_dim)
        assert torch.equal(
            queries.view(local.num_kv_heads, -1),
            keys.view(local.num_kv_heads, -1)[:, :1].expand_as(queries.view(local.num_kv_heads, -1)),
        )


def test_a_rank_of_one_holds_everything() -> None:
    assert Sharding().local_config(TINY) is TINY


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({}, 3, r"4 query heads cannot be split over 3 ranks evenly; this model can be split over 2, 4$"),
        ({"hidden_size": 9}, 2, r"9 hidden dimensions"),
        ({"intermediate_size": 5}, 2, r"5 inner dimensions.*; this model cannot be split"),
        ({"heads": Heads(12, 3, 2), "hidden_size": 12}, 2, "3 key heads can be neither split over 2 ranks"),
        ({"experts": ExpertsConfig(4, 2, True, 6, 3, (True,))}, 2, "3 inner dimensions of the shared expert"),
        ({"experts": ExpertsConfig(4, 2, True, 5, 0, (True,))}, 2, "5 inner dimensions of an expert"),
        ({"vocab_size": 4, "heads": Heads(24, 1, 2), "hidden_size": 24, "intermediate_size": 24}, 3, "4 token ids"),
    ],
)
def test_what_cannot_be_split_is_refused(changes: dict[str, object], ranks: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Sharding(0, ranks).local_config(dataclasses.replace(TINY, **changes))  # type: ignore[arg-type]


def test_a_rank_reads_its_part_of_a_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama_biased", dtype="bfloat16", shards=2)
    whole = load_folder(tmp_path, "auto", lambda *_: None)
    read: list[tuple[int, int]] = []

    parts = [
        load_folder(tmp_path, "auto", lambda _, done, total: read.append((done, total)), Sharding(rank, 2))
        for rank in range(2)
    ]

    for name in whole.tensors:
        cuts = cut(name, whole.config, 2, whole.tensors)
        assert all(torch.equal(part.tensors[name], tensor) for part, tensor in zip(parts, cuts, strict=True)), name
        assert all(part.tensors[name].is_contiguous() for part in parts)
    sizes = [sum(tensor.nbytes for tensor in each.tensors.values()) for each in (whole, *parts)]
    assert sizes[1] == sizes[2] < 0.51 * sizes[0]
    assert read[-1][0] == sizes[2]
    assert sizes[2] <= read[-1][1] < 1.2 * sizes[2]
    assert parts[0].fingerprint == parts[1].fingerprint != whole.fingerprint


def test_a_gguf_file_is_not_split(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ModelError, match="GGUF file is not split over ranks; use the safetensors checkpoint"):
        load_model(tmp_path / "m.gguf", "auto", 0, lambda *_: None, Sharding(0, 2))


def test_a_damaged_tensor_is_told_also_by_a_rank(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    tensors = dict(load_folder(tmp_path, "auto", lambda *_: None).tensors)
    name = "model.layers.0.self_attn.k_proj.weight"
    save_file({**tensors, name: tensors[name][:16].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"k_proj.weight has shape \[16, 64\], the config asks for \[32, 64\]"):
        load_model(tmp_path, "auto", 0, lambda *_: None, Sharding(1, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 2}, "rank below it, not 2 and 2"),
        ({"world_size": 65}, "world_size must be from 1 to 64"),
        ({"device": "cpu"}, "device cpu does not split a model over processes"),
        ({"rendezvous": "tcp://*:29500"}, "every interface"),
        ({"rendezvous": "tcp://0.0.0.0:29500"}, "every interface"),
        ({"rendezvous": "tcp://[::]:29500"}, "every interface"),
        ({"rendezvous": "tcp://10.0.0.1"}, "must be ipc://PATH or tcp://ADDRESS:PORT"),
        ({"rendezvous": "10.0.0.1:29500"}, "must be ipc://PATH or tcp://ADDRESS:PORT"),
        ({"rank_timeout_s": 0.0}, "rank_timeout_s must be positive"),
    ],
)
def test_settings_of_ranks_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WorkerConfig(**{"model": "m", "world_size": 2, "device": "reference", **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_a_device_that_cannot_run_a_part_of_a_model_says_so(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.gpu_worker.devices._has_gpu", lambda: False)
    assert [device_of_ranks(name) for name in ("reference", "cuda")] == ["reference", "cuda"]
    with pytest.raises(DeviceError, match=f"device {device} cannot run a model that is split"):
        device_of_ranks(device)


def test_with_gpus_a_part_of_a_model_is_run_on_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.gpu_worker.devices._has_gpu", lambda: True)
    assert device_of_ranks("auto") == "cuda"
    assert [gpu_of_rank(rank, 4) for rank in (0, 3, 4, 6)] == ["cuda:0", "cuda:3", "cuda:0", "cuda:2"]
    assert gpu_of_rank(5, 1) == "cuda:0"


@pytest.mark.parametrize("name", ["phi3", "glm4"])
def test_matrices_that_a_checkpoint_holds_joined_are_split_like_others(name: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, name)
    whole = load_folder(tmp_path, "auto", lambda *_: None).tensors
    ranks = [load_folder(tmp_path, "auto", lambda *_: None, Sharding(rank, 2)).tensors for rank in range(2)]

    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        matrix = f"model.layers.1.{part}.weight"
        assert torch.equal(torch.cat([tensors[matrix] for tensors in ranks]), whole[matrix]), part
