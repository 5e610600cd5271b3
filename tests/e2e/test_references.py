"""Greedy tokens of the real model equal transformers' float32 run, however the work is cut up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .stack import DEVICE_FLAGS, Reference, Stack, answer, greedy, references, until_idle, until_running

DEVICES = ["cpu", pytest.param("reference", marks=pytest.mark.slow)]
TINY_POOL = {"cpu": "45MiB", "reference": "90MiB"}  # 128 blocks each: one long prompt nearly fills it


@contextmanager
def serving(model: Path, device: str, *flags: str) -> Iterator[Stack]:
    stack = Stack(model, *DEVICE_FLAGS[device], *flags)
    try:
        yield stack
    finally:
        assert stack.stop() == 0


def some(device: str) -> list[Reference]:
    """All, or four for the device that computes tiles of 16 rows for one: a long one, and one that ends of itself."""
    return references() if device == "cpu" else references()[3::6]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("device", DEVICES)
async def test_alone_together_and_from_the_prefix_cache(smollm2: Path, device: str) -> None:
    chosen = some(device)
    with serving(smollm2, device, "--kv-cache-memory", "512MiB") as stack:
        async with stack.client() as client:
            alone = [await greedy(client, reference) for reference in chosen]
            for reference, answer in zip(chosen, alone, strict=True):
                reference.check(answer.ids)
            assert sum(answer.cached_tokens for answer in alone) < 100
            together = await asyncio.gather(*[greedy(client, reference) for reference in chosen])
            # Bit for bit: neither the others in the batch nor the cache hits change a token.
            assert [answer.ids for answer in together] == [answer.ids for answer in alone]
            num_prompt_tokens = sum(len(reference.prompt_ids) for reference in chosen)
            assert sum(answer.cached_tokens for answer in together) > 0.7 * num_prompt_tokens
            await until_idle(client)


@pytest.mark.timeout(900)
async def test_prompts_that_begin_alike_beside_each_other(smollm2: Path) -> None:
    longest = max((reference.prompt_ids for reference in references()), key=len)
    prompts = [[*longest[:200], *reference.prompt_ids[:20]] for reference in references()[:8]]
    options = {"max_new_tokens": 16, "temperature": 0, "ignore_end_of_sequence": True}
    with serving(smollm2, "cpu", "--kv-cache-memory", "256MiB", "--max-prefill-tokens", "2048") as stack:
        async with stack.client() as client:
            alone = [await answer(client, token_ids=ids, bypass_prefix_cache=True, **options) for ids in prompts]
            # While the worker computes this the others come. What they begin with is computed once.
            first = asyncio.create_task(answer(client, token_ids=longest[::-1], **options))
            await until_running(client)
            together = await asyncio.gather(*[answer(client, token_ids=ids, **options) for ids in prompts])
            assert [one.ids for one in together] == [one.ids for one in alone]
            assert sorted(one.cached_tokens for one in together)[1:] == [192] * 7
            await first
            await until_idle(client)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("device", DEVICES)
async def test_with_a_pool_so_small_that_sequences_are_preempted(smollm2: Path, device: str) -> None:
    flags = ("--kv-cache-memory", TINY_POOL[device], "--speculative-tokens", "0")
    with serving(smollm2, device, *flags) as stack:
        async with stack.client() as client:
            answers = await asyncio.gather(*[greedy(client, reference) for reference in references()])
            for reference, answer in zip(references(), answers, strict=True):
                reference.check(answer.ids)
            assert sum(answer.preemptions for answer in answers) > 0
            await until_idle(client)


@pytest.mark.timeout(900)
async def test_with_so_small_a_pool_and_guesses(smollm2: Path) -> None:
    length = 192  # a shorter text that is guessed well may end before others need its blocks
    with serving(smollm2, "cpu", "--kv-cache-memory", TINY_POOL["cpu"]) as stack:
        async with stack.client() as client:
            answers = await asyncio.gather(
                *[greedy(client, reference, length, ignore_end_of_sequence=True) for reference in references()]
            )
            for reference, answer in zip(references(), answers, strict=True):
                assert len(answer.ids) == length
                reference.check(answer.ids[: len(reference.ids)])
            assert sum(answer.preemptions for answer in answers) > 0
            await until_idle(client)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("device", "chunk"), [("cpu", 7), ("cpu", 32), ("cpu", 300), pytest.param("reference", 7, marks=pytest.mark.slow)]
)
async def test_with_prompts_computed_in_chunks(smollm2: Path, device: str, chunk: int) -> None:
    flags = ["--max-num-seqs", "7", "--max-num-batched-tokens", str(max(chunk, 7)), "--max-prefill-tokens", str(chunk)]
    with serving(smollm2, device, "--kv-cache-memory", "256MiB", *flags) as stack:
        async with stack.client() as client:
            chosen = some(device)
            answers = await asyncio.gather(*[greedy(client, reference) for reference in chosen])
            for reference, answer in zip(chosen, answers, strict=True):
                reference.check(answer.ids)
