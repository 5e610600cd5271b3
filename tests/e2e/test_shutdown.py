"""A deployment is told to stop, in whatever way: running streams end as if nothing had happened."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from octavo.services.client import Client

from .stack import STOP_TIMEOUT_S, Stack, answer, references
from .test_faults import SAMPLED, until_running

NUM_STREAMS = 6
NUM_TOKENS = 64


def everyone(stack: Stack) -> list[int]:
    """The process ids of a deployment, the supervisor's last."""
    supervisor = psutil.Process(stack.process.pid)
    return [*(child.pid for child in supervisor.children(recursive=True)), supervisor.pid]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("order", [1, -1], ids=["the supervisor last", "the supervisor first"])
async def test_streams_end_well_when_all_processes_are_told_to_stop_at_once(smollm2: Path, order: int) -> None:
    stack = Stack(smollm2, "--device", "cpu", "--kv-cache-memory", "256MiB", "--grace-s", "60")
    try:
        async with Client(stack.address, resume_for_s=0) as client:  # a stream that breaks stays broken
            streams = asyncio.gather(
                *(
                    answer(client, token_ids=each.prompt_ids, max_new_tokens=NUM_TOKENS, seed=7, **SAMPLED)
                    for each in references()[:NUM_STREAMS]
                )
            )
            await until_running(client, NUM_STREAMS)
            for pid in everyone(stack)[::order]:
                os.kill(pid, signal.SIGTERM)
            answers = await streams
        assert [len(each.ids) for each in answers] == [NUM_TOKENS] * NUM_STREAMS
        assert await asyncio.to_thread(stack.process.wait, STOP_TIMEOUT_S) == 0
        assert "did not stop in time" not in "".join(stack.lines)
    finally:
        stack.kill()
