"""`octavo serve --tensor-parallel 2`: the tokens of one process, and a rank that dies or hangs costs none."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from octavo.services.client import Client

from .stack import Stack, until_idle

FLAGS = ("--device", "reference", "--kv-cache-memory", "8MiB", "--max-num-seqs", "8", "--max-num-batched-tokens", "128")
SAMPLED: dict[str, Any] = {"temperature": 0.8, "ignore_end_of_sequence": True, "max_new_tokens": 60}


@pytest.fixture(scope="module", autouse=True)
def _patience() -> Iterator[None]:
    """The processes take it from the environment: what hangs is given up after two seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCTAVO_RANK_TIMEOUT_S", "2s")
        yield


async def run_all(client: Client, on_first_token: Callable[[], None] = lambda: None) -> list[list[int]]:
    """Return the token ids of a few streams at once; call `on_first_token` when the first has its first token."""

    async def stream(seed: int) -> list[int]:
        token_ids: list[int] = []
        prompt = [10 + 7 * seed, *range(20, 20 + 9 * seed), 50]
        async for delta in client.stream(token_ids=prompt, seed=seed, return_token_ids=True, **SAMPLED):
            if seed == 0 and not token_ids:
                on_first_token()
            token_ids += delta.token_ids
        return token_ids

    return await asyncio.gather(*map(stream, range(3)))


def rank_1(stack: Stack) -> int:
    (found,) = [pid for pid in stack.children("worker") if "--rank=1" in psutil.Process(pid).cmdline()]
    return found


@pytest.mark.timeout(240)
async def test_two_ranks_give_the_tokens_of_one_process_whatever_happens_to_them(tiny_llama: Path) -> None:
    alone = Stack(tiny_llama, *FLAGS)
    async with alone.client() as client:
        expected = await run_all(client)
    assert alone.stop() == 0

    stack = Stack(tiny_llama, *FLAGS, "--tensor-parallel", "2")
    try:
        async with stack.client() as client:
            assert await run_all(client) == expected
            for blow in (signal.SIGKILL, signal.SIGSTOP):
                before = stack.children("worker")
                assert await run_all(client, lambda blow=blow: os.kill(rank_1(stack), blow)) == expected
                after = stack.children("worker")
                assert len(after) == 2
                assert not set(after) & set(before), "all ranks start anew"
                await until_idle(client)
        left = psutil.Process(stack.process.pid).children(recursive=True)
    finally:
        status = stack.stop()
    assert status == 0
    assert not [process for process in left if process.is_running()]
