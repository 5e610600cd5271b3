"""Turns a Chat message into what chat templates expect: dicts in the shape transformers documents."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

from octavo.inference.v1 import generation_pb2
from octavo.services.common.errors import (
    MAX_VIOLATIONS,
    FieldViolation,
    feature_disabled,
    invalid_field,
    invalid_fields,
)
from octavo.services.gateway.offload import long_json
from octavo.services.gateway.output.formats import describe_tools, write_calls
from octavo.services.gateway.tokenization.chat_template import TemplateFacts, render_request

MAX_MARKS = 1 << 19
"""Most structural characters of all JSON in a conversation: so many values take some 40 MB."""


class _Reader:
    """Reads the JSON in a conversation, and gathers what is wrong."""

    def __init__(self) -> None:
        self.violations: list[FieldViolation] = []
        self._num_marks = 0

    def wrong(self, path: str, description: str) -> None:
        """Note what is wrong with a field; as many as an error has room for."""
        if len(self.violations) < MAX_VIOLATIONS:
            self.violations.append(FieldViolation(path, description))

    def read(self, text: str, kind: type, path: str) -> Any:
        """Return the value, which must be of a kind; an empty one if it is not. Raises INVALID_FIELD for too many."""
        self._num_marks += long_json.count_marks(text)
        if self._num_marks > MAX_MARKS:
            advice = f"send at most {MAX_MARKS} brackets, braces, commas and colons of JSON in a conversation"
            raise invalid_field(path, f"has too many values, with those before it; {advice}")
        try:
            value = long_json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            self.wrong(path, f"is not JSON: {reason}")
            return kind()
        if not isinstance(value, kind):
            self.wrong(path, "must be a JSON object")
            return kind()
        return value


@dataclass(frozen=True, slots=True)
class ChatInput:
    """A conversation, ready for a chat template."""

    messages: list[dict[str, Any]]
    tools: list[Any]
    options: dict[str, Any]
    continue_final_message: bool

    def request(self) -> bytes:
        """Return what ChatTemplate.render takes."""
        return render_request(self.messages, self.tools, self.options, self.continue_final_message)


def read_chat(chat: generation_pb2.Chat, template: TemplateFacts, path: str) -> ChatInput:
    """Return the conversation in `chat`, which lies at `path` in the request.

    Raises FEATURE_DISABLED for media, and INVALID_FIELD with every unknown role and broken JSON.
    """
    reader = _Reader()
    messages: list[dict[str, Any]] = []
    for index, message in enumerate(chat.messages):
        at = f"{path}.messages[{index}]"
        if not template.knows_role(message.role):
            description = f"the model's chat template knows no role {message.role!r}; use system, user or assistant"
            reader.wrong(f"{at}.role", description)
        messages += _read_message(message, template.written_role(message.role), at, reader)
    tools = [reader.read(text, dict, f"{path}.tools_json[{index}]") for index, text in enumerate(chat.tools_json)]
    if chat.tool_choice.mode == generation_pb2.ToolChoice.MODE_NONE:
        tools = []
    options: dict[str, Any] = {}
    if chat.template_options_json:
        options = reader.read(chat.template_options_json, dict, f"{path}.template_options_json")
    if reader.violations:
        raise invalid_fields(reader.violations)
    if template.reads_thinking:
        for written in messages:  # it takes no text beside it in a message with calls
            if "reasoning_content" in written and not (written["content"] and written.get("tool_calls")):
                written["thinking"] = written["reasoning_content"]
    if not template.writes_tool_calls:
        _write_tool_calls(messages)
    elif template.writes_one_call:
        messages = _one_call_each(messages)
    if template.needs_descriptions:
        for function in (tool.get("function", tool) for tool in tools):
            if isinstance(function, dict) and function.get("description") is None:
                function["description"] = ""
    if tools and not template.takes_tools:
        _tell_of_tools(messages, tools)
    return ChatInput(messages, tools, options, chat.continue_final_message)


def _one_call_each(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages, with each of several calls in one of its own, and its results behind it."""
    turns: list[list[dict[str, Any]]] = []
    of_call: dict[str, list[dict[str, Any]]] = {}  # by the call's id
    for message in messages:
        if (turn := of_call.get(message.get("tool_call_id", ""))) is not None:
            turn.append(message)
            continue
        head = message
        for call in message.get("tool_calls", ()):
            turns.append([{**head, "tool_calls": [call]}])
            if call["id"]:
                of_call[call["id"]] = turns[-1]
            head = {"role": message["role"], "content": ""}
        if head is message:
            turns.append([message])
    return list(chain.from_iterable(turns))


def _write_tool_calls(messages: list[dict[str, Any]]) -> None:
    """Make calls that the assistant made a part of what it said."""
    for message in messages:
        calls = [call["function"] for call in message.get("tool_calls", ())]
        if calls:
            parts = [message["content"], write_calls(calls)]
            message["content"] = "\n".join(part for part in parts if part)


def _tell_of_tools(messages: list[dict[str, Any]], tools: list[Any]) -> None:
    """Put the description of the tools at the end of the system message."""
    if not messages or messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": ""})
    system = messages[0]["content"]
    messages[0]["content"] = "\n\n".join(part for part in (system, describe_tools(tools)) if part)


def _read_message(message: generation_pb2.Message, role: str, path: str, reader: _Reader) -> list[dict[str, Any]]:
    """Return the dicts of one message: one, and one for each tool result in it."""
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for index, part in enumerate(message.parts):
        kind = part.WhichOneof("content")
        if kind == "text":
            texts.append(part.text)
        elif kind == "reasoning":
            reasoning.append(part.reasoning)
        elif kind == "tool_call":
            calls.append(_read_tool_call(part.tool_call, f"{path}.parts[{index}].tool_call", reader))
        elif kind == "tool_result":
            result = part.tool_result
            results.append({"role": role, "content": result.text, "tool_call_id": result.id})
        elif kind == "media":
            raise feature_disabled("media", f"{path}.parts[{index}] is media, and this server takes text only")
    if results and not texts and not calls:
        return results
    whole: dict[str, Any] = {"role": role, "content": "".join(texts)}
    if reasoning:
        whole["reasoning_content"] = "".join(reasoning)
    if calls:
        whole["tool_calls"] = calls
    return [whole, *results]


def _read_tool_call(call: generation_pb2.ToolCall, path: str, reader: _Reader) -> dict[str, Any]:
    arguments = reader.read(call.arguments_json or "{}", dict, f"{path}.arguments_json")
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}
