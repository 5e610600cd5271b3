"""What the tokens of two models are compared by: WorkerReady.tokenizer_sha256."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence

from octavo.services.vocabulary.tokenizer_json import TokenizerJson

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
