"""The listener's own description: OpenAPI 3.1."""

from __future__ import annotations

import json

from octavo import __version__
from octavo.services.gateway.http.fields import OBJECTS, REQUIRED, Field, Schema, Support

_ERROR: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string", "description": "says what to change"},
                "type": {"type": "string", "description": "the kind of error"},
                "param": {"type": ["string", "null"], "description": "which parameter is wrong"},
                "code": {"type": ["string", "null"], "description": "a constant for programs"},
            },
        }
    },
}


def _schemas() -> dict[str, Schema]:
    """Return the schemas of all requests, as the tables have them."""
    schemas: dict[str, Schema] = {"Error": _ERROR}
    for name, fields in OBJECTS.items():
        schemas[name] = {
            "type": "object",
            "properties": {field: _property(each) for field, each in fields.items()},
            "required": list(REQUIRED.get(name, ())),
        }
    return schemas


def _property(field: Field) -> Schema:
    description = field.description
    if field.support is Support.IGNORED:
        description = f"Ignored: {description}"
    elif field.support is Support.HINT:
        description = f"A hint, which is ignored, or refused by strict servers: {description}"
    elif field.support is Support.REFUSED:
        values = " or ".join(json.dumps(value) for value in field.allowed)
        description = f"Refused{f' unless {values}' if values else ''}: {description}"
    return {**field.schema, "description": description}


def _operation(summary: str, body: str = "", parameters: tuple[str, ...] = (), answer: str = "") -> Schema:
    """Return an operation: `body` names its schema, `parameters` are those of the path."""
    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    content = {"content": {"application/json": {"schema": {"type": "object"}}}}
    if answer == "events":
        content["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    operation: Schema = {
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
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in parameters
        ]
    return operation


def openapi_document() -> Schema:
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
            "/v1/responses": {"post": _operation("Answer, as items", "ResponsesRequest", answer="events")},
            "/v1/messages": {"post": _operation("Answer, as Anthropic's API does", "MessagesRequest", answer="events")},
            "/v1/messages/count_tokens": {"post": _operation("Count the tokens of a conversation", "MessagesRequest")},
            "/v1/embeddings": {"post": _operation("Embed texts", "EmbeddingsRequest")},
            **{
                f"{version}/rerank": {"post": _operation("Order documents by relevance", "RerankRequest")}
                for version in ("", "/v1", "/v2")
            },
            **{
                f"{version}/score": {"post": _operation("Score pairs of texts", "ScoreRequest")}
                for version in ("", "/v1")
            },
            **{
                f"{version}/classify": {"post": _operation("Label texts", "ClassifyRequest")} for version in ("", "/v1")
            },
            "/v1/models": {"get": _operation("List the models")},
            "/v1/models/{model}": {"get": _operation("Describe a model", parameters=("model",))},
            "/v1/load_lora_adapter": {"post": _operation("Give a LoRA adapter a name")},
            "/v1/unload_lora_adapter": {"post": _operation("Take an adapter's name away")},
            "/tokenize": {"post": _operation("Turn text into tokens", "TokenizeRequest")},
            "/detokenize": {"post": _operation("Turn tokens into text", "DetokenizeRequest")},
            "/": {"get": _operation("Which paths there are; browsers get to the page, where there is one")},
            "/docs": {"get": _operation("The same as /")},
            "/health": {"get": _operation("Whether requests can be served now", answer="empty")},
            "/ping": {"get": _operation("The same as /health", answer="empty")},
            "/version": {"get": _operation("The version of the software")},
            "/openapi.json": {"get": _operation("This document")},
        },
        "components": {"schemas": _schemas()},
    }
