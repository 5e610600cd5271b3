"""What a model's folder says about making vectors, scores or labels, in the layout of sentence-transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.common.v1 import common_pb2

MODULES_FILE = "modules.json"
PROMPTS_FILE = "config_sentence_transformers.json"
LENGTH_FILES = ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_xlm-roberta_config.json")
_MAX_PROMPTS = 256
_MAX_LABELS = 65536
_CLASSIFIER = "ForSequenceClassification"


@dataclass(frozen=True)
class VectorFiles:
    """A model that makes vectors, scores or labels, and no text.

    max_input_tokens      longer inputs are cut; 0: by nothing but the model's own limit
    prompts               what goes before a text, by name
    default_prompt_name   of the prompt where a request names none; empty: none
    dimensions            the sizes that vectors may be cut to; empty: any
    lower_case            texts are read in lower case, whatever the tokenizer does by itself
    labels                what a classifier tells apart
    needs_template        pairs are read as the chat template has them, with the roles query and document
    """

    task: common_pb2.ModelTask
    max_input_tokens: int = 0
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str = ""
    dimensions: tuple[int, ...] = ()
    lower_case: bool = False
    labels: tuple[str, ...] = ()
    needs_template: bool = False


def read_vector_files(
    folder: Path, config: Mapping[str, Any], read_json: Mapping[str, dict[str, Any]], modules: str | None
) -> VectorFiles | None:
    """Return what a folder says; None if its model generates text. Raises ValueError.

    config     its config.json, parsed
    read_json  the files of LENGTH_FILES and PROMPTS_FILE that there are, parsed
    modules    MODULES_FILE, None if there is none
    """
    names = config.get("architectures") or [""]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise ValueError(f"{folder / 'config.json'}: architectures must be a list of names")
    architecture = names[0]
    is_classifier, is_logit_score = architecture.endswith(_CLASSIFIER), _has_module(modules, "LogitScore")
    if modules is None and not is_classifier and not architecture.endswith(("Model", "ForMaskedLM")):
        return None
    task = common_pb2.MODEL_TASK_EMBED
    labels: tuple[str, ...] = ()
    if is_classifier:
        labels = _labels(config)
        task = common_pb2.MODEL_TASK_SCORE if len(labels) == 1 else common_pb2.MODEL_TASK_CLASSIFY
    elif is_logit_score:
        task, labels = common_pb2.MODEL_TASK_SCORE, ("LABEL_0",)
    settings = read_json.get(PROMPTS_FILE, {})
    given = settings.get("prompts")
    prompts = given if isinstance(given, dict) else {}
    default = str(settings.get("default_prompt_name") or "")
    if default and default not in prompts:
        raise ValueError(
            f"{folder / PROMPTS_FILE}: default_prompt_name must be one of the prompts, not {default[:50]!r}"
        )
    sizes = config.get("matryoshka_dimensions")
    return VectorFiles(
        task,
        _length(read_json),
        {str(name): str(text) for name, text in list(prompts.items())[:_MAX_PROMPTS]},
        default,
        tuple(size for size in sizes if isinstance(size, int)) if isinstance(sizes, list) else (),
        _is_lower_case(read_json),
        labels,
        needs_template=is_logit_score and not is_classifier,
    )


def _has_module(modules: str | None, kind: str) -> bool:
    """Return whether the text of MODULES_FILE names a kind of module."""
    try:
        rows = json.loads(modules or "[]")
    except (ValueError, RecursionError):
        return False  # which the worker says more about
    kinds = [row.get("type") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return any(isinstance(each, str) and each.rpartition(".")[2] == kind for each in kinds)


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a classifier's labels, in their order; those without one are named as transformers does."""
    given = config.get("id2label")
    names = given if isinstance(given, dict) else {}
    count = config.get("num_labels") or len(names) or 2
    if not isinstance(count, int) or not 1 <= count <= _MAX_LABELS:
        return ()  # which the worker refuses
    return tuple(str(names.get(str(index), f"LABEL_{index}")) for index in range(count))


def _length(read_json: Mapping[str, dict[str, Any]]) -> int:
    for name in LENGTH_FILES:
        length = read_json.get(name, {}).get("max_seq_length")
        if isinstance(length, int) and not isinstance(length, bool) and length > 0:
            return length
    return 0


def _is_lower_case(read_json: Mapping[str, dict[str, Any]]) -> bool:
    return any(read_json.get(name, {}).get("do_lower_case") is True for name in LENGTH_FILES)
