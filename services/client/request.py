"""Builds the body of a generate request from keyword arguments."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, TypeVar, cast

from google.protobuf.message import Message

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2

_HEADER_VALUE = re.compile(r"[!-~]([ -~]*[!-~])?")

M = TypeVar("M", bound=Message)
MessageLike = generation_pb2.Message | Mapping[str, str]


class GenerationOptions(TypedDict, total=False):
    """Keyword arguments of Client.stream and Client.generate, named after the fields of the API.

    A field left out means the model's own default. `stop` are stop strings, or one; `json_schema` and
    `tools` are JSON texts or what json.dumps takes. `tool_choice` is as in OpenAI's API: "auto", "none",
    "required", or {"type": "function", "function": {"name": "..."}} for the one tool that is called.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    top_n_sigma: float
    typical_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int]
    bad_words: Sequence[str]

    max_new_tokens: int
    min_new_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_end_of_sequence: bool
    include_stop_sequence: bool
    soft_time_limit_ms: int

    json_schema: str | Mapping[str, Any]
    regex: str
    grammar: str
    choices: Sequence[str]
    any_json: bool

    return_token_ids: bool
    omit_text: bool
    logprobs: int
    chosen_logprob: bool
    prompt_logprobs: int
    max_coalesce_ms: int
    progress_interval_ms: int

    priority: int
    session_id: str
    cache_salt: str
    bypass_prefix_cache: bool
    resume_window_ms: int

    tools: Sequence[str | Mapping[str, Any]]
    tool_choice: str | Mapping[str, Any]
    template_options: Mapping[str, Any]
    continue_final_message: bool

    continue_output: Sequence[int]
    candidate_count: int
    adapter: str
    idempotency_key: str


class CallOptions(TypedDict, total=False):
    """Keyword arguments that concern a call and not what is generated."""

    request_id: str
    timeout_s: float | None


class PromptOptions(TypedDict, total=False):
    """Keyword arguments that say what is continued, and by which model."""

    model: str
    messages: Sequence[MessageLike] | None
    token_ids: Sequence[int] | None


class RequestOptions(GenerationOptions, CallOptions, PromptOptions, total=False):
    """All keyword arguments of Client.stream and Client.generate."""


class BatchItem(GenerationOptions, PromptOptions, total=False):
    """One request of Client.batch: as the keyword arguments of Client.generate, without those of the call."""

    prompt: str


_SAMPLING = frozenset(common_pb2.SamplingParams.DESCRIPTOR.fields_by_name)
_STOP = frozenset(common_pb2.StopCriteria.DESCRIPTOR.fields_by_name)
_CONSTRAINT = frozenset({"json_schema", "regex", "grammar", "choices", "any_json"})
_OUTPUT = frozenset(generation_pb2.OutputOptions.DESCRIPTOR.fields_by_name)
_SCHEDULING = frozenset(generation_pb2.Scheduling.DESCRIPTOR.fields_by_name)
_CHAT = frozenset({"tools", "tool_choice", "template_options", "continue_final_message"})
_TOOL_CHOICES: Mapping[str, generation_pb2.ToolChoice.Mode] = {
    "auto": generation_pb2.ToolChoice.MODE_AUTO,
    "none": generation_pb2.ToolChoice.MODE_NONE,
    "required": generation_pb2.ToolChoice.MODE_REQUIRED,
}
_PROMPTS: Mapping[str, Any] = {"model": "", "messages": None, "token_ids": None}
_OPTIONS: Mapping[str, str] = {"stop_sequences": "stop", "token_ids": "return_token_ids"}  # by the field's name
_OTHER = frozenset({"continue_output", "candidate_count", "adapter", "idempotency_key"})


def split_options(prompt: str | None, options: RequestOptions) -> tuple[generation_pb2.Generation, CallOptions]:
    """Return the request that keyword arguments describe, and those of its call. Raises what build_generation does."""
    values: dict[str, Any] = dict(options)
    call: dict[str, Any] = {name: values.pop(name) for name in CallOptions.__annotations__ if name in values}
    model, messages, token_ids = (values.pop(name, default) for name, default in _PROMPTS.items())
    generation = build_generation(model, prompt, messages, token_ids, cast(GenerationOptions, values))
    return generation, cast(CallOptions, call)


