"""A tool call that has to be made: a constraint on the output, which is then JSON and nothing else."""

from __future__ import annotations

from typing import Any

from octavo.inference.v1 import generation_pb2
from octavo.services.common.errors import invalid_field
from octavo.services.gateway.offload import long_json
from octavo.services.gateway.output.formats import NONE
from octavo.services.gateway.requests.parsing import read_tools

_FORMAT = "json"
_FIELD = "generation.chat.tool_choice"


def force_tool_call(generation: generation_pb2.Generation) -> generation_pb2.Generation:
    """Where the chat's `tool_choice` demands a call, set the constraint that makes one, and the format that reads it.

    Returns a changed copy, or `generation` itself: a call may be tried again with it. Raises INVALID_FIELD. Whatever
    the model's own format: a call without marks around it can be constrained from its first token to its last, and
    leaves no room for anything else.
    """
    chat = generation.chat
    if generation.WhichOneof("prompt") != "chat" or chat.tool_choice.mode != generation_pb2.ToolChoice.MODE_REQUIRED:
        return generation
    tools = read_tools(chat)
    if not tools:
        raise invalid_field(_FIELD, "needs tools to choose from; send tools, too")
    if chat.tool_choice.name:
        tools = [tool for tool in tools if tool["name"] == chat.tool_choice.name]
        if not tools:
            raise invalid_field(_FIELD, f"there is no tool {chat.tool_choice.name!r}; name one of tools")
    if generation.HasField("constraint"):
        raise invalid_field("generation.constraint", "cannot be given together with a tool_choice that demands a call")
    forced = generation_pb2.Generation()
    forced.CopyFrom(generation)
    forced.constraint.json_schema = long_json.dumps(_schema(tools), ensure_ascii=False)
    forced.output.parsing.tool_call_format = _FORMAT
    forced.output.parsing.reasoning_format = NONE
    return forced


def _schema(tools: list[dict[str, Any]]) -> dict[str, Any]:
    if len(tools) == 1:
        return _call(tools[0], "#")
    return {"anyOf": [_call(tool, f"#/anyOf/{index}") for index, tool in enumerate(tools)]}


def _call(tool: dict[str, Any], place: str) -> dict[str, Any]:
    """Return the schema of a call of one tool; `place` is where it stands in the whole."""
    parameters = tool.get("parameters") or {"type": "object"}
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool["name"]},  # first, so that the arguments can be sent while they are made
            "arguments": _moved(parameters, f"{place}/properties/arguments"),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """Return a schema whose references to its own root hold where it stands now."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(value, place) for name, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved
