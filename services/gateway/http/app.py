"""The listener's routes."""

from __future__ import annotations

import json
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.services.common.interceptor import choose_request_id
from octavo.services.common.request_memory import RequestMemory
from octavo.services.gateway.authentication import Authenticator
from octavo.services.gateway.http.embed import EmbedEndpoints
from octavo.services.gateway.http.endpoint import Endpoint, Handler, HttpRequest
from octavo.services.gateway.http.errors import HttpError, http_error_response
from octavo.services.gateway.http.generate import GenerateEndpoints
from octavo.services.gateway.http.info import InfoEndpoints
from octavo.services.gateway.http.openapi import openapi_document

_EXPOSED = (
    "x-request-id",
    "retry-after",
    "retry-after-ms",
    *(f"x-ratelimit-{what}-requests" for what in ("limit", "remaining", "reset")),
)


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
) -> Starlette:
    """Return the ASGI application.

    memory        what bodies may take together
    cors_origins  may be called from by browsers, none if empty
    more_routes   method, path and handler of what only some gateways have
    public_routes the same, for what needs no key
    """

    def route(method: str, path: str, handler: Handler, *, public: bool = False) -> Route:
        endpoint = Endpoint(handler, max_body_bytes, None if public else authenticator, memory)
        return Route(path, endpoint, methods=[method])

    routes = [
        route("POST", "/v1/chat/completions", generate.chat),
        route("POST", "/v1/completions", generate.complete),
        route("POST", "/v1/responses", generate.respond),
        route("POST", "/v1/embeddings", embed.embeddings),
        route("POST", "/v1/rerank", embed.rerank),
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
        wrong = HttpError(404, f"Unknown request URL: {where}", "unknown_url")
    return http_error_response(wrong, choose_request_id(request.headers.get("x-request-id", "")))
