"""The bodies of POST /v1/chat/completions and /v1/completions as our requests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from octavo.inference.v1 import generation_pb2
from octavo.services.gateway.http.fields import CHAT, COMPLETION, MESSAGE
from octavo.services.gateway.http.params import Ignored, Params, are_token_ids
from octavo.services.gateway.http.requests import (
    ApiCall,
    GenerateRequest,
    copies,
    prefer_tool_call,
    read_common,
    read_max_tokens,
    read_outputs,
    read_stream,
    want_logprobs,
)
from octavo.services.gateway.offload import long_json

_Choice = generation_pb2.ToolChoice
_TOOL_CHOICES = {"auto": _Choice.MODE_AUTO, "none": _Choice.MODE_NONE, "required": _Choice.MODE_REQUIRED}
MEDIA = ("image_url", "input_audio", "file", "input_image", "input_file", "image", "document")


def read_chat_call(body: Mapping[str, Any], headers: Mapping[str, str], ignored: Ignored | None = None) -> ApiCall:
    """Return what a body asks for. Raises ServingError that names OpenAI's parameters."""
    params = Params(body, fields=CHAT, ignored=ignored)
    request = GenerateRequest()
    generation = request.generation
    names = read_common(params, generation, headers, params.object("response_format"), "response_format")
    read_outputs(params, generation)
    stream, include_usage, continuous_usage = read_stream(params)
    limit_name, limit = read_max_tokens(params)
    if limit is not None:
        generation.stop.max_new_tokens = limit
    wants_logprobs = bool(params.boolean("logprobs"))
    top_logprobs = params.integer("top_logprobs")
    if top_logprobs is not None and not wants_logprobs:
        raise params.wrong("top_logprobs", "is only allowed when logprobs is true")
    token_ids = want_logprobs(generation.output, (top_logprobs or 0) if wants_logprobs else None)
    read_chat(params, generation.chat)
    prefer_tool_call(generation, names, "response_format")
    generation.output.parsing.single_tool_call = params.boolean("parallel_tool_calls") is False
    include_reasoning = params.boolean("include_reasoning") is not False
    params.finish()
    return ApiCall(
        requests=[request],
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        logprobs=(top_logprobs or 0) if wants_logprobs else None,
        token_ids=token_ids,
        names={**names, "generation.stop.max_new_tokens": limit_name, "max_new_tokens": limit_name},
        include_reasoning=include_reasoning,
    )


def read_chat(params: Params, chat: generation_pb2.Chat) -> None:
    """Fill in a conversation from the parameters that make one up."""
    chat.SetInParent()
    for index, message in enumerate(params.array("messages") or ()):
        if not isinstance(message, dict):
            raise params.wrong(f"messages[{index}]", "must be an object")
        _read_message(params.inner(message, f"messages[{index}].", MESSAGE), chat.messages.add())
    read_tools(params, chat, [tool for _, tool in function_tools(params)], params.take("tool_choice"))
    documents = params.array("documents")
    options = params.object("chat_template_kwargs") or {}
    enable_thinking = params.boolean("enable_thinking")
    if enable_thinking is not None:
        options = {"enable_thinking": enable_thinking, **options}
    read_template_options(chat, options, params.text("reasoning_effort"), documents)
    chat.continue_final_message = bool(params.boolean("continue_final_message"))
    add_generation_prompt = params.boolean("add_generation_prompt")
    if add_generation_prompt is chat.continue_final_message:
        advice = "is the opposite of continue_final_message here; leave it out"
        raise params.wrong("add_generation_prompt", advice)


