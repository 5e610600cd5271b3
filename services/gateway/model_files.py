"""Reads what the gateway needs of a model, from a folder in Hugging Face's layout or a GGUF file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from tokenizers import Tokenizer

from octavo.services.gateway.gguf_metadata import GgufError, read_metadata
from octavo.services.gateway.gguf_tokenizer import UnknownTokenizerError, build_tokenizer
from octavo.services.gateway.model_identity import folder_digest, gguf_digest
from octavo.services.gateway.vector_files import LENGTH_FILES, PROMPTS_FILE, VectorFiles, read_vector_files

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_SAMPLING_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_GGUF_SAMPLING = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
_GGUF_END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


class ModelError(ValueError):
    """A model that cannot be served. The message is one line that says what to change."""


@dataclass(frozen=True)
class ModelFiles:
    """What a model's files say."""

    tokenizer: Tokenizer
    definition: bytes
    """tokenizer.json."""
    files: dict[str, bytes]
    """What clients can download, by name; tokenizer.json is among them."""
    chat_template: str
    """Jinja source, or "" if the model has none."""
    special_tokens: dict[str, str]
    """For the template: "bos_token" and the like."""
    vocab_size: int
    """Rows of the embedding: token ids are below this, also those that the tokenizer does not know."""
    max_model_len: int
    """Longest context, in tokens; 0 if the files do not say."""
    end_of_sequence_ids: list[int]
    default_sampling: dict[str, float] = field(default_factory=dict)
    """What the model's makers recommend, by the names in SamplingParams."""
    vector_files: VectorFiles | None = None
    """Of a model that makes vectors and no text."""
    tokens_sha256: str = ""
    """What its tokens are compared by; see WorkerReady.tokenizer_sha256."""


def read_model(path: Path) -> ModelFiles:
    """Return what the files at `path` say. Raises ModelError."""
    try:
        if path.is_dir():
            return _read_folder(path)
        if path.is_file() and path.suffix == ".gguf":
            return _read_gguf(path)
    except (GgufError, UnknownTokenizerError) as error:
        raise ModelError(str(error)) from None
    except OSError as error:
        raise ModelError(f"cannot read {error.filename or path}: {error.strerror}") from None
    what = "is not a .gguf file or a folder" if path.exists() else "does not exist"
    raise ModelError(f"the model {path} {what}; give the folder with config.json and tokenizer.json, or a .gguf file")


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file, or {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return value


def _read_folder(folder: Path) -> ModelFiles:
    source = folder / "tokenizer.json"
    if not source.is_file():
        raise ModelError(f"{folder} has no tokenizer.json; save the model's fast tokenizer there")
    definition = source.read_bytes()
    tokenizer = _parse_tokenizer(definition, source)
    config = _read_json(folder / "config.json")
    text_config = config.get("text_config") or config  # models for text and images nest it
    generation = _read_json(folder / "generation_config.json")
    tokenizer_config = _read_json(folder / "tokenizer_config.json")
    special = _special_tokens({**_read_json(folder / "special_tokens_map.json"), **tokenizer_config})
    template = _folder_template(folder, tokenizer_config)
    files = {"tokenizer.json": definition}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            files[name] = (folder / name).read_bytes()
    if template:
        files["chat_template.jinja"] = template.encode()
    ends = _ids(generation.get("eos_token_id")) + _ids(text_config.get("eos_token_id"))
    if "eos_token" in special:
        ends += _ids(tokenizer.token_to_id(special["eos_token"]))
    context = next((text_config[name] for name in _CONTEXT_NAMES if text_config.get(name)), 0)
    settings = {name: _read_json(folder / name) for name in (*LENGTH_FILES, PROMPTS_FILE)}
    return ModelFiles(
        tokenizer=tokenizer,
        definition=definition,
        files=files,
        vector_files=read_vector_files(folder, config, settings),
        tokens_sha256=folder_digest(definition),
        chat_template=template,
        special_tokens=special,
        vocab_size=int(text_config.get("vocab_size") or tokenizer.get_vocab_size()),
        max_model_len=int(context),
        end_of_sequence_ids=list(dict.fromkeys(ends)),
        default_sampling={name: generation[name] for name in _SAMPLING_NAMES if _is_number(generation.get(name))},
    )


def _parse_tokenizer(definition: bytes, source: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_buffer(definition)
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{source} is not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _folder_template(folder: Path, tokenizer_config: dict[str, Any]) -> str:
    """Return the chat template: of a file of its own, or the (default) one in tokenizer_config.json."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
    return template if isinstance(template, str) else ""


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens


def _ids(value: object) -> list[int]:
    """Return token ids that are given as one, as a list, or not at all."""
    values = value if isinstance(value, list) else [value]
    return [index for index in values if isinstance(index, int) and not isinstance(index, bool) and index >= 0]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _read_gguf(path: Path) -> ModelFiles:
    metadata = read_metadata(path)
    tokenizer = build_tokenizer(metadata)
    definition = tokenizer.to_str().encode()
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    special = {}
    for name in ("bos", "eos", "unknown", "padding"):
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(index, int) and index < len(tokens):
            special[{"unknown": "unk", "padding": "pad"}.get(name, name) + "_token"] = tokens[index]
    template = str(metadata.get("tokenizer.chat_template", ""))
    context = int(metadata.get(f"{metadata.get('general.architecture')}.context_length", 0))
    config = {**special, "model_max_length": context, "tokenizer_class": "PreTrainedTokenizerFast"}
    files = {"tokenizer.json": definition, "tokenizer_config.json": json.dumps(config, ensure_ascii=False).encode()}
    if template:
        files["chat_template.jinja"] = template.encode()
    ends = [index for name in _GGUF_END_IDS for index in _ids(metadata.get(f"tokenizer.ggml.{name}"))]
    sampling = {name: metadata.get(f"general.sampling.{key}") for name, key in _GGUF_SAMPLING.items()}
    return ModelFiles(
        tokenizer=tokenizer,
        definition=definition,
        files=files,
        chat_template=template,
        special_tokens=special,
        vocab_size=len(tokens),
        max_model_len=context,
        end_of_sequence_ids=list(dict.fromkeys(ends)),
        default_sampling={name: float(value) for name, value in sampling.items() if _is_number(value)},
        tokens_sha256=gguf_digest(metadata),
    )
