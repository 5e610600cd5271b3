"""The bytes that a token stands for, which follow from its name in most models."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

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
