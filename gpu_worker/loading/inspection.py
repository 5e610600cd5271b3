"""Says of a model's files whether they can be served and what that takes, before anything is loaded.

It asks the functions that load models, in the order in which they are asked then. Only a .gguf file needs torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from octavo.common.v1 import common_pb2
from octavo.gpu_worker.devices.cpu.packed_model import check_head_linear, check_heads
from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.formats.checkpoint_files import StoredTensor, read_head, read_json
from octavo.gpu_worker.formats.tensor_kinds import Head, Plan, biases_beside, plans_of
from octavo.gpu_worker.loading import fallback
from octavo.gpu_worker.loading.fallback import Fallback
from octavo.gpu_worker.loading.folder import (
    STORED_BYTES,
    check_shape,
    check_stored,
    match_tensors,
    read_config,
    read_quantization,
    weight_files,
)
from octavo.gpu_worker.loading.loading import check_device, find_files, kv_token_bytes
from octavo.gpu_worker.loading.stacked_experts import Piece, unstacked
from octavo.gpu_worker.loading.tensor_names import is_packed_alone
from octavo.gpu_worker.models import encoders
from octavo.gpu_worker.models.config import ModelConfig
from octavo.gpu_worker.quantization import Quantization, takes_codes
from octavo.kernels.group_codes import CodeShape

_JOINED = re.compile(r"[qkv]_proj|(experts\.\d+\.)?(gate_proj|up_proj|w1|w3)|experts\.\d+\.(?=down_proj|w2)")
"""What a layer's matrices are called that are packed as one, or in one format."""
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_MODALITIES: Final = {
    "vision_config": "images",
    "audio_config": "audio",
    "video_config": "video",
    "talker_config": "speech",
    "speech_config": "audio",
}
"""What a part of a config.json says that a model takes or makes besides text."""
_TASKS: Final = {
    common_pb2.MODEL_TASK_EMBED: "embed",
    common_pb2.MODEL_TASK_SCORE: "score",
    common_pb2.MODEL_TASK_CLASSIFY: "classify",
}


