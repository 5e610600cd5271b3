"""Loads decoders that have no description here, as modules of the transformers package that is installed.

No code of a checkpoint is ever run: a class is taken from transformers, by its name there, or there is none.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from octavo.gpu_worker.errors import ModelError, one_line, shown
from octavo.gpu_worker.formats.checkpoint_files import StoredTensor, fingerprint_of_folder, read_head, read_json
from octavo.gpu_worker.loading.folder import STORED_BYTES, architecture_of, weight_files
from octavo.gpu_worker.loading.tensor_names import is_wrapper
from octavo.gpu_worker.models.config import MAX_LAYERS, MAX_POSITIONS, Json
from octavo.gpu_worker.models.registry import ARCHITECTURES
from octavo.gpu_worker.ops import Heads

if TYPE_CHECKING:  # they need torch
    from octavo.gpu_worker.models.modules import ModuleDecoder, Trace

NOTE: Final = (
    "This architecture has no description of its own: it is computed by the modules of transformers over the paged "
    "cache. A native description would be faster."
)
"""What the log and the API say of a model that is loaded here."""
_DEFAULT_CONTEXT = 2048  # of models that have no positions to count
# Of config.json: code, another file's name to take weights from, and what is of classifiers.
_UNREAD = {"auto_map", "transformers_weights", "num_labels", "id2label", "label2id"}
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_MODULES_OF_NEIGHBOURS = ("Conv1d", "Conv2d", "LSTM", "GRU", "RNN")  # torch's: they read tokens beside a token


@dataclass(frozen=True)
class Fallback:
    """A model that modules of transformers can compute, before its weights are read.

    shapes   of its parameters, by their names in the module; those that share memory once
    traced   what a pass showed, None if that needs the weights
    """

    architecture: str
    config: Any
    model_class: Any
    shapes: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, int]
    max_context: int
    num_layers: int
    traced: Trace | None

    @property
    def heads(self) -> Heads:
        """The heads of its cache, or, where they are not known yet, those that the settings name."""
        if self.traced is not None:
            return self.traced.cache_heads()
        text = self.config.get_text_config()
        num_heads = text.num_attention_heads
        names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        named = [int(getattr(text, name, 0) or 0) for name in names]
        latent = max(named[0] + named[1], named[2]) if all(named) else 0
        head_dim = latent or getattr(text, "head_dim", None) or text.hidden_size // num_heads
        return Heads(num_heads, num_heads if latent else getattr(text, "num_key_value_heads", num_heads), head_dim)


def is_needed(folder: Path) -> bool:
    """Return whether a folder's architecture is not described here, and is one that transformers has a decoder for."""
    try:
        values = read_json(folder / "config.json")
        name = architecture_of(values, "")
    except ModelError:
        return False
    if name in ARCHITECTURES or is_wrapper(name) or values.get("is_encoder_decoder"):
        return False
    return _class_name(values.get("model_type"), name) is not None


def _class_name(kind: object, name: str) -> str | None:
    """Return the architecture's name if transformers has it for a `model_type`."""
    try:
        from transformers.models.auto import modeling_auto
    except ImportError:
        return None
    known: Mapping[str, Any] = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    classes = known.get(kind, ()) if isinstance(kind, str) else ()
    return name if name in ((classes,) if isinstance(classes, str) else classes) else None


def check_settings(folder: Path) -> None:
    """Raise ModelError if the settings of a folder say that it cannot be loaded, whatever its tensors are."""
    where = str(folder / "config.json")
    values = read_json(folder / "config.json")
    name = architecture_of(values, where)
    _check_settings(values, name, where)
    _sizes(_read_config(values, name, where)[0].get_text_config(), where)


def plan_fallback(folder: Path) -> Fallback:
    """Read the settings, and the heads of the files; build the modules without weights. Raises ModelError."""
    where = str(folder / "config.json")
    values = read_json(folder / "config.json")
    name = architecture_of(values, where)
    _check_settings(values, name, where)
    config, model_class = _read_config(values, name, where)
    text = config.get_text_config()
    num_layers, context = _sizes(text, where)
    stored = _stored_tensors(folder)
    model = _without_weights(config, model_class, where)
    _check_modules(model, name)
    shapes = {each: tuple(parameter.shape) for each, parameter in model.named_parameters()}
    _check_size(shapes, stored, folder)
    traced = None
    with contextlib.suppress(RuntimeError, NotImplementedError):  # experts are chosen by values that are not there
        from octavo.gpu_worker.models.modules import trace

        traced = trace(model, num_layers, name)
    sizes: dict[str, int] = {}
    for tensor in stored.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.end - tensor.start
    return Fallback(name, config, model_class, shapes, sizes, context, num_layers, traced)