def function_tools(
    params: Params, wanted: str = "function", default_type: str = "function"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the functions of `tools`, each after its index; ignore, or refuse, tools of other types.

    wanted        the type of functions
    default_type  what a tool is that does not say it
    """
    for index, tool in enumerate(params.array("tools") or ()):
        kind = tool.get("type", default_type) if isinstance(tool, dict) else None
        if kind == wanted:
            yield index, tool
        elif params.ignored.refuses or not isinstance(kind, str) or not kind:
            raise params.wrong(f"tools[{index}]", f"must be an object of type {wanted}; this server runs no tools")
        else:
            params.ignored.add(f"tools[type={kind}]")


def read_tools(params: Params, chat: generation_pb2.Chat, tools: Sequence[Mapping[str, Any]], choice: Any) -> None:
    """Fill in the tools, in the format of chat completions, and which of them may be called."""
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        choice = choice.get("allowed_tools", choice)  # chat completions have them in an object of their own
        allowed = choice.get("tools") if isinstance(choice, dict) else None
        if not isinstance(allowed, list) or choice.get("mode") not in ("auto", "required"):
            raise params.wrong("tool_choice", "must have the allowed tools, and the mode auto or required")
        names = {_function_name(each) for each in allowed}
        tools = [tool for tool in tools if _function_name(tool) in names]
        choice = choice["mode"]
    chat.tools_json.extend(long_json.dumps(tool, ensure_ascii=False) for tool in tools)
    if choice is None:
        return
    if isinstance(choice, dict) and choice.get("type") == "function":
        name = _function_name(choice)
        if not name:
            raise params.wrong("tool_choice", "must have the function's name")
        chat.tool_choice.mode, chat.tool_choice.name = _Choice.MODE_REQUIRED, name
    elif isinstance(choice, str) and choice in _TOOL_CHOICES:
        chat.tool_choice.mode = _TOOL_CHOICES[choice]
    else:
        raise params.wrong("tool_choice", "must be auto, none, required or an object of type function or allowed_tools")
    if chat.tool_choice.mode == _Choice.MODE_REQUIRED and not chat.tools_json:
        raise params.wrong("tool_choice", "needs tools to choose from; send tools, too")


def _function_name(tool: Any) -> str | None:
    """Return a function's name, None without one: chat completions have it in `function`, responses beside `type`."""
    named = tool.get("function", tool) if isinstance(tool, dict) else None
    name = named.get("name") if isinstance(named, dict) else None
    return name if isinstance(name, str) else None


def read_template_options(
    chat: generation_pb2.Chat,
    given: Mapping[str, Any] | None,
    effort: str | None,
    documents: list[Any] | None = None,
) -> None:
    """Fill in the variables of the chat template."""
    options = dict(given or {})
    if effort is not None:
        options.setdefault("reasoning_effort", effort)
        if effort == "none":
            options.setdefault("enable_thinking", False)
    if documents is not None:
        options.setdefault("documents", documents)
    if options:
        chat.template_options_json = long_json.dumps(options, ensure_ascii=False)


def read_parts(params: Params, name: str, types: Sequence[str] = ("text",)) -> list[str]:
    """Return the texts of a content: a string, or a list of parts of these types."""
    content = params.take(name)
    if content is None or isinstance(content, str):
        return [] if content is None else [content]
    if not isinstance(content, list):
        raise params.wrong(name, "must be a string or a list of parts")
    texts = []
    for index, given in enumerate(content):
        at = f"{name}[{index}]"
        kind = given.get("type") if isinstance(given, dict) else None
        if kind not in types:
            if kind in MEDIA:
                raise params.unsupported(at, "media", f"this server takes text only, not {kind}; leave that part out")
            raise params.wrong(at, f'must be an object such as {{"type": "{types[0]}", "text": "..."}}')
        fields = params.inner(given, f"{at}.")
        fields.text("type")
        text = fields.text("text")
        if text is None:
            raise fields.wrong("text", "must be a string")
        fields.object("cache_control")
        for needless in ("annotations", "citations", "logprobs"):
            fields.array(needless)
        fields.finish()
        texts.append(text)
    return texts


def _read_message(params: Params, message: generation_pb2.Message) -> None:
    message.role = params.text("role") or ""
    texts = read_parts(params, "content")
    reasoning = params.text("reasoning_content"), params.text("reasoning")
    if thought := reasoning[0] or reasoning[1]:
        message.parts.add(reasoning=thought)
    call_id = params.text("tool_call_id")
    if message.role == "tool":
        result = message.parts.add().tool_result
        result.id = call_id or ""
        result.text = "".join(texts)
    else:
        for text in texts:
            message.parts.add(text=text)
    for index, call in enumerate(params.array("tool_calls") or ()):
        _read_tool_call(params, index, call, message.parts.add().tool_call)
    params.finish()


def _read_tool_call(params: Params, index: int, given: Any, call: generation_pb2.ToolCall) -> None:
    function = given.get("function") if isinstance(given, dict) else None
    if not isinstance(function, dict):
        raise params.wrong(f"tool_calls[{index}]", "must be an object with a function")
    fields = params.inner({"id": given.get("id"), **function}, f"tool_calls[{index}].")
    call.id = fields.text("id") or ""
    call.name = fields.text("name") or ""
    call.arguments_json = fields.text("arguments") or ""


_MAX_PROMPTS = 256
_DEFAULT_MAX_TOKENS = 16  # OpenAI's, which clients of this old endpoint rely on


def read_completion_call(
    body: Mapping[str, Any], headers: Mapping[str, str], ignored: Ignored | None = None
) -> ApiCall:
    """Return what a body asks for. Raises ServingError that names OpenAI's parameters."""
    params = Params(body, fields=COMPLETION, ignored=ignored)
    request = GenerateRequest()
    generation = request.generation
    names = read_common(params, generation, headers, params.object("response_format"), "response_format")
    read_outputs(params, generation)
    stream, include_usage, continuous_usage = read_stream(params)
    limit_name, limit = read_max_tokens(params)
    echo = bool(params.boolean("echo"))
    omits_output = echo and limit == 0
    generation.stop.max_new_tokens = _DEFAULT_MAX_TOKENS if limit is None else max(limit, int(omits_output))
    logprobs = params.integer("logprobs")
    if echo and logprobs is not None:
        generation.output.prompt_logprobs = max(logprobs, 1)  # 0 would be none at all
    token_ids = want_logprobs(generation.output, logprobs)
    params.only("best_of", (generation.candidate_count,), COMPLETION["best_of"].description)
    prompts = _read_prompts(params)
    params.finish()
    requests = copies(request, len(prompts))
    for each, prompt in zip(requests, prompts, strict=True):
        if isinstance(prompt, str):
            each.generation.text = prompt
        else:
            each.generation.token_ids.ids.extend(prompt)
            each.generation.token_ids.SetInParent()  # an empty list is still a list
    return ApiCall(
        requests=requests,
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        logprobs=logprobs,
        token_ids=token_ids,
        echoed_prompts=prompts if echo else (),
        omits_output=omits_output,
        names={
            **names,
            "generation.stop.max_new_tokens": limit_name,
            "max_new_tokens": limit_name,
            "generation.output.logprobs": "logprobs",
            "generation.output.prompt_logprobs": "logprobs",
        },
    )


def _read_prompts(params: Params) -> list[str | list[int]]:
    """Return all prompts: a prompt is a string or a list of token ids, and a list holds several."""
    given, token_ids = params.take("prompt"), params.token_ids("prompt_token_ids")
    if given is not None and token_ids is not None:
        raise params.wrong("prompt_token_ids", "cannot be given together with prompt")
    if token_ids is not None:
        return [token_ids]
    if given is None:
        raise params.wrong("prompt", "must be set")
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if are_token_ids(given):
            return [given]
        if len(given) > _MAX_PROMPTS:
            raise params.wrong("prompt", f"has {len(given)} prompts; send at most {_MAX_PROMPTS} at a time")
        if all(isinstance(prompt, str) for prompt in given):
            return given
        if all(isinstance(prompt, list) and are_token_ids(prompt) for prompt in given):
            return given
    raise params.wrong("prompt", "must be a string, a list of strings, a list of token ids, or a list of such lists")
