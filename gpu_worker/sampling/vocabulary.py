"""The bytes that each token stands for, read from a model's files: what grammars need to know of a tokenizer."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from octavo.gpu_worker.errors import ModelError
from octavo.services.vocabulary.gguf_header import StringArray
from octavo.services.vocabulary.token_bytes import (
    byte_level_bytes,
    folder_digest,
    gguf_digest,
    sentencepiece_bytes,
    to_bytes_of,
)
from octavo.services.vocabulary.tokenizer_json import parse

_UNKNOWN, _CONTROL = 2, 3  # GGUF's token types that matter here


@dataclass(frozen=True)
class Vocabulary:
    """What every token id means.

    tokens             [vocab_size] bytes of each token; empty for ids that the tokenizer does not know
    special_token_ids  those that are no text
    """

    tokens: list[bytes]
    special_token_ids: list[int]


def read_vocabulary(path: Path, vocab_size: int) -> Vocabulary:
    """Read it from a Hugging Face folder or a .gguf file.

    Raises ModelError where the bytes of a token do not follow from its name, or the files do not say.
    """
    if path.is_file() and path.suffix == ".gguf":
        return _read_gguf(path, vocab_size)
    source = path / "tokenizer.json"
    try:
        tokenizer = parse(source.read_bytes())
        to_bytes = to_bytes_of(tokenizer.decoder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{source}: cannot be read ({error})") from None
    if to_bytes is None:
        kind = tokenizer.decoder["type"] if tokenizer.decoder else "no kind"
        raise ModelError(f"{source}: the bytes of tokens do not follow from a decoder of {kind}")
    tokens = [b""] * vocab_size
    for token_id, name in tokenizer.names.items():
        if token_id < vocab_size:
            tokens[token_id] = to_bytes(name)
    return Vocabulary(tokens, [token_id for token_id in tokenizer.special_ids if token_id < vocab_size])


def tokenizer_sha256(path: Path) -> str:
    """Return what gateways compare the tokens of a model by, as WorkerReady.tokenizer_sha256; empty if it has none.

    path  a Hugging Face folder or a .gguf file
    """
    try:
        if path.is_file() and path.suffix == ".gguf":
            return _gguf_sha256(path)
        return folder_digest(parse((path / "tokenizer.json").read_bytes()))
    except (OSError, ValueError, struct.error, ModelError):
        return ""


def _gguf_sha256(path: Path) -> str:
    from octavo.gpu_worker.formats.gguf_file import GgufFile

    file = GgufFile(path)
    names = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(names, StringArray):
        return ""
    return gguf_digest(file.strings(names), file.metadata.get("tokenizer.ggml.token_type"))


def _read_gguf(path: Path, vocab_size: int) -> Vocabulary:
    # Imported late: most models are folders.
    from octavo.gpu_worker.formats.gguf_file import GgufFile

    file = GgufFile(path)
    metadata = file.metadata
    kind, names = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or not isinstance(names, StringArray):
        raise ModelError(f"{path}: tokenizers of the kind {kind!r} are not known; use the folder with tokenizer.json")
    to_bytes = byte_level_bytes if kind == "gpt2" else sentencepiece_bytes
    types = metadata.get("tokenizer.ggml.token_type") or [1] * names.length
    special_types = (_CONTROL,) if kind == "gpt2" else (_CONTROL, _UNKNOWN)
    tokens = [to_bytes(name) for name in file.strings(names)][:vocab_size]
    tokens += [b""] * (vocab_size - len(tokens))
    special = [token_id for token_id, type_ in enumerate(types[:vocab_size]) if type_ in special_types]
    return Vocabulary(tokens, special)
