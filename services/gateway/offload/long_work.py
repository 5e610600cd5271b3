"""Runs what would stop the event loop in a few threads. No call of C code in it may hold the GIL for long either."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from octavo.services.common.errors import Reason, ServingError
from octavo.services.gateway.offload.shares import Turns

T = TypeVar("T")
_MAX_WAITING = 4096
_MAX_WAIT_S = 60.0


class LongWork:
    """The threads of a gateway for texts, chat templates and bodies; tenants take turns. `close` ends them."""

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="long-work")
        self._turns = Turns(num_threads, _MAX_WAITING, _MAX_WAIT_S, _busy)

    def close(self) -> None:
        """End the threads; what runs in them is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def run(self, tenant: str, work: Callable[[], T], is_long: bool = True) -> T:
        """Return what `work` returns, which runs in a thread if it `is_long`. Raises QUEUE_FULL."""
        if not is_long:
            return work()
        await self._turns.begin(tenant)
        loop = asyncio.get_running_loop()

        def ended(_: Future[T]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                loop.call_soon_threadsafe(self._turns.end)

        try:
            future = self._pool.submit(work)
        except BaseException:
            self._turns.end()
            raise
        future.add_done_callback(ended)  # not when the caller leaves: the thread is busy until then
        return await asyncio.wrap_future(future)


def _busy() -> ServingError:
    message = "this gateway is busy with long texts; send fewer at a time, or try again later"
    return ServingError(Reason.QUEUE_FULL, message, retry_after_ms=1000)