@dataclass(frozen=True)
class Inspection:
    """A model that can be loaded.

    task         "generate", "embed", "score" or "classify"
    shapes       of the tensors that are read, by name
    stored       bytes of those in the files, by type
    config       of a decoder that is described here, else None
    fallback     of a decoder that is not
    max_context  tokens that the model was made for
    codes        of matrices that device cpu can compute with from their codes: the kind's name, and what they mean
    """

    architecture: str
    task: str
    shapes: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, int]
    max_context: int
    config: ModelConfig | None
    codes: Mapping[str, tuple[str, CodeShape]] = field(default_factory=dict)
    fallback: Fallback | None = None

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of KV cache that a token takes, in 16 bits; 0 without a cache."""
        if self.fallback is not None:
            return kv_token_bytes(self.fallback.num_layers, self.fallback.heads)
        return 0 if self.config is None else kv_token_bytes(self.config.num_layers, self.config.heads)

    @property
    def notes(self) -> list[str]:
        """What who serves it should know, in sentences."""
        if self.fallback is not None:
            return [fallback.NOTE]
        unread = 0 if self.config is None else self.config.num_nextn_layers
        return [f"The {unread} layer(s) that predict further tokens are left unread."] if unread else []

    @property
    def rotary_token_bytes(self) -> int:
        """Bytes that the rotary tables take for each position."""
        if self.config is None:
            return 0
        return sum(rope.rotary_dim * 4 for rope in (self.config.rope, self.config.window_rope) if rope is not None)


@dataclass(frozen=True)
class WeightBytes:
    """Memory of weights: of all of them, and of those that are read to decode a token."""

    held: int
    read: int


@dataclass(frozen=True)
class Facts:
    """What files say of a model that may or may not be served."""

    architecture: str = ""
    left_out: list[str] = field(default_factory=list)
    quantised: str = ""
    licence: str = ""
    gguf: Mapping[str, int] = field(default_factory=dict)  # tensors by kind


def facts_of(path: Path) -> Facts:
    """Return what can be told of a folder or file, whatever is wrong with it."""
    if path.is_file():
        return _facts_of_gguf(path)
    try:
        values = read_json(path / "config.json")
    except ModelError:
        return Facts(licence=_licence(path))
    names = values.get("architectures")
    architecture = str(names[0]) if isinstance(names, list) and names else ""
    left_out = sorted({what for key, what in _MODALITIES.items() if values.get(key)})
    return Facts(architecture, left_out, _quantisation(values), _licence(path))


def check_config(path: Path) -> None:
    """Raise ModelError if the settings of a folder say that it cannot be loaded, whatever its tensors are."""
    folder = find_files(path)
    if fallback.is_needed(folder):
        fallback.check_settings(folder)
    elif not (folder.is_file() or encoders.architecture_of(folder) in encoders.PREFIXES):
        read_config(folder, has_head=not encoders.makes_vectors(folder))


def inspect(path: Path) -> Inspection:
    """Read the settings, and the names, shapes and types of all tensors. Raises ModelError if it cannot be loaded."""
    try:
        file = find_files(path)
        if file.is_file():
            return _inspect_gguf(file)
        if fallback.is_needed(file) and not encoders.makes_vectors(file):
            found = fallback.plan_fallback(file)
            return Inspection(
                found.architecture, "generate", found.shapes, found.stored, found.max_context, None, fallback=found
            )
        if not encoders.makes_vectors(file):
            return _inspect_decoder(file, has_head=True)
        if (architecture := encoders.architecture_of(file)) in encoders.PREFIXES:
            return _inspect_encoder(file, architecture)
        return _inspect_decoder(file, has_head=False)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error})") from error


def check_runs(path: Path, inspection: Inspection, device: str, scheme: str) -> None:
    """Raise DeviceError or ModelError if a device, "cuda", "cpu" or "reference", cannot run it under a scheme."""
    has_vectors = inspection.task != "generate"
    check_device(find_files(path), device, scheme, has_vectors=has_vectors)
    if device == "cpu" and inspection.config is not None:
        check_heads(inspection.config.heads)
        if (latent := inspection.config.latent) is not None:
            check_head_linear(latent.nope_dim, latent.rank, latent.query_dim)
            check_head_linear(latent.rank, latent.value_dim, latent.rank)


def weight_bytes(inspection: Inspection, device: str, scheme: str) -> WeightBytes:
    """Return what the weights take on a device under a scheme, as near as it is known before they are packed.

    For device cpu its kernels are asked, which must be there. Raises build.BuildError.
    """
    is_packed = device == "cpu" and inspection.task == "generate"
    sizes = _packed_sizes(inspection, scheme) if is_packed else _plain_sizes(inspection, device, scheme)
    held = sum(sizes.values())
    config = inspection.config
    read = held
    if config is not None and not config.tie_word_embeddings:
        read -= sizes[_EMBEDDING]  # of which a token reads a row
    if config is not None and config.experts is not None:
        share = 1 - config.experts.num_chosen / config.experts.num_experts
        read -= round(share * sum(size for name, size in sizes.items() if ".experts." in name))
    return WeightBytes(held, read)


def computed_from(inspection: Inspection, device: str, scheme: str) -> dict[str, int]:
    """Return how many of the quantised matrices a device computes with from what, for people."""
    if scheme != Quantization.NONE:
        return {}
    is_packed = device == "cpu" and inspection.task == "generate"
    formats = formats_of_codes(inspection) if is_packed else {}
    found: Counter[str] = Counter()
    for name, (kind, _) in inspection.codes.items():
        found[f"{kind} {'codes' if formats.get(name) else 'dequantised'}"] += 1
    return dict(found)


def formats_of_codes(inspection: Inspection) -> dict[str, int]:
    """Return the format of device cpu for each quantised matrix; that of numbers where no other holds its codes."""
    from octavo.kernels.cpu import library as cpu

    if not takes_codes("auto", sum(inspection.stored.values())):
        return {}
    layers: dict[str, list[str]] = {}
    for name, shape in inspection.shapes.items():
        if len(shape) == 2:
            layers.setdefault(_JOINED.sub("joined", name), []).append(name)
    formats: dict[str, int] = {}
    for names in layers.values():
        shapes = [inspection.codes[name][1] for name in names if name in inspection.codes]
        joined = cpu.format_of(shapes) if len(shapes) == len(names) else cpu.WEIGHT_BF16
        formats |= {name: joined for name in names if name in inspection.codes}
    return formats


def _stored_tensors(folder: Path) -> dict[str, tuple[Path, StoredTensor]]:
    """Return the tensors of a folder's safetensors files, each with its file. Raises ModelError."""
    found: dict[str, tuple[Path, StoredTensor]] = {}
    for path in weight_files(folder):
        head, tensors = read_head(path)
        for name, tensor in tensors.items():
            if name in found:
                raise ModelError(f"{path}: {name} is also in {found[name][0].name}")
            found[name] = (path, tensor)
        spans = sorted((tensor.start, tensor.end) for tensor in tensors.values())
        ends = [0, *(end for _, end in spans)]
        if [start for start, _ in spans] != ends[:-1] or path.stat().st_size != 8 + len(head) + ends[-1]:
            raise ModelError(f"{path}: not a whole safetensors file (its head or length is wrong); download it again")
    return found


