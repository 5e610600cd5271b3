"""Keeps the index of a scheduler's prefix cache current, by its WatchCache stream."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
from grpc import aio

from octavo.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from octavo.services.gateway.schedulers.prefix_index import LostEventsError, PrefixIndex

_log = logging.getLogger(__name__)
_EOF: Any = aio.EOF  # type: ignore[attr-defined]  # the stubs do not know it
_RETRY_S = 1.0


async def watch_cache(stub: scheduler_pb2_grpc.SchedulerServiceStub, index: PrefixIndex) -> None:
    """Follow the cache for as long as the task runs; returns only if the scheduler does not tell.

    Without the index requests are routed by load alone, so no failure of this stream is one of the hop's.
    """
    index.clear()
    while True:
        await index.settle()
        after = scheduler_pb2.WatchCacheRequest(after_event_id=index.last_event_id, epoch=index.epoch)
        call = stub.WatchCache(after)
        try:
            while (event := await call.read()) is not _EOF:
                if event.cleared:
                    index.clear()
                    await index.settle()
                index.apply(event)
                await index.settle()
        except LostEventsError as error:
            _log.info("the prefix cache is asked for again: %s", error)
            index.clear()
        except aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return
        finally:
            call.cancel()
        await asyncio.sleep(_RETRY_S)
