"""The encoders that there are, by the name in config.json; apart from their code, which needs torch."""

from __future__ import annotations

from pathlib import Path

from octavo.gpu_worker.errors import ModelError
from octavo.gpu_worker.formats.checkpoint_files import read_json

MODULES_FILE = "modules.json"
"""Where sentence-transformers lists what makes a vector, the model first."""
CLASSIFIER = "ForSequenceClassification"
"""What the names of architectures with a head for labels end with."""

# What the names of a checkpoint's tensors begin with, where they begin with something.
PREFIXES = {
    "BertModel": "bert.",
    "BertForMaskedLM": "bert.",
    "BertForSequenceClassification": "bert.",
    "RobertaModel": "roberta.",
    "RobertaForMaskedLM": "roberta.",
    "RobertaForSequenceClassification": "roberta.",
    "XLMRobertaModel": "roberta.",
    "XLMRobertaForMaskedLM": "roberta.",
    "XLMRobertaForSequenceClassification": "roberta.",
    "ModernBertModel": "model.",
    "ModernBertForMaskedLM": "model.",
    "ModernBertForSequenceClassification": "model.",
    "NomicBertModel": "nomic_bert.",
    "NomicBertForMaskedLM": "nomic_bert.",
    "NomicBertForSequenceClassification": "nomic_bert.",
}


def makes_vectors(file: Path) -> bool:
    """Return whether a model is for vectors: an encoder, a classifier, or in the layout of sentence-transformers."""
    architecture = architecture_of(file)
    return (file / MODULES_FILE).is_file() or architecture in PREFIXES or architecture.endswith(CLASSIFIER)


def is_bidirectional(file: Path) -> bool:
    """Return whether a folder's config.json says of a decoder that all tokens of a text see each other."""
    try:
        return read_json(file / "config.json").get("use_bidirectional_attention") is True
    except ModelError:
        return False


def architecture_of(file: Path) -> str:
    """Return the architecture that a folder's config.json names; empty if there is none that can be read."""
    try:
        names = read_json(file / "config.json").get("architectures")
    except ModelError:
        return ""
    return str(names[0]) if isinstance(names, list) and names else ""