def load_fallback(folder: Path, dtype: str, positions: int, found: Fallback) -> tuple[ModuleDecoder, str]:
    """Load the weights; return the model and the fingerprint of its files. Raises ModelError.

    dtype  a name of torch's, or "auto" for what is stored
    """
    import torch
    import transformers

    from octavo.gpu_worker.models.modules import IMPLEMENTATION, ModuleDecoder, trace

    stored = _stored_type(found.stored)
    with _quiet():
        model, report = found.model_class.from_pretrained(
            folder,
            config=found.config,
            dtype=stored,  # else it would be held in both types at once
            attn_implementation=IMPLEMENTATION,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are told of in the report
            output_loading_info=True,
        )
    for what, names in (("are missing", report["missing_keys"]), ("have other shapes", report["mismatched_keys"])):
        if names:
            some = ", ".join(sorted(str(each) for each in names)[:4])
            raise ModelError(f"{folder}: tensors of {found.architecture} {what}: {some}; the checkpoint is incomplete")
    model.eval().requires_grad_(False)
    for parameter in model.parameters() if dtype in ("bfloat16", "float16") else ():
        parameter.data = parameter.data.to(getattr(torch, dtype))  # one by one; to float32 the device does
    _freeze_rotation(model, found.max_context)
    traced = trace(model, found.num_layers, found.architecture)
    settings = [(folder / "config.json").read_bytes(), dtype.encode(), transformers.__version__.encode()]
    fingerprint = fingerprint_of_folder(settings, weight_files(folder))
    return ModuleDecoder(model, traced, positions), fingerprint


def _check_settings(values: Json, name: str, where: str) -> None:
    """Raise ModelError for what the paged cache cannot hold, as far as settings say so."""
    if values.get("quantization_config"):
        raise ModelError(
            f"{where}: the checkpoint is quantised (quantization_config), which is not supported; "
            "use the unquantised checkpoint"
        )
    # Before transformers sees them: its configs make a list, or a table, of as many entries as they are told.
    for key, value in values.items():
        count = value if key.endswith(("layers", "n_layer")) else _num_repeated(value)
        if isinstance(count, int) and count > MAX_LAYERS:
            raise ModelError(f"{where}: {key} asks for {count} layers; at most {MAX_LAYERS} are supported")
    if values.get("add_cross_attention") or values.get("cross_attention_layers"):
        raise ModelError(f"{where}: {name} has cross attention, which is not served")
    kinds = values.get("layer_types") or values.get("layers_block_type") or []
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise ModelError(f"{where}: layer_types is {shown(kinds)}, expected a list of names")
    if others := sorted(set(kinds) - _LAYER_TYPES - {"attention"}):
        raise ModelError(
            f"{where}: {name} has layers of {shown(others[0])}, whose state between tokens (recurrent, or of parts "
            "of a text) the paged cache does not hold"
        )
    for rotary in (values.get("rope_parameters"), values.get("rope_scaling")):
        if isinstance(rotary, Mapping) and "dynamic" in (rotary.get("rope_type"), rotary.get("type")):
            raise ModelError(f"{where}: rope_type dynamic turns a text's first tokens anew as it grows: not served")


def _num_repeated(value: Any) -> int:
    """Return how many layers a setting such as [[["global", "local"], 12], ...] stands for: kinds, and how often."""
    total = 0
    for entry in value if isinstance(value, list) else ():
        kinds = [len(each) for each in entry if isinstance(each, list)] if isinstance(entry, list) else []
        if kinds:
            total += sum(each for each in entry if isinstance(each, int)) * max(kinds)
    return total


