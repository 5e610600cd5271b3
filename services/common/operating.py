"""What operators may do to any process: another log level, and a look at what it is doing; and who they are."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from octavo.services.common.api_keys import find_key, parse_keys
from octavo.services.common.errors import Reason, ServingError, invalid_field
from octavo.services.common.files import WatchedFile
from octavo.services.common.logging import LEVELS, set_level


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


MAX_STACKS_BYTES = 1 << 20
_MAX_TASKS = 500


def change_log_level(level: str) -> str:
    """Log so much from now on; return the level before. Raises INVALID_FIELD."""
    if level not in LEVELS:
        raise invalid_field("level", f"must be one of {', '.join(LEVELS)}, not {level!r}")
    before = logging.getLevelName(logging.getLogger().level).lower()
    set_level(level)
    return str(before)


def stacks() -> str:
    """Return where each thread is (files, lines, functions, no values), and which tasks the event loop has."""
    with tempfile.TemporaryFile() as file:
        # It reads the interpreter's own notes: frames are not asked for, which has crashed processes with gRPC in them.
        faulthandler.dump_traceback(file)
        file.seek(0)
        threads = file.read(MAX_STACKS_BYTES // 2).decode(errors="replace")
    tasks = Counter(getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks())
    counts = [f"{count:6} {name}" for name, count in tasks.most_common(_MAX_TASKS)]
    return "\n".join([threads, "tasks of the event loop, by what they run:", *counts])
