"""Reads what the gateway needs of a model, from a folder in Hugging Face's layout or a GGUF file."""

from __future__ import annotations

import json
import mmap
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from octavo.services.gateway.tokenization.gguf_tokenizer import UnknownTokenizerError, build_tokenizer, token_id
from octavo.services.gateway.tokenization.vector_files import (
    LENGTH_FILES,
    MODULES_FILE,
    PROMPTS_FILE,
    VectorFiles,
    read_vector_files,
)
from octavo.services.vocabulary.gguf_header import GgufError, GgufHeader, StringArray
from octavo.services.vocabulary.token_bytes import folder_digest, gguf_digest
from octavo.services.vocabulary.tokenizer_json import parse

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_SAMPLING_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_GGUF_SAMPLING = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
_GGUF_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_GGUF_ENDS = ("eos", "eot", "eom")
_GGUF_EMBEDDING = "token_embd.weight"
_GGUF_TEMPLATE = "tokenizer.chat_template"
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
MAX_VOCAB_SIZE = 4_194_304
MAX_CONTEXT = (1 << 31) - 1
_MAX_JSON_BYTES = 16 << 20
_MAX_TOKENIZER_BYTES = 256 << 20
_MAX_NUMBER = 1e30
_TRIAL = "a \U000f0000"  # the last one is for private use
_MAX_TRIAL_TOKENS = 1024


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
    chat_template_from: str
    """The file, and the field in it, that the template is from."""
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
    settings_from: str = ""
    """Where `default_sampling` is from."""
    tokens_sha256: str = ""
    """What its tokens are compared by; see WorkerReady.tokenizer_sha256."""


def read_model(path: Path) -> ModelFiles:
    """Return what the files at `path` say. Raises ModelError."""
    try:
        if path.is_dir():
            return _read_folder(path)
        if path.is_file() and path.suffix == ".gguf":
            return _read_gguf(path)
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(str(error)) from None
    except OSError as error:
        raise ModelError(f"cannot read {error.filename or path}: {error.strerror}") from None
    what = "is not a .gguf file or a folder" if path.exists() else "does not exist"
    raise ModelError(f"the model {path} {what}; give the folder with config.json and tokenizer.json, or a .gguf file")


def _read_file(path: Path, max_bytes: int = _MAX_JSON_BYTES) -> bytes | None:
    """Return what is in a file, or None if there is no such file."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise ModelError(f"{path} is a link to a file that does not exist; put the file there") from None
        return None
    if not stat.S_ISREG(mode):  # to open a FIFO takes until somebody writes
        raise ModelError(f"{path} must be a file, and is something else; put the file there, or remove it")
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ModelError(f"{path} must have at most {max_bytes} bytes")
    return data


def _read_text(path: Path) -> str | None:
    data = _read_file(path)
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} must be UTF-8: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file, or {} if there is no such file."""
    text = _read_text(path)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except RecursionError:
        raise ModelError(f"{path} is nested too deeply") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return value


def _read_folder(folder: Path) -> ModelFiles:
    source = folder / "tokenizer.json"
    definition = _read_file(source, _MAX_TOKENIZER_BYTES)
    if definition is None:
        raise ModelError(f"{folder} has no tokenizer.json; save the model's fast tokenizer there")
    tokenizer = _parse_tokenizer(definition, source)
    config_file, generation_file = folder / "config.json", folder / "generation_config.json"
    config = _read_json(config_file)
    text_config = config.get("text_config") or config  # models for text and images nest it
    if not isinstance(text_config, dict):
        raise ModelError(f"{config_file}: text_config must be an object")
    generation = _read_json(generation_file)
    tokenizer_config = _read_json(folder / "tokenizer_config.json")
    special = _special_tokens({**_read_json(folder / "special_tokens_map.json"), **tokenizer_config})
    template, template_from = _folder_template(folder, tokenizer_config)
    files = {"tokenizer.json": definition}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (content := _read_file(folder / name)) is not None:
            files[name] = content
    if template:
        files["chat_template.jinja"] = template.encode()
    vocab_size = _whole(text_config.get("vocab_size"), f"{config_file}: vocab_size", MAX_VOCAB_SIZE)
    ends = _ids(generation.get("eos_token_id"), f"{generation_file}: eos_token_id")
    ends += _ids(text_config.get("eos_token_id"), f"{config_file}: eos_token_id")
    if "eos_token" in special:
        ends += _ids(tokenizer.token_to_id(special["eos_token"]), "")
    context = next((name for name in _CONTEXT_NAMES if text_config.get(name)), _CONTEXT_NAMES[0])
    settings = {name: _read_json(folder / name) for name in (*LENGTH_FILES, PROMPTS_FILE)}
    return ModelFiles(
        tokenizer=tokenizer,
        definition=definition,
        files=files,
        vector_files=read_vector_files(folder, config, settings, _read_text(folder / MODULES_FILE)),
        tokens_sha256=_folder_digest(definition, source),
        chat_template=template,
        chat_template_from=template_from,
        special_tokens=special,
        vocab_size=vocab_size or tokenizer.get_vocab_size(),
        max_model_len=_whole(text_config.get(context), f"{config_file}: {context}", MAX_CONTEXT),
        end_of_sequence_ids=_ends(ends, tokenizer, vocab_size or tokenizer.get_vocab_size()),
        default_sampling={
            name: _number(generation[name], f"{generation_file}: {name}")
            for name in _SAMPLING_NAMES
            if generation.get(name) is not None
        },
        settings_from=str(generation_file),
    )