def build_generation(
    model: str,
    prompt: str | None,
    messages: Sequence[MessageLike] | None,
    token_ids: Sequence[int] | None,
    options: GenerationOptions,
) -> generation_pb2.Generation:
    """Return the request that asks `model` to continue exactly one of `prompt`, `messages` and `token_ids`.

    Raises TypeError for an unknown or misplaced option and ValueError for a value that no field
    can hold; whether a value makes sense is the server's to say.
    """
    if sum(value is not None for value in (prompt, messages, token_ids)) != 1:
        raise TypeError("give exactly one of prompt, messages and token_ids")
    values: dict[str, Any] = dict(options)
    if "stop" in values:
        stop = values.pop("stop")
        values["stop_sequences"] = [stop] if isinstance(stop, str) else stop
    if "return_token_ids" in values:
        values["token_ids"] = values.pop("return_token_ids")
    known = _SAMPLING | _STOP | _CONSTRAINT | _OUTPUT | _SCHEDULING | _CHAT | _OTHER
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise TypeError(f"unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))

    generation = generation_pb2.Generation(model=model)
    if prompt is not None:
        generation.MergeFrom(make_message(generation_pb2.Generation, {"text": prompt}, "prompt"))
    elif token_ids is not None:
        generation.token_ids.CopyFrom(make_message(common_pb2.TokenIds, {"ids": token_ids}, "token_ids"))
    else:
        assert messages is not None
        generation.chat.CopyFrom(build_chat(messages, _pick(values, _CHAT)))
    if messages is None and (misplaced := _pick(values, _CHAT)):
        raise TypeError(f"{', '.join(misplaced)} can only be given with messages")

    if sampling := _pick(values, _SAMPLING):
        generation.sampling.CopyFrom(make_message(common_pb2.SamplingParams, sampling))
    if stops := _pick(values, _STOP):
        generation.stop.CopyFrom(make_message(common_pb2.StopCriteria, stops))
    if output := _pick(values, _OUTPUT):
        generation.output.CopyFrom(make_message(generation_pb2.OutputOptions, output))
    if scheduling := _pick(values, _SCHEDULING):
        generation.scheduling.CopyFrom(make_message(generation_pb2.Scheduling, scheduling))
    if constraint := _pick(values, _CONSTRAINT):
        generation.constraint.CopyFrom(_constraint(constraint))
    generation.MergeFrom(make_message(generation_pb2.Generation, _pick(values, _OTHER - {"continue_output"})))
    if "continue_output" in values:
        generation.continue_output.CopyFrom(
            make_message(common_pb2.TokenIds, {"ids": values["continue_output"]}, "continue_output")
        )
    return generation


def make_message(kind: type[M], values: Mapping[str, Any], option: str = "") -> M:
    """Return a message of these fields. Raises TypeError or ValueError that names the option whose value is wrong.

    option  what the caller calls the only field; empty: options are called as the fields are
    """
    try:
        return kind(**values)
    except (TypeError, ValueError):
        for name, value in values.items():
            try:
                kind(**{name: value})
            except (TypeError, ValueError) as error:
                name = option or _OPTIONS.get(name, name)
                kind_of_error = TypeError if isinstance(error, TypeError) else ValueError  # not one of its subclasses
                raise kind_of_error(f"{name}={value!r:.80} is not possible: {error}") from None
        raise


def routing_headers(generation: generation_pb2.Generation) -> list[tuple[str, str]]:
    """Return metadata that mirrors a request, for routers that read no bodies; what no header can hold is left out."""
    pairs = (("x-model", generation.model), ("x-session-id", generation.scheduling.session_id))
    return [(name, value) for name, value in pairs if value and _HEADER_VALUE.fullmatch(value)]


def build_chat(messages: Sequence[MessageLike], options: Mapping[str, Any]) -> generation_pb2.Chat:
    """Return the conversation; a mapping has the keys "role" and "content" (the text)."""
    chat = generation_pb2.Chat(messages=[_message(message) for message in messages])
    chat.tools_json.extend(_json(tool) for tool in options.get("tools", ()))
    if "tool_choice" in options:
        chat.tool_choice.CopyFrom(_tool_choice(options["tool_choice"]))
    if "template_options" in options:
        chat.template_options_json = _json(options["template_options"])
    chat.continue_final_message = options.get("continue_final_message", False)
    return chat


def _message(message: MessageLike) -> generation_pb2.Message:
    if isinstance(message, generation_pb2.Message):
        return message
    if set(message) != {"role", "content"}:
        raise TypeError(f"a message has the keys 'role' and 'content', not {sorted(message)}")
    part = make_message(generation_pb2.Part, {"text": message["content"]}, "content")
    return generation_pb2.Message(role=message["role"], parts=[part])


def _tool_choice(value: str | Mapping[str, Any]) -> generation_pb2.ToolChoice:
    if isinstance(value, str) and value in _TOOL_CHOICES:
        return generation_pb2.ToolChoice(mode=_TOOL_CHOICES[value])
    function = value.get("function") if isinstance(value, Mapping) and value.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        shape = '{"type": "function", "function": {"name": "..."}}'
        raise ValueError(f"tool_choice is one of {', '.join(_TOOL_CHOICES)}, or {shape}, not {value!r}")
    return generation_pb2.ToolChoice(mode=generation_pb2.ToolChoice.MODE_REQUIRED, name=name)


def _constraint(values: dict[str, Any]) -> common_pb2.OutputConstraint:
    if len(values) > 1:
        raise TypeError(f"give only one of {', '.join(values)}")
    ((kind, value),) = values.items()
    if kind == "choices":
        if isinstance(value, str):
            raise TypeError(f"choices={value!r:.80} is not possible: give a list of texts")
        return common_pb2.OutputConstraint(choices=make_message(common_pb2.Choices, {"values": value}, "choices"))
    return make_message(common_pb2.OutputConstraint, {kind: _json(value) if kind == "json_schema" else value})


def _json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _pick(values: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names}
