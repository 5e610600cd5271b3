"""The body of POST /v1/responses as our request: the conversation is all in it, for nothing is stored here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from octavo.inference.v1 import generation_pb2
from octavo.services.common.errors import feature_disabled
from octavo.services.gateway.http.chat_request import (
    function_tools,
    read_parts,
    read_template_options,
    read_tools,
)
from octavo.services.gateway.http.fields import (
    REASONING,
    RESPONSES,
    STREAM_OPTIONS_OF_RESPONSES,
    TEXT_OF_RESPONSES,
)
from octavo.services.gateway.http.params import Ignored, Params
from octavo.services.gateway.http.requests import (
    ApiCall,
    GenerateRequest,
    prefer_tool_call,
    read_common,
    want_logprobs,
)
from octavo.services.gateway.offload.long_json import to_json

_LOGPROBS = "message.output_text.logprobs"
# What answers here have nothing of. The first is asked for by clients that send everything again, as they must here.
_NEVER_THERE = (
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
# Items about what other servers' own tools did: a model here has no way to read them.
_OTHERS_ITEMS = (
    "web_search_call",
    "file_search_call",
    "code_interpreter_call",
    "image_generation_call",
    "computer_call",
    "computer_call_output",
    "mcp_list_tools",
    "mcp_call",
    "mcp_approval_request",
    "mcp_approval_response",
    "tool_search_call",
    "tool_search_output",
)
_TEXT_PARTS = ("input_text", "output_text", "text")
_ECHOED = ("instructions", "max_output_tokens", "metadata", "prompt_cache_key", "reasoning", "top_logprobs", "user")


@dataclass(frozen=True, slots=True)
class ResponsesCall(ApiCall):
    """A translated request, with what its answer repeats."""

    echoed: Mapping[str, Any] = field(default_factory=dict)


def read_responses_call(
    body: Mapping[str, Any], headers: Mapping[str, str], ignored: Ignored | None = None
) -> ResponsesCall:
    """Return what a body asks for. Raises ServingError that names OpenAI's parameters."""
    params = Params(body, fields=RESPONSES, ignored=ignored)
    request = GenerateRequest()
    generation = request.generation
    params.integer("n")
    text = params.inner(params.object("text") or {}, "text.", TEXT_OF_RESPONSES)
    names = read_common(params, generation, headers, read_format(text), "text.format")
    generation.candidate_count = 1
    limit = params.integer("max_output_tokens")
    if limit is not None:
        generation.stop.max_new_tokens = limit
    logprobs = _read_logprobs(params)
    want_logprobs(generation.output, logprobs)
    generation.output.parsing.single_tool_call = params.boolean("parallel_tool_calls") is False
    stream = bool(params.boolean("stream"))
    params.inner(params.object("stream_options") or {}, "stream_options.", STREAM_OPTIONS_OF_RESPONSES).finish()
    _read_conversation(params, generation.chat)
    prefer_tool_call(generation, names, "text.format")
    params.finish()
    return ResponsesCall(
        requests=[request],
        stream=stream,
        include_usage=True,
        logprobs=logprobs,
        token_ids=False,
        names={
            **names,
            "generation.stop.max_new_tokens": "max_output_tokens",
            "max_new_tokens": "max_output_tokens",
            "generation.chat.messages": "input",
            "generation.chat": "input",
        },
        echoed=_echo(body),
    )


def read_format(text: Params) -> dict[str, Any] | None:
    """Return the field `format`, the last one of an object that is read, in the shape of a chat's response_format."""
    given = text.object("format")
    text.finish()
    if given is None or given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}


def _read_logprobs(params: Params) -> int | None:
    top = params.integer("top_logprobs")
    wants = False
    for index, item in enumerate(params.array("include") or ()):
        if item == _LOGPROBS:
            wants = True
        elif item not in _NEVER_THERE:
            raise params.wrong(f"include[{index}]", f"must be {_LOGPROBS}; nothing else can be included")
    if top and not wants:
        raise params.wrong("top_logprobs", f"needs {_LOGPROBS} in include")
    return (top or 0) if wants else None


