"""The body of POST /v1/responses as our request: the conversation is all in it, for nothing is stored here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from octavo.inference.v1 import generation_pb2
from octavo.services.common.errors import feature_disabled
from octavo.services.gateway import long_json
from octavo.services.gateway.http.chat_request import read_parts, read_template_options, read_tool_choice
from octavo.services.gateway.http.fields import RESPONSES, STREAM_OPTIONS_OF_RESPONSES
from octavo.services.gateway.http.params import Params
from octavo.services.gateway.http.requests import ApiCall, GenerateRequest, read_common, want_logprobs

_LOGPROBS = "message.output_text.logprobs"
_NOTHING_STORED = ("reasoning.encrypted_content",)  # asked for by clients that send everything again, as they must here
_TEXT_PARTS = ("input_text", "output_text", "text")
_ECHOED = ("instructions", "max_output_tokens", "metadata", "prompt_cache_key", "reasoning", "top_logprobs", "user")


@dataclass(frozen=True, slots=True)
class ResponsesCall(ApiCall):
    """A translated request, with what its answer repeats."""

    echoed: Mapping[str, Any] = field(default_factory=dict)


def read_responses_call(body: Mapping[str, Any], headers: Mapping[str, str]) -> ResponsesCall:
    """Return what a body asks for. Raises ServingError that names OpenAI's parameters."""
    params = Params(body, fields=RESPONSES)
    request = GenerateRequest()
    generation = request.generation
    text = Params(params.object("text") or {}, "text.")
    text.only("verbosity", ("medium",), "is not known to models here; say it in the instructions")
    names = read_common(params, generation, headers, _response_format(text), "text.format")
    generation.candidate_count = 1
    limit = params.integer("max_output_tokens")
    if limit is not None:
        generation.stop.max_new_tokens = limit
    logprobs = _read_logprobs(params)
    want_logprobs(generation.output, logprobs)
    generation.output.parsing.single_tool_call = params.boolean("parallel_tool_calls") is False
    stream = bool(params.boolean("stream"))
    Params(params.object("stream_options") or {}, "stream_options.", STREAM_OPTIONS_OF_RESPONSES).finish()
    _read_conversation(params, generation.chat)
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


def _response_format(text: Params) -> dict[str, Any] | None:
    """Return `text.format` in the shape of a chat's response_format."""
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
        elif item not in _NOTHING_STORED:
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
        _read_item(Params(item, f"input[{index}]."), chat)
    for index, tool in enumerate(params.array("tools") or ()):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise params.wrong(f"tools[{index}]", "must be of type function; this server runs no tools itself")
        function = {name: value for name, value in tool.items() if name != "type" and value is not None}
        chat.tools_json.append(long_json.dumps({"type": "function", "function": function}, ensure_ascii=False))
    read_tool_choice(params, chat)
    reasoning = Params(params.object("reasoning") or {}, "reasoning.")
    effort = reasoning.text("effort")
    for name in ("summary", "generate_summary"):
        reasoning.only(name, ("auto",), "summaries are not made here; reasoning is in the output as it is")
    reasoning.finish()
    read_template_options(chat, params.object("chat_template_kwargs"), effort)


def _read_item(params: Params, chat: generation_pb2.Chat) -> None:
    """Add one item: a message, or a part of the assistant's turn."""
    kind = params.text("type") or "message"
    params.text("id")
    params.text("status")
    if kind == "message":
        _read_message(params, chat)
    elif kind == "function_call":
        call = _assistant(chat, ("reasoning", "text", "tool_call")).parts.add().tool_call
        call.id = params.text("call_id") or ""
        call.name = params.text("name") or ""
        call.arguments_json = params.text("arguments") or ""
    elif kind == "function_call_output":
        result = chat.messages.add(role="tool").parts.add().tool_result
        result.id = params.text("call_id") or ""
        result.text = "".join(read_parts(params, "output", _TEXT_PARTS))
    elif kind == "reasoning":
        params.take("encrypted_content")
        params.array("summary")
        texts = read_parts(params, "content", ("reasoning_text",))
        if texts:
            _assistant(chat, ()).parts.add(reasoning="".join(texts))
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
        "tools": [{"strict": None, "parameters": None, **tool} for tool in body.get("tools") or ()],
    }
