"""POST /v1/chat/completions, through OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from octavo.common.v1 import common_pb2
from octavo.scheduler.v1 import scheduler_pb2

END, MAX_TOKENS = common_pb2.FINISH_REASON_END_OF_SEQUENCE, common_pb2.FINISH_REASON_MAX_TOKENS
USER: Any = [{"role": "user", "content": "hi"}]


async def answering(call: Any, harness: Any, text: str, **finished: Any) -> Any:
    """Let the scheduler answer a call; return what the scheduler got and what the client got."""
    running = asyncio.ensure_future(call)
    submit = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(submit.handle, [*harness.ids(text), 0], finish=END, **finished)
    return submit, await running


async def test_an_answer_has_openai_s_shape(harness: Any, sdk: openai.AsyncOpenAI) -> None:
    call = sdk.chat.completions.with_raw_response.create(model="little", messages=USER)
    usage = {"prompt_tokens": 5, "cached_prompt_tokens": 3, "output_tokens": 3}
    submit, raw = await answering(call, harness, "hello", usage=usage)

    answer = raw.parse()
    prompt = harness.tokenizer.decode(submit.prompt_token_ids, skip_special_tokens=False)
    assert prompt == "<|start|>user\nhi<|end|>\n<|start|>assistant\n"
    assert answer.id == "chatcmpl-" + raw.headers["x-request-id"]
    assert submit.request_id == raw.headers["x-request-id"]
    assert [raw.headers[f"x-ratelimit-{what}-requests"] for what in ("limit", "remaining")] == ["4096", "3641"]
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    assert answer.system_fingerprint
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content, choice.message.refusal) == ("assistant", "hello", None)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(submit.prompt_token_ids)
    assert answer.usage.completion_tokens == len(harness.ids("hello")) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


async def test_a_stream_starts_with_the_role_and_ends_with_the_usage(harness: Any, sdk: openai.AsyncOpenAI) -> None:
    opening = asyncio.ensure_future(
        sdk.chat.completions.create(
            model="tiny", messages=USER, stream=True, stream_options={"include_usage": True}, max_tokens=4
        )
    )
    submit = await harness.scheduler.next_admitted()
    stream = await opening
    role = await anext(aiter(stream))
    ids = harness.ids("héllo")
    harness.scheduler.tokens(submit.handle, ids[:2])  # ends inside the é: that is held back
    first = await anext(aiter(stream))
    harness.scheduler.tokens(submit.handle, ids[2:], finish=MAX_TOKENS)
    rest = [chunk async for chunk in stream]

    assert (role.object, role.model) == ("chat.completion.chunk", "tiny")
    assert role.choices[0].delta.role == "assistant"
    assert first.choices[0].delta.content == "h"
    *deltas, ending, usage = rest
    assert "".join(chunk.choices[0].delta.content or "" for chunk in deltas) == "éllo"
    assert ending.choices[0].finish_reason == "length"
    assert ending.choices[0].delta.content is None
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == len(ids)
    assert all(chunk.usage is None for chunk in [role, first, *deltas, ending])
    assert {chunk.id for chunk in [role, first, *rest]} == {role.id}


async def test_events_that_are_known_together_are_written_together(harness: Any, url: str) -> None:
    body = json.dumps({"model": "tiny", "messages": USER, "stream": True, "n": 2}).encode()
    reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    )
    writer.write(head % len(body) + body)
    await harness.scheduler.next_admitted()
    await reader.readuntil(b"\r\n\r\n")

    size = int(await reader.readline(), 16)  # of the first HTTP chunk
    first = await reader.readexactly(size)
    writer.close()

    assert first.count(b"data: ") == 2  # a role for each candidate


async def test_several_candidates_have_their_own_choices(harness: Any, sdk: openai.AsyncOpenAI) -> None:
    call = asyncio.ensure_future(sdk.chat.completions.create(model="tiny", messages=USER, n=2))
    submit = await harness.scheduler.next_admitted()
    for index, text in ((1, "no"), (0, "yes")):
        harness.scheduler.tokens(submit.handle, harness.ids(text), candidate=index, finish=MAX_TOKENS)
    answer = await call

    assert submit.candidate_count == 2
    assert [(c.index, c.message.content, c.finish_reason) for c in answer.choices] == [
        (0, "yes", "length"),
        (1, "no", "length"),
    ]


async def test_every_parameter_reaches_the_scheduler(harness: Any, sdk: openai.AsyncOpenAI) -> None:
    call = sdk.chat.completions.create(
        model="tiny",
        messages=USER,
        temperature=0.5,
        top_p=0.25,
        presence_penalty=1,
        frequency_penalty=-1,
        seed=-1,
        max_completion_tokens=9,
        logit_bias={"7": -100},
        stop=["zz", "yy"],
        user="someone",
        extra_body={
            "top_k": -1,
            "min_p": 0.125,
            "repetition_penalty": 2,
            "ignore_eos": True,
            "min_tokens": 2,
            "stop_token_ids": [9],
            "allowed_token_ids": [7, 8, 9],
            "bad_words": ["x"],
            "include_stop_str_in_output": True,
            "skip_special_tokens": True,
            "priority": -3,
            "cache_salt": "s",
        },
    )
    submit, _ = await answering(call, harness, "")
    plain, _ = await answering(sdk.chat.completions.create(model="tiny", messages=USER), harness, "")

    sampling, stop = submit.sampling, submit.stop
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 0, 0.125)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 2)
    assert sampling.seed == 2**64 - 1
    assert dict(sampling.logit_bias) == {7: -100}
    assert list(sampling.allowed_token_ids) == [7, 8, 9]
    assert len(sampling.bad_words_token_ids) > 0
    assert (stop.max_new_tokens, stop.min_new_tokens, list(stop.stop_token_ids)) == (9, 2, [9])
    assert list(submit.end_of_sequence_ids) == []
    assert submit.priority == 3  # vLLM serves small numbers first, we serve large ones first
    assert submit.cache_salt != plain.cache_salt


@pytest.mark.parametrize("stop", ["lo", ["x", "lo"]])
async def test_a_stop_string_ends_the_output_and_frees_the_work(
    harness: Any, sdk: openai.AsyncOpenAI, stop: Any
) -> None:
    call = asyncio.ensure_future(sdk.chat.completions.create(model="tiny", messages=USER, stop=stop))
    submit = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(submit.handle, harness.ids("hello world"))
    answer = await call

    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("hel", "stop")
    assert (await harness.scheduler.next("cancel")).handle == submit.handle


async def test_log_probabilities_have_texts_and_bytes(harness: Any, sdk: openai.AsyncOpenAI) -> None:
    e_acute = harness.ids("é")  # two tokens, a byte each
    token_ids = [*e_acute, 0]
    columns: Any = {
        "logprobs": [-0.5, -1, float("-inf")],
        "ranks": [1, 2, 3],
        "candidate_token_ids": [e_acute[0], harness.ids("h")[0], 1],
        "candidate_logprobs": [-0.5, -0.25, -0.125],
    }
    create: Any = sdk.chat.completions.create
    results = []
    for stream in (False, True):
        running = asyncio.ensure_future(
            create(model="tiny", messages=USER, logprobs=True, top_logprobs=1, stream=stream)
        )
        submit = await harness.scheduler.next_admitted()
        assert (submit.logprobs, submit.chosen_logprob) == (1, True)
        step = scheduler_pb2.StepOutputs(handles=[submit.handle], token_counts=[3], token_ids=token_ids, **columns)
        step.finished.add(handle=submit.handle, reason=END)
        harness.scheduler.send(step_outputs=step)
        results.append(await running)
    whole, streamed = results
    chunks = [chunk async for chunk in streamed]

    content = whole.choices[0].logprobs.content
    entries = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [(entry.token, entry.bytes) for entry in content] == [
        ("\\xc3", [0xC3]),
        ("\\xa9", [0xA9]),
        ("<|end|>", list(b"<|end|>")),
    ]
    assert [entry.logprob for entry in content] == [-0.5, -1, -9999]
    assert [(top.token, top.logprob) for top in content[1].top_logprobs] == [("h", -0.25)]
    assert [entry.model_dump() for entry in entries] == [entry.model_dump() for entry in content]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "é"


@pytest.mark.parametrize("context", [256])
async def test_tool_messages_reach_the_template(harness: Any, sdk: openai.AsyncOpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    call = sdk.chat.completions.create(
        model="tiny",
        messages=messages,
        tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        tool_choice="none",
    )
    submit, _ = await answering(call, harness, "ok")

    prompt = harness.tokenizer.decode(submit.prompt_token_ids, skip_special_tokens=False)
    assert prompt.startswith("<|start|>system\nab<|end|>")
    assert '{"name": "f", "arguments": {"x": 1}}' in prompt  # by the server: the template does not write calls
    assert "<|start|>tool\n42<|end|>" in prompt


async def test_the_final_message_can_be_continued(harness: Any, sdk: openai.AsyncOpenAI) -> None:
    messages: Any = [*USER, {"role": "assistant", "content": "he"}]
    body = {"continue_final_message": True, "add_generation_prompt": False}
    call = sdk.chat.completions.create(model="tiny", messages=messages, extra_body=body)
    submit, _ = await answering(call, harness, "llo")

    prompt = harness.tokenizer.decode(submit.prompt_token_ids, skip_special_tokens=False)
    assert prompt.endswith("<|start|>assistant\nhe")


async def test_token_ids_come_when_asked_for(harness: Any, http: httpx.AsyncClient) -> None:
    ids = [*harness.ids("hello"), 0]
    body = {"model": "tiny", "messages": USER, "return_token_ids": True}
    submit, whole = await answering(http.post("/v1/chat/completions", json=body), harness, "hello")
    _, stream = await answering(http.post("/v1/chat/completions", json={**body, "stream": True}), harness, "hello")

    chunks = [json.loads(line.removeprefix("data: ")) for line in stream.text.split("\n\n")[:-2]]
    assert whole.json()["choices"][0]["token_ids"] == ids
    assert whole.json()["prompt_token_ids"] == list(submit.prompt_token_ids)
    assert chunks[0]["prompt_token_ids"] == list(submit.prompt_token_ids)
    assert [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])] == ids
    assert stream.text.endswith("data: [DONE]\n\n")


async def test_concurrent_streams_do_not_mix(harness: Any, sdk: openai.AsyncOpenAI) -> None:
    async def read(name: str) -> str:
        stream = await sdk.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": name}], stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    names = [f"hello {number}" for number in range(8)]
    calls = [asyncio.ensure_future(read(name)) for name in names]
    submits = [await harness.scheduler.next_admitted() for _ in names]
    texts = {}
    for submit in submits:
        prompt = harness.tokenizer.decode(submit.prompt_token_ids, skip_special_tokens=False)
        texts[submit.handle] = harness.ids(prompt.split("\n")[1].removesuffix("<|end|>"))
    for place in range(max(map(len, texts.values()))):  # a token of each in turn
        for handle, ids in texts.items():
            if place < len(ids):
                harness.scheduler.tokens(handle, [ids[place]], finish=MAX_TOKENS if place == len(ids) - 1 else 0)

    assert await asyncio.gather(*calls) == names
