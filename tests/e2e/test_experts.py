"""A mixture of experts is served like any other model, and a request's tokens are its own."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.services.client import Client

from ..gpu_worker.tiny import make_checkpoint, write_tokenizer  # noqa: TID252 - tests are no package with a name
from .stack import Stack, answer, until_idle

NUM_TOKENS = 32
PROMPTS = [torch.randint(0, 258, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 40, 150)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A tiny Qwen3-MoE with a tokenizer of bytes, and the greedy tokens that transformers gives PROMPTS."""
    folder: Path = tmp_path_factory.mktemp("qwen3-moe")
    model = make_checkpoint(folder, "qwen3_moe", tie_word_embeddings=False)
    write_tokenizer(folder)
    expected = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(NUM_TOKENS):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    return folder, expected


async def tokens(client: Client, prompt: list[int], **options: Any) -> list[int]:
    return (
        await answer(client, token_ids=prompt, max_new_tokens=NUM_TOKENS, ignore_end_of_sequence=True, **options)
    ).ids


async def test_greedy_tokens_are_those_of_transformers(checkpoint: tuple[Path, list[list[int]]]) -> None:
    folder, expected = checkpoint
    stack = Stack(folder, "--device", "reference", "--kv-cache-memory", "64MiB")
    try:
        async with stack.client() as client:
            together = await asyncio.gather(*(tokens(client, prompt, temperature=0) for prompt in PROMPTS))
            assert together == expected
    finally:
        assert stack.stop() == 0


async def test_tokens_on_the_cpu_do_not_depend_on_company_or_chunks(checkpoint: tuple[Path, list[list[int]]]) -> None:
    limits = "--kv-cache-memory 64MiB --max-num-seqs 16 --max-num-batched-tokens 40 --max-prefill-tokens 24"
    stack = Stack(checkpoint[0], "--device", "cpu", *limits.split())
    try:
        async with stack.client() as client:
            alone = [await tokens(client, prompt, temperature=0.9, seed=5) for prompt in PROMPTS]
            others = [tokens(client, [n, 7, n + 1], temperature=0.7, seed=n) for n in range(12)]
            together = await asyncio.gather(
                *(tokens(client, prompt, temperature=0.9, seed=5) for prompt in PROMPTS), *others
            )
            assert together[: len(PROMPTS)] == alone
            await until_idle(client)
    finally:
        assert stack.stop() == 0
