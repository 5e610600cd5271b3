"""Loads an encoder's folder, with what makes vectors or scores of its hidden states."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.loading import LoadedModel, Progress, context_of
from octavo.gpu_worker.models.bert import BertConfig, BertModel, tensor_shapes
from octavo.gpu_worker.models.encoders import PREFIXES
from octavo.gpu_worker.pooler import Dense, Pooling
from octavo.gpu_worker.pooling_files import dense, read_pooling, score_pooling
from octavo.gpu_worker.sharding import Part
from octavo.gpu_worker.weights import fingerprint_of, name_list, read_json, read_tensors, tensor_files, weight_files

_CLASSIFIER = "ForSequenceClassification"


def load_encoder(folder: Path, architecture: str, dtype: str, max_model_len: int, progress: Progress) -> LoadedModel:
    """Load a folder whose config.json names one of PREFIXES. Raises ModelError.

    dtype  a name of weights.DTYPES, or "auto" to keep what is stored
    """
    path = folder / "config.json"
    values = read_json(path)
    config = BertConfig.from_json(values, architecture, str(path))
    files = weight_files(folder)
    owners = tensor_files(files)
    prefix = PREFIXES[architecture]
    if not any(name.startswith(prefix) for name in owners):
        prefix = ""
    shapes = {prefix + name: shape for name, shape in tensor_shapes(config).items()}
    head = _head_shapes(config, values, path) if architecture.endswith(_CLASSIFIER) else {}
    if missing := (shapes | head).keys() - owners.keys():
        raise ModelError(
            f"{folder}: tensors of {architecture} are missing: {name_list(missing)}; "
            "the checkpoint is incomplete or config.json is of another model"
        )
    parts = {name: Part(name, tuple(slice(0, size) for size in shape)) for name, shape in (shapes | head).items()}
    tensors = read_tensors(shapes | head, parts, owners, dtype, progress)
    model = BertModel(config, {name.removeprefix(prefix): tensors[name] for name in shapes})
    pooling = _score(tensors, values, path) if head else read_pooling(folder, config.hidden_size)
    context = context_of(folder, max_model_len, config.max_position_embeddings)
    fingerprint = fingerprint_of([path.read_bytes(), dtype.encode(), pooling_digest(pooling)], files)
    return LoadedModel(model, architecture, context, fingerprint, pooling)


def pooling_digest(pooling: Pooling) -> bytes:
    """Return what differs between two ways to make vectors of the same hidden states."""
    digest = hashlib.sha256(f"{pooling.task} {pooling.mode} {pooling.normalize}".encode())
    for layer in pooling.layers:
        digest.update(layer.activation.encode() + layer.weight.tobytes())
        digest.update(b"" if layer.bias is None else layer.bias.tobytes())
    return digest.digest()


def _head_shapes(config: BertConfig, values: dict[str, Any], path: Path) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a classifier with one label. Raises ModelError if it has more."""
    hidden = config.hidden_size
    labels = values.get("num_labels") or len(values.get("id2label") or {0: "", 1: ""})
    if labels != 1:
        raise ModelError(f"{path}: the classifier has {labels} labels; only scores, which are one, are supported")
    if config.architecture.startswith("Bert"):
        inner, outer = "bert.pooler.dense", "classifier"
    else:
        inner, outer = "classifier.dense", "classifier.out_proj"
    return {
        f"{inner}.weight": (hidden, hidden),
        f"{inner}.bias": (hidden,),
        f"{outer}.weight": (1, hidden),
        f"{outer}.bias": (1,),
    }


def _score(tensors: dict[str, torch.Tensor], values: dict[str, Any], path: Path) -> Pooling:
    """Return the classifier: two layers, and a sigmoid unless the file says otherwise, as in sentence-transformers."""
    inner, outer = (
        ("bert.pooler.dense", "classifier")
        if "bert.pooler.dense.weight" in tensors
        else ("classifier.dense", "classifier.out_proj")
    )
    named = (values.get("sentence_transformers") or {}).get("activation_fn") or "torch.nn.modules.activation.Sigmoid"
    activation = str(named).rpartition(".")[2].lower()
    if activation not in ("sigmoid", "identity"):
        raise ModelError(f"{path}: scores end with {named}, which is not supported; Sigmoid and Identity are")

    def layer(name: str, activation: str) -> Dense:
        return dense(tensors[f"{name}.weight"], tensors[f"{name}.bias"], activation)

    layers = [layer(inner, "tanh"), layer(outer, activation)]
    return score_pooling(len(layers[0].weight), layers)
