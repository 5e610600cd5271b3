"""Workers hang, or die of one request: what they computed goes on, and only that request fails."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo.services.client import OctavoError

from .stack import Stack, answer, references, until_idle
from .test_faults import run_all, until_running

POISON = 9_999  # a token of no reference prompt
# What a test puts before the worker's code: Python imports a module of this name at start. The product has no hook.
SITECUSTOMIZE = f"""
import builtins, os
from array import array
imported = builtins.__import__
def watching(name, *arguments, **options):
    module = imported(name, *arguments, **options)
    if name == "octavo.gpu_worker.worker" and builtins.__import__ is watching:
        builtins.__import__ = imported
        from octavo.gpu_worker.worker import Worker
        compute = Worker._compute
        def deadly(self, plan):
            if {POISON} in array("I", plan.token_ids):
                os.abort()
            compute(self, plan)
        Worker._compute = deadly
    return module
builtins.__import__ = watching
"""


@pytest.mark.timeout(180)
async def test_a_hung_worker_is_replaced_and_costs_no_token(stack: Stack) -> None:
    async with stack.client() as client:
        undisturbed = await run_all(client)
        disturbed = asyncio.create_task(run_all(client))
        await until_running(client, 6)
        (pid,) = stack.children("worker")
        stopped_at = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        while (await client.load())[0].workers_ready:
            pass
        print(f"a hung worker was given up after {time.monotonic() - stopped_at:.2f} s")
        after = await disturbed
        assert [each.ids for each in after] == [each.ids for each in undisturbed]
        assert stack.children("worker") not in ([], [pid])
        assert any("worker-0 hangs: killing it" in line for line in stack.lines)
        await until_idle(client)


@pytest.fixture
def poisoned(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    """A deployment whose worker aborts when it would compute one token id."""
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    stack = Stack(smollm2, "--device", "cpu", "--kv-cache-memory", "512MiB")
    yield stack
    assert stack.stop() == 0


@pytest.mark.timeout(240)
async def test_a_request_that_kills_workers_is_quarantined_and_the_others_finish(poisoned: Stack) -> None:
    async with poisoned.client() as client:
        prompts = [reference.prompt_ids for reference in references()[:4]]
        options: dict[str, Any] = {"max_new_tokens": 200, "temperature": 0, "ignore_end_of_sequence": True}
        innocent = [asyncio.create_task(answer(client, token_ids=prompt, **options)) for prompt in prompts]
        await until_running(client, 4)
        for _ in range(2):  # the second time it is refused at once
            with pytest.raises(OctavoError) as caught:
                await answer(client, token_ids=[*prompts[0], POISON], **options)
            assert (caught.value.code.name, caught.value.reason) == ("INTERNAL", "QUARANTINED")
        for task in innocent:
            assert len((await task).ids) == 200
        await until_idle(client)
