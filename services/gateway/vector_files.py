"""What a model's folder says about making vectors, in the layout of sentence-transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.common.v1 import common_pb2

MODULES_FILE = "modules.json"
PROMPTS_FILE = "config_sentence_transformers.json"
LENGTH_FILES = ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_xlm-roberta_config.json")
_MAX_PROMPTS = 256


@dataclass(frozen=True)
class VectorFiles:
    """A model that makes vectors, or scores, and no text.

    max_input_tokens      longer inputs are cut; 0: by nothing but the model's own limit
    prompts               what goes before a text, by name
    default_prompt_name   of the prompt where a request names none; empty: none
    dimensions            the sizes that vectors may be cut to; empty: any
    lower_case            texts are read in lower case, whatever the tokenizer does by itself
    """

    task: common_pb2.ModelTask
    max_input_tokens: int = 0
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str = ""
    dimensions: tuple[int, ...] = ()
    lower_case: bool = False


def read_vector_files(
    folder: Path, config: Mapping[str, Any], read_json: Mapping[str, dict[str, Any]]
) -> VectorFiles | None:
    """Return what a folder says; None if its model generates text.

    config     its config.json, parsed
    read_json  the files of LENGTH_FILES and PROMPTS_FILE that there are, parsed
    """
    architecture = str((config.get("architectures") or [""])[0])
    if architecture.endswith("ForSequenceClassification"):
        return VectorFiles(common_pb2.MODEL_TASK_SCORE, _length(read_json), lower_case=_is_lower_case(read_json))
    if not (folder / MODULES_FILE).is_file() and not architecture.endswith(("Model", "ForMaskedLM")):
        return None
    settings = read_json.get(PROMPTS_FILE, {})
    given = settings.get("prompts")
    prompts = given if isinstance(given, dict) else {}
    sizes = config.get("matryoshka_dimensions")
    return VectorFiles(
        common_pb2.MODEL_TASK_EMBED,
        _length(read_json),
        {str(name): str(text) for name, text in list(prompts.items())[:_MAX_PROMPTS]},
        str(settings.get("default_prompt_name") or ""),
        tuple(size for size in sizes if isinstance(size, int)) if isinstance(sizes, list) else (),
        _is_lower_case(read_json),
    )


def _length(read_json: Mapping[str, dict[str, Any]]) -> int:
    for name in LENGTH_FILES:
        length = read_json.get(name, {}).get("max_seq_length")
        if isinstance(length, int) and not isinstance(length, bool) and length > 0:
            return length
    return 0


def _is_lower_case(read_json: Mapping[str, dict[str, Any]]) -> bool:
    return any(read_json.get(name, {}).get("do_lower_case") is True for name in LENGTH_FILES)