def _read_conversation(params: Params, chat: generation_pb2.Chat) -> None:
    chat.SetInParent()
    instructions = params.text("instructions")
    if instructions is not None:
        chat.messages.add(role="system").parts.add(text=instructions)
    given = params.take("input")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise params.wrong("input", "must be a string or a list of items")
    for index, item in enumerate(given):
        if not isinstance(item, dict):
            raise params.wrong(f"input[{index}]", "must be an object")
        _read_item(params.inner(item, f"input[{index}]."), chat)
    tools = []
    for _, tool in function_tools(params, default_type=""):
        function = {name: value for name, value in tool.items() if name != "type" and value is not None}
        tools.append({"type": "function", "function": function})
    read_tools(params, chat, tools, params.take("tool_choice"))
    reasoning = params.inner(params.object("reasoning") or {}, "reasoning.", REASONING)
    effort = reasoning.text("effort")
    reasoning.finish()
    read_template_options(chat, params.object("chat_template_kwargs"), effort)


def _read_item(params: Params, chat: generation_pb2.Chat) -> None:
    """Add one item: a message, or a part of the assistant's turn."""
    kind = params.text("type") or "message"
    params.text("id")
    params.text("status")
    if kind == "message":
        _read_message(params, chat)
    elif kind in ("function_call", "custom_tool_call"):
        call = _assistant(chat, ("reasoning", "text", "tool_call")).parts.add().tool_call
        call.id = params.text("call_id") or ""
        call.name = params.text("name") or ""
        if kind == "function_call":
            call.arguments_json = params.text("arguments") or ""
        else:
            call.arguments_json = to_json({"input": params.text("input") or ""})
    elif kind in ("function_call_output", "custom_tool_call_output"):
        result = chat.messages.add(role="tool").parts.add().tool_result
        result.id = params.text("call_id") or ""
        result.text = "".join(read_parts(params, "output", _TEXT_PARTS))
    elif kind == "reasoning":
        params.take("encrypted_content")
        params.array("summary")
        texts = read_parts(params, "content", ("reasoning_text",))
        if texts:
            _assistant(chat, ()).parts.add(reasoning="".join(texts))
    elif kind in _OTHERS_ITEMS and not params.ignored.refuses:
        params.ignored.add(f"input[type={kind}]")
        return
    elif kind == "item_reference":
        raise feature_disabled("storage", "nothing is stored here; send the item itself instead of a reference to it")
    else:
        raise params.wrong("type", f"{kind!r} is not known here; use message, function_call, function_call_output")
    params.finish()


def _read_message(params: Params, chat: generation_pb2.Chat) -> None:
    role = params.text("role") or ""
    texts = read_parts(params, "content", _TEXT_PARTS)
    params.text("phase")
    message = _assistant(chat, ("reasoning",)) if role == "assistant" else chat.messages.add(role=role)
    for text in texts:
        message.parts.add(text=text)


def _assistant(chat: generation_pb2.Chat, after: Sequence[str]) -> generation_pb2.Message:
    """Return the assistant's message to go on with: the last one, if what it has is of these kinds, or a new one."""
    last = chat.messages[-1] if chat.messages else None
    if last is not None and last.role == "assistant" and last.parts:
        # Reasoning begins a message, so the last part tells.
        return last if last.parts[-1].WhichOneof("content") in after else chat.messages.add(role="assistant")
    return chat.messages.add(role="assistant")


def _echo(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the answer that repeat the request."""
    return {
        **{name: body.get(name) for name in _ECHOED},
        "metadata": body.get("metadata") or {},
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "text": {"format": {"type": "text"}} | (body.get("text") or {}),
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": [
            {"strict": None, "parameters": None, **tool}
            for tool in body.get("tools") or ()
            if tool.get("type") == "function"
        ],
    }
