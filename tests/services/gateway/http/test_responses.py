"""POST /v1/responses, through OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from octavo.common.v1 import common_pb2
from octavo.scheduler.v1 import scheduler_pb2

END, MAX_TOKENS = common_pb2.FINISH_REASON_END_OF_SEQUENCE, common_pb2.FINISH_REASON_MAX_TOKENS
TEMPLATE = (
    "{{ tools | tojson }}<tool_call><think>{{ reasoning_effort }}{% for m in messages %}[{{ m.role }}:"
    "{{ m.reasoning_content }}:{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}"
    "{% endfor %}]{% endfor %}"
)
TOOL: Any = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}}
CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'


@pytest.fixture
def model_path(tmp_path: Path, tools: Any) -> Path:
    return tools.write_model(tmp_path / "tiny", TEMPLATE, context=4096)


async def answering(call: Any, harness: Any, text: str, reason: int = END) -> tuple[Any, Any]:
    """Let the model answer a call; return what the scheduler got and what the client got."""
    running = asyncio.ensure_future(call)
    submit = await harness.scheduler.next_admitted()
    usage = {"prompt_tokens": 9, "cached_prompt_tokens": 3}
    harness.scheduler.tokens(submit.handle, [*harness.ids(text), 0], finish=reason, usage=usage)
    return submit, await running


async def test_an_answer_has_items(harness: Any, sdk: openai.AsyncOpenAI) -> None:
    call = sdk.responses.create(
        model="little", input="hi", instructions="be brief", tools=[TOOL], temperature=0.7, metadata={"a": "b"}
    )
    submit, response = await answering(call, harness, f"<think>hm</think>Let me see. {CALL}")

    prompt = harness.tokenizer.decode(submit.prompt_token_ids)
    reasoning, message, called = response.output
    function = {name: value for name, value in TOOL.items() if name != "type"}
    assert prompt.startswith(json.dumps([{"type": "function", "function": function}]))
    assert prompt.endswith("[system::be brief][user::hi]")
    assert (response.object, response.status, response.model, response.error) == ("response", "completed", "tiny", None)
    assert (response.instructions, response.temperature, response.metadata) == ("be brief", 0.7, {"a": "b"})
    assert (response.store, response.previous_response_id, response.tool_choice) == (False, None, "auto")
    assert (reasoning.type, reasoning.content[0].text) == ("reasoning", "hm")
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert response.output_text == "Let me see."
    assert (called.type, called.name, called.arguments) == ("function_call", "f", '{"x": 1}')
    assert len({item.id for item in response.output}) == 3
    assert response.usage.input_tokens == len(submit.prompt_token_ids)
    assert response.usage.input_tokens_details.cached_tokens == 3
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


async def test_a_stream_tells_of_every_item_from_its_beginning_to_its_end(
    harness: Any, sdk: openai.AsyncOpenAI
) -> None:
    running = asyncio.ensure_future(sdk.responses.create(model="tiny", input="hi", tools=[TOOL], stream=True))
    submit = await harness.scheduler.next_admitted()
    stream = await running
    events = [await anext(aiter(stream))]
    for token_id in harness.ids(f"<think>hm</think>Now.{CALL}"):
        harness.scheduler.tokens(submit.handle, [token_id])
    harness.scheduler.tokens(submit.handle, [0], finish=END)
    events += [event async for event in stream]

    kinds: list[str] = []
    for event in events:
        if not kinds or kinds[-1] != event.type:  # deltas follow each other
            kinds.append(event.type)
    item = ["response.output_item.added", "response.content_part.added"]
    ended = ["response.content_part.done", "response.output_item.done"]
    assert kinds == [
        "response.created", "response.in_progress",
        *item, "response.reasoning_text.delta", "response.reasoning_text.done", *ended,
        *item, "response.output_text.delta", "response.output_text.done", *ended,
        "response.output_item.added", "response.function_call_arguments.delta", "response.function_call_arguments.done",
        "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    done = [event for event in events if event.type == "response.output_item.done"]
    final = events[-1].response
    assert [event.item for event in done] == final.output
    assert [event.output_index for event in done] == [0, 1, 2]
    deltas: dict[str, str] = {}
    for event in events:
        if event.type.endswith(".delta"):
            deltas[event.item_id] = deltas.get(event.item_id, "") + event.delta
    assert list(deltas.values()) == ["hm", "Now.", '{"x": 1}']
    assert list(deltas) == [item.id for item in final.output]
    assert final.usage.output_tokens == len(harness.ids(f"<think>hm</think>Now.{CALL}")) + 1


async def test_the_sdk_s_own_helper_puts_a_stream_together(harness: Any, sdk: openai.AsyncOpenAI) -> None:
    async def read() -> Any:
        async with sdk.responses.stream(model="tiny", input="hi") as stream:
            return await stream.get_final_response()

    _, final = await answering(read(), harness, "hello")

    assert final.output_text == "hello"


async def test_items_of_earlier_turns_become_the_conversation(harness: Any, sdk: openai.AsyncOpenAI) -> None:
    items: Any = [
        {"role": "developer", "content": "be brief"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "id": "m", "status": "completed", "role": "assistant",
         "content": [{"type": "output_text", "text": "so", "annotations": []}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"x": 1}'},
        {"type": "function_call", "call_id": "2", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "42"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "43"}]},
    ]  # fmt: skip
    call = sdk.responses.create(model="tiny", input=items, reasoning={"effort": "low"})
    submit, _ = await answering(call, harness, "ok")

    prompt = harness.tokenizer.decode(submit.prompt_token_ids)
    assert prompt.removeprefix("null<tool_call><think>") == (
        'low[system::be brief][user::hi][assistant:hm:so{"name": "f", "arguments": {"x": 1}}'
        '{"name": "f", "arguments": {}}][tool::42][tool::43]'
    )


async def test_an_output_that_is_cut_off_is_incomplete(harness: Any, sdk: openai.AsyncOpenAI) -> None:
    call = sdk.responses.create(model="tiny", input="hi", max_output_tokens=3)
    submit, response = await answering(call, harness, "he", MAX_TOKENS)

    assert submit.stop.max_new_tokens == 3
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete"


async def test_log_probabilities_come_when_included(harness: Any, sdk: openai.AsyncOpenAI) -> None:
    include: Any = ["message.output_text.logprobs"]
    running = asyncio.ensure_future(sdk.responses.create(model="tiny", input="hi", include=include, top_logprobs=1))
    submit = await harness.scheduler.next_admitted()
    (h,) = harness.ids("h")
    step = scheduler_pb2.StepOutputs(handles=[submit.handle], token_counts=[2], token_ids=[h, 0])
    step.logprobs.extend([-0.5, -1.0])
    step.ranks.extend([1, 1])
    step.candidate_token_ids.extend([h, 0])
    step.candidate_logprobs.extend([-0.5, -1.0])
    step.finished.add(handle=submit.handle, reason=END)
    harness.scheduler.send(step_outputs=step)
    response = await running

    (content,) = response.output[0].content
    assert [(entry.token, entry.logprob) for entry in content.logprobs] == [("h", -0.5), ("<|end|>", -1)]
    assert [len(entry.top_logprobs) for entry in content.logprobs] == [1, 1]


async def test_log_probabilities_belong_to_the_message_after_reasoning(harness: Any, sdk: openai.AsyncOpenAI) -> None:
    include: Any = ["message.output_text.logprobs"]
    running = asyncio.ensure_future(sdk.responses.create(model="tiny", input="hi", include=include, top_logprobs=1))
    submit = await harness.scheduler.next_admitted()
    ids = [*harness.ids("<think>hm</think>h"), 0]
    step = scheduler_pb2.StepOutputs(handles=[submit.handle], token_counts=[len(ids)], token_ids=ids)
    step.logprobs.extend([-0.5] * len(ids))
    step.ranks.extend([1] * len(ids))
    step.candidate_token_ids.extend(ids)
    step.candidate_logprobs.extend([-0.5] * len(ids))
    step.finished.add(handle=submit.handle, reason=END)
    harness.scheduler.send(step_outputs=step)
    response = await running

    reasoning, message = response.output
    assert reasoning.type == "reasoning"
    assert [entry.token for entry in message.content[0].logprobs][-2:] == ["h", "<|end|>"]


async def test_a_stream_that_fails_says_so_in_its_last_event(harness: Any, sdk: openai.AsyncOpenAI) -> None:
    running = asyncio.ensure_future(sdk.responses.create(model="tiny", input="hi", stream=True))
    submit = await harness.scheduler.next_admitted()
    stream = await running
    harness.scheduler.send(
        failed=scheduler_pb2.Failed(handle=submit.handle, code=13, reason="INTERNAL", message="it broke")
    )
    events = [event async for event in stream]

    assert events[-1].type == "response.failed"
    assert events[-1].response.status == "failed"
    assert events[-1].response.error.code == "server_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{"type": "poem"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "poem"}]}]}, "input[0].content[0]"),
        ({"tools": [{"name": "f"}]}, "tools[0]"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": ["everything"]}, "include[0]"),
        ({"messages": []}, "messages"),
        ({"n": 2}, "n"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ],
)
async def test_a_wrong_field_is_named(http: httpx.AsyncClient, fields: dict[str, Any], param: str) -> None:
    response = await http.post("/v1/responses", json={"model": "tiny", "input": "hi", **fields})

    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert response.headers["x-request-id"]
