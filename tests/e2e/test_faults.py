"""Processes die under load: streams pause and go on, and nothing is lost, repeated or leaked."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest

from octavo.services.client import Client, OctavoError, Stream

from .stack import Answer, Stack, answer, open_stream, read, references, until_idle

SAMPLED: dict[str, Any] = {"temperature": 0.8, "repetition_penalty": 1.1, "ignore_end_of_sequence": True}
FILENAME = 6  # a token that no story has


def open_all(client: Client) -> list[Stream]:
    return [
        open_stream(client, token_ids=reference.prompt_ids, max_new_tokens=48, seed=n, **SAMPLED)
        for n, reference in enumerate(references()[:12])
    ]


async def run_all(client: Client) -> list[Answer]:
    return await asyncio.gather(*map(read, open_all(client)))


async def until_admitted(client: Client, streams: list[Stream]) -> None:
    """Wait until the client itself has been told so: what it was not told is for its caller to send again."""
    while not all(stream.started for stream in streams):
        await client.load()


async def until_running(client: Client, count: int) -> None:
    while True:
        (load,) = await client.load()
        if load.running >= count:
            return


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["worker", "scheduler", "gateway"])
async def test_a_killed_process_costs_no_token(stack: Stack, name: str) -> None:
    async with stack.client() as client:
        undisturbed = await run_all(client)
        streams = open_all(client)
        disturbed = asyncio.gather(*map(read, streams))
        await until_admitted(client, streams)
        (pid,) = stack.children(name)
        os.kill(pid, signal.SIGKILL)
        after = await disturbed
        assert [each.ids for each in after] == [each.ids for each in undisturbed]
        assert [each.text for each in after] == [each.text for each in undisturbed]
        assert stack.children(name) != [pid]
        await until_idle(client)


@pytest.mark.timeout(120)
async def test_a_killed_gateway_breaks_its_streams_with_a_retryable_code_and_comes_back(stack: Stack) -> None:
    async with Client(stack.address, resume_for_s=0) as client:
        running = asyncio.create_task(answer(client, "Once upon a time", max_new_tokens=2000, **SAMPLED))
        await until_running(client, 1)
        (pid,) = stack.children("gateway")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(OctavoError) as caught:
            await running
        assert caught.value.code.name == "UNAVAILABLE"
    stack.wait_for_restart("gateway", pid)
    async with stack.client() as client:
        assert len((await answer(client, "Hello", max_new_tokens=4, temperature=0)).ids) == 4
        await until_idle(client)


async def test_a_cancelled_stream_frees_its_blocks(stack: Stack) -> None:
    async with stack.client() as client:
        stream = client.stream("Once upon a time", max_new_tokens=4000, **SAMPLED)
        async for _ in stream:
            stream.cancel()
        await until_idle(client)


async def test_cancel_generation_ends_a_stream_with_what_there_is(stack: Stack) -> None:
    async with stack.client() as client:
        stream = client.stream("Once upon a time", max_new_tokens=4000, **SAMPLED)
        tokens = 0
        cancelled = None
        async for delta in stream:
            tokens += delta.token_count
            if cancelled is None:
                cancelled = await client.cancel(stream.request_id)
        assert cancelled is not None
        assert cancelled.was_running
        assert stream.completed is not None
        assert stream.completed.usage.output_tokens == tokens
        assert not (await client.cancel(stream.request_id)).was_running
        await until_idle(client)


async def test_a_deadline_stops_the_work_and_a_soft_limit_keeps_it(stack: Stack) -> None:
    async with stack.client() as client:
        stop = {"stop_token_ids": [FILENAME], "seed": 0}  # it might end in time, so it is let try
        with pytest.raises(OctavoError) as caught:
            await answer(client, "Once upon a time", max_new_tokens=6000, timeout_s=0.4, **stop, **SAMPLED)
        assert caught.value.code.name == "DEADLINE_EXCEEDED"
        await until_idle(client)
        kept = await answer(client, "Once upon a time", max_new_tokens=6000, soft_time_limit_ms=300, **SAMPLED)
        assert kept.ids
        assert kept.stream.finished[0].finish_reason == 6  # FINISH_REASON_TIME_LIMIT
        await until_idle(client)
