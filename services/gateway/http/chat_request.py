"""The body of POST /v1/chat/completions, and its messages, as our request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from octavo.inference.v1 import generation_pb2
from octavo.services.common.errors import feature_disabled
from octavo.services.gateway.http.params import Params
from octavo.services.gateway.http.requests import (
    ApiCall,
    GenerateRequest,
    read_common,
    read_max_tokens,
    read_stream,
    want_logprobs,
)

_IGNORED_IN_MESSAGE = ("name", "refusal")


def read_chat_call(body: Mapping[str, Any], headers: Mapping[str, str]) -> ApiCall:
    """Return what a body asks for. Raises ServingError that names OpenAI's parameters."""
    params = Params(body)
    request = GenerateRequest()
    generation = request.generation
    names = read_common(params, generation, headers)
    stream, include_usage = read_stream(params)
    limit_name, limit = read_max_tokens(params)
    if limit is not None:
        generation.stop.max_new_tokens = limit
    wants_logprobs = bool(params.boolean("logprobs"))
    top_logprobs = params.integer("top_logprobs")
    if top_logprobs is not None and not wants_logprobs:
        raise params.wrong("top_logprobs", "is only allowed when logprobs is true")
    token_ids = want_logprobs(generation.output, (top_logprobs or 0) if wants_logprobs else None)
    read_chat(params, generation.chat)
    _read_tool_choice(params)
    params.finish()
    return ApiCall(
        requests=[request],
        stream=stream,
        include_usage=include_usage,
        logprobs=(top_logprobs or 0) if wants_logprobs else None,
        token_ids=token_ids,
        names={**names, "generation.stop.max_new_tokens": limit_name, "max_new_tokens": limit_name},
    )


def read_chat(params: Params, chat: generation_pb2.Chat) -> None:
    """Fill in a conversation from the parameters that make one up."""
    chat.SetInParent()
    for index, message in enumerate(params.array("messages") or ()):
        if not isinstance(message, dict):
            raise params.wrong(f"messages[{index}]", "must be an object")
        _read_message(Params(message, f"messages[{index}]."), chat.messages.add())
    for index, tool in enumerate(params.array("tools") or ()):
        if not isinstance(tool, dict):
            raise params.wrong(f"tools[{index}]", "must be an object")
        chat.tools_json.append(json.dumps(tool, ensure_ascii=False))
    options = params.object("chat_template_kwargs")
    if options:
        chat.template_options_json = json.dumps(options, ensure_ascii=False)
    chat.continue_final_message = bool(params.boolean("continue_final_message"))
    add_generation_prompt = params.boolean("add_generation_prompt")
    if add_generation_prompt is chat.continue_final_message:
        advice = "is the opposite of continue_final_message here; leave it out"
        raise params.wrong("add_generation_prompt", advice)


def _read_message(params: Params, message: generation_pb2.Message) -> None:
    message.role = params.text("role") or ""
    content = params.take("content")
    texts = [content] if isinstance(content, str) else [] if content is None else _read_parts(params, content)
    if message.role == "tool":
        result = message.parts.add().tool_result
        result.id = params.text("tool_call_id") or ""
        result.text = "".join(texts)
    else:
        for text in texts:
            message.parts.add(text=text)
    for index, call in enumerate(params.array("tool_calls") or ()):
        _read_tool_call(params, index, call, message.parts.add().tool_call)
    for name in _IGNORED_IN_MESSAGE:
        params.text(name)
    params.only("annotations", ([],), "is not known here; leave it out")
    params.finish()


def _read_parts(params: Params, content: Any) -> list[str]:
    """Return the texts of a content that is a list of parts."""
    if not isinstance(content, list):
        raise params.wrong("content", "must be a string or a list of parts")
    texts = []
    for index, given in enumerate(content):
        at = f"content[{index}]"
        kind = given.get("type") if isinstance(given, dict) else None
        if kind != "text":
            if kind in ("image_url", "input_audio", "file"):
                raise feature_disabled("media", f"this server takes text only, not {kind}; leave that part out")
            raise params.wrong(at, 'must be an object such as {"type": "text", "text": "..."}')
        text = given.get("text")
        if not isinstance(text, str):
            raise params.wrong(f"{at}.text", "must be a string")
        texts.append(text)
    return texts


def _read_tool_call(params: Params, index: int, given: Any, call: generation_pb2.ToolCall) -> None:
    function = given.get("function") if isinstance(given, dict) else None
    if not isinstance(function, dict):
        raise params.wrong(f"tool_calls[{index}]", "must be an object with a function")
    fields = Params({"id": given.get("id"), **function}, f"tool_calls[{index}].")
    call.id = fields.text("id") or ""
    call.name = fields.text("name") or ""
    call.arguments_json = fields.text("arguments") or ""


def _read_tool_choice(params: Params) -> None:
    """Refuse what needs calls of tools to be found in the output; tools in the prompt are the template's business."""
    choice = params.take("tool_choice")
    params.boolean("parallel_tool_calls")
    if choice is not None and choice != "none":
        message = "tool_choice needs the feature 'tools', which is off here; leave it out, and tools reach the template"
        raise feature_disabled("tools", message)
