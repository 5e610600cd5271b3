"""Who may call octavo.admin.v1 of a process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from octavo.services.common.api_keys import find_key, parse_keys
from octavo.services.common.errors import Reason, ServingError
from octavo.services.common.files import WatchedFile


class AdminKeys:
    """Lets those call who have an admin's API key; the file is followed."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises ValueError."""
        self._keys = WatchedFile(path, parse_keys)

    def authorize(self, method: str, context: Any) -> str:
        """Return the tenant of a call's key. Raises UNAUTHENTICATED, PERMISSION_DENIED."""
        del method
        headers = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        scheme, _, key = headers.get("authorization", "").partition(" ")
        who = find_key(self._keys.get(), key.strip()) if scheme.lower() == "bearer" else None
        if who is None:
            message = "this server needs a valid credential: send the header `authorization: Bearer KEY`"
            raise ServingError(Reason.UNAUTHENTICATED, message)
        if not who.is_admin:
            raise ServingError(Reason.PERMISSION_DENIED, "this needs a key made with `octavo keys add --admin`")
        return who.tenant
