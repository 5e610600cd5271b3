"""Schemas and other constraints to measure with: varied ones, and ones that mean harm.

Varied ones are those of the JSON Schema Test Suite (`tests/data/json_schema_test_suite.jsonl`), written by hand, and
drawn from a seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUITE = Path(__file__).resolve().parent.parent / "tests" / "data" / "json_schema_test_suite.jsonl"
Schema = dict[str, Any]
Constraint = tuple[str, str]
"""A field of OutputConstraint, and its value."""

_STRINGS: list[Schema] = [
    {"maxLength": 12},
    {"minLength": 2, "maxLength": 8},
    {"pattern": "^[A-Z]{2}-[0-9]{4}$"},
    {"pattern": "^(red|green|blue)( light)?$"},
    *({"format": name} for name in ("date", "time", "date-time", "uuid", "ipv4", "email")),
]
_TYPICAL_STRINGS: list[Schema] = [
    {},
    {"maxLength": 30},
    {"pattern": "^[A-Z]{2}-[0-9]{4}$"},
    {"format": "date"},
]
_NAMES = ["name", "size", "kind", "note", "größe", "名前", "a b", 'quo"te', "back\\slash", "$id", "ключ", "😀"]


def typical(rng: random.Random, depth: int = 0) -> Schema:
    """Return a schema as programs send them: an object with a handful of fields, up to three levels deep."""
    kind = rng.choice(["string", "integer", "boolean", "enum", "array", "object"]) if depth else "object"
    if kind == "enum":
        return {"enum": [f"value {rng.randrange(1000)}" for _ in range(rng.randint(1, 8))]}
    if kind == "object" and depth < 3:
        names = [f"{rng.choice(['name', 'size', 'kind', 'note'])}_{index}" for index in range(rng.randint(2, 7))]
        fields = {name: typical(rng, depth + 1) for name in names}
        return {"type": "object", "properties": fields, "required": names[:2], "additionalProperties": False}
    if kind == "array" and depth < 3:
        return {"type": "array", "items": typical(rng, depth + 1), "maxItems": rng.randint(1, 6)}
    if kind == "integer":
        return {"type": "integer", "minimum": rng.randint(-5, 5), "maximum": rng.randint(100, 9999)}
    if kind == "boolean":
        return {"type": "boolean"}
    return {"type": "string", **rng.choice(_TYPICAL_STRINGS)}


def varied(rng: random.Random, depth: int = 0) -> Schema:
    """Return a schema that uses any of the keywords that are kept to, whose texts are short."""
    leaves = [_string, _number, lambda _: {"type": ["boolean", "null"]}, _enum]
    inner = [_object, _array, _tuple, _any_of, _all_of, _nullable, _definitions]
    make = rng.choice(leaves if depth >= 2 else leaves + 2 * inner if depth else inner)
    schema = make(rng, depth) if make in inner else make(rng)  # type: ignore[operator]
    return {**schema, "description": f"number {rng.randrange(10**6)}"} if depth == 0 else schema


def _string(rng: random.Random) -> Schema:
    return {"type": "string", **rng.choice(_STRINGS)}


def _number(rng: random.Random) -> Schema:
    low = rng.randint(-50, 50)
    kind = rng.choice(["integer", "number"])
    bounds = [
        {"minimum": low, "maximum": low + rng.randint(0, 900)},
        {"exclusiveMinimum": low, "exclusiveMaximum": low + rng.randint(2, 900)},
        {"minimum": low / 4, "exclusiveMaximum": low / 4 + rng.randint(2, 9)},
        {"multipleOf": rng.choice([1, 2, 5, 10]), "minimum": 0, "maximum": 1000},
    ]
    return {"type": kind, **rng.choice(bounds)}


def _enum(rng: random.Random) -> Schema:
    values: list[Any] = ["yes", "no", "très", "日本", 'a "quote"', 1, -2.5, None, True, [1, 2], {"a": 1}, ""]
    return {"const": rng.choice(values)} if rng.random() < 0.3 else {"enum": rng.sample(values, rng.randint(1, 6))}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(_NAMES, rng.randint(1, 4))
    schema: Schema = {"type": "object", "properties": {name: varied(rng, depth + 1) for name in names}}
    schema["required"] = rng.sample(names, rng.randint(0, len(names)))
    kind = rng.randrange(4)
    if kind == 0:
        schema["additionalProperties"] = varied(rng, depth + 1)
        schema["maxProperties"] = len(names) + 1
    elif kind == 1:
        schema = {"type": "object", "patternProperties": {"^[a-c]{1,3}$": varied(rng, depth + 1)}}
        schema |= {"additionalProperties": False, "minProperties": 1, "maxProperties": 3}
    else:
        schema["additionalProperties"] = False
    return schema


def _array(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(0, 2)
    return {"type": "array", "items": varied(rng, depth + 1), "minItems": least, "maxItems": least + rng.randint(0, 2)}


def _tuple(rng: random.Random, depth: int) -> Schema:
    parts = [varied(rng, depth + 1) for _ in range(rng.randint(1, 3))]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": rng.randint(0, len(parts))}


def _any_of(rng: random.Random, depth: int) -> Schema:
    parts = [varied(rng, depth + 1) for _ in range(rng.randint(2, 3))]
    if rng.random() < 0.3:  # alternatives that cannot overlap
        return {"oneOf": [{"type": "string", "maxLength": 9}, {"type": "integer", "minimum": 0}, {"type": "null"}]}
    return {"anyOf": parts}


def _all_of(rng: random.Random, depth: int) -> Schema:
    del depth  # it has no schemas inside
    name = rng.choice(_NAMES)
    first = {"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]}
    return {"allOf": [first, {"properties": {name: {"minimum": 1, "maximum": 99}}, "additionalProperties": False}]}


def _nullable(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [{"type": "null"}, varied(rng, depth + 1)]}


def _definitions(rng: random.Random, depth: int) -> Schema:
    name = f"d{rng.randrange(10**6)}"
    if depth:  # references are to the whole document
        return varied(rng, depth + 1)
    refer = {"$ref": f"#/$defs/{name}"}
    node = {"type": "object", "properties": {"v": _number(rng), "next": {"anyOf": [{"type": "null"}, refer]}}}
    node |= {"required": ["v", "next"], "additionalProperties": False}
    return {"$defs": {name: rng.choice([node, varied(rng, 1)])}, "type": "array", "items": refer, "maxItems": 2}


BY_HAND: list[Schema] = [
    {"$ref": "#/$defs/tree", "$defs": {"tree": {
        "type": "object", "required": ["value", "children"], "additionalProperties": False,
        "properties": {"value": {"type": "integer", "minimum": 0, "maximum": 9},
                       "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}}}}},
    {"type": "object", "required": ["from", "to", "lines"], "additionalProperties": False, "properties": {
        "from": {"$ref": "#/definitions/place"}, "to": {"$ref": "#/definitions/place"},
        "lines": {"type": "array", "minItems": 1, "maxItems": 3, "items": {
            "type": "object", "required": ["sku", "count"], "additionalProperties": False,
            "properties": {"sku": {"type": "string", "pattern": "^[A-Z]{3}[0-9]{3}$"}, "count": {"type": "integer",
                           "minimum": 1, "maximum": 99}}}}},
        "definitions": {"place": {"type": "object", "required": ["city", "zip"], "additionalProperties": False,
            "properties": {"city": {"enum": ["Paris", "Roma", "København", "東京"]},
                           "zip": {"type": "string", "pattern": "^\\d{5}$"}}}}},
    {"anyOf": [{"type": "object", "properties": {"kind": {"const": "circle"}, "r": {"type": "number", "minimum": 0,
                "maximum": 10}}, "required": ["kind", "r"], "additionalProperties": False},
               {"type": "object", "properties": {"kind": {"const": "square"}, "a": {"type": "integer", "minimum": 1,
                "maximum": 5}}, "required": ["kind", "a"], "additionalProperties": False}]},
    {"oneOf": [{"type": "object", "properties": {"ok": {"const": True}}, "required": ["ok"],
                "additionalProperties": False},
               {"type": "object", "properties": {"ok": {"const": False}, "why": {"type": "string", "maxLength": 20}},
                "required": ["ok", "why"], "additionalProperties": False}]},
    {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 1},
                                "minItems": 3, "maxItems": 3}, "minItems": 3, "maxItems": 3},
    {"type": "string", "pattern": "^(?:[01]\\d|2[0-3]):[0-5]\\d$"},
    {"type": "string", "pattern": "^[A-ZÀ-Ý][a-zà-ý]{2,6}$"},
    {"type": "string", "minLength": 3, "maxLength": 3},
    {"type": "number", "minimum": 0.25, "maximum": 0.75},
    {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 3},
    {"type": ["string", "integer", "null"], "maxLength": 5, "minimum": 10, "maximum": 20},
    {"enum": ["\u0000", "\n", "\u2028", "\\", "\"", "/", "é", "𝄞"]},
    {"const": {"a": [1, {"b": None}], "ü": "\u00fc"}},
    {"type": "object", "maxProperties": 0},
    {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["a", "b"],
     "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    {"type": "object", "properties": {f"field_{i}": {"type": "boolean"} for i in range(20)},
     "required": [f"field_{i}" for i in range(0, 20, 2)], "additionalProperties": False},
]  # fmt: skip


def suite() -> list[tuple[Schema | bool, list[tuple[Any, bool]]]]:
    """Return the schemas of the JSON Schema Test Suite, each with texts and whether they are valid."""
    rows = [json.loads(line) for line in SUITE.read_text().splitlines()]
    return [(row["schema"], [(data, valid) for data, valid in row["tests"]]) for row in rows]


def everything(num_drawn: int, seed: int = 0) -> Iterator[Schema]:
    """Yield all schemas that there are, then so many drawn ones."""
    yield from (schema for schema, _ in suite() if isinstance(schema, dict))
    yield from BY_HAND
    rng = random.Random(seed)
    yield from (varied(rng) for _ in range(num_drawn))


def _schema(schema: Any) -> Constraint:
    return "json_schema", json.dumps(schema)


def _deep(depth: int, keyword: str) -> str:
    return f'{{"{keyword}":' * depth + "{}" + "}" * depth


def hostile() -> list[Constraint]:
    """Return more than 200 constraints that are too large, too deep, endless, exponential or broken."""
    found: list[Constraint] = []
    for n in (10, 1000, 10_000, 60_000):
        wide = {f"p{i}": {"type": "string", "pattern": f"^.{{{i % 400}}}x.*$"} for i in range(n // 4)}
        found += [
            _schema({"enum": [f"value number {i}" for i in range(n)]}),
            _schema({"properties": {f"p{i}": {"type": "integer"} for i in range(n)}}),
            _schema({"properties": {f"p{i}": {} for i in range(n)}, "required": [f"p{i}" for i in range(n)]}),
            _schema({"properties": wide}),
            _schema({"anyOf": [{"type": "string", "pattern": f"^a{{{i % 99}}}.*b$"} for i in range(n)]}),
            _schema({"anyOf": [{"properties": {"a": {"const": i}}, "required": ["a"]} for i in range(n)]}),
            _schema({"allOf": [{"pattern": f"a{i}"} for i in range(n)], "type": "string"}),
            _schema({"allOf": [{"minimum": i} for i in range(n)]}),
            _schema({"type": "array", "minItems": n, "items": {"type": "array", "minItems": n}}),
            _schema({"type": "string", "minLength": n, "maxLength": 2 * n}),
            _schema({"prefixItems": [{"enum": [i, str(i)]} for i in range(n)], "minItems": n}),
            _schema({"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(n)}, "$ref": "#/$defs/d0"}),
            ("json_schema", _deep(n, "items")),
            ("json_schema", _deep(n, "additionalProperties")),
            ("json_schema", '{"anyOf":[' * n + "{}" + "]}" * n),
            ("json_schema", '{"properties":{"a":' * n + "{}" + "}}" * n),
            ("regex", f"(a|b)*a(a|b){{{n}}}"),
            ("regex", f"[a-z]{{{n}}}[0-9]{{{n}}}"),
            ("regex", f"(x+x+){{{n}}}y"),
            ("regex", "(" * n + "a" + ")*" * n),
            ("regex", "|".join(f"word{i}.*{i}" for i in range(n))),
            ("regex", f"(.{{{n}}}){{{n}}}"),
            ("grammar", "start: " + " ".join(f"r{i}" for i in range(n)) + "".join(f'\nr{i}: "a"?' for i in range(n))),
            ("grammar", "start: r0" + "".join(f"\nr{i}: r{i + 1} r{i + 1}" for i in range(n)) + f'\nr{n}: "a"'),
            ("grammar", f'start: ("a" | "b"){{{n}}}'),
            ("grammar", "start: " + "(" * n + '"a"' + ")" * n),
            ("choices", json.dumps([f"{'x' * (i % 50)}{i}" for i in range(n)])),
        ]
    return found + _exponential() + _broken()


def _exponential() -> list[Constraint]:
    """Return small ones that stand for large ones, or for nothing that ends."""
    found: list[Constraint] = []
    for n in (4, 8, 12, 16, 20):
        product = [{"anyOf": [{"properties": {f"a{i}{j}": {"minimum": j}}} for j in range(n)]} for i in range(n)]
        doubling = {f"d{i}": {"items": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2}} for i in range(n)}
        found += [
            _schema({"allOf": product}),
            _schema({"allOf": [{"oneOf": [{"const": i}, {"const": j}]} for i in range(n) for j in range(i)]}),
            _schema({"$defs": {**doubling, f"d{n}": {}}, "$ref": "#/$defs/d0"}),
            _schema({"type": "string", "pattern": f"^(([a-z])+.)+[A-Z]([a-z])+{'(a|aa)+' * n}$"}),
            _schema({"type": "string", "allOf": [{"pattern": f"^(..{'.' * i})*$"} for i in range(n)]}),
            ("regex", "(a*)*" * n + "b"),
            ("regex", "(a|a)*" * n + "(a|a?)+$"),
            ("regex", "".join(f"(?:.*{chr(97 + i)})?" for i in range(n)) + "(.|\\s){1,500}"),
            ("regex", "((" * n + "a{9}){9}" + "){9}){9}" * n),
            ("grammar", "start: e\ne: " + " | ".join("e " * (i + 1) for i in range(n)) + ' | "a" | ""'),
        ]
    return found


def _broken() -> list[Constraint]:
    """Return what is no constraint, or one that nothing matches."""
    return [
        *(("json_schema", text) for text in ("", "{", "[]", "null", '"a"', "nan", '{"a": 1e999}', '{"type": 5}')),
        *(("json_schema", text) for text in ('{"enum": []}', '{"type": "string", "pattern": "("}', '{"$ref": "#"}')),
        _schema({"$ref": "http://example.com/schema"}),
        _schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
        _schema({"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#"}}}),
        _schema({"type": "array", "minItems": 1, "items": {"$ref": "#"}}),
        _schema({"type": "string", "minLength": 9, "maxLength": 1}),
        _schema({"type": "integer", "minimum": 10**30, "maximum": 10**30 + 1}),
        _schema({"multipleOf": 1e-300}),
        _schema({"type": "string", "pattern": "\ud800"}),
        _schema({"type": "object", "properties": {"\ud800": {}}, "required": ["\ud800"]}),
        _schema({"type": "string", "format": "x" * 100_000}),
        *(("regex", text) for text in ("(", "[", "a{99999999}", "a{5,1}", r"(a)\1", "(?=a)", "(?<!a)b", "\\", "[z-a]")),
        *(("regex", text) for text in (r"\u{110000}", r"\xff\xfe", "(?i)" * 1000, "a" * 200_000)),
        *(("regex", text) for text in (r"\p{Nope}", r"[^\s\S]")),
        *(("grammar", text) for text in ("", "start", "start: start", "x: y", 'start: "a')),
        *(("grammar", text) for text in ("root ::= root", "root ::= (")),
        *(("grammar", text) for text in ("start: /(/", 'start: "" start', "start: %json {", "%import common.X", "\0")),
    ]  # fmt: skip
