"""Decides how a request's output is taken apart, and says so in the request's own words."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from octavo.inference.v1 import generation_pb2
from octavo.services.common.errors import invalid_field
from octavo.services.gateway.offload import long_json
from octavo.services.gateway.output.formats import (
    NONE,
    REASONING_FORMATS,
    TOOL_CALL_FORMATS,
    ReasoningFormat,
    ToolCallFormat,
)
from octavo.services.gateway.output.parser import ParserSettings
from octavo.services.gateway.requests.model import ServedModel

F = TypeVar("F", ToolCallFormat, ReasoningFormat)
_FIELD = "generation.output.parsing"
_PROMPT_END_TOKENS = 16
_MODE = generation_pb2.ToolChoice


def resolve_parsing(
    generation: generation_pb2.Generation, model: ServedModel, prompt: Sequence[int]
) -> generation_pb2.Parsing:
    """Return `output.parsing` with everything filled in that the model, the chat and the prompt say.

    Raises INVALID_FIELD. The prompt is the one made of the chat: what was resolved goes on to hold without the chat.
    """
    parsing = generation_pb2.Parsing()
    parsing.CopyFrom(generation.output.parsing)
    is_chat = generation.WhichOneof("prompt") == "chat"
    if is_chat and generation.chat.tools_json and generation.chat.tool_choice.mode != _MODE.MODE_NONE:
        parsing.tool_call_format = parsing.tool_call_format or model.tool_call_format
        if not parsing.tool_names:
            parsing.tool_names.extend(tool["name"] for tool in read_tools(generation.chat))
    if is_chat:
        parsing.reasoning_format = parsing.reasoning_format or model.reasoning_format
    parsing.tool_call_format = parsing.tool_call_format or NONE
    parsing.reasoning_format = parsing.reasoning_format or NONE
    reasoning = _format(REASONING_FORMATS, parsing.reasoning_format, "reasoning_format")
    _format(TOOL_CALL_FORMATS, parsing.tool_call_format, "tool_call_format")
    if reasoning is not None and not parsing.HasField("starts_in_reasoning"):
        parsing.starts_in_reasoning = _starts_in(reasoning, generation, model, prompt)
    return parsing


def parser_settings(parsing: generation_pb2.Parsing) -> ParserSettings | None:
    """Return what `resolve_parsing` resolved; None if the output is left as it is."""
    tool_calls, reasoning = (
        TOOL_CALL_FORMATS.get(parsing.tool_call_format),
        REASONING_FORMATS.get(parsing.reasoning_format),
    )
    if tool_calls is None and reasoning is None:
        return None
    return ParserSettings(
        tool_calls,
        reasoning,
        frozenset(parsing.tool_names),
        parsing.single_tool_call,
        parsing.whole_tool_calls,
        parsing.starts_in_reasoning,
    )


def answer_begin(generation: generation_pb2.Generation, model: ServedModel) -> str:
    """Return what has to follow a chat's prompt so that an answer that is constrained comes without a header."""
    chat = generation.chat
    is_constrained = generation.HasField("constraint") or chat.tool_choice.mode == _MODE.MODE_REQUIRED
    if not is_constrained or chat.continue_final_message:
        return ""
    reasoning = REASONING_FORMATS.get(model.reasoning_format)  # whether or not the client has it taken apart
    return "" if reasoning is None else reasoning.answer_begin


def marks(settings: ParserSettings | None, model: ServedModel, all_special: bool) -> Mapping[int, str]:
    """Return the special tokens that have text, with that: those that belong to the formats, or all."""
    if all_special:
        return model.tokenizer.special_tokens()
    if settings is None:
        return {}
    texts: list[str] = []
    if settings.tool_calls is not None:
        texts += settings.tool_calls.tokens
    if settings.reasoning is not None:
        texts += settings.reasoning.tokens or (settings.reasoning.begin, settings.reasoning.end)
    return model.tokenizer.special_tokens(texts)


def call_id(request_id: str, candidate: int, index: int, settings: ParserSettings | None) -> str:
    """Return the id of a tool call: the same in every gateway that goes on with the request."""
    digest = hashlib.sha256(f"{request_id}/{candidate}/{index}".encode()).hexdigest()
    is_short = settings is not None and settings.tool_calls is not None and settings.tool_calls.short_ids
    return digest[:9] if is_short else f"call_{digest[:24]}"


def _format(formats: Mapping[str, F], name: str, field: str) -> F | None:
    if name != NONE and name not in formats:
        raise invalid_field(f"{_FIELD}.{field}", f"{name!r} is not known; use one of {', '.join([NONE, *formats])}")
    return formats.get(name)


def read_tools(chat: generation_pb2.Chat) -> list[dict[str, Any]]:
    """Return the functions of the chat's tools, each of which has a name. Raises INVALID_FIELD."""
    functions = []
    for index, text in enumerate(chat.tools_json):
        tool = long_json.loads(text)  # read before, for the template
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise invalid_field(f"generation.chat.tools_json[{index}]", "must have a function with a name")
        functions.append(function)
    return functions


def _starts_in(
    reasoning: ReasoningFormat, generation: generation_pb2.Generation, model: ServedModel, prompt: Sequence[int]
) -> bool:
    """Return whether the prompt ends inside the reasoning section."""
    if generation.chat.continue_final_message:
        text = "".join(part.text for part in generation.chat.messages[-1].parts)
        if text.rfind(reasoning.begin) > text.rfind(reasoning.end):
            return True
    return model.tokenizer.text_of(prompt[-_PROMPT_END_TOKENS:]).rstrip().endswith(reasoning.begin)


_FORCED_FORMAT = "json"
_CHOICE = "generation.chat.tool_choice"


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
        raise invalid_field(_CHOICE, "needs tools to choose from; send tools, too")
    if chat.tool_choice.name:
        tools = [tool for tool in tools if tool["name"] == chat.tool_choice.name]
        if not tools:
            raise invalid_field(_CHOICE, f"there is no tool {chat.tool_choice.name!r}; name one of tools")
    if generation.HasField("constraint"):
        raise invalid_field("generation.constraint", "cannot be given together with a tool_choice that demands a call")
    forced = generation_pb2.Generation()
    forced.CopyFrom(generation)
    forced.constraint.json_schema = long_json.dumps(_schema(tools), ensure_ascii=False)
    forced.output.parsing.tool_call_format = _FORCED_FORMAT
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
