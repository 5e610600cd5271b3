"""POST /v1/completions, through OpenAI's own client."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from octavo.common.v1 import common_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.gateway.http.logprobs import completion_logprobs

MAX_TOKENS = common_pb2.FINISH_REASON_MAX_TOKENS


async def test_an_answer_has_openai_s_shape_and_sixteen_tokens_by_default(
    harness: Any, sdk: openai.AsyncOpenAI
) -> None:
    call = asyncio.ensure_future(sdk.completions.create(model="tiny", prompt="hello"))
    submit = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(submit.handle, harness.ids(" world"), finish=MAX_TOKENS)
    answer = await call

    assert list(submit.prompt_token_ids) == harness.ids("hello")
    assert submit.stop.max_new_tokens == 16
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    assert answer.id.startswith("cmpl-")
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, " world", "length", None)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(harness.ids("hello"))


@pytest.mark.parametrize("stream", [False, True])
async def test_each_prompt_is_a_request_of_its_own(harness: Any, sdk: openai.AsyncOpenAI, stream: bool) -> None:
    create: Any = sdk.completions.create
    prompts = [harness.ids("a"), harness.ids("bb")]
    options = {"stream_options": {"include_usage": True}} if stream else {}
    call = asyncio.ensure_future(create(model="tiny", prompt=prompts, n=2, stream=stream, **options))
    submits = [await harness.scheduler.next_admitted() for _ in prompts]
    assert [list(submit.prompt_token_ids) for submit in submits] == prompts
    for number, submit in reversed(list(enumerate(submits))):
        for candidate in range(2):
            ids = harness.ids(f"{number}{candidate}")
            harness.scheduler.tokens(submit.handle, ids, candidate=candidate, finish=MAX_TOKENS)
    answer = await call

    texts = dict.fromkeys(range(4), "")
    if stream:
        chunks = [chunk async for chunk in answer]
        for chunk in chunks:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        usage = chunks[-1].usage
    else:
        texts |= {choice.index: choice.text for choice in answer.choices}
        usage = answer.usage
    assert texts == {0: "00", 1: "01", 2: "10", 3: "11"}
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 8)
    assert len({submit.request_id for submit in submits}) == 2


async def test_nothing_is_sent_before_all_prompts_are_admitted(harness: Any, sdk: openai.AsyncOpenAI) -> None:
    call = asyncio.ensure_future(sdk.completions.create(model="tiny", prompt=["a", "b"], stream=True))
    first = await harness.scheduler.next_admitted()
    second = await harness.scheduler.next("submit")
    harness.scheduler.tokens(first.handle, harness.ids("x"))
    rejected = scheduler_pb2.Rejected(handle=second.handle, code=8, reason="QUEUE_FULL", message="full")
    harness.scheduler.send(rejected=rejected)

    with pytest.raises(openai.RateLimitError):
        await call
    assert (await harness.scheduler.next("cancel")).handle == first.handle


async def test_a_prompt_can_be_token_ids(harness: Any, sdk: openai.AsyncOpenAI) -> None:
    call = asyncio.ensure_future(sdk.completions.create(model="tiny", prompt=[5, 6, 7]))
    submit = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(submit.handle, [9], finish=MAX_TOKENS)

    await call

    assert list(submit.prompt_token_ids) == [5, 6, 7]


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_have_the_old_shape(harness: Any, sdk: openai.AsyncOpenAI, stream: bool) -> None:
    create: Any = sdk.completions.create
    call = asyncio.ensure_future(create(model="tiny", prompt="x", logprobs=1, stream=stream))
    submit = await harness.scheduler.next_admitted()
    (he,), (other,) = harness.ids("he"), harness.ids("x")
    for token, best in ((he, he), (other, he)):
        step = scheduler_pb2.StepOutputs(handles=[submit.handle], token_counts=[1], token_ids=[token])
        step.logprobs.append(-0.5 if token == best else -2)
        step.ranks.append(1)
        step.candidate_token_ids.append(best)
        step.candidate_logprobs.append(-0.5)
        if token == other:
            step.finished.add(handle=submit.handle, reason=MAX_TOKENS)
        harness.scheduler.send(step_outputs=step)
    answer = await call

    shapes = [chunk.choices[0].logprobs async for chunk in answer] if stream else [answer.choices[0].logprobs]
    joined: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for shape in filter(None, shapes):
        for name, values in joined.items():
            values += getattr(shape, name)
    assert joined == {
        "tokens": ["he", "x"],
        "token_logprobs": [-0.5, -2],
        "top_logprobs": [{"he": -0.5}, {"he": -0.5, "x": -2}],
        "text_offset": [0, 2],
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["héx", [104, 195, 169]])
async def test_an_echo_is_the_prompt_before_the_output(
    harness: Any, sdk: openai.AsyncOpenAI, stream: bool, prompt: Any
) -> None:
    create: Any = sdk.completions.create
    call = asyncio.ensure_future(create(model="tiny", prompt=prompt, echo=True, n=2, stream=stream))
    submit = await harness.scheduler.next_admitted()
    text = harness.tokenizer.decode(submit.prompt_token_ids)
    for index, made in enumerate(("yes", "no")):
        ids = harness.ids(made)
        harness.scheduler.tokens(submit.handle, ids, candidate=index, finish=MAX_TOKENS)
    answer = await call

    texts = ["", ""]
    for chunk in [chunk async for chunk in answer] if stream else [answer]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert submit.prompt_logprobs == 0
    assert texts == [text + "yes", text + "no"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_log_probabilities_of_an_echo_are_those_of_the_prompt_and_the_output(
    harness: Any, sdk: openai.AsyncOpenAI, stream: bool, max_tokens: int
) -> None:
    create: Any = sdk.completions.create
    options = {"prompt": "hexx", "echo": True, "logprobs": 1, "max_tokens": max_tokens, "stream": stream}
    call = asyncio.ensure_future(create(model="tiny", **options))
    submit = await harness.scheduler.next_admitted()
    (he,), (x,) = harness.ids("he"), harness.ids("x")
    assert list(submit.prompt_token_ids) == [he, x, x]
    for position, value in ((1, -1), (1, -1), (2, -2)):  # a scheduler that takes over repeats what was known
        columns: Any = {"chosen": [value], "ranks": [2], "width": 1}
        columns |= {"candidate_token_ids": [he], "candidate_logprobs": [-0.5]}
        row: Any = {"handle": submit.handle, "position": position, "columns": columns}
        harness.scheduler.send(step_outputs=scheduler_pb2.StepOutputs(prompt_logprobs=[row]))
    step = scheduler_pb2.StepOutputs(handles=[submit.handle], token_ids=[he], logprobs=[-0.5], ranks=[1])
    step.candidate_token_ids.append(he)
    step.candidate_logprobs.append(-0.5)
    step.finished.add(handle=submit.handle, reason=MAX_TOKENS)
    harness.scheduler.send(step_outputs=step)
    answer = await call

    choices = [chunk.choices[0] for chunk in [chunk async for chunk in answer]] if stream else [answer.choices[0]]
    joined: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for choice in choices:
        for name, values in joined.items():
            values += getattr(choice.logprobs, name) if choice.logprobs else []
    count = 3 + max_tokens
    assert submit.prompt_logprobs == 1
    assert "".join(choice.text for choice in choices) == "hexxhe"[: 4 + 2 * max_tokens]
    assert choices[-1].finish_reason == "length"
    assert joined == {
        "tokens": ["he", "x", "x", "he"][:count],
        "token_logprobs": [None, -1, -2, -0.5][:count],
        "top_logprobs": [None, {"he": -0.5, "x": -1}, {"he": -0.5, "x": -2}, {"he": -0.5}][:count],
        "text_offset": [0, 2, 3, 4][:count],
    }


async def test_token_ids_come_when_asked_for(harness: Any, http: Any) -> None:
    body = {"model": "tiny", "prompt": [[5], [6, 7]], "return_token_ids": True}
    call = asyncio.ensure_future(http.post("/v1/completions", json=body))
    for token in (8, 9):
        submit = await harness.scheduler.next_admitted()
        harness.scheduler.tokens(submit.handle, [token], finish=MAX_TOKENS)
    choices = (await call).json()["choices"]

    assert [(c["prompt_token_ids"], c["token_ids"]) for c in choices] == [([5], [8]), ([6, 7], [9])]


@pytest.mark.parametrize("usage", [False, True])
async def test_the_last_event_of_a_stream_is_done(harness: Any, http: httpx.AsyncClient, usage: bool) -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": "x", "stream": True, "stream_options": {"include_usage": usage}}
    call = asyncio.ensure_future(http.post("/v1/completions", json=body))
    submit = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(submit.handle, harness.ids("ok"), finish=MAX_TOKENS)
    events = (await call).text.split("\n\n")

    assert events[-2:] == ["data: [DONE]", ""]
    assert ('"usage":{' in events[-3]) == usage


def test_text_offsets_count_characters() -> None:
    names = ["日本", "é", "x"]
    texts: Any = SimpleNamespace(get=lambda token_id: (names[token_id], names[token_id].encode()))
    columns = common_pb2.LogprobColumns(chosen=[-1.0] * 3, ranks=[1] * 3)

    first, offset = completion_logprobs(texts, [0, 1, 2], columns, 5)
    second, _ = completion_logprobs(texts, [0, 1, 2], columns, offset)

    assert first["text_offset"] == [5, 7, 8]
    assert second["text_offset"] == [9, 11, 12]
