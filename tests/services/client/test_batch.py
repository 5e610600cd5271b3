"""Client.batch, against a gateway that breaks its calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from octavo.inference.v1 import generation_pb2
from octavo.services.client import BatchItem, Client


def done(request: Any) -> generation_pb2.BatchGenerateResponse:
    response = generation_pb2.BatchGenerateResponse(item_id=request.item_id)
    response.response.candidates.add(text=request.generation.text)
    return response


async def test_an_item_that_is_awaited_when_the_call_breaks_is_not_lost(gateway: Any) -> None:
    """The source is asked once for each item, however often the call breaks meanwhile."""
    more = asyncio.Event()

    async def items() -> AsyncIterator[BatchItem]:
        for number in range(6):
            if number == 3:
                await more.wait()
            yield {"prompt": str(number)}

    async def breaking(requests: Any, context: Any) -> AsyncIterator[Any]:
        count = 0
        async for request in requests:
            yield done(request)
            count += 1
            if gateway.batch_calls == 1 and count == 3:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    async def reconnecting(requests: Any, context: Any) -> AsyncIterator[Any]:
        if gateway.batch_calls == 2:
            more.set()
        async for response in breaking(requests, context):
            yield response

    gateway.batch = reconnecting
    async with Client(gateway.address) as client:
        found = [(result.index, result.result and result.result.text) async for result in client.batch(items())]
    assert sorted(found) == [(number, str(number)) for number in range(6)]
    assert gateway.batch_calls == 2


async def test_an_unanswered_item_is_sent_again(gateway: Any) -> None:
    async def breaking(requests: Any, context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            if gateway.batch_calls == 1 and request.item_id == "2":
                await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            yield done(request)

    gateway.batch = breaking
    batch: list[BatchItem] = [{"prompt": str(number)} for number in range(5)]
    async with Client(gateway.address) as client:
        found = [result.index async for result in client.batch(batch, ordered=True)]
    assert found == [0, 1, 2, 3, 4]
