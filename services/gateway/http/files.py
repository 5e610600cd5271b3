"""/v1/files: what batches read and write."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

from starlette.datastructures import FormData, UploadFile
from starlette.responses import FileResponse, JSONResponse, Response

from octavo.services.common.errors import Reason, ServingError, invalid_field
from octavo.services.gateway.authentication import caller
from octavo.services.gateway.batches.file_store import FileWriter
from octavo.services.gateway.batches.objects import StoredBatch, StoredFile
from octavo.services.gateway.batches.store import BatchStore
from octavo.services.gateway.http.endpoint import HttpRequest
from octavo.services.gateway.http.errors import HttpError

T = TypeVar("T", StoredFile, StoredBatch)

_FORM_BYTES = 1 << 20  # of a form, what is not the file
_MAX_NAME = 256
_MAX_PAGE = 10_000
_EXPIRY_S = (3600, 30 * 24 * 3600)  # what OpenAI takes
_RETRY_UPLOAD_MS = 5000


class FileEndpoints:
    """The files of the tenant who calls."""

    def __init__(self, store: BatchStore) -> None:
        self._files = store.files
        self._limits = store.limits
        self._uploads: Counter[str] = Counter()  # on their way, by tenant

    async def create(self, request: HttpRequest) -> Response:
        """Keep a file. Its bytes are counted before they come, and written to their place."""
        tenant = caller().tenant
        size = min(max(request.announced_bytes - _FORM_BYTES, 0), self._limits.max_file_bytes)
        try:
            with self._one_more_upload(tenant):
                writer = await asyncio.to_thread(self._files.begin, tenant, size)
                try:
                    kept = await self._receive(request, writer)
                finally:
                    await asyncio.to_thread(writer.end)
        except OSError as error:
            await request.discard()
            raise HttpError(507, f"the file cannot be kept: {error.strerror}", "storage_failed") from None
        except ServingError:
            await request.discard()
            raise
        return JSONResponse(describe(kept))

    async def _receive(self, request: HttpRequest, writer: FileWriter) -> StoredFile:
        form = await request.form(self._limits.max_file_bytes + _FORM_BYTES, writer)
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise invalid_field("file", "is missing: send it as a part of the form that has a file name")
        if purpose != "batch":
            raise invalid_field("purpose", "must be batch: other files have no use here")
        name = (file.filename or "upload")[:_MAX_NAME]
        return await asyncio.to_thread(writer.keep, name, "batch", _expiry(form))

    @contextlib.contextmanager
    def _one_more_upload(self, tenant: str) -> Iterator[None]:
        if self._uploads[tenant] >= self._limits.max_uploads:
            message = f"{self._uploads[tenant]} files are being uploaded: wait for one of them"
            raise ServingError(Reason.QUOTA_EXCEEDED, message, quota_subject="tenant", retry_after_ms=_RETRY_UPLOAD_MS)
        self._uploads[tenant] += 1
        try:
            yield
        finally:
            self._uploads[tenant] -= 1
            if not self._uploads[tenant]:
                del self._uploads[tenant]

    async def list(self, request: HttpRequest) -> Response:
        """List files, newest first."""
        tenant, purpose = caller().tenant, request.query.get("purpose")

        async def fetch(limit: int, after: str | None) -> Sequence[StoredFile]:
            return await asyncio.to_thread(self._files.list, tenant, limit, after, purpose)

        return JSONResponse(await page(request, fetch, describe))

    async def get(self, request: HttpRequest) -> Response:
        """Describe a file."""
        return JSONResponse(describe(await self._find(request)))

    async def content(self, request: HttpRequest) -> Response:
        """Return a file's bytes."""
        file = await self._find(request)
        return FileResponse(self._files.data_path(file.id), media_type="application/octet-stream")

    async def delete(self, request: HttpRequest) -> Response:
        """Delete a file."""
        file_id = request.path_params["file_id"]
        await asyncio.to_thread(self._files.delete, caller().tenant, file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    async def _find(self, request: HttpRequest) -> StoredFile:
        return await asyncio.to_thread(self._files.get, caller().tenant, request.path_params["file_id"])


def check_expiry(name: str, anchor: object, seconds: object) -> int:
    """Return after how many seconds something is to expire. Raises INVALID_FIELD."""
    least, most = _EXPIRY_S
    if anchor != "created_at":
        raise invalid_field(f"{name}.anchor", "must be created_at")
    if isinstance(seconds, bool) or not isinstance(seconds, int) or not least <= seconds <= most:
        raise invalid_field(f"{name}.seconds", f"must be a number from {least} to {most}")
    return seconds


def _expiry(form: FormData) -> int | None:
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    is_number = isinstance(seconds, str) and seconds.isascii() and seconds.isdecimal() and len(seconds) < 10
    return check_expiry("expires_after", anchor, int(seconds) if is_number and isinstance(seconds, str) else None)


def describe(file: StoredFile) -> dict[str, Any]:
    """Return OpenAI's File object."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }


async def page(
    request: HttpRequest,
    fetch: Callable[[int, str | None], Awaitable[Sequence[T]]],
    shape: Callable[[T], dict[str, Any]],
    default_limit: int = _MAX_PAGE,
) -> dict[str, Any]:
    """Return OpenAI's list object of the items after the one that `after` names, at most `limit` of them.

    fetch  returns at most so many items, those after an id
    """
    text = request.query.get("limit", str(default_limit))
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= _MAX_PAGE):
        raise invalid_field("limit", f"must be a number from 1 to {_MAX_PAGE}")
    limit = int(text)
    items = await fetch(limit + 1, request.query.get("after"))
    found = items[:limit]
    return {
        "object": "list",
        "data": [shape(item) for item in found],
        "first_id": found[0].id if found else None,
        "last_id": found[-1].id if found else None,
        "has_more": len(items) > limit,
    }
