"""The network between gateway and scheduler is cut, in both directions or in one: streams wait and nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from octavo.services.client import Client, OctavoError
from tests.ports import free_port

from .relay import Relay
from .stack import STOP_TIMEOUT_S, Answer, answer, references, until_idle
from .test_faults import SAMPLED, until_running

NUM_STREAMS = 4
NUM_TOKENS = 96


def start(kind: str, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "octavo.services.cli", kind, *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@asynccontextmanager
async def deployment(model: Path, folder: Path) -> AsyncIterator[tuple[Client, Relay]]:
    """Run a scheduler, a worker, and a gateway whose way to the scheduler is the relay."""
    scheduler_port, address = free_port(), f"127.0.0.1:{free_port()}"
    relay = Relay(scheduler_port)
    processes = [
        start("scheduler", f"--scheduler-address=127.0.0.1:{scheduler_port}", f"--worker-endpoint=ipc://{folder}/w"),
        start(
            "worker", f"--model={model}", f"--worker-endpoint=ipc://{folder}/w", "--device=cpu", "--num-threads=1",
            "--kv-cache-memory=256MiB",
        ),
        start(
            "gateway", str(model), "--model-name=demo", f"--grpc-address={address}", "--http-address=",
            f"--scheduler-addresses=127.0.0.1:{relay.port}", "--failover-s=60",
        ),
    ]  # fmt: skip
    try:
        async with relay.running(), Client(address, resume_for_s=0) as client:
            await until_ready(client)
            yield client, relay
    finally:
        for process in processes:
            process.kill()
            process.wait(STOP_TIMEOUT_S)


async def until_ready(client: Client) -> None:
    while True:
        with contextlib.suppress(OctavoError):  # the gateway starts, or knows no scheduler yet
            if any(load.workers_ready for load in await client.load()):
                return
        await asyncio.sleep(0.05)


async def seeded(client: Client) -> list[Answer]:
    calls = [
        answer(client, token_ids=each.prompt_ids, max_new_tokens=NUM_TOKENS, seed=number, **SAMPLED)
        for number, each in enumerate(references()[:NUM_STREAMS])
    ]
    return await asyncio.gather(*calls)


async def reconnects(relay: Relay, since: int) -> None:
    """Wait until the gateway has given its connection up and tries another one."""
    while relay.num_connections == since:  # noqa: ASYNC110
        await asyncio.sleep(0.05)


@pytest.mark.timeout(300)
async def test_streams_outlive_a_cut_in_both_directions_and_in_either_one(smollm2: Path, tmp_path: Path) -> None:
    async with deployment(smollm2, tmp_path) as (client, relay):
        undisturbed = await seeded(client)
        await until_idle(client)
        for there, back in ((True, True), (False, True), (True, False)):
            disturbed = asyncio.create_task(seeded(client))
            await until_running(client, NUM_STREAMS)
            before = relay.num_connections
            relay.cut(there, back)
            await reconnects(relay, before)
            relay.heal()
            after = await disturbed
            assert [each.ids for each in after] == [each.ids for each in undisturbed], (there, back)
            assert [each.text for each in after] == [each.text for each in undisturbed], (there, back)
            if back:  # else what they waited for came all the same
                assert all(each.stream.completed and each.stream.completed.failovers for each in after)
            await until_ready(client)  # streams may have ended before the gateway was back
            await until_idle(client)
