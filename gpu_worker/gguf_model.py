"""Turns a GGUF file into the checkpoint it was made from: names, order of rows, tied embeddings."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.gguf_file import GgufFile, GgufTensor, StringArray
from octavo.gpu_worker.loading import Progress
from octavo.gpu_worker.models.config import MAX_LAYERS, ModelConfig, RopeConfig
from octavo.gpu_worker.models.registry import find_architecture
from octavo.gpu_worker.ops import Heads
from octavo.gpu_worker.quantization import Quantization
from octavo.gpu_worker.weights import DTYPES, Checkpoint, check_shape, fingerprint_of, name_list
from octavo.kernels.cpu import library
from octavo.kernels.cpu.coded_rows import CodedRows, Codes

RowsOf = TypeVar("RowsOf", torch.Tensor, npt.NDArray[np.uint8])  # values, or bytes of codes

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
_PIECE_VALUES = 1 << 19
_F32, _F16 = 0, 1  # GGUF's numbers of the types that are no quantisation
_CODES_OF_4_BITS = {2: library.Q4_0, 3: library.Q4_1, 12: library.Q4_K}
_CODES_OF_8_BITS = {8: library.Q8_0}


def load_gguf(path: Path, dtype: str, progress: Progress, quantization: Quantization = Quantization.NONE) -> Checkpoint:
    """Load a .gguf file. `dtype` is a name of DTYPES or "auto": bfloat16, if the file is not all float.

    Matrices that the file has in as many bits as `quantization` wants, in a kind that the native kernels
    know, are left as they are (`CodedRows`). Raises ModelError.
    """
    source = GgufFile(path)
    names = {_hub_name(name, path): name for name in source.tensors if name != _ROPE_FACTORS}
    config = _read_config(source, names)
    if config.tie_word_embeddings and "lm_head.weight" in names:
        # A second copy of tied embeddings, quantised less: the better one serves for both.
        names["model.embed_tokens.weight"] = names.pop("lm_head.weight")
    architecture = find_architecture(config.architecture, str(path))
    wanted = architecture.tensor_shapes(config)
    if wrong := wanted.keys() ^ names.keys():
        raise ModelError(f"{path}: tensors missing or not known to {config.architecture}: {name_list(wrong)}")
    for name, shape in wanted.items():
        check_shape(names[name], source.tensors[names[name]].shape, shape, str(path))
    target = DTYPES.get(dtype) or _natural_dtype(source)

    tensors: dict[str, torch.Tensor] = {}
    for name, shape in wanted.items():
        kind = _codes_wanted(name, quantization).get(source.tensors[names[name]].quantisation)
        if kind is None or len(shape) != 2:
            tensors[name] = torch.empty(shape, dtype=target)
        else:
            data = _rows_as_published(name, source.data(source.tensors[names[name]]), config, source)
            tensors[name] = CodedRows([Codes(kind, np.ascontiguousarray(data))], shape[1])
    pieces = [
        (name, rows)
        for name, shape in wanted.items()
        if not isinstance(tensors[name], CodedRows)
        for rows in _row_pieces(shape)
    ]

    def read(piece: tuple[str, slice]) -> None:
        name, rows = piece
        whole = rows.stop - rows.start == wanted[name][0]  # a vector has no rows to cut
        tensors[name][rows] = _dequantise(source, source.tensors[names[name]], slice(None) if whole else rows)

    total = sum(source.tensors[names[name]].num_bytes for name in {name for name, _ in pieces})
    done = 0
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # numpy computes without the interpreter's lock
        for (name, rows), _ in zip(pieces, threads.map(read, pieces), strict=True):
            if rows.stop >= wanted[name][0]:
                tensors[name] = _rows_as_published(name, tensors[name], config, source).contiguous()
                done += source.tensors[names[name]].num_bytes
                progress(name, done, total)
    places = [tensor.offset for tensor in source.tensors.values()]
    fingerprint = fingerprint_of([source.header_bytes(), dtype.encode()], [(path, places)])
    return Checkpoint(config, architecture, tensors, fingerprint)


def _codes_wanted(name: str, quantization: Quantization) -> dict[int, int]:
    """Return GGUF's numbers of the kinds that a tensor is left in, with the library's."""
    if quantization is Quantization.NONE:
        return {}
    has_8_bits = quantization is Quantization.INT8 or name in ("model.embed_tokens.weight", "lm_head.weight")
    return _CODES_OF_8_BITS if has_8_bits else _CODES_OF_4_BITS


def _row_pieces(shape: tuple[int, ...]) -> list[slice]:
    """Cut a tensor's rows into pieces whose float32 values stay in the processor's cache."""
    step = max(1, _PIECE_VALUES // math.prod(shape[1:])) if len(shape) > 1 else shape[0]
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def _hub_name(name: str, path: Path) -> str:
    """Translate a tensor's GGUF name to the name in a Hugging Face checkpoint."""
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in _TOP_NAMES:
        return f"{_TOP_NAMES[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    raise ModelError(f"{path}: holds a tensor that no supported architecture has: {name}")


