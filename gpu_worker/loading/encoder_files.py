"""Loads an encoder's folder, with what makes vectors or scores of its hidden states."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.formats.checkpoint_files import fingerprint_of_folder, read_json
from octavo.gpu_worker.loading.folder import name_list, weight_files
from octavo.gpu_worker.loading.loading import LoadedModel, Progress, context_of
from octavo.gpu_worker.loading.pooling_files import dense, head_pooling, last_activation, norm, read_pooling
from octavo.gpu_worker.loading.sharding import Part
from octavo.gpu_worker.models.bert import BertConfig
from octavo.gpu_worker.models.classifier import Classifier, num_labels_of
from octavo.gpu_worker.models.encoders import CLASSIFIER, PREFIXES
from octavo.gpu_worker.models.modernbert import ModernBertConfig
from octavo.gpu_worker.models.nomic_bert import NomicBertConfig
from octavo.gpu_worker.steps.pooler import ACTIVATIONS, Layer, Pooling

if TYPE_CHECKING:  # what a folder holds is known without torch
    import torch

EncoderConfig = BertConfig | ModernBertConfig | NomicBertConfig


@dataclass(frozen=True)
class EncoderPlan:
    """What config.json says, and the tensors that are read of those in the files.

    shapes  of the encoder's tensors, by their names there, which begin with `prefix`
    head    of those behind it
    """

    config: EncoderConfig
    prefix: str
    shapes: dict[str, tuple[int, ...]]
    head: dict[str, tuple[int, ...]]
    last_activation: str
    num_labels: int


def plan_encoder(folder: Path, architecture: str, found: Mapping[str, object]) -> EncoderPlan:
    """Return what of the tensors `found`, by name, is read for one of PREFIXES. Raises ModelError."""
    path = folder / "config.json"
    values = read_json(path)
    has_head = architecture.endswith(CLASSIFIER)
    num_labels = num_labels_of(values, str(path)) if has_head else 0
    config: EncoderConfig
    if architecture.startswith("ModernBert"):
        config = ModernBertConfig.from_json(values, num_labels, str(path))
    elif architecture.startswith("NomicBert"):
        config = NomicBertConfig.from_json(values, num_labels, str(path))
    else:
        config = BertConfig.from_json(values, architecture, num_labels, str(path))
    prefix = PREFIXES[architecture]
    if not any(name.startswith(prefix) for name in found):
        prefix = ""
    shapes = {prefix + name: shape for name, shape in config.tensor_shapes().items()}
    head: dict[str, tuple[int, ...]] = {}
    if has_head:
        _check_activations(config.classifier, path)
        head = dict(config.classifier.tensor_shapes(config.hidden_size))
    if missing := (shapes | head).keys() - found.keys():
        raise ModelError(
            f"{folder}: tensors of {architecture} are missing: {name_list(missing)}; "
            "the checkpoint is incomplete or config.json is of another model"
        )
    return EncoderPlan(config, prefix, shapes, head, last_activation(folder, num_labels) if head else "", num_labels)


def load_encoder(folder: Path, architecture: str, dtype: str, max_model_len: int, progress: Progress) -> LoadedModel:
    """Load a folder whose config.json names one of PREFIXES. Raises ModelError.

    dtype  a name of weights.DTYPES, or "auto" to keep what is stored
    """
    # Imported late: what a folder holds is known without torch.
    from octavo.gpu_worker.loading.weights import read_tensors, tensor_files

    path = folder / "config.json"
    files = weight_files(folder)
    owners = tensor_files(files)
    plan = plan_encoder(folder, architecture, owners)
    config, prefix, shapes, head = plan.config, plan.prefix, plan.shapes, plan.head
    parts = {name: Part(name, tuple(slice(0, size) for size in shape)) for name, shape in (shapes | head).items()}
    tensors = read_tensors(shapes | head, parts, owners, dtype, progress)
    context = context_of(folder, max_model_len, config.max_position_embeddings)
    model = config.build({name.removeprefix(prefix): tensors[name] for name in shapes}, context)
    if head:
        pooling = _head(config.classifier, config.hidden_size, tensors, plan.last_activation)
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


def _check_activations(classifier: Classifier, path: Path) -> None:
    """Raise ModelError if a layer of a head before its last one is not computed here."""
    for layer in classifier.layers[:-1]:
        if layer.activation not in ACTIVATIONS:
            raise ModelError(
                f"{path}: the classifier's activation {layer.activation} is not one of {list(ACTIVATIONS)}"
            )


def _head(classifier: Classifier, hidden_size: int, tensors: dict[str, torch.Tensor], activation: str) -> Pooling:
    """Return the classifier, with an activation behind its last layer."""
    *inner, last = classifier.layers
    layers: list[Layer] = []
    for layer in (*inner, replace(last, activation=activation)):
        layers.append(dense(tensors[f"{layer.name}.weight"], tensors.get(f"{layer.name}.bias"), layer.activation))
        if layer.norm is not None:
            weight, bias = tensors[f"{layer.norm.name}.weight"], tensors.get(f"{layer.norm.name}.bias")
            layers.append(norm(weight, bias, layer.norm.eps))
    return head_pooling(classifier.pooling, hidden_size, layers)
