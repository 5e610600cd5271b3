"""What a client may say about its output, as one kind of grammar: Lark, as llguidance reads it.

Runs in a process that may be killed (`constraint_process.py`): texts here are any client's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

# Forced texts are left to the model's own choice of tokens, and nothing needs a tokenizer's encoder.
HEADER = '%llguidance {"no_forcing": true}\n'
_ONE_LINE = " ?"  # between the parts of JSON: fewer tokens, and fewer answers that are cut off
# Where a schema asks for more white space. It is bounded, or a small model may go on with it for ever.
_WHITESPACE = r"[ \n\r\t]{0,24}"
_OPTIONS = "x-guidance"
_LIST_OF_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAP_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SCHEMA = (
    "items", "additionalProperties", "additionalItems", "contains", "not", "if", "then", "else", "propertyNames",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
_MAX_EXACT = 2**53  # integers up to this are exact as floats
_UNKNOWN_FORMAT = re.compile(r"Unknown format: (.+)")


class ConstraintError(ValueError):
    """Why something is no constraint that can be kept to. `place` says where in it, or is empty."""

    def __init__(self, message: str, place: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.place = place


def grammar_of(kind: str, value: str | Sequence[str]) -> str:
    """Return the grammar of a field of OutputConstraint. Raises ConstraintError; engine errors come later.

    value  the field's text; the strings of `choices`; "" for `any_json`
    """
    if kind == "choices":
        return HEADER + "start: " + " | ".join(_literal(str(choice)) for choice in dict.fromkeys(value))
    assert isinstance(value, str), kind
    if kind == "json_schema":
        return grammar_of_schema(read_schema(value))
    if kind == "any_json":
        return grammar_of_schema({})
    # Imported late: it is not everybody's business.
    if kind == "regex":
        from llguidance import regex_to_lark

        return f"{HEADER}start: /{regex_to_lark(value, 'd')}/"
    assert kind == "grammar", f"a constraint of the kind {kind!r}"
    if "::=" in value:
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            value = any_to_lark(value).replace("%llguidance {}\n", "")
        except Exception as error:  # the library raises what it comes to
            raise ConstraintError(f"not an EBNF grammar: {error}") from None
    return HEADER + value


def read_schema(text: str) -> Any:
    """Return a schema, which is an object or a boolean. Raises ConstraintError."""

    def refuse(constant: str) -> NoReturn:
        raise ConstraintError(f"not JSON: it has {constant}")

    def number(digits: str) -> float:
        value = float(digits)
        if math.isinf(value):
            refuse(digits)
        # 2.0 is an integer to JSON Schema, and none to the engine where it wants one.
        return int(value) if value.is_integer() and abs(value) <= _MAX_EXACT else value

    try:
        schema = json.loads(text, parse_constant=refuse, parse_float=number)
    except RecursionError:
        raise ConstraintError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ConstraintError(f"not JSON: {error.msg}", f"line {error.lineno}, column {error.colno}") from None
    if isinstance(schema, bool):
        return {} if schema else {"not": {}}
    if not isinstance(schema, dict):
        raise ConstraintError("a schema must be an object")
    return schema


def grammar_of_schema(schema: dict[str, Any]) -> str:
    """Return the grammar of a JSON Schema; raises ConstraintError if it cannot be written down."""
    options = schema.get(_OPTIONS)
    is_flexible = isinstance(options, dict) and options.get("whitespace_flexible") is True
    pattern = _WHITESPACE if is_flexible else _ONE_LINE
    try:
        text = json.dumps({**schema, _OPTIONS: {"whitespace_pattern": pattern}}, ensure_ascii=False)
    except RecursionError:
        raise ConstraintError("nested too deeply") from None
    return f"{HEADER}start: %json {text}"


def without_format(schema: dict[str, Any], error: str) -> dict[str, Any] | None:
    """Return the schema without the format that an engine's error calls unknown; None if it is about something else.

    A format that is not known is no constraint (JSON Schema 2020-12, Validation, 7.2.3).
    """
    unknown = _UNKNOWN_FORMAT.search(error)
    if unknown is None:
        return None
    copy: dict[str, Any] = json.loads(json.dumps(schema))
    for _, part in walk(copy):
        if part.get("format") == unknown[1].strip():
            del part["format"]
    return copy if copy != schema else None


def walk(schema: dict[str, Any], pointer: str = "#") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a schema and the schemas in it, outer ones first, each with its JSON pointer."""
    yield pointer, schema
    for at, part in children(schema):
        yield from walk(part, pointer + at)


def children(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the schemas directly in a schema."""
    for key, value in schema.items():
        parts: list[tuple[str, Any]] = []
        if key in _MAP_OF_SCHEMAS and isinstance(value, dict):
            parts = [(f"/{key}/{_escaped(name)}", part) for name, part in value.items()]
        elif key in _LIST_OF_SCHEMAS and isinstance(value, list):
            parts = [(f"/{key}/{index}", part) for index, part in enumerate(value)]
        elif key in _SCHEMA:
            parts = [(f"/{key}", value)]
        yield from ((at, part) for at, part in parts if isinstance(part, dict))


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _literal(text: str) -> str:
    """Return a text as Lark writes it. Control characters other than blanks have no escape there."""
    for character in text:
        if (ord(character) < 32 and character not in "\n\r\t") or ord(character) == 127:
            raise ConstraintError(f"a choice has the control character U+{ord(character):04X}")
    return json.dumps(text, ensure_ascii=False)
