"""The bytes that tokens stand for, by their names, and the digest by which the tokens of two models are compared."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from octavo.services.vocabulary.tokenizer_json import TokenizerJson

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BLANK = "▁"


def to_bytes_of(decoder: dict[str, Any] | None) -> Callable[[str], bytes] | None:
    """Return how the bytes of a token follow from its name, or None if they depend on its neighbours.

    decoder  as in a tokenizer.json
    """
    if decoder is None:
        return None
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return byte_level_bytes
    blanks = {"type": "Replace", "pattern": {"String": _BLANK}, "content": " "}
    # Strip takes the blank off the start of a text. An output never is the start: the prompt is.
    if blanks in steps and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"} and kinds.count("Replace") == 1:
        return sentencepiece_bytes if "ByteFallback" in kinds else lambda name: name.replace(_BLANK, " ").encode()
    return None


def _byte_alphabet() -> dict[str, int]:
    """Return which byte each character of a byte-level token stands for (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def byte_level_bytes(name: str) -> bytes:
    """Return the bytes of a byte-level token."""
    try:
        return bytes([_BYTE_OF[character] for character in name])
    except KeyError:  # an added token: plain text
        return name.encode()


def sentencepiece_bytes(name: str) -> bytes:
    """Return the bytes of a SentencePiece token that may stand for a byte."""
    byte = _BYTE_TOKEN.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name.replace(_BLANK, " ").encode()


_UNUSED = 5  # GGUF's type of ids that no tokenizer makes


def folder_digest(tokenizer: TokenizerJson) -> str:
    """Return that of a tokenizer.json."""
    return _digest("json", tokenizer.names.items())


def gguf_digest(names: Sequence[str], types: Sequence[int] | None) -> str:
    """Return that of a GGUF file's tokenizer.ggml.tokens and tokenizer.ggml.token_type."""
    types = types or [1] * len(names)
    return _digest("gguf", (token for token, kind in zip(enumerate(names), types, strict=False) if kind != _UNUSED))


def _digest(kind: str, tokens: Iterable[tuple[int, str]]) -> str:
    digest = hashlib.sha256()
    for token_id, name in sorted(tokens):
        data = name.encode("utf-8", "surrogatepass")
        digest.update(struct.pack("<II", token_id, len(data)) + data)
    return f"{kind}:{digest.hexdigest()}"