def _expert_tensor(piece: Piece, stack: StoredTensor) -> StoredTensor:
    """Return one expert's tensor as if the file had it."""
    return stack._replace(shape=piece.stack.shape(stack.shape))


def _inspect_decoder(folder: Path, *, has_head: bool) -> Inspection:
    config, architecture, wrapper = read_config(folder, has_head=has_head)
    found = _stored_tensors(folder)
    if architecture.traits.has_stacked_experts:
        found = unstacked(found, lambda _, tensor: tensor.shape, _expert_tensor)
    plans, needless = dict[str, Plan](), set[str]()
    if (settings := read_quantization(folder)) is not None:
        heads = {name: Head(tensor.dtype, tensor.shape) for name, (_, tensor) in found.items()}
        plans, taken = plans_of(settings, heads, str(folder))
        found, needless = {name: tensor for name, tensor in found.items() if name not in taken}, biases_beside(plans)
    names = found | dict.fromkeys(plans)
    wanted, places = match_tensors(folder, config, architecture, wrapper, names, needless)
    stored = _check_all({place.name: place.shape for place in places.values()}, found, plans, folder)
    task = "generate" if has_head else _task_of_head(folder, config)
    codes = {
        tensor: (plans[place.name].kind, plans[place.name].codes)
        for tensor, place in places.items()
        if place.name in plans and is_packed_alone(tensor, 2)
    }
    return Inspection(config.architecture, task, wanted, stored, config.max_position_embeddings, config, codes)


def _inspect_encoder(folder: Path, architecture: str) -> Inspection:
    from octavo.gpu_worker.loading.encoder_files import plan_encoder

    found = _stored_tensors(folder)
    plan = plan_encoder(folder, architecture, found)
    shapes = plan.shapes | plan.head
    stored = _check_all(shapes, found, {}, folder)
    if not plan.head:
        _read_pooling(folder, plan.config.hidden_size)
    task = "embed" if not plan.head else "score" if plan.num_labels == 1 else "classify"
    return Inspection(architecture, task, shapes, stored, plan.config.max_position_embeddings, None)


def _task_of_head(folder: Path, config: ModelConfig) -> str:
    from octavo.gpu_worker.loading.decoder_heads import read_decoder_pooling

    return _TASKS[read_decoder_pooling(folder, config).task]


def _read_pooling(folder: Path, hidden_size: int) -> None:
    from octavo.gpu_worker.loading.pooling_files import read_pooling

    read_pooling(folder, hidden_size)


def _check_all(
    shapes: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[Path, StoredTensor]],
    plans: Mapping[str, Plan],
    folder: Path,
) -> dict[str, int]:
    """Check each tensor that is read; return their bytes by type. Raises ModelError."""
    stored: Counter[str] = Counter()
    for name, wanted in shapes.items():
        if (plan := plans.get(name)) is not None:
            check_shape(name, plan.shape, wanted, str(folder))
            stored[plan.kind] += plan.num_bytes
            continue
        path, (dtype, shape, _, _) = found[name]
        check_stored(name, dtype, shape, wanted, str(path))
        stored[dtype] += math.prod(shape) * STORED_BYTES[dtype]
    return dict(stored)


def _inspect_gguf(file: Path) -> Inspection:
    from octavo.gpu_worker.formats.gguf_file import GgufFile
    from octavo.gpu_worker.loading.gguf_model import check_kinds, kind_as_packed, plan_gguf

    source = GgufFile(file)
    _, config, _, parts, wanted = plan_gguf(source)
    tensors = [parts[name] for name in wanted]
    check_kinds(source, tensors)
    stored: Counter[str] = Counter()
    for tensor in tensors:
        stored[_kind(tensor.quantisation)] += tensor.num_bytes
    kinds = {
        name: kind_as_packed(name, parts[name].quantisation, Quantization.NONE, keeps_codes=True) for name in wanted
    }
    codes = {
        name: (kind.name, kind.shape)
        for name, kind in kinds.items()
        if kind is not None and is_packed_alone(name, len(wanted[name]))
    }
    context = config.max_position_embeddings
    return Inspection(config.architecture, "generate", wanted, dict(stored), context, config, codes)


