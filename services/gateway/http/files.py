"""/v1/files: what batches read and write."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from starlette.datastructures import UploadFile
from starlette.responses import FileResponse, JSONResponse, Response

from octavo.services.common.errors import invalid_field
from octavo.services.gateway.authentication import caller
from octavo.services.gateway.batches.store import BatchStore, StoredBatch, StoredFile
from octavo.services.gateway.http.endpoint import HttpRequest
from octavo.services.gateway.http.errors import HttpError

T = TypeVar("T", StoredFile, StoredBatch)

_FORM_BYTES = 1 << 20  # of a form, what is not the file
_MAX_NAME = 256
_MAX_PAGE = 10_000


class FileEndpoints:
    """The files of the tenant who calls."""

    def __init__(self, store: BatchStore) -> None:
        self._store = store

    async def create(self, request: HttpRequest) -> Response:
        """Keep a file."""
        form = await request.form(self._store.limits.max_file_bytes + _FORM_BYTES)
        try:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise invalid_field("file", "is missing: send it as a part of the form that has a file name")
            if purpose != "batch":
                raise invalid_field("purpose", "must be batch: other files have no use here")
            kept = await asyncio.to_thread(self._keep, caller().tenant, file)
        finally:
            await form.close()
        return JSONResponse(describe(kept))

    async def list(self, request: HttpRequest) -> Response:
        """List files, newest first."""
        purpose = request.query.get("purpose")
        files = await asyncio.to_thread(self._store.files, caller().tenant)
        return JSONResponse(page(request, [file for file in files if purpose in (None, file.purpose)], describe))

    async def get(self, request: HttpRequest) -> Response:
        """Describe a file."""
        return JSONResponse(describe(await self._find(request)))

    async def content(self, request: HttpRequest) -> Response:
        """Return a file's bytes."""
        file = await self._find(request)
        return FileResponse(self._store.data_path(file.id), media_type="application/octet-stream")

    async def delete(self, request: HttpRequest) -> Response:
        """Delete a file."""
        file_id = request.path_params["file_id"]
        await asyncio.to_thread(self._store.delete_file, caller().tenant, file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    async def _find(self, request: HttpRequest) -> StoredFile:
        return await asyncio.to_thread(self._store.file, caller().tenant, request.path_params["file_id"])

    def _keep(self, tenant: str, upload: UploadFile) -> StoredFile:
        path = self._store.temporary_path()
        try:
            with path.open("xb") as copy:
                shutil.copyfileobj(upload.file, copy, 1 << 20)
            return self._store.add_file(tenant, (upload.filename or "upload")[:_MAX_NAME], "batch", path)
        except OSError as error:
            raise HttpError(507, f"the file cannot be kept: {error.strerror}", "storage_failed") from None
        finally:
            path.unlink(missing_ok=True)


def describe(file: StoredFile) -> dict[str, Any]:
    """Return OpenAI's File object."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }


def page(
    request: HttpRequest, items: Sequence[T], shape: Callable[[T], dict[str, Any]], default_limit: int = _MAX_PAGE
) -> dict[str, Any]:
    """Return OpenAI's list object of the items after the one that `after` names, at most `limit` of them."""
    text = request.query.get("limit", str(default_limit))
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= _MAX_PAGE):
        raise invalid_field("limit", f"must be a number from 1 to {_MAX_PAGE}")
    limit = int(text)
    after = request.query.get("after")
    start = 0
    if after is not None:
        start = next((place + 1 for place, item in enumerate(items) if item.id == after), len(items))
    found = items[start : start + limit]
    return {
        "object": "list",
        "data": [shape(item) for item in found],
        "first_id": found[0].id if found else None,
        "last_id": found[-1].id if found else None,
        "has_more": start + limit < len(items),
    }
