"""A page to chat with the model and to see how busy it is: plain files, and one endpoint for the gauges."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from typing import Any

from starlette.responses import Response

from octavo.inference.v1 import load_pb2
from octavo.services.gateway.http.endpoint import Handler, HttpRequest
from octavo.services.gateway.requests.model import Models
from octavo.services.gateway.rpc.model_service import LoadServicer

_SCRIPTS = ("app.js", "api.js", "gauges.js", "markdown.js", "store.js")
_FILES = {"/ui": "index.html", **{f"/ui/{name}": name for name in (*_SCRIPTS, "style.css", "icon.svg")}}
_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'; "
    "require-trusted-types-for 'script'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
_COUNTS = (
    "running",
    "waiting",
    "workers_ready",
    "kv_blocks_free",
    "kv_blocks_total",
    "looked_up_tokens",
    "cached_tokens",
    "estimated_queue_ms",
)
_NO_CONTEXT: Any = None  # the servicer takes nothing from its calls' contexts


class UiEndpoints:
    """The page. Its files are for everybody; what they show needs a key where calls do."""

    def __init__(self, models: Models, load: LoadServicer, is_ready: Callable[[], bool]) -> None:
        self._models = models
        self._load = load
        self._is_ready = is_ready

    @property
    def routes(self) -> list[tuple[str, str, Handler]]:
        """Method, path and handler of what needs a key."""
        return [("GET", "/ui/status", self.status)]

    @property
    def public_routes(self) -> list[tuple[str, str, Handler]]:
        """Those of the files."""
        return [("GET", path, _file(name)) for path, name in _FILES.items()]

    async def status(self, request: HttpRequest) -> Response:
        """Return the names of the models, and how busy each scheduler is."""
        del request
        load = await self._load.GetLoad(load_pb2.GetLoadRequest(), _NO_CONTEXT)
        body = {
            "ready": self._is_ready(),
            "models": [model.name for model in self._models.all],
            "schedulers": [_describe(each) for each in load.schedulers],
        }
        return Response(json.dumps(body), headers={"cache-control": "no-store"}, media_type="application/json")


def _describe(load: load_pb2.SchedulerLoad) -> dict[str, Any]:
    counts = {name: getattr(load, name) for name in _COUNTS}
    tokens_per_s = sum(worker.tokens_per_s for worker in load.workers if worker.running)
    return {"scheduler_id": load.scheduler_id, **counts, "tokens_per_s": tokens_per_s}


def _file(name: str) -> Handler:
    content = (resources.files(__package__) / "ui" / name).read_bytes()

    async def send(request: HttpRequest) -> Response:
        del request
        return Response(content, headers=HEADERS, media_type=_TYPES[name.rpartition(".")[2]])

    return send