def _read_config(source: GgufFile, names: dict[str, str]) -> ModelConfig:
    """Read the metadata. Which biases there are, and whether embeddings are tied, the tensors say."""
    family = source.metadata.get("general.architecture")
    if family not in ARCHITECTURES:
        raise ModelError(
            f"{source.path}: GGUF architecture {family!r} is not supported; supported are {', '.join(ARCHITECTURES)}"
        )
    if source.metadata.get("split.count", 1) > 1:
        raise ModelError(f"{source.path}: one part of a split GGUF; join the parts with llama-gguf-split --merge")
    if source.metadata.get(f"{family}.expert_count", 0):
        raise ModelError(f"{source.path}: mixtures of experts are not supported")
    read = _Metadata(source, family)
    num_heads = read.integer("attention.head_count")
    hidden_size = read.integer("embedding_length")
    num_layers = read.integer("block_count")
    if num_heads < 1 or not 1 <= num_layers <= MAX_LAYERS:
        raise ModelError(f"{source.path}: {num_heads} attention heads in {num_layers} layers are no model")
    head_dim = read.integer("attention.key_length", hidden_size // num_heads)
    embedding = source.tensors.get(names.get("model.embed_tokens.weight", ""))
    if embedding is None:
        raise ModelError(f"{source.path}: token_embd.weight is missing")
    return ModelConfig(
        architecture=ARCHITECTURES[family],
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        intermediate_size=read.integer("feed_forward_length"),
        num_layers=num_layers,
        heads=Heads(num_heads, read.integer("attention.head_count_kv", num_heads), head_dim),
        max_position_embeddings=read.integer("context_length"),
        rms_norm_eps=read.number("attention.layer_norm_rms_epsilon"),
        activation="silu",
        rope=_read_rope(source, read, head_dim),
        windows=(read.integer("attention.sliding_window", 0),) * num_layers,
        tie_word_embeddings="lm_head.weight" not in names or _is_second_copy(source),
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in names,
        output_bias="model.layers.0.self_attn.o_proj.bias" in names,
        mlp_bias="model.layers.0.mlp.gate_proj.bias" in names,
        qk_norm="model.layers.0.self_attn.q_norm.weight" in names,
    )


class _Metadata:
    """Typed look-ups of one architecture's keys."""

    def __init__(self, source: GgufFile, family: str) -> None:
        self._source = source
        self._family = family

    def integer(self, key: str, default: int | None = None) -> int:
        """Return an integer; an array (one value a layer) only if all its values agree."""
        value = self.get(key, default)
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelError(f"{self._source.path}: {self._family}.{key} is {value!r}, expected one integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelError(f"{self._source.path}: {self._family}.{key} is {value!r}, expected a number")
        return float(value)

    def get(self, key: str, default: object) -> object:
        """Return any value; raise ModelError if there is none and no default."""
        value = self._source.metadata.get(f"{self._family}.{key}", default)
        if value is None or isinstance(value, StringArray):
            raise ModelError(f"{self._source.path}: {self._family}.{key} is missing")
        return value


def _read_rope(source: GgufFile, read: _Metadata, head_dim: int) -> RopeConfig:
    """Read rotary settings. A llama3 scaling comes as a tensor of factors."""
    rope_type = {"none": "default"}.get(scaling := str(read.get("rope.scaling.type", "none")), scaling)
    if rope_type not in ("default", "linear", "yarn"):
        raise ModelError(f"{source.path}: rope scaling {rope_type!r} is not supported")
    if read.number("rope.scaling.attn_factor", 1.0) != 1:
        raise ModelError(f"{source.path}: a rope scaling with an attn_factor is not supported")
    factors = source.tensors.get(_ROPE_FACTORS)
    return RopeConfig(
        rope_type=rope_type,
        theta=read.number("rope.freq_base", 10000.0),
        rotary_dim=read.integer("rope.dimension_count", head_dim),
        factor=read.number("rope.scaling.factor", 1.0),
        original_max_position_embeddings=read.integer(
            "rope.scaling.original_context_length", read.integer("context_length")
        ),
        beta_fast=read.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=read.number("rope.scaling.yarn_beta_slow", 1.0),
        freq_factors=() if factors is None else tuple(_dequantise(source, factors).tolist()),
    )


def _dequantise(source: GgufFile, tensor: GgufTensor, rows: slice = slice(None)) -> torch.Tensor:
    """Return a tensor, or some of its rows, as float32."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    data = source.data(tensor)[rows]
    try:
        values = dequantize(data, GGMLQuantizationType(tensor.quantisation))
    except NotImplementedError:
        kind = GGMLQuantizationType(tensor.quantisation).name
        raise ModelError(
            f"{source.path}: {tensor.name} is quantised as {kind}, which cannot be read; use another quantisation"
        ) from None
    if not values.flags.writeable:  # an unquantised tensor comes as a view of the file
        values = values.copy()
    values = values.astype(np.float32, copy=False)
    return torch.from_numpy(values.reshape(-1, *tensor.shape[1:]))


def _rows_as_published(name: str, values: RowsOf, config: ModelConfig, source: GgufFile) -> RowsOf:
    """Undo GGUF's order of rotary rows (pairs next to each other) in llama's queries and keys."""
    if source.metadata["general.architecture"] != "llama" or ".self_attn." not in name:
        return values
    if ".q_proj." in name:
        heads = config.heads.num_heads
    elif ".k_proj." in name:
        heads = config.heads.num_kv_heads
    else:
        return values
    return values.reshape(heads, values.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)


def _is_second_copy(source: GgufFile) -> bool:
    """Tell whether `output.weight` is `token_embd.weight` in another quantisation, by some rows.

    Nothing in the metadata says it. Rows of matrices that were trained apart are not parallel.
    """
    embedding, head = source.tensors["token_embd.weight"], source.tensors["output.weight"]
    if embedding.shape != head.shape:
        return False
    rows = slice(0, None, max(1, embedding.shape[0] // 64))
    one, other = _dequantise(source, embedding, rows), _dequantise(source, head, rows)
    return bool(torch.nn.functional.cosine_similarity(one, other).median() > 0.95)


def _natural_dtype(source: GgufFile) -> torch.dtype:
    """Return the type to hold the weights in: that of the matrices if they agree on float16 or float32."""
    kinds = {tensor.quantisation for tensor in source.tensors.values() if len(tensor.shape) > 1}
    return {frozenset({_F32}): torch.float32, frozenset({_F16}): torch.float16}.get(frozenset(kinds), torch.bfloat16)
