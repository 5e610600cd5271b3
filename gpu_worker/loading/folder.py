"""Finds out what a Hugging Face folder holds, and whether it is what its architecture wants. Needs no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from octavo.gpu_worker.errors import ModelError, shown
from octavo.gpu_worker.formats.checkpoint_files import INDEX_FILE, adapter_of, read_json
from octavo.gpu_worker.formats.quantization_settings import quantization_of
from octavo.gpu_worker.formats.tensor_kinds import Settings
from octavo.gpu_worker.loading.tensor_names import Place, TextNames, is_wrapper, place_of, text_part
from octavo.gpu_worker.models.config import ModelConfig, from_json
from octavo.gpu_worker.models.encoders import CLASSIFIER
from octavo.gpu_worker.models.registry import ARCHITECTURES, Architecture, find_architecture

SINGLE_FILE = "model.safetensors"
STORED_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
"""Bytes of a value, by the names that safetensors files have for the types that are read."""
# What the names of a family end with where it has no head for tokens.
_HEADLESS = ("Model", CLASSIFIER)
_PICKLED_SUFFIXES = (".bin", ".pt", ".pth")


def read_quantization(folder: Path) -> Settings | None:
    """Return what config.json says of quantised matrices, None if there are none. Raises ModelError."""
    return quantization_of(read_json(folder / "config.json"), str(folder / "config.json"))


def read_config(folder: Path, *, has_head: bool = True) -> tuple[ModelConfig, Architecture, str]:
    """Return what config.json says, and what it calls a model of which only the text part is read. Raises ModelError.

    has_head  whether it is to give logits
    """
    if adapter := adapter_of(folder):
        raise ModelError(f"{folder}: {adapter}")
    path = folder / "config.json"
    values = read_json(path)
    name = architecture_of(values, str(path))
    if not has_head:
        for kind in _HEADLESS:
            name = re.sub(f"(Text)?{kind}$", "ForCausalLM", name)
    if values.get("is_encoder_decoder"):
        raise ModelError(f"{path}: {shown(name)} is an encoder and a decoder, which are not served")
    wrapper = name if is_wrapper(name) else ""
    if wrapper:
        name, values = text_part(values, wrapper, str(path))
    if name not in ARCHITECTURES and values.get("auto_map"):
        raise ModelError(
            f"{path}: architecture {shown(name)} is not supported; supported are {', '.join(ARCHITECTURES)}; code that "
            "comes with a model (auto_map) is never run"
        )
    quantization_of(values, str(path))
    architecture = find_architecture(name, str(path))
    return replace(from_json(values, name, architecture.traits, str(path)), has_head=has_head), architecture, wrapper


def match_tensors(
    folder: Path,
    config: ModelConfig,
    architecture: Architecture,
    wrapper: str,
    found: Mapping[str, object],
    needless: Set[str] = frozenset(),
) -> tuple[dict[str, tuple[int, ...]], dict[str, Place]]:
    """Return the shapes of the tensors that an architecture wants, and where among `found`, by name, each is.

    Without a head the tensors' names may lack "model." at their beginning. Raises ModelError if some are missing, or
    there that the architecture does not know.

    wrapper   what the checkpoint is called if this is its text part, else empty
    needless  tensors that the architecture need not know
    """
    fused = architecture.traits.fused
    # One more than there are is enough to find one that is missing: a config may ask for millions.
    most = len(found) * max(map(len, fused.values()), default=1) + 1
    wanted = dict(islice(architecture.tensor_shapes(config), most))
    text = TextNames(found) if wrapper else None

    def stored(name: str) -> str:
        if text is not None:
            return text.stored(name)
        return name if config.has_head or name in found else name.removeprefix("model.")

    places = {tensor: place_of(tensor, wanted, fused) for tensor in wanted}
    places = {tensor: replace(place, name=stored(place.name)) for tensor, place in places.items()}
    read = found if text is None else text.of_text(found, wrapper)
    _check_names({place.name: place.shape for place in places.values()}, read.keys(), config, folder, needless)
    return wanted, places


def check_stored(name: str, dtype: str, shape: tuple[int, ...], wanted: tuple[int, ...], where: str) -> None:
    """Raise ModelError if a tensor of a safetensors file has another shape than the config says, or no type to read."""
    check_shape(name, shape, wanted, where)
    if dtype not in STORED_BYTES:
        raise ModelError(f"{where}: {name} is of type {dtype}; supported are {', '.join(STORED_BYTES)}")


def architecture_of(values: Mapping[str, Any], where: str) -> str:
    """Return the architecture that a parsed config.json names; `where` names the file. Raises ModelError."""
    names = values.get("architectures") or ["(none named)"]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise ModelError(f"{where}: architectures is {shown(names)}, expected a list with one name")
    return names[0]


def check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...], where: str) -> None:
    """Raise ModelError if a tensor's shape is not what the config says."""
    if found != wanted:
        raise ModelError(f"{where}: {name} has shape {list(found)}, the config asks for {list(wanted)}")


def name_list(names: Iterable[str]) -> str:
    """Return some of `names` for a message."""
    ordered = sorted(names)
    return ", ".join(ordered[:4]) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, from its index if it has one. Raises ModelError."""
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{folder / INDEX_FILE}: weight_map is missing or empty")
        names = sorted({str(name) for name in weight_map.values()})
        if any(Path(name).name != name or "\0" in name or len(os.fsencode(name)) > 255 for name in names):
            raise ModelError(f"{folder / INDEX_FILE}: names a file outside its folder, or by what is no name of a file")
    elif (folder / SINGLE_FILE).is_file():
        names = [SINGLE_FILE]
    elif pickled := [path.name for path in folder.iterdir() if path.suffix in _PICKLED_SUFFIXES]:
        raise ModelError(
            f"{folder}: holds only pickled weights ({name_list(pickled)}), which can run any code when loaded "
            "and are refused; download the safetensors files, or convert them: load them with transformers where you "
            "trust them and call save_pretrained"
        )
    else:
        raise ModelError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ModelError(f"{folder}: {INDEX_FILE} names files that are not there: {name_list(missing)}")
    return [folder / name for name in names]


def _check_names(
    wanted: Mapping[str, object], found: Set[str], config: ModelConfig, folder: Path, needless: Set[str]
) -> None:
    """Raise ModelError if tensors are missing, or there that the architecture does not know."""
    if missing := wanted.keys() - found:
        raise ModelError(
            f"{folder}: tensors of {config.architecture} are missing: {name_list(missing)}; "
            "the checkpoint is incomplete or config.json is of another model"
        )
    unknown = {name for name in found - wanted.keys() - needless if not name.endswith(".rotary_emb.inv_freq")}
    unknown = {name for name in unknown if not _predicts_further_tokens(name, config)}
    if config.tie_word_embeddings or not config.has_head:
        unknown = {name for name in unknown if not name.endswith("lm_head.weight")}
    if not config.has_head:
        unknown.discard("score.weight")
    if unknown:
        raise ModelError(
            f"{folder}: holds tensors that {config.architecture} does not have: {name_list(unknown)}; "
            "config.json is of another model, or the checkpoint is of a variant that is not supported"
        )


def _predicts_further_tokens(name: str, config: ModelConfig) -> bool:
    """Return whether a tensor is of the part that predicts more tokens than the next, which is not served."""
    if name.startswith(("mtp.", "model.mtp_")):
        return True
    found = re.match(r"(?:model\.)?layers\.(\d{1,9})\.", name)
    return found is not None and 0 <= int(found[1]) - config.num_layers < config.num_nextn_layers
