"""The bytes that each token stands for, read from a model's files: what grammars need to know of a tokenizer."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.gpu_worker.errors import ModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BLANK = "▁"
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5  # GGUF's token types that matter here


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
        definition = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{source}: cannot be read ({error})") from None
    to_bytes = _to_bytes(definition.get("decoder"))
    vocab = definition["model"]["vocab"]
    names = vocab.items() if isinstance(vocab, dict) else ((entry[0], at) for at, entry in enumerate(vocab))
    tokens = [b""] * vocab_size
    for name, token_id in names:
        if token_id < vocab_size:
            tokens[token_id] = to_bytes(name)
    special = []
    for added in definition.get("added_tokens", ()):
        if added["id"] < vocab_size:
            tokens[added["id"]] = to_bytes(added["content"])
            if added["special"]:
                special.append(added["id"])
    return Vocabulary(tokens, special)


def tokenizer_sha256(path: Path) -> str:
    """Return what gateways compare the tokens of a model by, as WorkerReady.tokenizer_sha256; empty if it has none.

    path  a Hugging Face folder or a .gguf file
    """
    try:
        if path.is_file() and path.suffix == ".gguf":
            return _gguf_sha256(path)
        definition = json.loads((path / "tokenizer.json").read_bytes())
        vocab = definition["model"]["vocab"]
        names = vocab.items() if isinstance(vocab, dict) else ((entry[0], at) for at, entry in enumerate(vocab))
        tokens = {token_id: text for text, token_id in names}
        tokens.update((added["id"], added["content"]) for added in definition.get("added_tokens") or ())
        return _digest("json", tokens.items())
    except (OSError, ValueError, KeyError, TypeError, struct.error, ModelError):
        return ""


def _gguf_sha256(path: Path) -> str:
    from octavo.gpu_worker.gguf_file import GgufFile, StringArray

    file = GgufFile(path)
    names = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(names, StringArray):
        return ""
    types = file.metadata.get("tokenizer.ggml.token_type") or [1] * names.length
    used = (token for token, kind in zip(enumerate(file.strings(names)), types, strict=False) if kind != _UNUSED)
    return _digest("gguf", used)


def _digest(kind: str, tokens: Iterable[tuple[int, str]]) -> str:
    digest = hashlib.sha256()
    for token_id, text in sorted(tokens):
        data = text.encode("utf-8", "surrogatepass")
        digest.update(struct.pack("<II", token_id, len(data)) + data)
    return f"{kind}:{digest.hexdigest()}"


def _read_gguf(path: Path, vocab_size: int) -> Vocabulary:
    # Imported late: most models are folders.
    from octavo.gpu_worker.gguf_file import GgufFile, StringArray

    file = GgufFile(path)
    metadata = file.metadata
    kind, names = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or not isinstance(names, StringArray):
        raise ModelError(f"{path}: tokenizers of the kind {kind!r} are not known; use the folder with tokenizer.json")
    to_bytes = _byte_level_bytes if kind == "gpt2" else _sentencepiece_bytes
    types = metadata.get("tokenizer.ggml.token_type") or [1] * names.length
    special_types = (_CONTROL,) if kind == "gpt2" else (_CONTROL, _UNKNOWN)
    tokens = [to_bytes(name) for name in file.strings(names)][:vocab_size]
    tokens += [b""] * (vocab_size - len(tokens))
    special = [token_id for token_id, type_ in enumerate(types[:vocab_size]) if type_ in special_types]
    return Vocabulary(tokens, special)


def _to_bytes(decoder: dict[str, Any] | None) -> Callable[[str], bytes]:
    """Return how the bytes of a token follow from its name. Raises ModelError."""
    steps = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level_bytes
    blanks = {"type": "Replace", "pattern": {"String": _BLANK}, "content": " "}
    if blanks in steps and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"} and kinds.count("Replace") == 1:
        return _sentencepiece_bytes if "ByteFallback" in kinds else lambda name: name.replace(_BLANK, " ").encode()
    raise ModelError(f"tokenizer.json: the bytes of tokens do not follow from a decoder of {kinds or 'no kind'}")


def _byte_alphabet() -> dict[str, int]:
    """Return which byte each character of a byte-level token stands for (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level_bytes(name: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in name])
    except KeyError:  # an added token: plain text
        return name.encode()


def _sentencepiece_bytes(name: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace(_BLANK, " ").encode()