def _parse_tokenizer(definition: bytes, source: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_buffer(definition)
        tokenizer.no_truncation()
        tokenizer.no_padding()
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{source} is not a tokenizer: {error}") from None
    except BaseException as error:
        raise _panic(source, error) from None
    _try_out(tokenizer, source)
    return tokenizer


def _try_out(tokenizer: Tokenizer, source: Path) -> None:
    """Refuse a tokenizer that fails at a text, or makes a long one of it: each request would."""
    try:
        text = _TRIAL if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(_TRIAL)
        num_tokens = len(tokenizer.encode(_TRIAL)) if len(text) <= _MAX_TRIAL_TOKENS else 0
    except Exception as error:
        advice = "model.unk_token must be in model.vocab, or every character in the tokenizer"
        raise ModelError(f"{source} cannot encode a text with a character of no use: {error}; {advice}") from None
    except BaseException as error:
        raise _panic(source, error) from None
    if len(text) > _MAX_TRIAL_TOKENS:
        raise ModelError(f"{source}: its normalizer makes {len(text)} characters of a text of {len(_TRIAL)}")
    if num_tokens > _MAX_TRIAL_TOKENS:
        raise ModelError(f"{source} makes {num_tokens} tokens of a text of {len(_TRIAL)} characters")


def _panic(source: Path, error: BaseException) -> BaseException:
    """Return what to raise for an exception of no usual kind: the library's panics are such."""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return error
    return ModelError(f"{source} is not a tokenizer: the library fails with it ({error})")


def _folder_digest(definition: bytes, source: Path) -> str:
    try:
        return folder_digest(parse(definition))
    except ValueError as error:
        raise ModelError(f"{source}: {error}") from None


def _folder_template(folder: Path, tokenizer_config: dict[str, Any]) -> tuple[str, str]:
    """Return the chat template, of a file of its own or the (default) one in a JSON file, and where it is from."""
    own = folder / "chat_template.jinja"
    text = _read_text(own)
    if text is not None:
        return text, str(own)
    for name, holder in (
        ("tokenizer_config.json", tokenizer_config),
        ("chat_template.json", _read_json(folder / "chat_template.json")),
    ):
        source = f"{folder / name}: chat_template"
        template = holder.get("chat_template")
        if isinstance(template, list):
            entries = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
            template = entries[-1].get("template") if entries else ""
        if template is not None and not isinstance(template, str):
            raise ModelError(f"{source} must be a text, or a list of names and templates")
        if template:
            return _unicode(template, source), source
    return "", ""


def _unicode(text: str, source: str) -> str:
    """Return a text that can be written in UTF-8, as JSON need not be."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ModelError(f"{source} must be Unicode: {error}") from None
    return text


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = _unicode(text, name)
    return tokens


def _ids(value: object, source: str) -> list[int]:
    """Return token ids that are given as one, as a list, or not at all; -1 is none."""
    ids = []
    for each in value if isinstance(value, list) else [value]:
        if each is not None and (not isinstance(each, int) or isinstance(each, bool)):
            raise ModelError(f"{source} must be a token id, or a list of them, not {_shown(value)}")
        if each is not None and each >= 0:
            ids.append(each)
    return ids


def _ends(ids: list[int], tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Return each id once, without those that no output can have."""
    end, call, answer = (tokenizer.token_to_id(f"<|{name}|>") for name in ("end", "call", "return"))
    if call is not None and answer in ids:
        # gpt-oss: a GGUF file names one end only, and <|end|> stands after each message, those of reasoning, too.
        ids = [index for index in ids if index != end] + [call]
    return [index for index in dict.fromkeys(ids) if index < vocab_size]


def _whole(value: object, source: str, most: int) -> int:
    """Return a count; 0 if there is none."""
    if value is None:
        return 0
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if not is_whole or isinstance(value, bool) or not 0 <= value <= most:  # type: ignore[operator]  # a number by now
        raise ModelError(f"{source} must be a whole number from 0 to {most}, not {_shown(value)}")
    return int(value)  # type: ignore[call-overload, no-any-return]


def _number(value: object, source: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= _MAX_NUMBER:
        raise ModelError(f"{source} must be a number, not {_shown(value)}")
    return value


def _shown(value: object) -> str:
    """Return a value as it may stand in a message: what JSON can hold may be long."""
    if isinstance(value, int) and abs(value) > _MAX_NUMBER:
        return f"one of {value.bit_length()} bits"
    return repr(value)[:80]


def _gguf_metadata(path: Path) -> tuple[dict[str, Any], int]:
    """Return the metadata of a file, and how many token ids its embedding has rows for. Raises ModelError, OSError."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = GgufHeader(data)
            values = header.metadata.items()
            metadata = {key: header.strings(of) if isinstance(of, StringArray) else of for key, of in values}
    except GgufError as error:
        raise ModelError(f"{path}: {error}") from None
    except ValueError:  # mmap's
        raise ModelError(f"{path} is not a whole GGUF file: it is empty; download it again") from None
    rows = (tensor.shape[0] for tensor in header.tensors if tensor.name == _GGUF_EMBEDDING)
    return metadata, next(rows, sys.maxsize)


def _read_gguf(path: Path) -> ModelFiles:
    metadata, embedding_rows = _gguf_metadata(path)
    try:
        tokenizer = build_tokenizer(metadata)
        ids = {name: token_id(metadata, name) for name in (*_GGUF_SPECIAL, *_GGUF_ENDS)}
    except UnknownTokenizerError as error:
        raise ModelError(f"{path}: {error}") from None
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{path}: its tokenizer cannot be used: {error}") from None
    except BaseException as error:
        raise _panic(path, error) from None
    _try_out(tokenizer, path)
    definition = tokenizer.to_str().encode()
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    # Tokens that the embedding has no row for cannot be computed.
    vocab_size = min(len(tokens), embedding_rows)
    special = {token: tokens[index] for name, token in _GGUF_SPECIAL.items() if (index := ids[name]) is not None}
    template = metadata.get(_GGUF_TEMPLATE, "")
    if not isinstance(template, str):
        raise ModelError(f"{path}: {_GGUF_TEMPLATE} must be a text")
    context_name = f"{metadata.get('general.architecture')}.context_length"
    context = _whole(metadata.get(context_name), f"{path}: {context_name[:80]}", MAX_CONTEXT)
    config = {**special, "model_max_length": context, "tokenizer_class": "PreTrainedTokenizerFast"}
    files = {"tokenizer.json": definition, "tokenizer_config.json": json.dumps(config, ensure_ascii=False).encode()}
    if template:
        files["chat_template.jinja"] = template.encode()
    sampling = {name: f"general.sampling.{key}" for name, key in _GGUF_SAMPLING.items()}
    return ModelFiles(
        tokenizer=tokenizer,
        definition=definition,
        files=files,
        chat_template=template,
        chat_template_from=f"{path}: {_GGUF_TEMPLATE}",
        special_tokens=special,
        vocab_size=vocab_size,
        max_model_len=context,
        end_of_sequence_ids=_ends(
            [index for name in _GGUF_ENDS if (index := ids[name]) is not None], tokenizer, vocab_size
        ),
        default_sampling={
            name: _number(metadata[key], f"{path}: {key}") for name, key in sampling.items() if key in metadata
        },
        tokens_sha256=gguf_digest(tokens, metadata.get("tokenizer.ggml.token_type")),
        settings_from=f"{path}: general.sampling",
    )
