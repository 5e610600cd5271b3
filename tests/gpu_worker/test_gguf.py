"""A GGUF file gives the tensors of the checkpoint that it was made from."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from octavo.gpu_worker import quantization
from octavo.gpu_worker.devices.cpu.device import CpuDevice
from octavo.gpu_worker.devices.reference.device import ReferenceDevice
from octavo.gpu_worker.errors import DeviceError, ModelError
from octavo.gpu_worker.formats.gguf_file import GgufFile
from octavo.gpu_worker.loading.gguf_architectures import GGUF_ARCHITECTURES
from octavo.gpu_worker.loading.gguf_model import load_gguf, plan_gguf
from octavo.gpu_worker.loading.loading import check_device, load_model
from octavo.gpu_worker.loading.sharding import Pairs
from octavo.gpu_worker.loading.tensor_names import pairs_of
from octavo.gpu_worker.loading.weights import Checkpoint, load_folder
from octavo.gpu_worker.quantization import Quantization
from octavo.kernels.cpu.coded_rows import Coded, parts_of

from .paged import MAX_BLOCKS, Paged
from .test_models import random_tokens
from .tiny import make_checkpoint


def permuted(values: npt.NDArray[np.float32], pairs: Pairs) -> npt.NDArray[np.float32]:
    """Order rotary rows as llama.cpp's converter does."""
    heads = values.reshape(-1, pairs.head_dim, *values.shape[1:]).copy()
    rotated = heads[:, pairs.first : pairs.first + pairs.count]
    halves = rotated.reshape(len(heads), 2, pairs.count // 2, *values.shape[1:])
    rotated[:] = halves.swapaxes(1, 2).reshape(rotated.shape)
    return heads.reshape(values.shape)


PERMUTED = (
    "llama",
    "mistral3",
    "internlm2",
    "glm4",
    "granite",
    "granitemoe",
    "smollm3",
    "ernie4_5",
    "ernie4_5-moe",
    "deepseek2",
)  # llama.cpp rotates pairs of dimensions in them
EXPERT_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def published_tensors(source: Checkpoint) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield a checkpoint's tensors in the form that the converter's names are made of: experts in a stack."""
    stacks: dict[str, list[npt.NDArray[np.float32]]] = {}
    for name, tensor in source.tensors.items():
        values = tensor.float().numpy()
        name = name.replace("block_sparse_moe.router.", "block_sparse_moe.router.layer.")
        name = name.replace("block_sparse_moe.shared_expert.", "mlp.shared_expert.")
        if match := re.fullmatch(r"(.*)\.(?:mlp|block_sparse_moe)\.experts\.\d+\.(\w+)\.weight", name):
            part = EXPERT_NAMES.get(match[2], match[2])
            stacks.setdefault(f"{match[1]}.mlp.experts.{part}.weight", []).append(values)
        elif name.endswith("shared_expert_gate.weight"):
            yield name, values.squeeze()
        elif name.endswith("sinks"):
            yield f"{name}.weight", values
        elif name.endswith("moe_statics.e_score_correction_bias"):
            yield name.replace("_bias", ".bias"), values.squeeze()
        elif name.endswith("_bias"):
            yield re.sub("(_correction)?_bias$", r"\1.bias", name), values
        else:
            yield name, values
    yield from ((name, np.stack(values)) for name, values in stacks.items())


def fused(source: Checkpoint, family: str) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield a checkpoint's tensors as Phi 3 has them, or GLM-4 but for queries, keys and values."""
    parts = dict(published_tensors(source))
    for layer in range(source.config.num_layers):
        prefix = f"model.layers.{layer}."
        gated = [parts.pop(f"{prefix}mlp.{name}_proj.weight") for name in ("gate", "up")]
        if family == "phi3":
            qkv = [parts.pop(f"{prefix}self_attn.{name}_proj.weight") for name in "qkv"]
            parts[f"{prefix}self_attn.qkv_proj.weight"] = np.concatenate(qkv)
        parts[f"{prefix}mlp.gate_up_proj.weight"] = np.concatenate(gated)
    yield from parts.items()


def _tensors(source: Checkpoint, family: str, is_older: bool) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield a checkpoint's tensors as the files of a family have them; see `write_gguf`."""
    if family in ("phi3", "glm4"):
        yield from fused(source, family)
        return
    for name, values in published_tensors(source):
        if source.config.latent is not None and name.endswith("kv_b_proj.weight") and not is_older:
            matrices = values.reshape(source.config.heads.num_heads, -1, values.shape[1])
            keys, nope_dim = name.replace("kv_b_proj", "k_b_proj"), source.config.latent.nope_dim
            yield keys, matrices[:, :nope_dim].swapaxes(1, 2)
            yield keys.replace("k_b_proj", "v_b_proj"), matrices[:, nope_dim:]
        else:
            yield name, values


def write_gguf(
    path: Path,
    source: Checkpoint,
    family: str,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: dict[str, npt.NDArray[np.float32]] | None = None,
    settings: Callable[[gguf.GGUFWriter], object] = lambda _: None,
    *,
    is_older: bool = False,
) -> None:
    """Write a checkpoint as llama.cpp's converter does, matrices as `kind`.

    extra     tensors in addition
    settings  writes metadata in addition
    is_older  whether a latent attention is written as before 2025
    """
    config = source.config
    writer = gguf.GGUFWriter(str(path), family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.heads.num_heads)
    latent = config.latent
    if latent is not None and is_older:
        writer.add_head_count_kv(config.heads.num_heads)
        writer.add_key_length(latent.query_dim)
        writer.add_value_length(latent.value_dim)
    else:
        writer.add_head_count_kv(config.heads.num_kv_heads)
        writer.add_key_length(config.heads.head_dim)
        writer.add_value_length(config.heads.value_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    if config.rope.rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope.factor)
    if config.rope.rope_type == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope.factor)
        writer.add_rope_scaling_orig_ctx_len(config.rope.original_max_position_embeddings)
        if config.rope.mscale_all_dim:
            writer.add_rope_scaling_yarn_log_mul(0.1 * config.rope.mscale_all_dim)
    if latent is not None:
        if latent.query_rank:
            writer.add_q_lora_rank(latent.query_rank)
        writer.add_kv_lora_rank(latent.rank)
        if not is_older:
            writer.add_key_length_mla(latent.query_dim)
            writer.add_value_length_mla(latent.value_dim)
    if config.rope.rotary_dim != config.heads.head_dim:
        writer.add_rope_dimension_count(config.rope.rotary_dim)
    if family in ("granite", "granitemoe"):
        writer.add_embedding_scale(config.embedding_scale)
        writer.add_attention_scale(config.attention_scale)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_divisor)
    if config.logits_soft_cap:
        writer.add_attn_logit_softcapping(config.attention_soft_cap)
        writer.add_final_logit_softcapping(config.logits_soft_cap)
    if max(config.windows):
        writer.add_sliding_window(max(config.windows))
    if (experts := config.experts) is not None:
        writer.add_expert_count(experts.num_experts)
        writer.add_expert_used_count(experts.num_chosen)
        if family != "llama":
            writer.add_expert_feed_forward_length(experts.intermediate_size)
        if family in ("qwen2moe", "granitemoe"):
            writer.add_expert_shared_feed_forward_length(experts.shared_intermediate_size)
        elif experts.shared_intermediate_size:
            writer.add_expert_shared_count(experts.shared_intermediate_size // experts.intermediate_size)
        if family in ("deepseek2", "dots1"):
            writer.add_expert_weights_scale(experts.routing.scale)
            writer.add_expert_group_count(experts.routing.num_groups)
            writer.add_expert_group_used_count(experts.routing.num_chosen_groups)
            if experts.is_normalized:
                writer.add_expert_weights_norm(True)
        if experts.routing.scores == "sigmoid":
            writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    settings(writer)
    writer.add_token_list([f"token{i}" for i in range(config.vocab_size)])
    architecture = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[family]
    names = gguf.get_tensor_name_map(architecture, config.num_layers)
    dense_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    for name, values in _tensors(source, family, is_older):
        if family in PERMUTED and (pairs := pairs_of(name, replace(config, is_interleaved=True))):
            values = permuted(values, pairs)
        if family in ("gemma", "gemma2", "gemma3") and name.endswith("norm.weight"):
            values = values + 1
        suffixes = (".weight", ".bias")
        # No published mixture of Qwen has dense layers, and the package does not name their tensors.
        gguf_name = names.get_name(name, suffixes) or dense_names.get_name(name, suffixes)
        assert gguf_name is not None, name
        add_tensor(writer, gguf_name, values, kind)
    for name, values in (extra or {}).items():
        add_tensor(writer, name, values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tensor(
    writer: gguf.GGUFWriter, name: str, values: npt.NDArray[np.float32], kind: gguf.GGMLQuantizationType
) -> None:
    if values.ndim == 1 or name.endswith(".bias") or kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, np.ascontiguousarray(values))
    else:
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)


