"""Tools and reasoning over gRPC: into the prompt, and out of the output."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2, model_pb2, model_pb2_grpc
from octavo.services.gateway.config import GatewayConfig

TOOL_CALL, END = common_pb2.FINISH_REASON_TOOL_CALL, common_pb2.FINISH_REASON_END_OF_SEQUENCE
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|end|>{% endfor %}<|start|>assistant{% if open %}<think>\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
ARGUMENTS = '{"x": 1}'


@pytest.fixture
def model_path(tmp_path: Path, tools: Any) -> Path:
    return tools.write_model(tmp_path / "m", TEMPLATE, context=4096, special_tokens=["[TOOL_CALLS]"])


@pytest.fixture
def config(config: GatewayConfig) -> GatewayConfig:
    return dataclasses.replace(config, model_name="tiny")


def chat(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "parts": [{"text": "hi"}]}]
    return {"chat": {"messages": messages, "tools_json": [json.dumps(TOOL)], **fields}}


async def answered(harness: Any, output_text: str | Sequence[int], **fields: Any) -> list[Any]:
    """Stream a request that the model answers so; return the deltas, and last how it finished."""
    call = harness.stream(**fields)
    submit = await harness.scheduler.next_admitted()
    ids = harness.ids(output_text) if isinstance(output_text, str) else output_text
    harness.scheduler.tokens(submit.handle, [*ids, 0], finish=END, stop_token_id=0)
    events = [response.event async for response in call]
    deltas = [event.delta for event in events if event.HasField("delta")]
    return [*deltas, next(event.candidate_finished for event in events if event.HasField("candidate_finished"))]


async def test_a_call_comes_in_fragments_and_ends_the_turn(harness: Any) -> None:
    call = harness.stream(**chat())
    submit = await harness.scheduler.next_admitted()
    await call.read()  # Started
    ids = [*harness.ids(f"Sure. {CALL}"), 0]
    half = len(harness.ids("Sure. " + CALL[:45]))
    harness.scheduler.tokens(submit.handle, ids[:half])
    first = (await call.read()).event.delta
    harness.scheduler.tokens(submit.handle, ids[half:], finish=END, stop_token_id=0)
    rest = (await call.read()).event.delta
    finished = (await call.read()).event.candidate_finished

    (begun,), (ended,) = first.tool_calls, rest.tool_calls
    assert (first.text, rest.text) == ("Sure.", "")
    assert (begun.name, begun.index, begun.id[:5]) == ("f", 0, "call_")
    assert (ended.name, ended.index, ended.id) == ("", 0, "")
    assert begun.arguments_json
    assert begun.arguments_json + ended.arguments_json == ARGUMENTS
    assert (finished.finish_reason, finished.stop_token_id) == (TOOL_CALL, 0)
    assert first.token_count + rest.token_count == finished.output_tokens == len(ids)


async def test_generate_returns_whole_calls_and_leaves_half_ones_in_the_text(harness: Any) -> None:
    for text, calls in ((CALL, ["f"]), (CALL[:-25], [])):
        request = generation_pb2.GenerateRequest(generation=harness.generation(**chat()))
        running = harness.stub.Generate(request)
        submit = await harness.scheduler.next_admitted()
        harness.scheduler.tokens(submit.handle, [*harness.ids(text), 0], finish=END)
        (candidate,) = (await running).candidates

        assert [call.name for call in candidate.tool_calls] == calls
        assert [call.arguments_json for call in candidate.tool_calls] == [ARGUMENTS] * len(calls)
        assert candidate.text == ("" if calls else text)
        assert candidate.finished.finish_reason == (TOOL_CALL if calls else END)


async def test_one_call_is_the_end_where_one_is_all_that_may_be(harness: Any) -> None:
    call = harness.stream(**chat(), output={"parsing": {"single_tool_call": True}})
    submit = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(submit.handle, harness.ids(CALL + CALL))
    events = [response.event async for response in call]
    cancel = await harness.scheduler.next("cancel")

    assert cancel.handle == submit.handle
    (finished,) = [event.candidate_finished for event in events if event.HasField("candidate_finished")]
    assert finished.finish_reason == TOOL_CALL
    assert finished.output_tokens == len(harness.ids(CALL.removesuffix("</tool_call>")))


async def test_tools_and_calls_and_their_results_are_in_the_prompt(harness: Any) -> None:
    messages = [
        {"role": "user", "parts": [{"text": "hi"}]},
        {
            "role": "assistant",
            "parts": [{"reasoning": "hm"}, {"tool_call": {"id": "1", "name": "f", "arguments_json": ARGUMENTS}}],
        },
        {"role": "tool", "parts": [{"tool_result": {"id": "1", "text": "42"}}]},
    ]
    harness.stream(**chat(messages=messages))
    submit = await harness.scheduler.next_admitted()
    prompt = harness.tokenizer.decode(submit.prompt_token_ids, skip_special_tokens=False)

    assert prompt == (
        f"<tools>{json.dumps([TOOL])}</tools><|start|>userhi<|end|><|start|>assistant<think>hm</think>"
        f"<tool_call>{json.dumps({'name': 'f', 'arguments': {'x': 1}})}</tool_call><|end|><|start|>tool42<|end|>"
        "<|start|>assistant"
    )


async def test_without_a_choice_the_model_is_told_of_no_tools_and_its_words_are_left_alone(harness: Any) -> None:
    call = harness.stream(**chat(tool_choice={"mode": "MODE_NONE"}))
    submit = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(submit.handle, [*harness.ids(CALL), 0], finish=END)
    events = [response.event async for response in call]

    assert "tools" not in harness.tokenizer.decode(submit.prompt_token_ids)
    assert "".join(event.delta.text for event in events) == CALL


@pytest.mark.parametrize("is_open", [False, True])
async def test_reasoning_is_apart_and_counted(harness: Any, is_open: bool) -> None:
    text = "hm" if is_open else "<think>hm"
    options = json.dumps({"open": is_open})
    call = harness.stream(**chat(template_options_json=options))
    submit = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(submit.handle, [*harness.ids(f"{text}</think>\nYes"), 0], finish=END)
    events = [response.event async for response in call]

    assert "".join(event.delta.reasoning_text for event in events) == "hm"
    assert "".join(event.delta.text for event in events) == "Yes"
    assert 0 < events[-1].completed.usage.reasoning_tokens < len(harness.ids(f"{text}</think>"))


async def test_special_tokens_of_the_format_are_seen(harness: Any) -> None:
    token_id = 261  # [TOOL_CALLS], after the tokens of every tiny model
    ids = [token_id, *harness.ids('[{"name": "f", "arguments": {}}]')]
    parsing = {"tool_call_format": "mistral"}
    *deltas, finished = await answered(harness, ids, **chat(), output={"parsing": parsing})
    *plain, _ = await answered(harness, ids, text="hi")
    *kept, _ = await answered(harness, ids, text="hi", output={"keep_special_tokens": True})

    (call,) = [call for delta in deltas for call in delta.tool_calls if call.name]
    assert (call.name, len(call.id), call.id.isalnum()) == ("f", 9, True)  # as Mistral's templates want it
    assert finished.finish_reason == TOOL_CALL
    assert "".join(delta.text for delta in plain).startswith("[{")
    assert "".join(delta.text for delta in kept).startswith("[TOOL_CALLS][{")


async def test_a_resumed_stream_goes_on_inside_a_call(harness: Any) -> None:
    call = harness.stream(**chat(), scheduling={"resume_window_ms": 60_000}, output={"token_ids": True})
    submit = await harness.scheduler.next_admitted()
    ids = [*harness.ids(CALL), 0]
    half = len(harness.ids(CALL[:45]))
    harness.scheduler.tokens(submit.handle, ids[:half])
    started = (await call.read()).event.started
    first = (await call.read()).event.delta
    call.cancel()
    await harness.scheduler.next("detach")
    cursors = [generation_pb2.Cursor(next_token_offset=half)]
    resumed = harness.stub.ResumeStream(
        generation_pb2.ResumeStreamRequest(resume_token=started.resume_token, cursors=cursors)
    )
    asked = await harness.scheduler.next("reattach")
    harness.scheduler.send(
        reattached={
            "handle": asked.handle,
            "gateway_state": submit.gateway_state,
            "prompt_tokens": len(submit.prompt_token_ids),
            "candidate_count": 1,
        }
    )
    harness.scheduler.tokens(asked.handle, ids, finish=END)
    events = [response.event async for response in resumed]

    (begun,) = first.tool_calls
    rest = [fragment for event in events for fragment in event.delta.tool_calls]
    assert begun.name == "f"
    assert [fragment.name for fragment in rest] == [""] * len(rest)
    assert begun.arguments_json + "".join(fragment.arguments_json for fragment in rest) == ARGUMENTS
    assert any(event.candidate_finished.finish_reason == TOOL_CALL for event in events)


async def test_a_model_says_what_it_can(harness: Any) -> None:
    stub = harness.service(model_pb2_grpc.ModelServiceStub)
    (model,) = (await stub.ListModels(model_pb2.ListModelsRequest())).models

    assert {"chat", "tools", "reasoning"} <= set(model.features)


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        (chat(tools_json=['{"type": "function"}']), "generation.chat.tools_json[0]"),
        ({**chat(), "output": {"parsing": {"tool_call_format": "x"}}}, "generation.output.parsing.tool_call_format"),
        ({**chat(), "output": {"parsing": {"reasoning_format": "x"}}}, "generation.output.parsing.reasoning_format"),
    ],
)
async def test_a_wrong_request_is_refused(harness: Any, tools: Any, fields: dict[str, Any], wrong: str) -> None:
    failure = await tools.rejection(harness.stream(**fields))

    assert failure.fields == [wrong]
