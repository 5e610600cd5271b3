"""Background tasks of which none may end by itself: if one does, that is a bug, and somebody has to know."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class WatchedTasks:
    """Keeps tasks alive until `close`, and remembers the first one that ended by itself."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._crashed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something that never returns."""
        self.watch(asyncio.create_task(work))

    def watch(self, task: asyncio.Task[None]) -> None:
        """Take a task that never returns."""
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something that does return."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def wait_crashed(self) -> None:
        """Raise what ended one of the tasks, once one ended by itself."""
        await asyncio.shield(self._crashed)

    async def close(self) -> None:
        """Cancel all."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and not self._crashed.done():
            error = task.exception()
            assert error is not None, "a task returned that never may"
            self._crashed.set_exception(error)
