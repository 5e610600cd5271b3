"""The OpenAI-compatible listener on a real deployment, through OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from .stack import Stack, answer

MODEL = "smollm2-135m-instruct"
CAPITAL: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def sdk(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.http_url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def test_it_is_named_when_it_is_ready_and_healthy_then(stack: Stack) -> None:
    (line,) = [line for line in stack.lines if line.startswith("ready in ")]

    assert f", http 127.0.0.1:{stack.http_port} " in line
    assert httpx.get(f"{stack.http_url}/health").status_code == 200


async def test_a_chat_is_answered_the_same_way_whole_streamed_and_over_grpc(stack: Stack, sdk: openai.OpenAI) -> None:
    (model,) = [model.id for model in sdk.models.list() if model.id == MODEL]
    whole = sdk.chat.completions.create(model=model, messages=CAPITAL, temperature=0, max_tokens=48)
    stream = sdk.chat.completions.create(
        model=model, messages=CAPITAL, temperature=0, max_tokens=48, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    async with stack.client() as client:
        grpc = await answer(client, messages=CAPITAL, temperature=0, max_new_tokens=48)

    text = whole.choices[0].message.content
    assert text is not None
    assert "Paris" in text
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert grpc.text == text
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == len(grpc.ids)
    assert whole.choices[0].finish_reason in ("stop", "length")


async def test_a_seed_fixes_the_output_however_it_is_asked_for(stack: Stack, sdk: openai.OpenAI) -> None:
    prompt = "Once upon a time"
    options: Any = {"model": MODEL, "prompt": prompt, "temperature": 1, "max_tokens": 24}
    whole = sdk.completions.create(**options, seed=7).choices[0].text
    streamed = "".join(chunk.choices[0].text for chunk in sdk.completions.create(**options, seed=7, stream=True))
    other = sdk.completions.create(**options, seed=8).choices[0].text
    async with stack.client() as client:
        grpc = await answer(client, prompt, temperature=1, seed=7, max_new_tokens=24)

    assert whole == streamed == grpc.text
    assert other != whole


def test_log_probabilities_belong_to_the_text(sdk: openai.OpenAI) -> None:
    call = sdk.chat.completions.create(
        model=MODEL, messages=CAPITAL, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    choice = call.choices[0]

    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert b"".join(bytes(entry.bytes or ()) for entry in choice.logprobs.content).decode() == choice.message.content
    for entry in choice.logprobs.content:
        assert entry.token == entry.top_logprobs[0].token  # greedy
        assert len(entry.top_logprobs) == 3


def test_many_clients_at_once_get_their_own_answers(sdk: openai.OpenAI) -> None:
    prompts = [f"The number {number} is followed by" for number in range(12)]

    def ask(prompt: str) -> str:
        chunks = sdk.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=6, stream=True)
        return "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(ask, prompts))

    assert together == [
        choice.text
        for choice in sdk.completions.create(model=MODEL, prompt=prompts, temperature=0, max_tokens=6).choices
    ]


def test_a_wrong_request_is_refused_and_the_next_one_works(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=-1)
    right = sdk.chat.completions.create(model=MODEL, messages=CAPITAL, temperature=0, max_tokens=1)

    assert caught.value.param == "temperature"
    assert right.choices[0].finish_reason == "length"