def _facts_of_gguf(path: Path) -> Facts:
    from octavo.gpu_worker.formats.gguf_file import GgufFile

    try:
        source = GgufFile(path)
    except ModelError:
        return Facts()
    kinds = Counter(_kind(tensor.quantisation) for tensor in source.tensors.values())
    said = {key: source.metadata.get(f"general.{key}") for key in ("architecture", "license")}
    return Facts(*(str(said["architecture"] or ""), [], "", str(said["license"] or "")), gguf=dict(kinds.most_common()))


def _kind(quantisation: int) -> str:
    from gguf.constants import GGMLQuantizationType

    return str(GGMLQuantizationType(quantisation).name)


def _quantisation(values: Mapping[str, Any]) -> str:
    """Return in which way a checkpoint is quantised, for people; empty if it is not."""
    settings = values.get("quantization_config")
    if not isinstance(settings, Mapping) or not settings:
        return ""
    method = str(settings.get("quant_method") or settings.get("quant_algo") or "of an unknown kind")
    bits = settings.get("bits") or settings.get("w_bit")
    four = " in 4 bits" if settings.get("load_in_4bit") or settings.get("_load_in_4bit") else ""
    return f"{method} in {bits} bits" if isinstance(bits, int) else f"{method}{four}"


def _licence(folder: Path) -> str:
    """Return the licence that a model card beside the files names; empty if there is none."""
    try:
        with (folder / "README.md").open(encoding="utf-8", errors="replace") as file:
            head = file.read(1 << 14)
    except OSError:
        return ""
    if not head.startswith("---"):
        return ""
    fields = (line.partition(":") for line in head.split("\n---", 1)[0].splitlines())
    said = {key: value.strip().strip("\"'") for key, colon, value in fields if colon}
    return said.get("license_name") or said.get("license", "")


def _packed_sizes(inspection: Inspection, scheme: str) -> dict[str, int]:
    """Return the bytes of each tensor as the kernels of device cpu read it."""
    from octavo.kernels.cpu import library as cpu

    config, kernels = inspection.config, cpu.load()
    assert config is not None, inspection.architecture
    plain = cpu.WEIGHT_COMPRESSED if kernels.octavo_reads_compressed() else cpu.WEIGHT_BF16
    formats = {Quantization.NONE: plain, Quantization.INT8: cpu.WEIGHT_INT8, Quantization.INT4: cpu.WEIGHT_INT4}
    own = formats[Quantization(scheme)]
    of_codes = formats_of_codes(inspection) if scheme == Quantization.NONE else {}
    head = plain if scheme == Quantization.NONE else cpu.WEIGHT_INT8
    sizes = {}
    for name, shape in inspection.shapes.items():
        if len(shape) == 1 or name.endswith(".e_score_correction_bias"):
            sizes[name] = 4 * math.prod(shape)
        elif of_codes.get(name, cpu.WEIGHT_BF16) != cpu.WEIGHT_BF16:
            sizes[name] = int(kernels.octavo_packed_weight_size(of_codes[name], *shape))
        elif name == _EMBEDDING and not config.tie_word_embeddings and scheme == Quantization.NONE:
            sizes[name] = 2 * math.prod(shape)  # rows to look up
        else:
            packed_as = head if name in (_EMBEDDING, _HEAD) else plain if _is_router(name) else own
            sizes[name] = int(kernels.octavo_packed_weight_size(packed_as, *shape))
    return sizes


def _plain_sizes(inspection: Inspection, device: str, scheme: str) -> dict[str, int]:
    """Return the bytes of each tensor where nothing is packed."""
    of_values = 4 if device in ("cpu", "reference") else 2
    if device == "cuda" and inspection.stored.keys() <= {"F32", "F64"}:
        of_values = 4
    sizes = {}
    for name, shape in inspection.shapes.items():
        is_quantised = len(shape) == 2 and name not in (_EMBEDDING, _HEAD) and not _is_router(name)
        if scheme != Quantization.NONE and is_quantised:
            sizes[name] = math.prod(shape) + 4 * shape[0]  # with a scale for each row
        else:
            sizes[name] = of_values * math.prod(shape)
    return sizes


def _is_router(name: str) -> bool:
    return name.endswith((".gate.weight", ".shared_expert_gate.weight", ".e_score_correction_bias"))
