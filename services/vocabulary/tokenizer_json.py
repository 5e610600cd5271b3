"""Reads a tokenizer.json as far as ids, names and bytes of tokens go."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TokenizerJson:
    """The tokens of a tokenizer.json.

    names        of all tokens, by id; where two claim an id, that of the added one
    special_ids  of added tokens that are no text
    decoder      how names become text, as the file says it; None if it does not
    """

    names: dict[int, str]
    special_ids: list[int]
    decoder: dict[str, Any] | None


def parse(definition: bytes) -> TokenizerJson:
    """Return what a file says. Raises ValueError, which says which field is wrong."""
    try:
        whole = json.loads(definition)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    model = _field(whole, "model", dict)
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        names = {token_id: name for name, token_id in vocab.items()}
    elif isinstance(vocab, list):  # of Unigram: names with scores
        names = dict(enumerate(entry[0] if isinstance(entry, list) and entry else None for entry in vocab))
    else:
        raise ValueError("model.vocab must hold the tokens of the model")
    special_ids = []
    for added in _field(whole, "added_tokens", list):
        token_id = _field(added, "id", int)
        names[token_id] = added.get("content")
        if added.get("special") is True:
            special_ids.append(token_id)
    for token_id, name in names.items():
        if not isinstance(token_id, int) or not 0 <= token_id < 1 << 32 or not isinstance(name, str):
            raise ValueError(f"token {name!r} has the id {token_id!r}; each needs a name, and an id from 0 to 2^32 - 1")
    return TokenizerJson(names, special_ids, _field(whole, "decoder", dict) or None)


def _field(holder: Any, name: str, kind: type) -> Any:
    """Return a field, an empty one if it is null or not there. Raises ValueError if it is of another kind."""
    value = holder.get(name) if isinstance(holder, dict) else None
    if value is None and kind is not int:
        return kind()
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be of JSON's {_KINDS[kind]}, not {str(value)[:50]!r}")
    return value


_KINDS = {dict: "objects", list: "lists", int: "whole numbers"}
