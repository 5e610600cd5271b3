"""/v1/batches: files of requests, answered while nobody waits."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Scope

from octavo.services.batch.lines import Line
from octavo.services.batch.results import Answer
from octavo.services.batch.runner import final
from octavo.services.common.api_keys import Caller
from octavo.services.common.request_memory import RequestMemory
from octavo.services.gateway.authentication import Authenticator, caller
from octavo.services.gateway.batches.jobs import BatchJobs, JobLimits
from octavo.services.gateway.batches.objects import StoredBatch, StoreLimits
from octavo.services.gateway.batches.store import BatchStore
from octavo.services.gateway.config import REFUSE, GatewayConfig
from octavo.services.gateway.http.endpoint import Endpoint, Handler, HttpRequest
from octavo.services.gateway.http.files import FileEndpoints, check_expiry, page
from octavo.services.gateway.http.params import Params


class InProcessSender:
    """A Sender. The requests are made in the name of `tenant`.

    endpoints  by path: what answers, without asking for a credential
    name       the batch, as it begins its requests' ids
    """

    def __init__(self, endpoints: Mapping[str, ASGIApp], authenticator: Authenticator, tenant: str, name: str) -> None:
        self._endpoints = endpoints
        self._authenticator = authenticator
        self._tenant = tenant
        self._name = name

    async def __call__(self, line: Line) -> Answer:
        """See Sender."""
        self._authenticator.enter(Caller(self._tenant))  # it stays in this request's task
        request_id = f"{self._name}-{line.index}"
        exchange = _Exchange(line.url, line.body, request_id)
        await self._endpoints[line.url](exchange.scope, exchange.receive, exchange.send)
        answer = Answer(exchange.status, request_id, json.loads(exchange.body))
        return final(answer, exchange.headers.get("retry-after", ""))


class _Exchange:
    """One request and its response, as ASGI messages."""

    def __init__(self, path: str, body: Mapping[str, Any], request_id: str) -> None:
        headers = ((b"content-type", b"application/json"), (b"x-request-id", request_id.encode()))
        self.scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "query_string": b"",
            "headers": headers,
        }
        self._request = json.dumps(body).encode()
        self._is_sent = False
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""

    async def receive(self) -> Message:
        if self._is_sent:
            await asyncio.Event().wait()  # its client never goes away
        self._is_sent = True
        return {"type": "http.request", "body": self._request, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message.get("body", b"")


_WINDOW = re.compile(r"([1-9]\d{0,3})h")
_DEFAULT_PAGE = 20
_MAX_METADATA = 16
_MAX_KEY = 64
_MAX_VALUE = 512
_TIMES = (
    "in_progress_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)


class BatchService:
    """Files, batches, and what runs them."""

    def __init__(
        self,
        config: GatewayConfig,
        folder: Path,
        handlers: Mapping[str, Handler],
        authenticator: Authenticator,
        memory: RequestMemory,
    ) -> None:
        """Make the folder. `handlers`: by path, what a batch may ask for. Raises OSError."""
        limits = StoreLimits(
            config.batch_max_file_bytes, config.batch_max_tenant_bytes, retention_s=int(config.batch_retention_s)
        )
        store = self._store = BatchStore(folder, limits)
        endpoints = {
            path: Endpoint(
                handler, config.http_max_body_bytes, None, memory, refuses_unknown=config.unknown_fields == REFUSE
            )
            for path, handler in handlers.items()
        }

        def make_sender(batch: StoredBatch) -> InProcessSender:
            return InProcessSender(endpoints, authenticator, batch.tenant, batch.id)

        self._jobs = BatchJobs(
            store, make_sender, JobLimits(config.batch_jobs, config.batch_window, config.batch_max_requests)
        )
        files, batches = FileEndpoints(store), BatchEndpoints(store, self._jobs, tuple(endpoints))
        self.routes: Sequence[tuple[str, str, Handler]] = (
            ("POST", "/v1/files", files.create),
            ("GET", "/v1/files", files.list),
            ("GET", "/v1/files/{file_id}", files.get),
            ("GET", "/v1/files/{file_id}/content", files.content),
            ("DELETE", "/v1/files/{file_id}", files.delete),
            ("POST", "/v1/batches", batches.create),
            ("GET", "/v1/batches", batches.list),
            ("GET", "/v1/batches/{batch_id}", batches.get),
            ("POST", "/v1/batches/{batch_id}/cancel", batches.cancel),
        )
        """Method, path and handler of each endpoint."""

    def start(self) -> None:
        """Run batches from now on."""
        self._jobs.start()

    async def stop(self) -> None:
        """Leave running batches to another gateway, or to the next start."""
        await self._jobs.stop()
        await asyncio.to_thread(self._store.close)


class BatchEndpoints:
    """The batches of the tenant who calls."""

    def __init__(self, store: BatchStore, jobs: BatchJobs, endpoints: Sequence[str]) -> None:
        self._store = store
        self._jobs = jobs
        self._endpoints = endpoints

    async def create(self, request: HttpRequest) -> Response:
        """Begin a batch."""
        params = Params(await request.json(), ignored=request.ignored)
        file_id = params.text("input_file_id") or ""
        endpoint = params.text("endpoint") or ""
        if endpoint not in self._endpoints:
            raise params.wrong("endpoint", f"must be one of {', '.join(self._endpoints)}")
        window = _WINDOW.fullmatch(params.text("completion_window") or "24h")
        if window is None:
            raise params.wrong("completion_window", "must be a number of hours, such as 24h")
        metadata = _metadata(params)
        expiry = params.object("output_expires_after")
        params.finish()
        output_expires_after_s = None
        if expiry is not None:
            output_expires_after_s = check_expiry("output_expires_after", expiry.get("anchor"), expiry.get("seconds"))
        batch = await asyncio.to_thread(
            self._store.add_batch,
            caller().tenant,
            endpoint,
            file_id,
            int(window[1]) * 3600,
            metadata,
            output_expires_after_s,
        )
        self._jobs.wake()
        return JSONResponse(describe(batch))

    async def list(self, request: HttpRequest) -> Response:
        """List batches, newest first."""
        tenant = caller().tenant

        async def fetch(limit: int, after: str | None) -> list[StoredBatch]:
            return await asyncio.to_thread(self._store.batches, tenant, limit, after)

        return JSONResponse(await page(request, fetch, describe, _DEFAULT_PAGE))

    async def get(self, request: HttpRequest) -> Response:
        """Describe a batch."""
        return JSONResponse(describe(await self._find(request)))

    async def cancel(self, request: HttpRequest) -> Response:
        """End a batch; what was answered is kept. Whoever runs it does that within a second."""
        batch = await self._find(request)
        if batch.running:
            await asyncio.to_thread(self._store.ask_to_cancel, batch)
            batch.status = "cancelling"
        return JSONResponse(describe(batch))

    async def _find(self, request: HttpRequest) -> StoredBatch:
        return await asyncio.to_thread(self._store.batch, caller().tenant, request.path_params["batch_id"])


def describe(batch: StoredBatch) -> dict[str, Any]:
    """Return OpenAI's Batch object."""
    errors = [{"param": None, **error} for error in batch.errors]
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "errors": {"object": "list", "data": errors} if errors else None,
        "created_at": batch.created_at,
        "expires_at": batch.expires_at,
        **{name: getattr(batch, name) for name in _TIMES},
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "metadata": batch.metadata,
    }


def _metadata(params: Params) -> dict[str, str] | None:
    given = params.object("metadata")
    if given is None:
        return None
    for key, value in given.items():
        if not isinstance(value, str) or len(key) > _MAX_KEY or len(value) > _MAX_VALUE:
            raise params.wrong(f"metadata[{key[:_MAX_KEY]}]", f"must be a string of at most {_MAX_VALUE} characters")
    if len(given) > _MAX_METADATA:
        raise params.wrong("metadata", f"must have at most {_MAX_METADATA} entries")
    return dict(given)
