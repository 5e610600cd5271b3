"""The same request gives the same tokens, whatever else runs: seeded sampling, bit for bit."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from octavo.services.client import Client

from .stack import DEVICE_FLAGS, Stack, answer, references, until_idle

SAMPLED: dict[str, Any] = {
    "temperature": 0.9, "top_p": 0.95, "top_k": 200, "min_p": 0.01, "repetition_penalty": 1.1,
    "frequency_penalty": 0.2, "presence_penalty": 0.1, "seed": 1234, "ignore_end_of_sequence": True,
}  # fmt: skip


def prompts() -> list[list[int]]:
    """Four prompts, of 1, 33, 335 and 957 tokens."""
    return [references()[place].prompt_ids for place in (1, 2, 14, 23)]


async def sampled(client: Client, prompt: list[int], **options: Any) -> list[int]:
    return (await answer(client, token_ids=prompt, max_new_tokens=48, **{**SAMPLED, **options})).ids


async def with_others(client: Client, num_others: int) -> list[list[int]]:
    """The prompts beside each other and `num_others` other requests, which differ in everything."""
    mine = [sampled(client, prompt) for prompt in prompts()]
    others = [
        sampled(client, references()[n % 20].prompt_ids, seed=n, temperature=0.3 + n / 20, top_k=n)
        for n in range(num_others)
    ]
    return (await asyncio.gather(*mine, *others))[: len(mine)]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("device", ["cpu", pytest.param("reference", marks=pytest.mark.slow)])
async def test_seeded_requests_do_not_depend_on_company_chunks_or_preemption(smollm2: Path, device: str) -> None:
    num_others = 31 if device == "cpu" else 7
    stack = Stack(smollm2, *DEVICE_FLAGS[device], "--kv-cache-memory", "512MiB")
    try:
        async with stack.client() as client:
            alone = [await sampled(client, prompt) for prompt in prompts()]
            assert all(len(ids) == 48 for ids in alone)
            assert await with_others(client, num_others) == alone
            await until_idle(client)
    finally:
        assert stack.stop() == 0
    tiny = "--kv-cache-memory 45MiB --max-num-seqs 16 --max-num-batched-tokens 40 --max-prefill-tokens 24"
    stack = Stack(smollm2, *DEVICE_FLAGS[device], *tiny.split())
    try:
        async with stack.client() as client:
            assert await with_others(client, min(num_others, 15)) == alone
    finally:
        assert stack.stop() == 0


async def test_two_seeds_give_two_answers_and_candidates_differ(stack: Stack) -> None:
    async with stack.client() as client:
        prompt = references()[2].prompt_ids
        assert await sampled(client, prompt, seed=1) != await sampled(client, prompt, seed=2)
        result = await client.generate(
            token_ids=prompt, candidate_count=3, return_token_ids=True, max_new_tokens=24, **SAMPLED
        )
        outputs = [list(candidate.token_ids) for candidate in result.response.candidates]
        assert len({tuple(ids) for ids in outputs}) == 3
        again = await sampled(client, prompt)
        assert outputs[0] == again[:24]


@pytest.mark.timeout(600)
async def test_seeded_requests_do_not_depend_on_company_with_quantised_weights(smollm2: Path) -> None:
    stack = Stack(smollm2, "--device", "cpu", "--kv-cache-memory", "512MiB", "--quantization", "int4")
    try:
        async with stack.client() as client:
            alone = [await sampled(client, prompt) for prompt in prompts()]
            assert await with_others(client, 7) == alone
    finally:
        assert stack.stop() == 0
