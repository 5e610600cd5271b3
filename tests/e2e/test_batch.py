"""Many requests over one call, with real processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from octavo.services.client import BatchItem, Client, OctavoError, SyncClient

from .stack import Stack, references, until_idle


def items(count: int) -> list[BatchItem]:
    prompts = [reference.prompt for reference in references()]
    return [
        {"prompt": f"{number}. {prompts[number % len(prompts)][:80]}", "max_new_tokens": 8 + number % 9, "seed": number}
        for number in range(count)
    ]


async def outputs(client: Client, batch: list[BatchItem], **options: Any) -> list[str]:
    found = [result async for result in client.batch(batch, ordered=True, **options)]
    assert [result.index for result in found] == list(range(len(batch)))
    return [result.result.text if result.result else str(result.error) for result in found]


async def test_a_batch_answers_as_single_calls_do(stack: Stack) -> None:
    async with stack.client() as client:
        batch = items(40)
        texts = await outputs(client, batch)
        singly = [(await client.generate(**item)).text for item in batch[:5]]
        assert texts[:5] == singly
        await until_idle(client)


async def test_a_failing_item_ends_no_other(stack: Stack) -> None:
    batch = items(6)
    batch[2] = {"prompt": "too much", "temperature": -1.0}
    batch[4] = {"token_ids": [1] * 9000}
    async with stack.client() as client:
        found = {result.index: result async for result in client.batch(batch)}
    assert sorted(found) == list(range(6))
    assert {index for index, result in found.items() if result.error} == {2, 4}
    wrong = found[2].error
    assert wrong is not None
    assert wrong.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in wrong.violations] == ["generation.sampling.temperature"]
    assert found[4].error is not None
    assert found[4].error.reason == "CONTEXT_LENGTH_EXCEEDED"


async def test_items_are_read_as_there_is_room(stack: Stack) -> None:
    """Of an endless source no more is read than may be unanswered, and leaving ends the work."""
    read = 0

    def endless() -> Iterator[BatchItem]:
        nonlocal read
        while True:
            read += 1
            yield {"prompt": f"Count to {read}", "max_new_tokens": 4}

    async with stack.client() as client:
        results: Any = client.batch(endless())
        for _ in range(20):
            assert (await anext(results)).error is None
        assert read <= 20 + 1024 + 1
        await results.aclose()
        await until_idle(client)


async def test_a_wrong_item_is_named(stack: Stack) -> None:
    async with stack.client() as client:
        with pytest.raises(TypeError, match="item 1: unknown option 'temprature'"):
            [result async for result in client.batch([{"prompt": "a"}, {"prompt": "b", "temprature": 1}])]  # type: ignore[typeddict-unknown-key]


def test_batch_without_asyncio(stack: Stack) -> None:
    with SyncClient(stack.address) as client:
        found = list(client.batch(items(10), ordered=True))
    assert [result.index for result in found] == list(range(10))
    assert all(result.result and result.result.text for result in found)


@pytest.mark.slow
async def test_a_batch_survives_kills(stack: Stack) -> None:
    """A worker, the scheduler, then the gateway die in the middle: every item is answered once, with the same text."""
    async with stack.client() as client:
        batch = items(96)
        undisturbed = await outputs(client, batch)
        texts: dict[int, str] = {}
        victims = ["worker", "scheduler", "gateway"]
        async for result in client.batch(batch):
            assert result.result is not None, result.error
            assert result.index not in texts, "answered twice"
            texts[result.index] = result.result.text
            if len(texts) in (8, 24, 40):
                (pid,) = stack.children(victims.pop(0))
                os.kill(pid, signal.SIGKILL)
        assert [texts[index] for index in range(len(batch))] == undisturbed


async def test_without_a_server(unused_tcp_port: int) -> None:
    async with Client(f"127.0.0.1:{unused_tcp_port}", resume_for_s=0.2) as client:
        with pytest.raises(OctavoError) as failure:
            [result async for result in client.batch([{"prompt": "a", "model": "m"}])]
        assert failure.value.code is grpc.StatusCode.UNAVAILABLE
