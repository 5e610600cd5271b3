"""Turns a GGUF file into the checkpoint it was made from: names, order of rows, tied embeddings."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from octavo.gpu_worker.errors import ModelError, shown
from octavo.gpu_worker.formats.checkpoint_files import fingerprint_of
from octavo.gpu_worker.formats.gguf_file import GgufFile, GgufTensor
from octavo.gpu_worker.formats.gguf_kinds import KINDS, Kind
from octavo.gpu_worker.loading.folder import check_shape, name_list
from octavo.gpu_worker.loading.gguf_architectures import (
    GATINGS,
    GGUF_ARCHITECTURES,
    KEYS,
    LAYER_NAMES,
    NEUTRAL,
    TOP_NAMES,
    GgufArchitecture,
)
from octavo.gpu_worker.loading.loading import Progress
from octavo.gpu_worker.loading.tensor_names import is_packed_alone, pairs_of
from octavo.gpu_worker.loading.weights import DTYPES, Checkpoint
from octavo.gpu_worker.models.config import MAX_LAYERS, ModelConfig, checked_integer, checked_number, from_json
from octavo.gpu_worker.models.registry import Architecture, find_architecture
from octavo.gpu_worker.quantization import Quantization, takes_codes
from octavo.kernels.cpu.coded_rows import Coded, CodedRows, Unread
from octavo.kernels.group_codes import GroupCodes
from octavo.services.vocabulary.gguf_header import StringArray

RowsOf = TypeVar("RowsOf", torch.Tensor, npt.NDArray[np.int64])  # values, or numbers of rows

_ROPE_FACTORS = "rope_freqs.weight"
_PIECE_VALUES = 1 << 19
_F32, _F16 = 0, 1  # GGUF's numbers of the types that are no quantisation
_OF_4_BITS = ("Q4_0", "Q4_1", "Q4_K")  # kinds that a scheme of as many takes as they are
_OF_8_BITS = ("Q8_0",)


def load_gguf(path: Path, dtype: str, progress: Progress, packed_as: Quantization | None = None) -> Checkpoint:
    """Load a .gguf file. `dtype` is a name of DTYPES or "auto": bfloat16, if the file is not all float.

    For a device that packs them under a scheme `packed_as`, matrices are left unread (`CodedRows`): in the file's own
    codes without a scheme, if `takes_codes` says so, and under one if they have as many bits as it wants.
    Raises ModelError.
    """
    source = GgufFile(path)
    row, config, architecture, parts, wanted = plan_gguf(source)
    target = DTYPES.get(dtype) or _natural_dtype(source)

    tensors: dict[str, torch.Tensor] = {}
    keeps_codes = takes_codes(dtype, path.stat().st_size)
    kinds = {
        name: None
        if packed_as is None
        else kind_as_packed(name, parts[name].quantisation, packed_as, keeps_codes=keeps_codes)
        for name, shape in wanted.items()
        if is_packed_alone(name, len(shape))
    }
    total = sum(parts[name].num_bytes for name in wanted if kinds.get(name) is None)
    reader = _Reader(source, row, config, progress, total)
    # Packing rounds float32 to bfloat16 where it does not quantise: as bfloat16 it takes half of the memory until then.
    held = torch.bfloat16 if packed_as is Quantization.NONE and target is torch.float32 else target
    for name, shape in wanted.items():
        stored = parts[name]
        if (kind := kinds.get(name)) is not None:
            order = _rows_as_published(name, np.arange(shape[0]), config, row)
            read = partial(_codes_of, kind, source.data(stored), order)
            tensors[name] = CodedRows([Coded(shape[0], kind.shape, read, partial(source.drop, stored))], shape[1])
        elif name in kinds and packed_as is not None:
            part = Unread(shape[0], partial(reader.read, name, stored, held), partial(source.drop, stored))
            tensors[name] = CodedRows([part], shape[1], target)
        else:
            tensors[name] = reader.read(name, stored, target)
    places = [tensor.offset for tensor in source.tensors.values()]
    fingerprint = fingerprint_of([source.header_bytes(), dtype.encode()], [(path, places)])
    return Checkpoint(config, architecture, tensors, fingerprint)


def plan_gguf(
    source: GgufFile,
) -> tuple[GgufArchitecture, ModelConfig, Architecture, dict[str, GgufTensor], dict[str, tuple[int, ...]]]:
    """Return what a file's metadata says, its tensors by the names of a hub's checkpoint, and the wanted shapes.

    Raises ModelError.
    """
    path = source.path
    row = find_row(source)
    config = _read_config(source, row)
    names = _hub_names(source, row, config)
    if config.tie_word_embeddings and "lm_head.weight" in names:
        # A second copy of tied embeddings, quantised less: the better one serves for both.
        names["model.embed_tokens.weight"] = names.pop("lm_head.weight")
    architecture = find_architecture(config.architecture, str(path))
    # One more than there are is enough to find one that is missing: the metadata may ask for millions.
    wanted = dict(islice(architecture.tensor_shapes(config), len(names) + 1))
    if wrong := wanted.keys() ^ names.keys():
        raise ModelError(f"{path}: tensors missing or not known to {config.architecture}: {name_list(wrong)}")
    return row, config, architecture, _parts(source, names, wanted), wanted


def check_kinds(source: GgufFile, tensors: Iterable[GgufTensor]) -> None:
    """Raise ModelError if a tensor is quantised in a way that cannot be read. Reads a row of each kind."""
    for tensor in {tensor.quantisation: tensor for tensor in tensors}.values():
        _dequantise(source, tensor, slice(0, 1) if len(tensor.shape) > 1 else slice(None))


def kind_as_packed(name: str, number: int, quantization: Quantization, *, keeps_codes: bool) -> Kind | None:
    """Return the kind whose codes a tensor is packed in on device cpu, None if it is packed from its numbers.

    number       of the kind in the file
    keeps_codes  without a scheme
    """
    kind = KINDS.get(number)
    if kind is None or quantization is Quantization.NONE:
        return kind if keeps_codes else None
    has_8_bits = quantization is Quantization.INT8 or name in ("model.embed_tokens.weight", "lm_head.weight")
    return kind if kind.name in (_OF_8_BITS if has_8_bits else _OF_4_BITS) else None


def _codes_of(kind: Kind, data: npt.NDArray[np.uint8], order: npt.NDArray[np.int64], rows: slice) -> GroupCodes:
    """Return the codes of some rows of a matrix, which the file has in another order."""
    return kind.codes(data[order[rows]])


class _Reader:
    """Makes numbers of a file's tensors, with all threads, and tells how far it is."""

    def __init__(
        self, source: GgufFile, row: GgufArchitecture, config: ModelConfig, progress: Progress, total: int
    ) -> None:
        self._source = source
        self._row = row
        self._config = config
        self._progress = progress
        self._done, self._total = 0, total
        self._num_threads = torch.get_num_threads()
        self._threads = ThreadPoolExecutor(self._num_threads)  # numpy computes without the interpreter's lock

    def read(self, name: str, stored: GgufTensor, target: torch.dtype) -> torch.Tensor:
        """Return a tensor under the name that a hub's checkpoint has for it."""
        values = torch.empty(stored.shape, dtype=target)
        whole = [slice(None)]  # a vector has no rows to cut
        pieces = whole if len(stored.shape) == 1 else _row_pieces(stored.shape, self._num_threads)

        offset = self._row.norm_offset if name.endswith("norm.weight") else 0.0

        def fill(rows: slice) -> None:
            numbers = _dequantise(self._source, stored, rows)
            values[rows] = numbers - offset if offset else numbers

        for _ in self._threads.map(fill, pieces):
            pass
        self._done += stored.num_bytes
        self._progress(name, self._done, self._total)
        return _rows_as_published(name, values, self._config, self._row).contiguous()