def load(path: Path, dtype: str = "auto") -> Checkpoint:
    return load_gguf(path, dtype, lambda *_: None)


def make(tmp_path: Path, name: str) -> Checkpoint:
    make_checkpoint(tmp_path / name, name)
    return load_folder(tmp_path / name, "auto", lambda *_: None)


@pytest.mark.parametrize(
    ("name", "family"), [("llama_biased", "llama"), ("llama_yarn", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")]
)
def test_an_unquantised_file_gives_the_same_bits(tmp_path: Path, name: str, family: str) -> None:
    source = make(tmp_path, name)
    write_gguf(tmp_path / "model.gguf", source, family)

    loaded = load(tmp_path / "model.gguf")

    assert loaded.tensors.keys() == source.tensors.keys()
    for tensor_name, tensor in source.tensors.items():
        assert torch.equal(loaded.tensors[tensor_name], tensor), tensor_name
    assert loaded.config.heads == source.config.heads
    assert loaded.config.tie_word_embeddings == source.config.tie_word_embeddings


GEMMA: dict[str, Any] = {
    "num_hidden_layers": 7,
    "layer_types": ["full_attention" if layer == 5 else "sliding_attention" for layer in range(7)],
    "query_pre_attn_scalar": 32,
}
DEEPSEEK_ROPE = {  # the two scales are the same, as the converter takes it
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 128,
}
# The checkpoint that a file is made of, what is special in it, and the file's architecture.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama_linear", {}, "llama"),
    "llama, biased": ("llama_biased", {}, "llama"),
    "mistral": ("mistral", {}, "llama"),
    "mistral3": ("mistral", {"sliding_window": None}, "mistral3"),
    "qwen2": ("qwen2", {"use_sliding_window": False}, "qwen2"),
    "qwen3": ("qwen3", {}, "qwen3"),
    "mixtral": ("mixtral", {}, "llama"),
    "qwen2moe": ("qwen2_moe", {}, "qwen2moe"),
    "qwen3moe": ("qwen3_moe", {}, "qwen3moe"),
    "gemma": ("gemma", {}, "gemma"),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 32}, "gemma2"),
    "gemma3": ("gemma3", GEMMA, "gemma3"),
    "granite": ("granite", {}, "granite"),
    "olmo2": ("olmo2", {}, "olmo2"),
    "olmoe": ("olmoe", {}, "olmoe"),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 4, "num_hidden_layers": 4}, "smollm3"),
    "ernie4_5": ("ernie4_5", {}, "ernie4_5"),
    "granitemoe": ("granite_moe", {}, "granitemoe"),
    "granitemoe, shared": ("granite_moe_shared", {}, "granitemoe"),
    "gpt-oss": ("gpt_oss", {}, "gpt-oss"),
    "glm4": ("glm4", {}, "glm4"),
    "ernie4_5-moe": ("ernie4_5_moe", {}, "ernie4_5-moe"),
    "minimax-m2": ("minimax_m2", {}, "minimax-m2"),
    "dots1": ("dots1", {"sliding_window": None, "norm_topk_prob": True, "routed_scaling_factor": 2.5}, "dots1"),
    "deepseek2": ("deepseek_v2", {}, "deepseek2"),
    "deepseek2, groups": ("deepseek_v2_groups", {"attention_bias": False}, "deepseek2"),
    "deepseek2, sigmoids": ("deepseek_v3", {"rope_parameters": DEEPSEEK_ROPE}, "deepseek2"),
    "phi3": ("llama_linear", {}, "phi3"),
    "internlm2": ("llama_linear", {}, "internlm2"),
    "exaone": ("llama_linear", {}, "exaone"),
    "seed_oss": ("llama_linear", {"head_dim": 32}, "seed_oss"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_of_each_architecture_gives_the_logits_of_transformers(tmp_path: Path, case: str) -> None:
    name, special, family = CASES[case]
    model = make_checkpoint(tmp_path / "folder", name, **special)
    write_gguf(tmp_path / "model.gguf", load_folder(tmp_path / "folder", "auto", lambda *_: None), family)
    token_ids = random_tokens(150)  # several times as long as the sliding windows
    with torch.no_grad():
        true = model(torch.tensor([token_ids])).logits[0]

    loaded = load_model(tmp_path / "model.gguf", "auto", 0, lambda *_: None)
    paged = Paged(ReferenceDevice(loaded.model, 512, 8, MAX_BLOCKS))
    logits = paged.compute(paged.new(token_ids), chunk=150)

    assert (logits - true).abs().max() < 1e-4 * true.abs().max()


def test_each_architecture_of_the_table_is_compared() -> None:
    families = {family for _, _, family in CASES.values()}
    assert families == {name.split(" ")[0] for name in GGUF_ARCHITECTURES}


def test_device_cuda_does_not_take_a_file_of_latent_attention(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", make(tmp_path, "deepseek_v3"), "deepseek2")
    with pytest.raises(DeviceError, match="no kernels for the latent attention of DeepseekV3ForCausalLM"):
        check_device(tmp_path / "model.gguf", "cuda", "none", has_vectors=False)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_an_older_file_has_keys_and_values_of_latent_attention_in_one_matrix(name: str, tmp_path: Path) -> None:
    source = make(tmp_path, name)
    logits = []
    for is_older in (False, True):
        write_gguf(tmp_path / "model.gguf", source, "deepseek2", is_older=is_older)
        model = load_model(tmp_path / "model.gguf", "auto", 0, lambda *_: None).model
        paged = Paged(ReferenceDevice(model, 512, 8, MAX_BLOCKS))
        logits.append(paged.compute(paged.new(random_tokens(60)), chunk=60))

    assert torch.equal(*logits)


def test_queries_of_the_largest_gemma_are_scaled_by_its_width(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "gemma3", num_hidden_layers=62, layer_types=None, query_pre_attn_scalar=16)
    source = load_folder(tmp_path, "auto", lambda *_: None)
    write_gguf(tmp_path / "model.gguf", source, "gemma3")
    config = load(tmp_path / "model.gguf").config
    assert (config.attention_scale, config.windows) == (source.config.attention_scale, source.config.windows)


@pytest.mark.parametrize(
    "case",
    [
        "mixtral",
        "qwen2moe",
        "qwen3moe",
        "gemma3",
        "phi3",
        "gpt-oss",
        "granitemoe, shared",
        "deepseek2, groups",
        "deepseek2, sigmoids",
    ],
)
def test_the_cpu_device_computes_the_same_from_a_file_as_from_a_folder(tmp_path: Path, case: str) -> None:
    name, special, family = CASES[case]
    make_checkpoint(tmp_path / "folder", name, dtype="bfloat16", **special)
    source = load_folder(tmp_path / "folder", "auto", lambda *_: None)
    write_gguf(tmp_path / "model.gguf", source, family)

    def logits(path: Path) -> torch.Tensor:
        model = load_model(path, "bfloat16", 0, lambda *_: None, packed_as=Quantization.NONE).model
        paged = Paged(CpuDevice(model, 128, 8, MAX_BLOCKS, num_threads=1))
        return paged.compute(paged.new(random_tokens(60)), chunk=60)

    assert torch.equal(logits(tmp_path / "model.gguf"), logits(tmp_path / "folder"))


def test_progress_ends_with_all_that_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a tensor is read in many pieces."""
    monkeypatch.setattr("octavo.gpu_worker.loading.gguf_model._PIECE_VALUES", 256)
    write_gguf(tmp_path / "model.gguf", make(tmp_path, "llama"), "llama")
    steps: list[tuple[int, int]] = []
    load_gguf(tmp_path / "model.gguf", "auto", lambda _, done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1] > 0
    assert len({total for _, total in steps}) == 1


def test_a_quantised_file_is_rounded_to_bfloat16(tmp_path: Path) -> None:
    source = make(tmp_path, "llama")
    write_gguf(tmp_path / "model.gguf", source, "llama", gguf.GGMLQuantizationType.Q8_0)

    loaded = load(tmp_path / "model.gguf")

    name = "model.layers.2.mlp.gate_proj.weight"
    quantised = gguf.quantize(source.tensors[name].numpy(), gguf.GGMLQuantizationType.Q8_0)
    true = torch.from_numpy(gguf.dequantize(quantised, gguf.GGMLQuantizationType.Q8_0)).bfloat16()
    assert torch.equal(loaded.tensors[name], true)
    assert {tensor.dtype for tensor in loaded.tensors.values()} == {torch.bfloat16}
    assert load(tmp_path / "model.gguf", "float32").tensors[name].dtype == torch.float32


@pytest.mark.parametrize(("dtype", "packed_as"), [("float32", None), ("auto", Quantization.NONE)])
def test_experts_of_four_bits_are_those_that_a_file_has(
    dtype: str, packed_as: Quantization | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "MIN_BYTES_OF_CODES", 0)
    make_checkpoint(tmp_path / "source", "gpt_oss", hidden_size=96, intermediate_size=64)
    source, kind = load_folder(tmp_path / "source", "auto", lambda *_: None), gguf.GGMLQuantizationType.MXFP4
    write_gguf(tmp_path / "model.gguf", source, "gpt-oss", kind)

    tensors = load_gguf(tmp_path / "model.gguf", dtype, lambda *_: None, packed_as).tensors

    for name in ("self_attn.sinks", *(f"mlp.experts.{part}_proj_bias" for part in ("gate", "up", "down"))):
        found = tensors[f"model.layers.1.{name}"]
        assert torch.equal(found, source.tensors[f"model.layers.1.{name}"].to(found.dtype)), name
    for part, expert in product(("gate", "up", "down"), range(6)):
        name = f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"
        expected = gguf.dequantize(gguf.quantize(source.tensors[name].numpy(), kind), kind)
        matrix = tensors[name]
        if packed_as is not None:
            (rows,) = parts_of(matrix)
            assert isinstance(rows, Coded)
            matrix = torch.from_numpy(rows.read(slice(0, len(matrix))).values())
        assert torch.equal(matrix, torch.from_numpy(expected)), name


def test_a_second_copy_of_tied_embeddings_serves_for_both(tmp_path: Path) -> None:
    source = make(tmp_path, "llama")
    better = source.tensors["model.embed_tokens.weight"].numpy() * np.float32(1.0001)
    write_gguf(tmp_path / "model.gguf", source, "llama", extra={"output.weight": better})

    loaded = load(tmp_path / "model.gguf")

    assert loaded.config.tie_word_embeddings
    assert torch.equal(loaded.tensors["model.embed_tokens.weight"], torch.from_numpy(better))


def test_factors_of_a_llama3_rope_divide_its_frequencies(tmp_path: Path) -> None:
    source = make(tmp_path, "llama")
    factors = np.linspace(1, 8, 8).astype(np.float32)
    write_gguf(tmp_path / "model.gguf", source, "llama", extra={"rope_freqs.weight": factors})

    assert load(tmp_path / "model.gguf").config.rope.freq_factors == tuple(factors.tolist())


def test_a_folder_with_one_gguf_file_is_a_model(tmp_path: Path) -> None:
    source = make(tmp_path, "qwen3")
    (tmp_path / "folder").mkdir()
    write_gguf(tmp_path / "folder" / "model.gguf", source, "qwen3")
    assert load_model(tmp_path / "folder", "auto", 0, lambda *_: None).architecture == "Qwen3ForCausalLM"


def test_the_version_changes_with_any_matrix(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "source", "llama")
    path = tmp_path / "model.gguf"
    write_gguf(path, load_folder(tmp_path / "source", "auto", lambda *_: None), "llama")
    data = path.read_bytes()
    tensors = GgufFile(path).tensors.values()
    versions = {load_model(path, "auto", 0, lambda *_: None).model_version}
    for tensor in tensors:
        flipped = bytes(byte ^ 1 for byte in data[tensor.offset : tensor.offset + tensor.num_bytes])
        path.write_bytes(data[: tensor.offset] + flipped + data[tensor.offset + tensor.num_bytes :])
        versions.add(load_model(path, "auto", 0, lambda *_: None).model_version)
    assert len(versions) == 1 + len(tensors)


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_told(tmp_path: Path, share: float) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, make(tmp_path, "llama"), "llama")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError, match=r"model\.gguf: .*(cut off|damaged)"):
        load(path)


def test_damaged_headers_never_do_more_than_raise(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, make(tmp_path, "llama"), "llama")
    data = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(data)
        for at in random.integers(0, 1200, 3):
            damaged[at] = random.integers(0, 256)
        path.write_bytes(damaged)
        with contextlib.suppress(ModelError):
            load(path)


def test_other_architectures_and_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, make(tmp_path, "llama"), "xverse")
    with pytest.raises(ModelError, match=r"'xverse' is not supported; supported are llama, .*qwen2, .*gemma3"):
        load(path)
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ModelError, match="not a GGUF file"):
        load(path)


@pytest.mark.parametrize(
    ("key", "value"), [("final_logit_softcapping", 30.0), ("attention.temperature_scale", 0.1), ("logit_scale", 8.0)]
)
def test_a_setting_that_would_change_what_is_computed_is_refused(tmp_path: Path, key: str, value: float) -> None:
    path, source = tmp_path / "model.gguf", make(tmp_path, "llama")
    write_gguf(path, source, "llama", settings=lambda writer: writer.add_float32(f"llama.{key}", value))
    with pytest.raises(ModelError, match=rf"llama\.{key} is .* not supported"):
        load(path)


def test_a_stack_of_experts_has_as_many_as_the_metadata_says(tmp_path: Path) -> None:
    path, source = tmp_path / "model.gguf", make(tmp_path, "mixtral")
    write_gguf(path, source, "llama")
    data = path.read_bytes()
    key = b"llama.expert_count" + (4).to_bytes(4, "little")
    assert data.count(key) == 1
    for count, says in ((3, "the metadata asks for 3 experts"), (0, "that no supported architecture has|0 experts")):
        path.write_bytes(data.replace(key + (4).to_bytes(4, "little"), key + count.to_bytes(4, "little")))
        with pytest.raises(ModelError, match=says):
            load(path)


def test_a_file_says_which_layers_have_a_window(tmp_path: Path) -> None:
    path, source = tmp_path / "model.gguf", make(tmp_path, "gemma3")
    write_gguf(path, source, "gemma3", settings=lambda writer: writer.add_sliding_window_pattern([True, False, True]))
    assert load(path).config.windows == (40, 0, 40)
    write_gguf(path, source, "gemma3", settings=lambda writer: writer.add_sliding_window_pattern(2))
    assert load(path).config.windows == (40, 0, 40)
    write_gguf(path, source, "gemma3", settings=lambda writer: writer.add_sliding_window_pattern([True, False]))
    with pytest.raises(ModelError, match="sliding_window_pattern names 2 layers"):
        load(path)

    file = GgufFile(path)
    del file.metadata["gemma3.attention.sliding_window"]
    with pytest.raises(ModelError, match=r"attention\.sliding_window is missing"):
        plan_gguf(file)


@pytest.mark.parametrize("case", ["mixtral", "qwen2moe", "gemma3", "phi3", "gpt-oss", "granitemoe", "deepseek2"])
def test_damaged_metadata_of_any_architecture_does_no_more_than_raise(tmp_path: Path, case: str) -> None:
    name, _, family = CASES[case]
    path = tmp_path / "model.gguf"
    write_gguf(path, make(tmp_path, name), family)
    data = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(data)
        for at in random.integers(0, 1500, 3):
            damaged[at] = random.integers(0, 256)
        path.write_bytes(damaged)
        with contextlib.suppress(ModelError):
            load(path)
