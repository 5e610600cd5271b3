"""Reads what makes a score, or labels, of a decoder's last hidden state: a classifier, or the logits of two words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.gpu_worker.errors import ModelError, shown
from octavo.gpu_worker.formats.checkpoint_files import read_json, read_list
from octavo.gpu_worker.loading.folder import check_shape, weight_files
from octavo.gpu_worker.loading.pooling_files import dense, head_pooling, last_activation, module_folder, read_pooling
from octavo.gpu_worker.models.classifier import num_labels_of
from octavo.gpu_worker.models.config import ModelConfig, checked_integer
from octavo.gpu_worker.models.encoders import CLASSIFIER, MODULES_FILE, architecture_of
from octavo.gpu_worker.steps.pooler import Pooling

_HEAD = "lm_head.weight"
_EMBEDDINGS = ("model.embed_tokens.weight", "embed_tokens.weight")
_CLASSES = "score.weight"


def read_decoder_pooling(folder: Path, config: ModelConfig) -> Pooling:
    """Return how a decoder's folder makes vectors, a score or labels of hidden states. Raises ModelError."""
    if architecture_of(folder).endswith(CLASSIFIER):
        return _classifier(folder, config)
    if place := _logit_score(folder):
        return _words(folder, place, config)
    return read_pooling(folder, config.hidden_size)


def _classifier(folder: Path, config: ModelConfig) -> Pooling:
    """Return the head that transformers has behind the last token of a text."""
    path = folder / "config.json"
    num_labels = num_labels_of(read_json(path), str(path))
    tensors = _tensors(folder)
    if _CLASSES not in tensors:
        raise ModelError(f"{folder}: the tensor {_CLASSES} is missing")
    weight = tensors[_CLASSES][:]
    check_shape(_CLASSES, tuple(weight.shape), (num_labels, config.hidden_size), str(folder))
    return head_pooling("last", config.hidden_size, [dense(weight, None, last_activation(folder, num_labels))])


def _logit_score(folder: Path) -> Path | None:
    """Return where the settings of sentence-transformers' LogitScore are; None if the folder has no such module."""
    if not (folder / MODULES_FILE).is_file():
        return None
    modules = read_list(folder / MODULES_FILE)
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if "LogitScore" not in kinds:
        return None
    if kinds != ["Transformer", "LogitScore"]:
        raise ModelError(
            f"{folder / MODULES_FILE}: the modules are {', '.join(kinds)}; LogitScore is the second of two"
        )
    return module_folder(folder, str(modules[1].get("path", ""))) / "config.json"


def _words(folder: Path, path: Path, config: ModelConfig) -> Pooling:
    """Return the difference of two words' logits behind the last token, as one layer: their rows of the head."""
    settings = read_json(path)
    ids = [settings.get(f"{name}_token_id") for name in ("true", "false")]
    wanted = [checked_integer(value, f"{path}: a token id") for value in ids if value is not None]
    if ids[0] is None or not all(0 <= token < config.vocab_size for token in wanted):
        raise ModelError(f"{path}: the token ids are {shown(ids)}, expected two below {config.vocab_size}")
    tensors = _tensors(folder)
    names = _EMBEDDINGS if config.tie_word_embeddings else (_HEAD,)
    name = next((name for name in names if name in tensors), None)
    if name is None:
        raise ModelError(f"{folder}: the tensor {names[0]} is missing, which logits are made of")
    check_shape(name, tuple(tensors[name].get_shape()), (config.vocab_size, config.hidden_size), str(folder))
    rows = [tensors[name][token : token + 1].float() for token in wanted]
    weight = (rows[0] - rows[1] if len(rows) > 1 else rows[0]) / config.logits_divisor
    return head_pooling("last", config.hidden_size, [dense(weight, None, last_activation(folder, 1))])


def _tensors(folder: Path) -> Mapping[str, Any]:
    """Return what reads each tensor, or rows of it."""
    from octavo.gpu_worker.loading.weights import tensor_files

    return {name: handle.get_slice(name) for name, (_, handle) in tensor_files(weight_files(folder)).items()}
