"""Loads an encoder's folder, with what makes vectors or scores of its hidden states."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.loading import LoadedModel, Progress, context_of
from octavo.gpu_worker.models.bert import BertConfig
from octavo.gpu_worker.models.classifier import Classifier
from octavo.gpu_worker.models.encoders import PREFIXES
from octavo.gpu_worker.models.modernbert import ModernBertConfig
from octavo.gpu_worker.pooler import ACTIVATIONS, Layer, Pooling
from octavo.gpu_worker.pooling_files import dense, norm, read_pooling, score_pooling
from octavo.gpu_worker.sharding import Part
from octavo.gpu_worker.weights import (
    fingerprint_of_folder,
    name_list,
    read_json,
    read_tensors,
    tensor_files,
    weight_files,
)

_CLASSIFIER = "ForSequenceClassification"


def load_encoder(folder: Path, architecture: str, dtype: str, max_model_len: int, progress: Progress) -> LoadedModel:
    """Load a folder whose config.json names one of PREFIXES. Raises ModelError.

    dtype  a name of weights.DTYPES, or "auto" to keep what is stored
    """
    path = folder / "config.json"
    values = read_json(path)
    config: ModernBertConfig | BertConfig
    if architecture.startswith("ModernBert"):
        config = ModernBertConfig.from_json(values, str(path))
    else:
        config = BertConfig.from_json(values, architecture, str(path))
    files = weight_files(folder)
    owners = tensor_files(files)
    prefix = PREFIXES[architecture]
    if not any(name.startswith(prefix) for name in owners):
        prefix = ""
    shapes = {prefix + name: shape for name, shape in config.tensor_shapes().items()}
    head: dict[str, tuple[int, ...]] = {}
    if architecture.endswith(_CLASSIFIER):
        _check_labels(values, path)
        head = dict(config.classifier.tensor_shapes(config.hidden_size))
    if missing := (shapes | head).keys() - owners.keys():
        raise ModelError(
            f"{folder}: tensors of {architecture} are missing: {name_list(missing)}; "
            "the checkpoint is incomplete or config.json is of another model"
        )
    parts = {name: Part(name, tuple(slice(0, size) for size in shape)) for name, shape in (shapes | head).items()}
    tensors = read_tensors(shapes | head, parts, owners, dtype, progress)
    context = context_of(folder, max_model_len, config.max_position_embeddings)
    model = config.build({name.removeprefix(prefix): tensors[name] for name in shapes}, context)
    if head:
        pooling = _score(config.classifier, config.hidden_size, tensors, values, path)
    else:
        pooling = read_pooling(folder, config.hidden_size)
    fingerprint = fingerprint_of_folder([path.read_bytes(), dtype.encode(), pooling_digest(pooling)], files)
    return LoadedModel(model, architecture, context, fingerprint, pooling)


def pooling_digest(pooling: Pooling) -> bytes:
    """Return what differs between two ways to make vectors of the same hidden states."""
    digest = hashlib.sha256(f"{pooling.task} {pooling.mode} {pooling.normalize}".encode())
    for layer in pooling.layers:
        digest.update(layer.identity())
    return digest.digest()


def _check_labels(values: dict[str, Any], path: Path) -> None:
    """Raise ModelError if a classifier has more than one label."""
    labels = values.get("num_labels") or len(values.get("id2label") or {0: "", 1: ""})
    if labels != 1:
        raise ModelError(f"{path}: the classifier has {labels} labels; only scores, which are one, are supported")


def _score(
    classifier: Classifier, hidden_size: int, tensors: dict[str, torch.Tensor], values: dict[str, Any], path: Path
) -> Pooling:
    """Return the classifier, with a sigmoid behind it unless the file says otherwise, as in sentence-transformers."""
    named = (values.get("sentence_transformers") or {}).get("activation_fn") or "torch.nn.modules.activation.Sigmoid"
    activation = str(named).rpartition(".")[2].lower()
    if activation not in ("sigmoid", "identity"):
        raise ModelError(f"{path}: scores end with {named}, which is not supported; Sigmoid and Identity are")
    *inner, last = classifier.layers
    layers: list[Layer] = []
    for layer in (*inner, replace(last, activation=activation)):
        if layer.activation not in ACTIVATIONS:
            raise ModelError(
                f"{path}: the classifier's activation {layer.activation} is not one of {list(ACTIVATIONS)}"
            )
        layers.append(dense(tensors[f"{layer.name}.weight"], tensors.get(f"{layer.name}.bias"), layer.activation))
        if layer.norm is not None:
            weight, bias = tensors[f"{layer.norm.name}.weight"], tensors.get(f"{layer.norm.name}.bias")
            layers.append(norm(weight, bias, layer.norm.eps))
    return score_pooling(classifier.pooling, hidden_size, layers)
