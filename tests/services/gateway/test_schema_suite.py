"""Grammars of schemas take no text that the JSON Schema Test Suite calls invalid, and take what they should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.gpu_worker.sampling import grammars
from octavo.services.gateway.constraints import process as constraint_process
from octavo.services.gateway.constraints.grammar import ConstraintError

SUITE = Path(__file__).parents[2] / "data" / "json_schema_test_suite.jsonl"
TOKENIZER = constraint_process.make_tokenizer([bytes([byte]) for byte in range(256)], [])
# What a grammar of ours leaves out: fields come in the order of the schema, integers have no fraction, and formats
# are kept to.
NARROWER = ("allOf: ", "const: ", "enum: ", "format: ", "type: integer")


def grammars_of_suite() -> list[tuple[str, str, list[tuple[Any, bool]]]]:
    """Name, grammar and examples of each schema that is taken."""
    taken = []
    for line in SUITE.read_text().splitlines():
        row = json.loads(line)
        try:
            grammar = constraint_process.try_out("json_schema", json.dumps(row["schema"]), [], TOKENIZER)
        except ConstraintError:
            continue
        taken.append((row["name"], grammar, row["tests"]))
    return taken


def is_taken(grammar: str, data: Any) -> bool:
    matcher = constraint_process._matcher(TOKENIZER, grammar)
    text = json.dumps(data, ensure_ascii=False).encode()
    return bool(matcher.try_consume_tokens(list(text)) == len(text) and matcher.is_accepting())


def test_what_the_suite_calls_invalid_is_never_taken() -> None:
    taken = grammars_of_suite()

    wrong = [
        (name, data) for name, grammar, tests in taken for data, valid in tests if is_taken(grammar, data) and not valid
    ]
    missed = [
        (name, data) for name, grammar, tests in taken for data, valid in tests if valid and not is_taken(grammar, data)
    ]

    assert wrong == []
    assert [name for name, _ in missed if not name.startswith(NARROWER)] == []
    assert len(taken) > 170


def test_a_number_that_is_whole_may_be_written_with_a_fraction() -> None:
    grammar = constraint_process.try_out("json_schema", '{"type": "string", "maxLength": 2.0}', [], TOKENIZER)

    assert is_taken(grammar, "ab")
    assert not is_taken(grammar, "abc")


def test_a_number_that_no_float_holds_is_refused() -> None:
    with pytest.raises(ConstraintError, match="1e999"):
        constraint_process.try_out("json_schema", '{"maximum": 1e999}', [], TOKENIZER)


def test_gateways_try_out_with_the_limits_of_the_workers() -> None:
    ours, theirs = constraint_process.parser_limits(), grammars.parser_limits()
    names = [name for name in dir(ours) if not name.startswith("_")]

    assert len(names) >= 6
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}
