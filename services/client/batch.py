"""Many requests over one call: results come as they are done, and a broken call loses none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import grpc

from octavo.inference.v1 import generation_pb2
from octavo.services.client.calls import Endpoints
from octavo.services.client.errors import OctavoError, ProtocolError, from_rpc_error, from_status
from octavo.services.client.request import BatchItem, RequestOptions, split_options
from octavo.services.client.stream import Result

MAX_UNANSWERED = 1024
"""Items that are sent and whose results were not given out: what a broken call may have to send again."""

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs do not know it
_LAST: Any = object()


@dataclass(frozen=True)
class BatchResult:
    """What an item came to: exactly one of `result` and `error` is set. `index` counts the items from 0."""

    index: int
    result: Result | None
    error: OctavoError | None


class BatchRun:
    """One run over `items`; `results` yields once for each of them.

    open_call  starts a BatchGenerate call, at whichever of `endpoints` is next
    timeout_s  how long all of it may take, as `open_call` knows
    model      is asked for the model of items that name none
    ordered    results come in the order of the items, not of their ends
    """

    def __init__(
        self,
        items: Iterable[BatchItem] | AsyncIterable[BatchItem],
        endpoints: Endpoints,
        open_call: Callable[[], Any],
        model: Callable[[], Awaitable[str]],
        resume_for_s: float,
        ordered: bool,
        timeout_s: float | None,
    ) -> None:
        self._items = aiter(items) if isinstance(items, AsyncIterable) else _each(items)
        self._endpoints = endpoints
        self._open_call = open_call
        self._model = model
        self._resume_for_s = resume_for_s
        self._ordered = ordered
        self._timeout_s = timeout_s
        self._early: dict[int, BatchResult] = {}
        self._num_given = 0
        self._unanswered: dict[str, generation_pb2.BatchGenerateRequest] = {}
        self._room = asyncio.Semaphore(MAX_UNANSWERED)
        self._num_items = 0
        self._all_read = False
        self._reading: asyncio.Task[generation_pb2.BatchGenerateRequest | None] | None = None

    async def results(self) -> AsyncIterator[BatchResult]:
        """Yield one result for each item. Raises OctavoError once no server can be reached any more."""
        loop = asyncio.get_running_loop()
        attempt = 0
        give_up_at = 0.0
        try:
            while True:
                call = self._open_call()
                feeding = asyncio.create_task(self._feed(call))
                try:
                    while (response := await call.read()) is not _EOF:
                        attempt = 0
                        for result in self._ready(self._take(response)):
                            self._room.release()
                            yield result
                    await feeding
                    if self._unanswered or not self._all_read:
                        raise ProtocolError(f"the call ended with {len(self._unanswered)} items unanswered")
                    return
                except (grpc.aio.AioRpcError, asyncio.CancelledError) as broken:
                    if feeding.done() and not feeding.cancelled() and (failure := feeding.exception()):
                        raise failure from None  # an item was wrong: the call was cancelled for it
                    if not isinstance(broken, grpc.aio.AioRpcError):
                        self._endpoints.check_open()
                        raise
                    error = from_rpc_error(broken, self._timeout_s)
                    if not error.is_broken_call or self._resume_for_s <= 0:
                        raise error from None
                    if attempt == 0:
                        give_up_at = loop.time() + self._resume_for_s
                    await self._endpoints.pause(attempt, error, give_up_at)
                    attempt += 1
                finally:
                    feeding.cancel()
                    call.cancel()
                    await asyncio.gather(feeding, return_exceptions=True)
        finally:
            if self._reading is not None:
                self._reading.cancel()

    async def _feed(self, call: Any) -> None:
        """Write what an earlier call has not answered, then new items as there is room for them."""
        try:
            for unanswered in list(self._unanswered.values()):
                await call.write(unanswered)
            while not self._all_read:
                # It outlives a broken call: a read that is cancelled would lose its item.
                self._reading = self._reading or asyncio.create_task(self._next_request())
                request = await asyncio.shield(self._reading)
                self._reading = None
                if request is not None:
                    self._unanswered[request.item_id] = request
                    await call.write(request)
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the call is over: its reader knows why
        except Exception:
            call.cancel()
            raise

    async def _next_request(self) -> generation_pb2.BatchGenerateRequest | None:
        """Return the next item as a request, once there is room for it; None after the last."""
        await self._room.acquire()
        item = await anext(self._items, _LAST)
        if item is _LAST:
            self._all_read = True
            self._room.release()
            return None
        if not isinstance(item, Mapping):
            raise TypeError(
                f'item {self._num_items} must be a mapping, such as {{"prompt": "Hello"}}, not {item!r:.80}'
            )
        options = dict(item)
        prompt = cast(str | None, options.pop("prompt", None))
        try:
            generation, call_options = split_options(prompt, cast(RequestOptions, options))
            if call_options:
                raise TypeError(f"{', '.join(call_options)} can only be given to the batch as a whole")
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"item {self._num_items}: {error}") from None
        generation.model = generation.model or await self._model()
        request = generation_pb2.BatchGenerateRequest(item_id=str(self._num_items), generation=generation)
        self._num_items += 1
        return request

    def _take(self, response: generation_pb2.BatchGenerateResponse) -> BatchResult:
        if self._unanswered.pop(response.item_id, None) is None:
            raise ProtocolError(f"a result came for item {response.item_id!r}, which is not expected")
        index = int(response.item_id)
        if response.WhichOneof("outcome") == "error_status":
            return BatchResult(index, None, from_status(response.error_status))
        return BatchResult(index, Result(response.response), None)

    def _ready(self, result: BatchResult) -> Iterator[BatchResult]:
        """Yield what can be given out now that `result` is there."""
        if not self._ordered:
            yield result
            return
        self._early[result.index] = result
        while self._num_given in self._early:
            yield self._early.pop(self._num_given)
            self._num_given += 1


async def _each(items: Iterable[BatchItem]) -> AsyncIterator[BatchItem]:
    for item in items:
        yield item