def _row_pieces(shape: tuple[int, ...], num_threads: int) -> list[slice]:
    """Cut a tensor's rows into pieces whose float32 values stay in the processor's cache, at least one a thread."""
    step = max(1, min(_PIECE_VALUES // math.prod(shape[1:]), math.ceil(shape[0] / num_threads)))
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def find_row(source: GgufFile) -> GgufArchitecture:
    """Return the row of a file's architecture."""
    family = source.metadata.get("general.architecture")
    if not isinstance(family, str) or family not in GGUF_ARCHITECTURES:
        raise ModelError(
            f"{source.path}: GGUF architecture {shown(family)} is not supported; supported are "
            f"{', '.join(GGUF_ARCHITECTURES)}"
        )
    read = _Metadata(source, family)
    has_experts = read.integer("expert_count", 0) > 0
    gating = GATINGS.get(read.integer("expert_gating_func", 0), "")
    row = GGUF_ARCHITECTURES.get(f"{family} {gating}", GGUF_ARCHITECTURES[family])
    if has_experts and not row.has_experts:
        row = GGUF_ARCHITECTURES.get(f"{family} with experts", row)
    if has_experts != row.has_experts:
        raise ModelError(f"{source.path}: {family} {'with' if has_experts else 'without'} experts is not supported")
    return row


def _hub_names(source: GgufFile, row: GgufArchitecture, config: ModelConfig) -> dict[str, tuple[str, int]]:
    """Return by their names in a Hugging Face checkpoint which tensor they are in, and as its which part."""
    names: dict[str, tuple[str, int]] = {}
    for name, stored in source.tensors.items():
        if name == _ROPE_FACTORS:
            continue
        parts = name.split(".")
        if len(parts) == 2 and parts[0] in TOP_NAMES:
            names[f"{TOP_NAMES[parts[0]]}.{parts[1]}"] = name, 0
            continue
        hub, suffix = None, ""
        if len(parts) == 4 and parts[0] == "blk":
            hub = _hub_name(row, ".".join(parts[2:]))
        if hub is None and len(parts) == 4 and parts[0] == "blk":
            hub, suffix = _hub_name(row, parts[2]), f".{parts[3]}"
        if hub is None:
            raise ModelError(f"{source.path}: holds a tensor that no supported architecture has: {shown(name)}")
        if "{}" in hub[0]:
            num_experts = 0 if config.experts is None else config.experts.num_experts
            if len(stored.shape) != 3 or stored.shape[0] != num_experts:
                what = f"{name} has shape {list(stored.shape)}"
                raise ModelError(f"{source.path}: {what}, the metadata asks for {num_experts} experts")
            hub = tuple(hub[0].format(expert) for expert in range(num_experts))
        for index, each in enumerate(hub):
            if names.setdefault(f"model.layers.{parts[1]}.{each}{suffix}", (name, index)) != (name, index):
                raise ModelError(f"{source.path}: {each} of layer {parts[1]} is there twice, also in {shown(name)}")
    return names


def _hub_name(row: GgufArchitecture, name: str) -> tuple[str, ...] | None:
    """Return what a hub's checkpoint calls the parts of a layer's tensor."""
    return row.names.get(name, LAYER_NAMES.get(name))


def _parts(
    source: GgufFile, names: dict[str, tuple[str, int]], wanted: dict[str, tuple[int, ...]]
) -> dict[str, GgufTensor]:
    """Return each wanted tensor's place, also inside a tensor that holds several. Shapes are checked."""
    holders: dict[str, list[str]] = {}
    for name, (stored_name, _) in sorted(names.items(), key=lambda item: item[1]):
        holders.setdefault(stored_name, []).append(name)
    parts: dict[str, GgufTensor] = {}
    for stored_name, held in holders.items():
        stored = source.tensors[stored_name]
        shapes = [wanted[name] for name in held]
        if len(stored.shape) == 3 and len(shapes[0]) == 2:
            whole: tuple[int, ...] = (len(held), *shapes[0])
        elif shapes == [(1, *stored.shape)]:  # a matrix of one row, which the converter made a vector
            whole = stored.shape
        else:
            whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        check_shape(stored_name, stored.shape, whole, str(source.path))
        at = stored.offset
        for name, shape in zip(held, shapes, strict=True):
            num_bytes = stored.num_bytes * math.prod(shape) // math.prod(stored.shape)
            parts[name] = GgufTensor(stored_name, shape, stored.quantisation, at, num_bytes)
            at += num_bytes
    return parts


def _read_config(source: GgufFile, row: GgufArchitecture) -> ModelConfig:
    """Read the metadata. Which biases there are, and whether embeddings are tied, the tensors say."""
    if checked_integer(source.metadata.get("split.count", 1), f"{source.path}: split.count") > 1:
        raise ModelError(f"{source.path}: one part of a split GGUF; join the parts with llama-gguf-split --merge")
    read = _Metadata(source, str(source.metadata["general.architecture"]))
    read.refuse_unknown({key.name for key in row.keys.values()})
    num_heads = read.integer("attention.head_count")
    num_layers = read.integer("block_count")
    if num_heads < 1 or not 1 <= num_layers <= MAX_LAYERS:
        raise ModelError(f"{source.path}: {num_heads} attention heads in {num_layers} layers are no model")
    traits = find_architecture(row.architecture, str(source.path)).traits
    values: dict[str, object] = {**row.values}
    for name, key in {**KEYS, **row.keys}.items():
        values[traits.keys.get(name, name)] = (
            read.number(key.name, key.default) * key.scale
            if key.kind == "number"
            else read.integer(key.name, None if key.default is None else int(key.default))
        )
    width = read.integer("embedding_length") // num_heads
    head_dim = read.integer("attention.key_length", width)
    value_dim = read.integer("attention.value_length", head_dim)
    if traits.is_latent:  # else, and in older files, these are of the cache
        rope_dim = read.integer("rope.dimension_count")
        values["qk_nope_head_dim"] = read.integer("attention.key_length_mla", head_dim) - rope_dim
        values["v_head_dim"] = read.integer("attention.value_length_mla", value_dim)
    elif value_dim != head_dim:
        raise ModelError(f"{source.path}: keys and values of different sizes are not supported")
    embedding = source.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelError(f"{source.path}: token_embd.weight is missing")
    if row.scales_by_width is not None:
        values["query_pre_attn_scalar"] = width if num_layers in row.scales_by_width else head_dim
    windows = _read_windows(read, row, num_layers)
    rope = _read_rope(source, read)
    if row.window_theta is not None:
        theta = read.number("rope.freq_base_swa", row.window_theta)
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": theta}}
    values |= {
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": read.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "vocab_size": embedding.shape[0],
        "sliding_window": None,
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in source.tensors or _is_second_copy(source),
    }
    if row.has_experts:
        values[traits.keys.get("first_k_dense_replace", "first_k_dense_replace")] = 0  # as the tensors say
        values["mlp_only_layers"] = [
            layer for layer in range(num_layers) if f"blk.{layer}.ffn_gate_inp.weight" not in source.tensors
        ]
        if (is_normalized := read.get("expert_weights_norm", values.get("norm_topk_prob"))) is not None:
            values["norm_topk_prob"] = is_normalized
    config = from_json(values, row.architecture, traits, str(source.path))

    rotary_dim = read.integer("rope.dimension_count", head_dim)
    factors = source.tensors.get(_ROPE_FACTORS)
    if factors is not None:
        check_shape(_ROPE_FACTORS, factors.shape, (rotary_dim // 2,), str(source.path))
    freq_factors = () if factors is None else tuple(_dequantise(source, factors).tolist())
    window_rope, latent = config.window_rope, config.latent
    return replace(
        config,
        windows=windows,
        rope=replace(config.rope, rotary_dim=rotary_dim, freq_factors=freq_factors),
        window_rope=None if window_rope is None else replace(window_rope, rotary_dim=rotary_dim),
        qkv_bias=bool({"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"} & source.tensors.keys()),
        output_bias="blk.0.attn_output.bias" in source.tensors,
        mlp_bias="blk.0.ffn_up.bias" in source.tensors,
        latent=latent and replace(latent, is_split="blk.0.attn_k_b.weight" in source.tensors),
    )


def _read_windows(read: _Metadata, row: GgufArchitecture, num_layers: int) -> tuple[int, ...]:
    """Return each layer's sliding window, 0 for none."""
    window = read.integer("attention.sliding_window", None if row.window_pattern else 0)
    pattern = read.get("attention.sliding_window_pattern", row.window_pattern)
    if isinstance(pattern, array):  # whether each layer has it
        if len(pattern) != num_layers:
            raise ModelError(f"{read.where('attention.sliding_window_pattern')} names {len(pattern)} layers")
        return tuple(window if has_window else 0 for has_window in pattern)
    every = checked_integer(pattern, read.where("attention.sliding_window_pattern"))
    if every < 0:
        raise ModelError(f"{read.where('attention.sliding_window_pattern')} is {every}, expected at least 0")
    return tuple(window if every == 0 or (layer + 1) % every else 0 for layer in range(num_layers))


class _Metadata:
    """Typed look-ups of one architecture's keys."""

    def __init__(self, source: GgufFile, family: str) -> None:
        self._source = source
        self._family = family

    def integer(self, key: str, default: int | None = None) -> int:
        """Return an integer; an array (one value a layer) only if all its values agree."""
        value = self.get(key, default)
        if isinstance(value, array) and value and min(value) == max(value):
            value = value[0]
        return checked_integer(value, self.where(key))

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number."""
        return checked_number(self.get(key, default), self.where(key))

    def where(self, key: str) -> str:
        """Return how messages name a key."""
        return f"{self._source.path}: {self._family}.{key}"

    def refuse_unknown(self, known: Set[str]) -> None:
        """Raise ModelError if a setting that is not among `known` ones changes what would be computed."""
        for key, neutral in NEUTRAL.items():
            value = self._source.metadata.get(f"{self._family}.{key}")
            if key not in known and value is not None and value not in neutral:
                raise ModelError(f"{self.where(key)} is {shown(value)}, which is not supported for this architecture")

    def get(self, key: str, default: object) -> object:
        """Return any value; raise ModelError if there is none and no default."""
        value = self._source.metadata.get(f"{self._family}.{key}", default)
        if value is None or isinstance(value, StringArray):
            raise ModelError(f"{self.where(key)} is missing")
        return value


def _read_rope(source: GgufFile, read: _Metadata) -> dict[str, object]:
    """Return rotary settings in the names of a config.json. A llama3 scaling comes as a tensor of factors."""
    rope_type = {"none": "default"}.get(scaling := str(read.get("rope.scaling.type", "none")), scaling)
    if rope_type not in ("default", "linear", "yarn"):
        raise ModelError(f"{source.path}: rope scaling {shown(rope_type)} is not supported")
    return {
        "rope_type": rope_type,
        "rope_theta": read.number("rope.freq_base", 10000.0),
        "factor": read.number("rope.scaling.factor", 1.0),
        "original_max_position_embeddings": read.integer(
            "rope.scaling.original_context_length", read.integer("context_length")
        ),
        "beta_fast": read.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": read.number("rope.scaling.yarn_beta_slow", 1.0),
    }


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


def _rows_as_published(name: str, values: RowsOf, config: ModelConfig, row: GgufArchitecture) -> RowsOf:
    """Undo GGUF's order of rotary rows, where it has pairs next to each other, in queries and keys."""
    pairs = pairs_of(name, replace(config, is_interleaved=row.rotates_pairs))
    if pairs is None:
        return values
    order = np.arange(len(values)).reshape(-1, pairs.head_dim)
    rotated = order[:, pairs.first : pairs.first + pairs.count]
    rotated[:] = rotated.reshape(len(order), -1, 2).swapaxes(1, 2).reshape(rotated.shape)
    return values[order.ravel()]


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
