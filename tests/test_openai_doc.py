"""docs/openai.md says of every field what the code does with it. Run as a program, this file writes the tables anew."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import openai.types.chat.completion_create_params as chat_params
import openai.types.completion_create_params as completion_params
import openai.types.responses.response_create_params as responses_params
import pytest

from octavo.services.common.errors import ServingError
from octavo.services.gateway.http.chat_request import read_chat_call, read_completion_call
from octavo.services.gateway.http.fields import OBJECTS, Field, Support
from octavo.services.gateway.http.openapi import openapi_document
from octavo.services.gateway.http.params import Ignored
from octavo.services.gateway.http.responses_request import read_responses_call

DOC = Path(__file__).resolve().parent.parent / "docs" / "openai.md"
TABLE = re.compile(r"(?<=<!-- table: )(\w+)( -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)
WRONG: dict[str, Any] = {"string": 5, "number": "x", "integer": "x", "boolean": "x", "array": "x", "object": "x"}
READERS = {
    "ChatCompletionRequest": (read_chat_call, {"model": "m", "messages": [{"role": "user", "content": "x"}]}),
    "CompletionRequest": (read_completion_call, {"model": "m", "prompt": "x"}),
    "ResponsesRequest": (read_responses_call, {"model": "m", "input": "x"}),
}
FIELDS = [(name, field) for name in READERS for field in OBJECTS[name]]


def table(name: str) -> str:
    """Return the rows that stand for an object's fields in the documentation."""
    rows = [f"| `{field}` | {each.support.value} | {note(each)} |" for field, each in OBJECTS[name].items()]
    return "\n".join(["| field | | |", "| --- | --- | --- |", *rows]) + "\n"


def note(field: Field) -> str:
    but = " or ".join(f"`{str(value).lower()}`" for value in field.allowed)
    return f"{f'unless {but}: ' if but else ''}{field.description}"


def test_the_documentation_has_the_code_s_tables() -> None:
    tables = {found[1]: found[3] for found in TABLE.finditer(DOC.read_text())}

    assert tables == {name: table(name) for name in OBJECTS}, "python tests/test_openai_doc.py writes them anew"


def test_the_description_has_them_too() -> None:
    schemas = openapi_document()["components"]["schemas"]

    assert {name: set(schemas[name]["properties"]) for name in OBJECTS} == {
        name: set(fields) for name, fields in OBJECTS.items()
    }


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("ChatCompletionRequest", chat_params.CompletionCreateParamsBase),
        ("CompletionRequest", completion_params.CompletionCreateParamsBase),
        ("ResponsesRequest", responses_params.ResponseCreateParamsBase),
    ],
)
def test_every_parameter_of_openai_s_client_is_in_a_table(name: str, parameters: Any) -> None:
    assert set(parameters.__annotations__) - set(OBJECTS[name]) == set()


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_what_the_table_says_is_what_happens(name: str, field: str) -> None:
    read, base = READERS[name]
    each = OBJECTS[name][field]
    wrong = WRONG.get(each.schema.get("type", ""), 5)

    def refusal(value: Any, *, refuses: bool = False) -> str | None:
        """Return which field is refused when this one has a value."""
        try:
            read({**base, field: value}, {}, Ignored(refuses=refuses))
        except ServingError as error:
            return error.violations[0].field if error.violations else error.message
        return None

    def ignored(value: Any) -> str:
        """Return what is ignored when this one has a value."""
        found = Ignored()
        read({**base, field: value}, {}, found)
        return found.header

    assert all(refusal(value, refuses=refuses) is None for value in each.allowed for refuses in (False, True))
    assert not any(ignored(value) for value in each.allowed)
    if each.support is Support.HINT:
        assert ignored(wrong) == field
        assert refusal(wrong, refuses=True) == field
    else:
        assert (refusal(wrong) or "").startswith((field, each.alias_of or field))
    if each.support is Support.IGNORED:
        assert ignored({} if each.schema["type"] == "object" else "x") == field


if __name__ == "__main__":
    DOC.write_text(TABLE.sub(lambda found: found[1] + found[2] + table(found[1]), DOC.read_text()))
    sys.exit(0)
