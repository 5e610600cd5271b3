"""Log probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from octavo.common.v1 import common_pb2
from octavo.services.gateway.tokenization.tokenizer import ModelTokenizer

_LEAST = -9999.0  # JSON has no infinity
_Alternatives = list[tuple[int, float]]


class TokenTexts:
    """What single tokens look like. Holds each one that was asked for, at most the vocabulary."""

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self._tokenizer = tokenizer
        self._entries: dict[int, tuple[str, bytes]] = {}

    def get(self, token_id: int) -> tuple[str, bytes]:
        """Return a token's text and bytes. What is not whole characters is written in hexadecimal, as OpenAI does."""
        entry = self._entries.get(token_id)
        if entry is None:
            data = self._tokenizer.token_bytes(token_id)
            entry = self._entries[token_id] = (_readable(data), data)
        return entry

    def join(self, token_ids: Sequence[int]) -> str:
        """Return the text of several tokens, special ones included."""
        return b"".join(self.get(token_id)[1] for token_id in token_ids).decode(errors="replace")


def _readable(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in data)


def _rows(token_ids: Sequence[int], columns: common_pb2.LogprobColumns) -> Iterator[tuple[int, float, _Alternatives]]:
    """Yield each token with its log probability and its alternatives."""
    width = columns.width
    for index, (token_id, chosen) in enumerate(zip(token_ids, columns.chosen, strict=True)):
        span = slice(index * width, (index + 1) * width)
        alternatives = zip(columns.candidate_token_ids[span], columns.candidate_logprobs[span], strict=True)
        yield token_id, max(chosen, _LEAST), [(other, max(value, _LEAST)) for other, value in alternatives]


def chat_logprobs(texts: TokenTexts, token_ids: Sequence[int], columns: common_pb2.LogprobColumns) -> dict[str, Any]:
    """Return the logprobs object of a choice of a chat."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text, data = texts.get(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(data)}

    content = [
        {**entry(token_id, logprob), "top_logprobs": [entry(*other) for other in alternatives]}
        for token_id, logprob, alternatives in _rows(token_ids, columns)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    texts: TokenTexts, token_ids: Sequence[int], columns: common_pb2.LogprobColumns, offset: int
) -> tuple[dict[str, Any], int]:
    """Return the logprobs object of a choice of a completion, and the offset of what follows.

    offset: characters of the tokens before these.
    """
    rows = list(_rows(token_ids, columns))
    names = [texts.get(token_id)[0] for token_id, _, _ in rows]
    offsets = []
    for name in names:
        offsets.append(offset)
        offset += len(name)
    top = [
        {texts.get(other)[0]: value for other, value in [*alternatives, (token_id, logprob)]}
        for token_id, logprob, alternatives in rows
    ]
    logprobs = {
        "tokens": names,
        "token_logprobs": [logprob for _, logprob, _ in rows],
        "top_logprobs": top if columns.width else None,
        "text_offset": offsets,
    }
    return logprobs, offset
