"""An architecture that has no description is served by its own modules like any other model."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
import torch

from octavo.services.client import Client

from ..gpu_worker.tiny import make_fallback, write_tokenizer  # noqa: TID252 - tests are no package with a name
from .stack import Stack, answer, until_idle, until_running

NUM_TOKENS = 24
# More tokens in a step than a tile has; two prompts share blocks, most are beyond the window of 40 in the end.
PROMPTS = [
    torch.randint(2, 258, (3 + 5 * n,), generator=torch.Generator().manual_seed(n % 14)).tolist() for n in range(16)
]


def generated(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    """Return the greedy tokens that transformers gives."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False)
    return list(made[0, len(prompt) :].tolist())


async def tokens(client: Client, prompt: list[int]) -> list[int]:
    options = {"max_new_tokens": NUM_TOKENS, "ignore_end_of_sequence": True, "temperature": 0}
    return (await answer(client, token_ids=prompt, **options)).ids


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["opt", "phi", "starcoder2", "nemotron", "gptj"])
async def test_sixteen_streams_get_the_tokens_of_transformers_and_a_killed_worker_costs_none(
    name: str, tmp_path: Path
) -> None:
    model = make_fallback(tmp_path, name)
    write_tokenizer(tmp_path)
    expected = [generated(model, prompt) for prompt in PROMPTS]
    limits = "--max-running 16 --max-batch-tokens 40 --max-prefill-tokens 24 --kv-cache-memory 64MiB --num-threads 1"
    stack = Stack(tmp_path, *limits.split())
    try:
        async with stack.client() as client:
            assert await asyncio.gather(*(tokens(client, prompt) for prompt in PROMPTS)) == expected
            (described,) = await client.models()
            assert "A native description would be faster" in described.notes[0]
            disturbed = asyncio.gather(*(tokens(client, prompt) for prompt in PROMPTS))
            await until_running(client)
            (pid,) = stack.children("worker")
            os.kill(pid, signal.SIGKILL)
            assert await disturbed == expected
            assert stack.children("worker") not in ([], [pid])
            await until_idle(client)
    finally:
        assert stack.stop() == 0
    assert any("A native description would be faster" in line for line in stack.lines)
