"""Whether a scheduler's workers have the model of this gateway: its token ids mean nothing to another one."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from octavo.scheduler.v1 import scheduler_pb2

_UNUSED = 5  # GGUF's type of ids that no tokenizer makes


@dataclass(frozen=True)
class ModelIdentity:
    """What this gateway knows of its model; what is 0 or empty is not compared.

    tokenizer_sha256  as WorkerReady.tokenizer_sha256
    model_version     of the weights, as WorkerHello.model_version
    """

    vocab_size: int = 0
    tokenizer_sha256: str = ""
    model_version: str = ""

    def mismatch(self, load: scheduler_pb2.Load) -> str:
        """Return why a scheduler's workers are not for this gateway, or nothing.

        Of a scheduler that has had no worker yet nothing is known, so nothing is wrong with it.
        """
        if self.model_version and load.model_version and load.model_version != self.model_version:
            return f"its workers have model version {load.model_version}, this gateway is for {self.model_version}"
        own, theirs = self.tokenizer_sha256, load.tokenizer_sha256
        if own and theirs and _kind(own) == _kind(theirs):
            if own != theirs:
                return f"its workers have a model with the tokenizer {theirs}, this gateway's is {own}"
        elif self.vocab_size and load.vocab_size and load.vocab_size != self.vocab_size:
            return f"its workers have a model with {load.vocab_size} token ids, this gateway's has {self.vocab_size}"
        return ""


def _kind(tokenizer: str) -> str:
    return tokenizer.partition(":")[0]


def folder_digest(definition: bytes) -> str:
    """Return what the tokens of a tokenizer.json are compared by; see WorkerReady.tokenizer_sha256."""
    parsed: dict[str, Any] = json.loads(definition)
    vocab = parsed["model"]["vocab"]
    names = vocab.items() if isinstance(vocab, dict) else ((entry[0], at) for at, entry in enumerate(vocab))
    tokens = {token_id: text for text, token_id in names}
    tokens.update((added["id"], added["content"]) for added in parsed.get("added_tokens") or ())
    return _digest("json", tokens.items())


def gguf_digest(metadata: dict[str, Any]) -> str:
    """Return the same of a GGUF file's metadata."""
    texts: list[str] = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(texts)
    used = (token for token, kind in zip(enumerate(texts), types, strict=False) if kind != _UNUSED)
    return _digest("gguf", used)


def _digest(kind: str, tokens: Iterable[tuple[int, str]]) -> str:
    digest = hashlib.sha256()
    for token_id, text in sorted(tokens):
        data = text.encode("utf-8", "surrogatepass")
        digest.update(struct.pack("<II", token_id, len(data)) + data)
    return f"{kind}:{digest.hexdigest()}"
