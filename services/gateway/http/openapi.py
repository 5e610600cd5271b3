"""The listener's own description: OpenAPI 3.1."""

from __future__ import annotations

from typing import Any

from octavo import __version__

_Schema = dict[str, Any]


def _text(description: str) -> _Schema:
    return {"type": "string", "description": description}


def _number(description: str) -> _Schema:
    return {"type": "number", "description": description}


def _whole(description: str, minimum: int = 0) -> _Schema:
    return {"type": "integer", "minimum": minimum, "description": description}


def _yes(description: str) -> _Schema:
    return {"type": "boolean", "description": description}


def _object(description: str) -> _Schema:
    return {"type": "object", "description": description}


def _list(item: _Schema, description: str) -> _Schema:
    return {"type": "array", "items": item, "description": description}


def _one_of(description: str, *schemas: _Schema) -> _Schema:
    return {"oneOf": list(schemas), "description": description}


_TOKEN_ID: _Schema = {"type": "integer", "minimum": 0}
_STRING: _Schema = {"type": "string"}

_CHAT: dict[str, _Schema] = {
    "messages": _list({"$ref": "#/components/schemas/Message"}, "The conversation, oldest first."),
    "tools": _list({"type": "object"}, "Tools for the template, in OpenAI's function format."),
    "chat_template_kwargs": _object("Further variables for the model's chat template."),
    "continue_final_message": _yes("The last message is continued instead of answered."),
    "add_generation_prompt": _yes("The opposite of continue_final_message."),
}
_COMMON: dict[str, _Schema] = {
    "model": _text("A name from GET /v1/models."),
    "temperature": _number("Divides the logits; 0 takes the most likely token. Unset: the model's default."),
    "top_p": _number("Keeps the most likely tokens that sum to this."),
    "top_k": _whole("Keeps so many tokens; 0 or -1 keeps all.", -1),
    "min_p": _number("Keeps tokens at least so likely, compared to the most likely one."),
    "presence_penalty": _number("Against tokens that are in the output, from -2 to 2."),
    "frequency_penalty": _number("The same, for each time, from -2 to 2."),
    "repetition_penalty": _number("Against tokens in prompt or output; 1 is neutral."),
    "seed": _whole("Fixes the output.", -(2**63)),
    "logit_bias": _object("By token id, what is added to its logit, from -100 to 100."),
    "allowed_token_ids": _list(_TOKEN_ID, "Only these can be produced."),
    "max_tokens": _whole("Most tokens to produce.", 1),
    "max_completion_tokens": _whole("The same as max_tokens.", 1),
    "min_tokens": _whole("The output does not end before."),
    "stop": _one_of("Strings that end the output.", _STRING, _list(_STRING, "Several.")),
    "stop_token_ids": _list(_TOKEN_ID, "Tokens that end the output."),
    "ignore_eos": _yes("Goes on after the end-of-sequence token."),
    "include_stop_str_in_output": _yes("Keeps the stop string that matched."),
    "skip_special_tokens": _yes("Only true is supported."),
    "n": _whole("How many outputs of each prompt.", 1),
    "stream": _yes("Sends server-sent events, one for each piece of output."),
    "stream_options": _object("include_usage: a last chunk with the usage."),
    "return_token_ids": _yes("Adds token_ids to choices, and prompt_token_ids."),
    "priority": {"type": "integer", "description": "Smaller numbers are served first, from -100 to 100."},
    "cache_salt": _text("Shares cached prefixes only with requests of the same salt."),
    "prompt_cache_key": _text("Requests of one key are kept together where that helps the prefix cache."),
    "response_format": _object("text, json_object or json_schema; all but text need a feature."),
    "guided_json": _object("A JSON Schema for the output; needs a feature."),
    "guided_regex": _text("A regular expression for the output; needs a feature."),
    "guided_choice": _list(_STRING, "Possible outputs; needs a feature."),
    "guided_grammar": _text("A grammar of the output; needs a feature."),
    "structured_outputs": _object("One of json, regex, choice, grammar, json_object; needs a feature."),
    "user": _text("Ignored."),
    "safety_identifier": _text("Ignored."),
    "metadata": _object("Ignored."),
    "store": _yes("Only false is supported."),
    "service_tier": {"enum": ["auto", "default"], "description": "There is one tier."},
}
_SCHEMAS: dict[str, _Schema] = {
    "Message": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": _text("Which roles exist is up to the model's chat template."),
            "content": _one_of("Text, or parts of type text.", _STRING, _list({"type": "object"}, "Parts.")),
            "tool_calls": _list({"type": "object"}, "Calls that the assistant made."),
            "tool_call_id": _text("In a message of a tool: the call it answers."),
            "name": _text("Ignored."),
        },
    },
    "ChatCompletionRequest": {
        "type": "object",
        "required": ["model", "messages"],
        "additionalProperties": False,
        "properties": {
            **_CHAT,
            **_COMMON,
            "logprobs": _yes("Returns log probabilities."),
            "top_logprobs": _whole("How many alternatives for each token, up to 20."),
            "tool_choice": _one_of("Only none is supported.", _STRING, {"type": "object"}),
            "parallel_tool_calls": _yes("Ignored."),
        },
    },
    "CompletionRequest": {
        "type": "object",
        "required": ["model", "prompt"],
        "additionalProperties": False,
        "properties": {
            **_COMMON,
            "prompt": _one_of(
                "One prompt or several, as text or token ids.",
                _STRING,
                _list(_STRING, "Texts."),
                _list(_TOKEN_ID, "Token ids."),
                _list(_list(_TOKEN_ID, "A prompt."), "Several lists of token ids."),
            ),
            "logprobs": _whole("Returns log probabilities, with so many alternatives for each token, up to 20."),
            "echo": _yes("Only false is supported."),
            "best_of": _whole("Must equal n.", 1),
            "suffix": _text("Not supported."),
        },
    },
    "TokenizeRequest": {
        "type": "object",
        "required": ["model"],
        "additionalProperties": False,
        "properties": {
            **_CHAT,
            "model": _COMMON["model"],
            "prompt": _text("A text; or else messages."),
            "add_special_tokens": _yes("Adds what the tokenizer puts around a text by itself; true if unset."),
            "return_token_strs": _yes("Adds the text of each token."),
        },
    },
    "DetokenizeRequest": {
        "type": "object",
        "required": ["model", "tokens"],
        "additionalProperties": False,
        "properties": {"model": _COMMON["model"], "tokens": _list(_TOKEN_ID, "What to decode.")},
    },
    "Error": {
        "type": "object",
        "properties": {
            "error": {
                "type": "object",
                "properties": {
                    "message": _text("Says what to change."),
                    "type": _text("The kind of error."),
                    "param": {"type": ["string", "null"], "description": "Which parameter is wrong."},
                    "code": {"type": ["string", "null"], "description": "A constant for programs."},
                },
            }
        },
    },
}


