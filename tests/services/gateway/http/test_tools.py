"""Tools and reasoning over HTTP, through OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from octavo.common.v1 import common_pb2

END = common_pb2.FINISH_REASON_END_OF_SEQUENCE
TEMPLATE = (
    "{{ tools | tojson }}<tool_call><think>{{ reasoning_effort }}{{ enable_thinking }}{{ documents | tojson }}"
    "{% for m in messages %}{{ m.role }}:{{ m.reasoning_content }}:{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ call.function | tojson }}{% endfor %};{% endfor %}"
)
USER: Any = [{"role": "user", "content": "hi"}]
TOOLS: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'


@pytest.fixture
def model_path(tmp_path: Path, tools: Any) -> Path:
    return tools.write_model(tmp_path / "tiny", TEMPLATE, context=4096)


async def answering(call: Any, harness: Any, text: str) -> tuple[str, Any]:
    """Let the model answer a call; return its prompt and what the client got."""
    running = asyncio.ensure_future(call)
    submit = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(submit.handle, [*harness.ids(text), 0], finish=END)
    return harness.tokenizer.decode(submit.prompt_token_ids), await running


async def test_a_call_is_in_the_message_with_its_reasoning(harness: Any, sdk: openai.AsyncOpenAI) -> None:
    call = sdk.chat.completions.create(model="tiny", messages=USER, tools=TOOLS)
    prompt, answer = await answering(call, harness, f"<think>hm</think>{CALL}")

    (choice,) = answer.choices
    (called,) = choice.message.tool_calls
    assert prompt.startswith(json.dumps(TOOLS))
    assert choice.finish_reason == "tool_calls"
    assert (choice.message.content, choice.message.reasoning_content) == (None, "hm")
    assert (called.type, called.function.name, called.function.arguments) == ("function", "f", '{"x": 1}')
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0


async def test_a_stream_has_fragments_that_the_sdk_puts_together(harness: Any, sdk: openai.AsyncOpenAI) -> None:
    call = sdk.chat.completions.create(model="tiny", messages=USER, tools=TOOLS, stream=True)
    running = asyncio.ensure_future(call)
    submit = await harness.scheduler.next_admitted()
    stream = await running
    ids = harness.ids(f"<think>hm</think>Now: {CALL}{CALL}")
    chunks = [await anext(aiter(stream))]
    for token_id in ids:
        harness.scheduler.tokens(submit.handle, [token_id])
    harness.scheduler.tokens(submit.handle, [0], finish=END)
    chunks += [chunk async for chunk in stream]

    deltas = [chunk.choices[0].delta for chunk in chunks]
    calls: dict[int, list[str]] = {}
    for fragment in [fragment for delta in deltas for fragment in delta.tool_calls or ()]:
        if fragment.id:
            assert fragment.index not in calls
            calls[fragment.index] = [fragment.id, fragment.function.name, ""]
        calls[fragment.index][2] += fragment.function.arguments
    assert "".join(delta.content or "" for delta in deltas) == "Now:"
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "hm"
    assert [(name, arguments) for _, name, arguments in calls.values()] == [("f", '{"x": 1}')] * 2
    assert len({call_id for call_id, _, _ in calls.values()}) == 2
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


async def test_a_conversation_with_calls_and_their_results_reaches_the_template(
    harness: Any, sdk: openai.AsyncOpenAI
) -> None:
    f = {"name": "f", "arguments": '{"x": 1}'}
    messages: Any = [
        *USER,
        {"role": "assistant", "reasoning": "hm", "tool_calls": [{"id": "1", "type": "function", "function": f}]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]  # fmt: skip
    body = {"documents": [{"text": "d"}]}
    call = sdk.chat.completions.create(
        model="tiny", messages=messages, tools=TOOLS, reasoning_effort="none", extra_body=body
    )
    prompt, _ = await answering(call, harness, "ok")

    assert prompt == (
        f'{json.dumps(TOOLS)}<tool_call><think>noneFalse[{{"text": "d"}}]user::hi;'
        'assistant:hm:{"name": "f", "arguments": {"x": 1}};tool::42;'
    )


@pytest.mark.parametrize("choice", ["none", "auto"])
async def test_none_leaves_tools_out_of_prompt_and_answer(harness: Any, sdk: openai.AsyncOpenAI, choice: Any) -> None:
    call = sdk.chat.completions.create(model="tiny", messages=USER, tools=TOOLS, tool_choice=choice)
    prompt, answer = await answering(call, harness, CALL)

    assert prompt.startswith("null" if choice == "none" else "[")
    assert (answer.choices[0].message.content == CALL) == (choice == "none")


async def test_without_parallel_calls_the_answer_ends_after_one(harness: Any, sdk: openai.AsyncOpenAI) -> None:
    call = sdk.chat.completions.create(model="tiny", messages=USER, tools=TOOLS, parallel_tool_calls=False)
    _, answer = await answering(call, harness, CALL + CALL)

    assert len(answer.choices[0].message.tool_calls) == 1
    assert answer.choices[0].finish_reason == "tool_calls"


async def test_reasoning_can_be_left_out(harness: Any, http: httpx.AsyncClient) -> None:
    for stream in (False, True):
        body = {"model": "tiny", "messages": USER, "include_reasoning": False, "stream": stream}
        _, response = await answering(http.post("/v1/chat/completions", json=body), harness, "<think>secret</think>Yes")

        assert "secret" not in response.text
        assert "Yes" in response.text


async def test_special_tokens_are_text_if_wanted(harness: Any, sdk: openai.AsyncOpenAI) -> None:
    call = sdk.completions.create(model="tiny", prompt="x", extra_body={"skip_special_tokens": False})
    _, answer = await answering(call, harness, "a<|start|>b")

    assert answer.choices[0].text == "a<|start|>b"
