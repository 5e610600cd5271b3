"""What a tokenizer.json says of tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest

from octavo.services.vocabulary.token_bytes import folder_digest, gguf_digest
from octavo.services.vocabulary.tokenizer_json import parse


def definition(vocab: Any, added: Any = (), **more: Any) -> bytes:
    return json.dumps({"model": {"vocab": vocab}, "added_tokens": added, **more}).encode()


def test_an_added_token_takes_its_id_from_another_one() -> None:
    added = [{"id": 1, "content": "<end>", "special": True}, {"id": 5, "content": "tool", "special": False}]

    tokenizer = parse(definition({"a": 0, "b": 1}, added, decoder={"type": "Fuse"}))

    assert tokenizer.names == {0: "a", 1: "<end>", 5: "tool"}
    assert (tokenizer.special_ids, tokenizer.decoder) == ([1], {"type": "Fuse"})


def test_a_list_of_scored_tokens_is_the_same_vocabulary() -> None:
    assert parse(definition([["a", -1.5], ["b", 0]])).names == parse(definition({"b": 1, "a": 0}, None)).names
    assert folder_digest(parse(definition([["a", 1]]))) == folder_digest(parse(definition({"a": 0})))
    assert folder_digest(parse(definition({"a": 0}))) != folder_digest(parse(definition({"b": 0})))


def test_ids_that_no_tokenizer_makes_are_not_compared() -> None:
    assert gguf_digest(["a", "pad"], [1, 5]) == gguf_digest(["a", "other"], [1, 5]) == gguf_digest(["a"], None)
    assert gguf_digest(["a"], None) != folder_digest(parse(definition({"a": 0})))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b"{", "Expecting"),
        (b"[]", "model.vocab"),
        (definition(5), "model.vocab"),
        (definition({"a": "x"}), "token 'a' has the id 'x'"),
        (definition({"a": -1}), "token 'a' has the id -1"),
        (definition({"a": 1 << 32}), "an id from 0 to"),
        (definition([["a"], 5]), "token None has the id 1"),
        (definition({}, {"id": 1}), "added_tokens must be of JSON's lists"),
        (definition({}, [{"content": "x"}]), "id must be of JSON's whole numbers"),
        (definition({}, [{"id": 1}]), "token None has the id 1"),
        (definition({}, decoder=[1]), "decoder must be of JSON's objects"),
    ],
)
def test_what_is_wrong_is_named(data: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(data)
