"""The encoders that there are, by the name in config.json; apart from their code, which needs torch."""

from __future__ import annotations

import json
from pathlib import Path

MODULES_FILE = "modules.json"
"""Where sentence-transformers lists what makes a vector, the model first."""

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
}


def makes_vectors(file: Path) -> bool:
    """Return whether a model is for vectors: an encoder, or a folder in the layout of sentence-transformers."""
    return (file / MODULES_FILE).is_file() or architecture_of(file) in PREFIXES


def architecture_of(file: Path) -> str:
    """Return the architecture that a folder's config.json names; empty if there is none that can be read."""
    try:
        return str(json.loads((file / "config.json").read_text(encoding="utf-8"))["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError):
        return ""