def _read_config(values: Json, name: str, where: str) -> tuple[Any, Any]:
    """Return transformers' config and class. Raises ModelError."""
    import transformers

    from octavo.gpu_worker.models.modules import IMPLEMENTATION, register

    register()
    try:
        config_class = transformers.models.auto.configuration_auto.CONFIG_MAPPING[values["model_type"]]
        known = {key: value for key, value in values.items() if key not in _UNREAD}
        with _quiet():
            config = config_class.from_dict(known)
        model_class = getattr(transformers, name)
    except Exception as error:  # a config's own checks raise what they like
        raise ModelError(f"{where}: transformers cannot read it ({type(error).__name__}: {one_line(error)})") from error
    if getattr(model_class, "_is_stateful", False):
        raise ModelError(f"{where}: {name} keeps a recurrent state, which the paged cache does not hold")
    if not getattr(model_class, "_supports_attention_backend", False):
        raise ModelError(
            f"{where}: {name} does not attend through transformers' attention interface (version "
            f"{transformers.__version__}), so that the paged cache cannot be put there"
        )
    config._attn_implementation = IMPLEMENTATION
    config.use_cache = False
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"
    return config, model_class


def _sizes(config: Any, where: str) -> tuple[int, int]:
    """Return the number of layers and of positions. Raises ModelError."""
    layers, positions = (getattr(config, name, None) for name in ("num_hidden_layers", "max_position_embeddings"))
    context = positions if isinstance(positions, int) and positions > 0 else _DEFAULT_CONTEXT
    if not isinstance(layers, int) or not 1 <= layers <= MAX_LAYERS or context > MAX_POSITIONS:
        raise ModelError(
            f"{where}: num_hidden_layers is {shown(layers)} and max_position_embeddings {shown(positions)}; at most "
            f"{MAX_LAYERS} and {MAX_POSITIONS} are supported"
        )
    return layers, context


def _without_weights(config: Any, model_class: Any, where: str) -> Any:
    import torch

    try:
        with torch.device("meta"), _quiet():
            return model_class(config).eval()
    except Exception as error:  # as above
        raise ModelError(
            f"{where}: transformers cannot build it ({type(error).__name__}: {one_line(error)})"
        ) from error


def _check_modules(model: Any, name: str) -> None:
    """Raise ModelError if a module is of a kind that reads other tokens than its own."""
    for path, module in model.named_modules():
        kind = type(module)
        if kind.__name__ in _MODULES_OF_NEIGHBOURS and kind.__module__.startswith("torch."):
            raise ModelError(
                f"architecture {name} cannot be served: {path} ({kind.__name__}) has a state between tokens, which the "
                "paged cache does not hold"
            )


def _check_size(shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredTensor], folder: Path) -> None:
    """Raise ModelError if the settings ask for much more than the files hold: it would be made up, at any size."""
    wanted = sum(map(math.prod, shapes.values()))
    there = sum(math.prod(tensor.shape) for tensor in stored.values())
    if wanted > 1.05 * there:
        raise ModelError(
            f"{folder}: config.json asks for {wanted:,} parameters, and the files hold {there:,}; the checkpoint is "
            "incomplete or config.json is of another model"
        )


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return what the files hold. Raises ModelError."""
    found: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        head, tensors = read_head(path)
        for name, tensor in tensors.items():
            if tensor.dtype not in STORED_BYTES and not tensor.dtype.startswith(("BOOL", "I", "U")):
                raise ModelError(f"{path}: {name} is of type {tensor.dtype}; supported are {', '.join(STORED_BYTES)}")
        end = max((tensor.end for tensor in tensors.values()), default=0)
        if path.stat().st_size != 8 + len(head) + end:
            raise ModelError(f"{path}: not a whole safetensors file (its length is wrong); download it again")
        found |= tensors
    return found


def _stored_type(stored: Mapping[str, int]) -> Any:
    """Return the type of most of the weights; float32 for those of 64 bits."""
    import torch

    most = max(stored, key=lambda name: stored[name], default="F32")
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(most, torch.float32)


def _freeze_rotation(model: Any, context: int) -> None:
    """Have longrope rotate by the longest context, not by that of a step: keys in the cache stay as they were."""
    import torch

    for module in model.modules():
        if getattr(module, "rope_type", None) == "longrope":
            with torch.no_grad():  # what the module itself does for a text of that length
                module(torch.zeros(1, 1, 1), torch.tensor([[context - 1]]))
            module.rope_type = "default"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Have transformers say nothing but errors, and show no bars."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