def _operation(summary: str, body: str = "", parameters: tuple[str, ...] = (), answer: str = "") -> _Schema:
    """Return an operation: `body` names its schema, `parameters` are those of the path."""
    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    content = {"content": {"application/json": {"schema": {"type": "object"}}}}
    if answer == "events":
        content["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    operation: _Schema = {
        "summary": summary,
        "responses": {
            "200": {"description": "It worked.", **({} if answer == "empty" else content)},
            "default": {"description": "It did not.", **error},
        },
    }
    if body:
        schema = {"$ref": f"#/components/schemas/{body}"}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if parameters:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": _STRING} for name in parameters
        ]
    return operation


def openapi_document() -> _Schema:
    """Return the document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Octavo",
            "version": __version__,
            "description": "OpenAI-compatible endpoints. Every request may carry x-request-id; generate requests may "
            "carry x-request-timeout-ms.",
        },
        "paths": {
            "/v1/chat/completions": {
                "post": _operation("Answer a conversation", "ChatCompletionRequest", answer="events")
            },
            "/v1/completions": {"post": _operation("Continue prompts", "CompletionRequest", answer="events")},
            "/v1/models": {"get": _operation("List the models")},
            "/v1/models/{model}": {"get": _operation("Describe a model", parameters=("model",))},
            "/tokenize": {"post": _operation("Turn text into tokens", "TokenizeRequest")},
            "/detokenize": {"post": _operation("Turn tokens into text", "DetokenizeRequest")},
            "/health": {"get": _operation("Whether requests can be served now", answer="empty")},
            "/ping": {"get": _operation("The same as /health", answer="empty")},
            "/version": {"get": _operation("The version of the software")},
            "/openapi.json": {"get": _operation("This document")},
        },
        "components": {"schemas": _SCHEMAS},
    }
