"""Reads how a folder in the layout of sentence-transformers makes vectors: modules.json and what it names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.common.v1 import common_pb2
from octavo.gpu_worker.errors import ModelError, shown
from octavo.gpu_worker.formats.checkpoint_files import read_json, read_list
from octavo.gpu_worker.loading.folder import check_shape
from octavo.gpu_worker.models.encoders import MODULES_FILE
from octavo.gpu_worker.steps.pooler import ACTIVATIONS, Dense, Layer, Pooling, PoolingMode, VectorNorm

if TYPE_CHECKING:  # most folders have no layers of their own behind the model
    import torch

_MODES: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_lasttoken": "last",
}
_SETTINGS_FILE = "config_sentence_transformers.json"
_PROBLEM_TYPES = {
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
    "regression": "identity",
}
_NAMES: dict[str, PoolingMode] = {
    "cls": "cls",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "lasttoken": "last",
}


def read_pooling(folder: Path, hidden_size: int) -> Pooling:
    """Return what the folder's modules after the transformer do. Raises ModelError.

    Without modules.json that is what sentence-transformers does then, the mean of all tokens, and normalizing.
    """
    if not (folder / MODULES_FILE).is_file():
        return Pooling(common_pb2.MODEL_TASK_EMBED, "mean", hidden_size)
    mode: PoolingMode | None = None
    layers: list[Layer] = []
    normalize = False
    for index, module in enumerate(read_list(folder / MODULES_FILE)):
        kind = str(module.get("type", "")).rpartition(".")[2]
        place = module_folder(folder, str(module.get("path", "")))
        if kind == "Transformer" and index == 0:
            continue
        if kind == "Pooling" and mode is None:
            mode = _mode(place / "config.json", hidden_size)
        elif kind == "Dense" and mode is not None and not normalize:
            layers.append(_dense(place, len(layers[-1].weight) if layers else hidden_size))
        elif kind == "Normalize" and mode is not None:
            normalize = True
        else:
            raise ModelError(
                f"{folder / MODULES_FILE}: module {index} is {kind}, which is not supported there; supported are a "
                "Transformer, Pooling, then Dense and at last Normalize"
            )
    if mode is None:
        raise ModelError(f"{folder / MODULES_FILE}: there is no Pooling module; vectors of tokens are not supported")
    return Pooling(common_pb2.MODEL_TASK_EMBED, mode, hidden_size, tuple(layers), normalize)


def head_pooling(mode: PoolingMode, hidden_size: int, layers: Sequence[Layer]) -> Pooling:
    """Return how a head makes a score, or the probabilities of several labels."""
    pooling = Pooling(common_pb2.MODEL_TASK_SCORE, mode, hidden_size, tuple(layers), normalize=False)
    return pooling if pooling.vector_size == 1 else replace(pooling, task=common_pb2.MODEL_TASK_CLASSIFY)


def last_activation(folder: Path, num_labels: int) -> str:
    """Return what a head ends with. Raises ModelError.

    For a score that is a sigmoid unless a file says otherwise, as in sentence-transformers; for several labels it
    follows from `problem_type`, as in the pipelines of transformers.
    """
    path = folder / "config.json"
    values = read_json(path)
    if num_labels > 1:
        kind = values.get("problem_type") or "single_label_classification"
        if not isinstance(kind, str) or kind not in _PROBLEM_TYPES:
            raise ModelError(f"{path}: problem_type is {shown(kind)}, expected one of {', '.join(_PROBLEM_TYPES)}")
        return _PROBLEM_TYPES[kind]
    settings = values.get("sentence_transformers")
    named = settings.get("activation_fn") if isinstance(settings, dict) else None
    if named is None and (folder / _SETTINGS_FILE).is_file():
        path = folder / _SETTINGS_FILE
        named = read_json(path).get("activation_fn")
    activation = str(named or "torch.nn.modules.activation.Sigmoid").rpartition(".")[2].lower()
    if activation not in ("sigmoid", "identity"):
        raise ModelError(f"{path}: scores end with {shown(named)}, which is not supported; Sigmoid and Identity are")
    return activation


def dense(weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> Dense:
    """Return a layer of these tensors."""
    return Dense(_array(weight), None if bias is None else _array(bias), activation)


def norm(weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> VectorNorm:
    """Return a LayerNorm of these tensors."""
    return VectorNorm(_array(weight), None if bias is None else _array(bias), eps)


def _array(tensor: torch.Tensor) -> Any:
    return np.ascontiguousarray(tensor.detach().float().numpy())


def module_folder(folder: Path, path: str) -> Path:
    """Return a module's folder. Raises ModelError if it is not in the model's."""
    if Path(path).name != path or path == "..":
        raise ModelError(f"{folder / MODULES_FILE}: the path {path!r} is not that of a folder inside")
    return folder / path


def _mode(path: Path, hidden_size: int) -> PoolingMode:
    config = read_json(path)
    size = config.get("word_embedding_dimension", config.get("embedding_dimension", hidden_size))
    if size != hidden_size:
        raise ModelError(f"{path}: pools {size} dimensions, the model has {hidden_size}")
    if config.get("include_prompt") is False:
        raise ModelError(f"{path}: leaving the prompt out of the pooling (include_prompt) is not supported")
    if "pooling_mode" in config:  # as written by newer versions
        wanted = config["pooling_mode"]
        names = [wanted] if isinstance(wanted, str) else list(wanted)
        modes = [_NAMES.get(str(name)) for name in names]
    else:
        names = [name for name, value in config.items() if name.startswith("pooling_mode_") and value]
        modes = [_MODES.get(name) for name in names]
    if len(modes) != 1 or modes[0] is None:
        raise ModelError(f"{path}: pools by {', '.join(names) or 'nothing'}; supported is one of {', '.join(_MODES)}")
    return modes[0]


def _dense(folder: Path, in_features: int) -> Dense:
    from octavo.gpu_worker.loading.weights import open_tensors

    config = read_json(folder / "config.json")
    name = str(config.get("activation_function", "torch.nn.modules.linear.Identity")).rpartition(".")[2].lower()
    if name not in ACTIVATIONS:
        raise ModelError(f"{folder}: the activation {name} is not supported; supported are {', '.join(ACTIVATIONS)}")
    tensors = open_tensors(folder)
    has_bias = bool(config.get("bias", True))
    out_features = int(config.get("out_features", 0))
    wanted = {"linear.weight": (out_features, in_features)} | ({"linear.bias": (out_features,)} if has_bias else {})
    for tensor, shape in wanted.items():
        if tensor not in tensors:
            raise ModelError(f"{folder}: the tensor {tensor} is missing")
        check_shape(tensor, tuple(tensors[tensor].shape), shape, str(folder))
    return dense(tensors["linear.weight"], tensors.get("linear.bias") if has_bias else None, name)
