"""A GGUF file gives the tensors of the checkpoint that it was made from."""

from __future__ import annotations

import contextlib
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.gguf_file import GgufFile
from octavo.gpu_worker.gguf_model import load_gguf
from octavo.gpu_worker.loading import load_model
from octavo.gpu_worker.weights import Checkpoint, load_folder

from .tiny import make_checkpoint

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    module, _, suffix = name.rpartition(".")
    if module in NAMES:
        return f"{NAMES[module]}.{suffix}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{suffix}"


def permuted(values: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Order rotary rows as llama.cpp's converter does."""
    shape = values.shape
    return values.reshape(heads, 2, shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(shape)


def write_gguf(
    path: Path,
    source: Checkpoint,
    family: str,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: dict[str, npt.NDArray[np.float32]] | None = None,
) -> None:
    """Write a checkpoint as llama.cpp's converter does, matrices as `kind`."""
    config = source.config
    writer = gguf.GGUFWriter(str(path), family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.heads.num_heads)
    writer.add_head_count_kv(config.heads.num_kv_heads)
    writer.add_key_length(config.heads.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_token_list([f"token{i}" for i in range(config.vocab_size)])
    for name, tensor in source.tensors.items():
        values = tensor.numpy()
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            values = permuted(values, config.heads.num_heads if "q_proj" in name else config.heads.num_kv_heads)
        add_tensor(writer, gguf_name(name), values, kind)
    for name, values in (extra or {}).items():
        add_tensor(writer, name, values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tensor(
    writer: gguf.GGUFWriter, name: str, values: npt.NDArray[np.float32], kind: gguf.GGMLQuantizationType
) -> None:
    if values.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
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


def test_progress_ends_with_all_that_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a tensor is read in many pieces."""
    monkeypatch.setattr("octavo.gpu_worker.gguf_model._PIECE_VALUES", 256)
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
    write_gguf(path, make(tmp_path, "llama"), "gemma3")
    with pytest.raises(ModelError, match="'gemma3' is not supported; supported are llama, qwen2, qwen3"):
        load(path)
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ModelError, match="not a GGUF file"):
        load(path)
