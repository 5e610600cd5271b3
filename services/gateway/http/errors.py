"""Errors as OpenAI's clients expect them, and OpenAI's names for the fields of our requests."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import grpc
from starlette.responses import Response

from octavo.services.common.errors import FieldViolation, Reason, ServingError

_Code = grpc.StatusCode
_STATUS: Mapping[grpc.StatusCode, int] = {
    _Code.INVALID_ARGUMENT: 400,
    _Code.OUT_OF_RANGE: 400,
    _Code.FAILED_PRECONDITION: 400,
    _Code.UNAUTHENTICATED: 401,
    _Code.PERMISSION_DENIED: 403,
    _Code.NOT_FOUND: 404,
    _Code.ALREADY_EXISTS: 409,
    _Code.RESOURCE_EXHAUSTED: 429,
    _Code.CANCELLED: 499,
    _Code.UNIMPLEMENTED: 501,
    _Code.UNAVAILABLE: 503,
    _Code.ABORTED: 503,
    _Code.DEADLINE_EXCEEDED: 504,
}
"""The HTTP status of each code; 500 for all others."""
_CODES: Mapping[str, str] = {Reason.UNAUTHENTICATED: "invalid_api_key"}  # OpenAI's, where its clients know one
ErrorForm = Callable[[int, str, str | None, str | None], dict[str, Any]]
"""Makes an API's JSON of a status, a message, a parameter and a code."""
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_MESSAGES_TYPES = {
    **_TYPES,
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}

# What a field of a request, or a phrase about it, is called in OpenAI's API, unless the request says otherwise.
_PARAMETERS = {
    "generation.model": "model",
    "generation.text": "prompt",
    "generation.token_ids.ids": "prompt",
    "generation.token_ids": "prompt",
    "generation.prompt": "prompt",
    "generation.chat.messages": "messages",
    "generation.chat.tools_json": "tools",
    "generation.chat.template_options_json": "chat_template_kwargs",
    "generation.chat.continue_final_message": "continue_final_message",
    "generation.chat.tool_choice": "tool_choice",
    "generation.chat": "messages",
    "generation.sampling.": "",  # the names are the same
    "generation.stop.max_new_tokens": "max_tokens",
    "generation.stop.min_new_tokens": "min_tokens",
    "generation.stop.stop_sequences": "stop",
    "generation.stop.stop_token_ids": "stop_token_ids",
    "generation.constraint": "response_format",
    "generation.candidate_count": "n",
    "generation.output.logprobs": "top_logprobs",
    "generation.scheduling.priority": "priority",
    "generation.scheduling.cache_salt": "cache_salt",
    "generation.scheduling.session_id": "prompt_cache_key",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "; send the request again with continue_output set to the tokens received": "; send the request again",
    # Of TokenizeRequest and DetokenizeRequest
    "texts[0]": "prompt",
    "chat.messages": "messages",
    "chat.tools_json": "tools",
    "chat.template_options_json": "chat_template_kwargs",
    "chat.continue_final_message": "continue_final_message",
    "sequences[0].ids": "tokens",
}
_MAX_TEXT = 2048  # of a message; a client's own words may be in it
_END = (r"(?!\w)", "")  # of a name; of the beginning of one
_QUOTED = re.compile(r"""((?<!\w)'(?:[^'\\]|\\.)*'(?!\w)|"(?:[^"\\]|\\.)*")""")
_PART = re.compile(r"\.parts(?:\[\d+\])?(?:\.(tool_call|tool_result)?(?:\.(\w+))?)?")


def in_openai_words(error: ServingError, names: Mapping[str, str] | None = None) -> ServingError:
    """Return the error with OpenAI's names of our fields in its message and violations.

    names: those that are not the usual ones in this request.
    """
    all_names = {**_PARAMETERS, **(names or {})}
    longest_first = sorted(all_names, key=len, reverse=True)
    pattern = re.compile("|".join(rf"(?<![\w.]){re.escape(name)}{_END[name[-1] == '.']}" for name in longest_first))

    def say_field(text: str) -> str:
        return _PART.sub(_say_part, pattern.sub(lambda found: all_names[found[0]], text))

    def say(text: str) -> str:
        """Say a sentence: its words are no fields, nor is anything in what it quotes."""

        def replaced(found: re.Match[str]) -> str:
            return found[0] if found[0].isalpha() else all_names[found[0]]

        pieces = _QUOTED.split(text[:_MAX_TEXT])
        pieces[::2] = [_PART.sub(_say_part, pattern.sub(replaced, piece)) for piece in pieces[::2]]
        return "".join(pieces)

    message = say(error.message)
    violations = [FieldViolation(say_field(each.field), say(each.description)) for each in error.violations]
    named = None if violations else pattern.search(_QUOTED.sub("", error.message))
    if named is not None and named[0].startswith("generation."):
        violations = [FieldViolation(all_names[named[0]], message)]
    if error.reason == Reason.INVALID_FIELD:
        message = "; ".join(f"{each.field}: {each.description}" for each in violations)
    return ServingError(
        error.reason,
        message,
        code=error.code,
        violations=violations,
        resource=error.resource,
        retry_after_ms=error.retry_after_ms,
    )


def _say_part(found: re.Match[str]) -> str:
    """Return where in a message of OpenAI's a part of ours comes from."""
    if found[1] == "tool_call":
        return ".tool_calls"
    return ".tool_call_id" if found[1] == "tool_result" and found[2] == "id" else ".content"


class HttpError(Exception):
    """A request is wrong as HTTP, before its fields are looked at. `code` is for programs."""

    def __init__(self, status: int, message: str, code: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = dict(headers or {})


def status_of(error: ServingError) -> int:
    """Return the HTTP status of an error."""
    return _STATUS.get(error.code, 500)


def openai_error(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    """Return an error as OpenAI's clients expect it."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def messages_error(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    """Return an error as Anthropic's clients expect it."""
    del param, code
    kind = _MESSAGES_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def error_body(error: ServingError, form: ErrorForm = openai_error) -> dict[str, Any]:
    """Return the error as an API's JSON."""
    status = status_of(error)
    param = error.violations[0].field if error.violations else "model" if error.resource is not None else None
    return form(status, error.message, param, _CODES.get(error.reason, error.reason.lower()))


def error_response(error: ServingError, request_id: str, form: ErrorForm = openai_error) -> Response:
    """Return the answer to a request that failed before anything of its output was sent."""
    status = status_of(error)
    headers = {"x-request-id": request_id}
    if status in (429, 503):
        retry_after_ms = error.retry_after_ms or 1000
        headers["retry-after"] = str(math.ceil(retry_after_ms / 1000))
        headers["retry-after-ms"] = str(retry_after_ms)
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status == 429:
        headers["x-ratelimit-remaining-requests"] = "0"
        headers["x-ratelimit-reset-requests"] = f"{retry_after_ms}ms"
    return _response(status, error_body(error, form), headers)


def http_error_response(error: HttpError, request_id: str, form: ErrorForm = openai_error) -> Response:
    """Return the answer to a request that is wrong as HTTP."""
    headers = {**error.headers, "x-request-id": request_id}
    return _response(error.status, form(error.status, error.message, None, error.code), headers)


def _response(status: int, body: dict[str, Any], headers: Mapping[str, str]) -> Response:
    return Response(json.dumps(body), status, headers, "application/json")
