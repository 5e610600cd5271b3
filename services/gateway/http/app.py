"""The listener's routes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from octavo.services.common.interceptor import choose_request_id
from octavo.services.common.request_memory import RequestMemory
from octavo.services.gateway.authentication import Authenticator
from octavo.services.gateway.http.embed import EmbedEndpoints
from octavo.services.gateway.http.endpoint import IGNORED_HEADER, Endpoint, Handler, HttpRequest
from octavo.services.gateway.http.errors import (
    ErrorForm,
    HttpError,
    http_error_response,
    messages_error,
    openai_error,
)
from octavo.services.gateway.http.generate import GenerateEndpoints
from octavo.services.gateway.http.info import InfoEndpoints
from octavo.services.gateway.http.openapi import openapi_document

_EXPOSED = (
    "x-request-id",
    "retry-after",
    "retry-after-ms",
    IGNORED_HEADER,
    *(f"x-ratelimit-{what}-requests" for what in ("limit", "remaining", "reset")),
)
# What is asked of other servers, or of this one with more options: by the beginning of a path.
_ADVICE: Mapping[str, str] = {
    "/v1/files": "files are off; --batch-dir (OCTAVO_BATCH_DIR) of the gateway switches them on",
    "/v1/batches": "batches are off; --batch-dir (OCTAVO_BATCH_DIR) of the gateway switches them on",
    "/ui": "the page is off; --ui switches it on",
    "/api/": "this server speaks OpenAI's API and not Ollama's; use /v1/chat/completions",
    "/v1/": "GET / lists what there is",
}


def make_app(
    generate: GenerateEndpoints,
    embed: EmbedEndpoints,
    info: InfoEndpoints,
    authenticator: Authenticator,
    max_body_bytes: int,
    memory: RequestMemory,
    cors_origins: Sequence[str],
    more_routes: Sequence[tuple[str, str, Handler]] = (),
    public_routes: Sequence[tuple[str, str, Handler]] = (),
    *,
    refuses_unknown: bool = False,
) -> Starlette:
    """Return the ASGI application.

    memory        what bodies may take together
    cors_origins  may be called from by browsers, none if empty
    more_routes   method, path and handler of what only some gateways have
    public_routes the same, for what needs no key
    refuses_unknown  fields that are not known are refused, not ignored
    """

    def route(
        method: str, path: str, handler: Handler, *, public: bool = False, form: ErrorForm = openai_error
    ) -> Route:
        endpoint = Endpoint(
            handler,
            max_body_bytes,
            None if public else authenticator,
            memory,
            refuses_unknown=refuses_unknown,
            error_form=form,
        )
        return Route(path, endpoint, methods=[method])

    has_page = any(path == "/ui" for _, path, _ in public_routes)

    async def index(request: HttpRequest) -> Response:
        if has_page and "text/html" in request.headers.get("accept", ""):
            return RedirectResponse("/ui")
        paths = sorted({each.path.replace(":path", "") for each in routes} - {"/", "/docs"})
        about = {"name": "Octavo", "api": "OpenAI's; a base URL ends with /v1", "description": "/openapi.json"}
        return Response(json.dumps({**about, "paths": paths}, indent=2), media_type="application/json")

    routes = [
        route("GET", "/", index, public=True),
        route("GET", "/docs", index, public=True),
        route("POST", "/v1/chat/completions", generate.chat),
        route("POST", "/v1/completions", generate.complete),
        route("POST", "/v1/responses", generate.respond),
        route("POST", "/v1/messages", generate.message, form=messages_error),
        route("POST", "/v1/messages/count_tokens", info.count_tokens, form=messages_error),
        route("POST", "/v1/embeddings", embed.embeddings),
        *(route("POST", f"{version}/rerank", embed.rerank) for version in ("", "/v1", "/v2")),
        *(route("POST", f"{version}/score", embed.score) for version in ("", "/v1")),
        *(route("POST", f"{version}/classify", embed.classify) for version in ("", "/v1")),
        route("GET", "/v1/models", info.list_models),
        route("GET", "/v1/models/{model:path}", info.get_model),
        route("POST", "/tokenize", info.tokenize),
        route("POST", "/detokenize", info.detokenize),
        route("GET", "/health", info.health, public=True),
        route("GET", "/ping", info.health, public=True),
        route("GET", "/version", info.version),
        route("GET", "/openapi.json", _openapi),
        *(route(*each) for each in more_routes),
        *(route(*each, public=True) for each in public_routes),
    ]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=cors_origins,
        allow_methods=("GET", "POST", "DELETE"),
        allow_headers=("*",),
        expose_headers=_EXPOSED,
    )
    app = Starlette(
        routes=routes, middleware=[cors] if cors_origins else [], exception_handlers={HTTPException: _unrouted}
    )
    app.router.redirect_slashes = False
    return app


async def _openapi(request: HttpRequest) -> Response:
    del request
    return Response(json.dumps(openapi_document()), media_type="application/json")


async def _unrouted(request: Request, error: Exception) -> Response:
    """Answer what fits no route, or not with its method."""
    assert isinstance(error, HTTPException), f"registered for another type than {type(error).__name__}"
    where = f"{request.method} {request.url.path}"
    if error.status_code == 405:
        wrong = HttpError(405, f"{where} is not allowed; see the allow header", "method_not_allowed", error.headers)
    else:
        wrong = HttpError(404, f"Unknown request URL: {where}{_advice(request)}", "unknown_url")
    form = messages_error if request.url.path.startswith("/v1/messages") else openai_error
    return http_error_response(wrong, choose_request_id(request.headers.get("x-request-id", "")), form)


def _advice(request: Request) -> str:
    """Return what else could be meant; empty: nothing is known."""
    path = request.url.path
    known = {route.path for route in request.app.routes}
    for meant in (f"/v1{path}", path.removeprefix("/v1")):
        if meant != path and meant in known:
            return f"; did you mean {meant}?" + (" A base URL ends with one /v1" if meant.startswith("/v1/") else "")
    return next((f"; {advice}" for start, advice in _ADVICE.items() if path.startswith(start)), "")
