"""The body of POST /v1/messages, as Anthropic's clients send it, as our request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.inference.v1 import generation_pb2
from octavo.services.gateway.http.chat_request import (
    MEDIA,
    function_tools,
    read_parts,
    read_template_options,
    read_tools,
)
from octavo.services.gateway.http.fields import MESSAGES, OUTPUT_CONFIG, THINKING
from octavo.services.gateway.http.params import Ignored, Params
from octavo.services.gateway.http.requests import ApiCall, GenerateRequest, prefer_tool_call, read_common
from octavo.services.gateway.http.responses_request import read_format
from octavo.services.gateway.offload import long_json

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def read_messages_call(body: Mapping[str, Any], headers: Mapping[str, str], ignored: Ignored | None = None) -> ApiCall:
    """Return what a body asks for. Raises ServingError that names Anthropic's parameters."""
    params = Params(body, fields=MESSAGES, ignored=ignored)
    request = GenerateRequest()
    generation = request.generation
    output = params.inner(params.object("output_config") or {}, "output_config.", OUTPUT_CONFIG)
    effort = output.text("effort")
    names = read_common(params, generation, headers, read_format(output), "output_config.format")
    generation.candidate_count = 1
    limit = params.integer("max_tokens")
    if limit is not None:
        generation.stop.max_new_tokens = limit
    stream = bool(params.boolean("stream"))
    _read_conversation(params, generation.chat)
    _read_tools(params, generation)
    read_template_options(generation.chat, _thinking(params), effort)
    prefer_tool_call(generation, names, "output_config.format")
    params.finish()
    return ApiCall(
        requests=[request],
        stream=stream,
        include_usage=True,
        logprobs=None,
        token_ids=False,
        names={**names, "generation.stop.stop_sequences": "stop_sequences"},
    )


def _read_conversation(params: Params, chat: generation_pb2.Chat) -> None:
    chat.SetInParent()
    system = read_parts(params, "system")
    if system:
        chat.messages.add(role="system").parts.extend(generation_pb2.Part(text=text) for text in system)
    for index, message in enumerate(params.array("messages") or ()):
        if not isinstance(message, dict):
            raise params.wrong(f"messages[{index}]", "must be an object")
        _read_message(params.inner(message, f"messages[{index}]."), chat)
    last = chat.messages[-1] if chat.messages else None
    # An answer that the client began is gone on with.
    is_begun = last is not None and last.role == "assistant" and bool(last.parts) and last.parts[-1].HasField("text")
    chat.continue_final_message = is_begun


def _read_message(params: Params, chat: generation_pb2.Chat) -> None:
    """Add a message, and one before it for each tool result in it."""
    role = params.text("role") or ""
    content = params.take("content")
    params.finish()
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise params.wrong("content", "must be a string or a list of blocks")
    message = generation_pb2.Message(role=role)
    has_results = False
    for index, block in enumerate(content):
        at = f"content[{index}]"
        if not isinstance(block, dict):
            raise params.wrong(at, 'must be an object such as {"type": "text", "text": "..."}')
        fields = params.inner(block, f"{at}.")
        kind = fields.text("type") or ""
        if kind in MEDIA:
            raise params.unsupported(at, "media", f"this server takes text only, not {kind}; leave that block out")
        fields.object("cache_control")
        if kind == "tool_result":
            has_results = True
            result = chat.messages.add(role="tool").parts.add().tool_result
            result.id = _required(fields, "tool_use_id")
            result.text = "".join(read_parts(fields, "content"))
            fields.boolean("is_error")
        else:
            _read_block(fields, kind, message)
        fields.finish()
    if message.parts or not has_results:
        chat.messages.append(message)


def _required(fields: Params, name: str) -> str:
    """Return a text that must be given."""
    text = fields.text(name)
    if not text:
        raise fields.wrong(name, "must be set")
    return text


def _read_block(fields: Params, kind: str, message: generation_pb2.Message) -> None:
    if kind == "text":
        text = fields.text("text")
        if text is None:
            raise fields.wrong("text", "must be a string")
        fields.array("citations")
        message.parts.add(text=text)
    elif kind == "thinking":
        fields.text("signature")
        message.parts.add(reasoning=fields.text("thinking") or "")
    elif kind == "redacted_thinking":
        fields.text("data")  # which no model here has written
    elif kind == "tool_use":
        call = message.parts.add().tool_call
        call.id = _required(fields, "id")
        call.name = _required(fields, "name")
        call.arguments_json = long_json.dumps(fields.object("input") or {}, ensure_ascii=False)
        fields.object("caller")
    else:
        raise fields.wrong("type", f"{kind!r} is not known here; use text, thinking, tool_use, tool_result")


def _read_tools(params: Params, generation: generation_pb2.Generation) -> None:
    tools = []
    names = set()
    for index, tool in function_tools(params, "custom", "custom"):
        fields = params.inner(tool, f"tools[{index}].")
        fields.text("type")
        fields.object("cache_control")
        name = _required(fields, "name")
        names.add(name)
        function = {"name": name, "description": fields.text("description")}
        parameters = {"parameters": fields.object("input_schema"), "strict": fields.boolean("strict")}
        fields.finish()
        given = {name: value for name, value in (function | parameters).items() if value is not None}
        tools.append({"type": "function", "function": given})
    fields = params.inner(params.object("tool_choice") or {"type": "auto"}, "tool_choice.")
    kind, chosen, is_single = fields.text("type"), fields.text("name"), fields.boolean("disable_parallel_tool_use")
    fields.finish()
    choice: Any = _CHOICES.get(kind or "")
    if kind == "tool":
        if chosen not in names:
            raise fields.wrong("name", f"there is no tool {chosen!r}; name one of tools")
        choice = {"type": "function", "name": chosen}
    elif choice is None:
        raise fields.wrong("type", "must be auto, any, tool or none")
    generation.output.parsing.single_tool_call = bool(is_single)
    read_tools(params, generation.chat, tools, choice if tools or kind == "any" else None)


def _thinking(params: Params) -> dict[str, Any] | None:
    """Return the variable of the chat template that switches thinking on or off; None: it is the template's own."""
    given = params.object("thinking")
    if given is None:
        return None
    fields = params.inner(given, "thinking.", THINKING)
    kind = fields.text("type")
    if kind not in ("enabled", "adaptive", "disabled"):
        raise fields.wrong("type", "must be enabled, adaptive or disabled")
    fields.integer("budget_tokens")
    fields.text("display")
    return {"enable_thinking": kind != "disabled"}
