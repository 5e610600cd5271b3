"""POST /v1/messages, as Anthropic's clients speak it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from octavo.common.v1 import common_pb2

PATH = "/v1/messages"
END = common_pb2.FINISH_REASON_END_OF_SEQUENCE
TEMPLATE = (
    "{{ tools | tojson }}<tool_call><think>{{ enable_thinking }}{{ reasoning_effort }}{% for m in messages %}"
    "[{{ m.role }}:{{ m.reasoning_content }}:{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ call.function | tojson }}{% endfor %}]{% endfor %}"
)
TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object"}}
CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def model_path(tmp_path: Path, tools: Any) -> Path:
    return tools.write_model(tmp_path / "tiny", TEMPLATE, context=4096)


async def answering(
    harness: Any, http: httpx.AsyncClient, text: str, reason: int = END, **fields: Any
) -> tuple[Any, httpx.Response]:
    """Let the model answer a call; return what the scheduler got and what the client got."""
    body = {"model": "tiny", "max_tokens": 64, "messages": USER, **fields}
    running = asyncio.ensure_future(http.post(PATH, json=body))
    submit = await harness.scheduler.next_admitted()
    usage = {"prompt_tokens": 9, "cached_prompt_tokens": 3}
    harness.scheduler.tokens(submit.handle, [*harness.ids(text), 0], finish=reason, usage=usage)
    return submit, await running


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    events = []
    for each in response.text.strip().split("\n\n"):
        name, data = each.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def block(content: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [content]}]}


async def test_an_answer_has_blocks(harness: Any, http: httpx.AsyncClient) -> None:
    fields = {"system": [{"type": "text", "text": "be brief"}], "tools": [TOOL], "temperature": 0.5}
    submit, response = await answering(harness, http, f"<think>hm</think>Let me see. {CALL}", **fields)

    prompt = harness.tokenizer.decode(submit.prompt_token_ids)
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    assert prompt.startswith(json.dumps([{"type": "function", "function": function}]))
    assert prompt.endswith("[system::be brief][user::hi]")
    assert (submit.sampling.temperature, submit.stop.max_new_tokens) == (0.5, 64)
    body = response.json()
    thought, text, call = body["content"]
    assert thought == {"type": "thinking", "thinking": "hm", "signature": ""}
    assert text == {"type": "text", "text": "Let me see."}
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "f", {"x": 1})
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "tiny")
    assert (body["stop_reason"], body["stop_sequence"]) == ("tool_use", None)
    num_prompt = len(submit.prompt_token_ids)
    usage = body["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (num_prompt - 3, 3)
    assert "x-ignored-fields" not in response.headers


@pytest.mark.parametrize(
    ("text", "reason", "expected"),
    [
        ("hello", END, ("end_turn", None, "hello")),
        ("hello", common_pb2.FINISH_REASON_MAX_TOKENS, ("max_tokens", None, "hello")),
        ("hello", common_pb2.FINISH_REASON_CONTEXT_LIMIT, ("max_tokens", None, "hello")),
        ("hello", common_pb2.FINISH_REASON_TIME_LIMIT, ("max_tokens", None, "hello")),
        ("heSTOPllo", END, ("stop_sequence", "STOP", "he")),
        ("", END, ("end_turn", None, "")),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_the_end_has_anthropic_s_name(
    harness: Any, http: httpx.AsyncClient, stream: bool, text: str, reason: int, expected: tuple[str, str | None, str]
) -> None:
    _, response = await answering(harness, http, text, reason, stop_sequences=["STOP"], stream=stream)

    if stream:
        events = events_of(response)
        ending = next(event["delta"] for event in events if event["type"] == "message_delta")
        said = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
        assert [event["type"] for event in events].count("content_block_start") == 1
    else:
        ending = response.json()
        said = ending["content"][0]["text"]
    assert (ending["stop_reason"], ending["stop_sequence"], said) == expected


async def test_a_stream_tells_of_every_block_from_its_beginning_to_its_end(
    harness: Any, http: httpx.AsyncClient
) -> None:
    submit, response = await answering(harness, http, f"<think>hm</think>Now.{CALL}{CALL}", tools=[TOOL], stream=True)

    events = events_of(response)
    kinds = [event["type"] for event in events]
    kinds = [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert kinds == ["message_start", *block, *block, *block, *block, "message_delta", "message_stop"]
    started = events[0]["message"]
    assert (started["content"], started["stop_reason"]) == ([], None)
    assert started["usage"]["input_tokens"] == len(submit.prompt_token_ids)
    starts = [event for event in events if event["type"] == "content_block_start"]
    assert [start["index"] for start in starts] == [0, 1, 2, 3]
    pieces: dict[int, str] = {}
    for event in events:
        if event["type"] == "content_block_delta":
            pieces[event["index"]] = pieces.get(event["index"], "") + list(event["delta"].values())[1]
    assert list(pieces.values()) == ["hm", "Now.", '{"x": 1}', '{"x": 1}']
    types = [start["content_block"]["type"] for start in starts]
    assert types == ["thinking", "text", "tool_use", "tool_use"]
    assert starts[2]["content_block"]["input"] == {}
    assert starts[2]["content_block"]["id"] != starts[3]["content_block"]["id"]
    last = events[-2]
    assert last["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert last["usage"]["cache_read_input_tokens"] == 3
    assert last["usage"]["output_tokens"] > 0


async def test_blocks_of_earlier_turns_become_the_conversation(harness: Any, http: httpx.AsyncClient) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "5"}]},
                {"type": "tool_result", "tool_use_id": "t1", "is_error": True},
                {"type": "text", "text": "well?"},
            ],
        },
    ]
    submit, response = await answering(
        harness, http, "x", messages=messages, thinking={"type": "disabled"}, output_config={"effort": "low"}
    )

    prompt = harness.tokenizer.decode(submit.prompt_token_ids)
    call = '{"name": "f", "arguments": {"x": 1}}'
    assert "<think>Falselow" in prompt
    assert prompt.endswith(f"[user::hi][assistant:hm:I look.{call}][tool::5][tool::][user::well?]")
    assert "x-ignored-fields" not in response.headers


async def test_an_answer_that_the_client_began_is_gone_on_with(harness: Any, http: httpx.AsyncClient) -> None:
    messages = [*USER, {"role": "assistant", "content": "Once upon"}]
    submit, _ = await answering(harness, http, " a time", messages=messages)

    assert harness.tokenizer.decode(submit.prompt_token_ids).endswith("[assistant::Once upon")


async def test_an_answer_that_ends_with_a_call_is_whole(harness: Any, http: httpx.AsyncClient) -> None:
    call = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
    messages = [*USER, {"role": "assistant", "content": [{"type": "text", "text": "I look."}, call]}]
    submit, _ = await answering(harness, http, "x", messages=messages)

    assert harness.tokenizer.decode(submit.prompt_token_ids).endswith('{"name": "f", "arguments": {}}]')


async def test_a_turn_of_which_nothing_can_be_read_is_still_a_turn(harness: Any, http: httpx.AsyncClient) -> None:
    hidden = {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}
    submit, _ = await answering(harness, http, "x", messages=[*USER, hidden, *USER])

    assert harness.tokenizer.decode(submit.prompt_token_ids).endswith("[user::hi][assistant::][user::hi]")


@pytest.mark.parametrize(
    ("choice", "expected"),
    [({"type": "none"}, "null"), ({"type": "auto", "disable_parallel_tool_use": True}, '[{"type"')],
)
async def test_tools_can_be_chosen_from(
    harness: Any, http: httpx.AsyncClient, choice: dict[str, Any], expected: str
) -> None:
    tools = [TOOL, {"type": "web_search_20250305", "name": "web_search"}]
    submit, response = await answering(harness, http, CALL + CALL, tools=tools, tool_choice=choice)

    assert harness.tokenizer.decode(submit.prompt_token_ids).startswith(expected)
    calls = [block for block in response.json()["content"] if block["type"] == "tool_use"]
    assert len(calls) == (0 if choice["type"] == "none" else 1)
    assert response.headers["x-ignored-fields"] == "tools[type=web_search_20250305]"


@pytest.mark.parametrize(
    ("fields", "status", "kind", "said"),
    [
        ({"model": "other"}, 404, "not_found_error", "other"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "invalid_request_error", "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error", "text only"),
        ({"messages": [{"role": "user", "content": [{"type": "x"}]}]}, 400, "invalid_request_error", "content[0].type"),
        ({"messages": [{"role": "user", "content": [5]}]}, 400, "invalid_request_error", "messages[0].content[0]"),
        ({"temperature": -1}, 400, "invalid_request_error", "temperature"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
        ({"max_token": 9}, 400, "invalid_request_error", "did you mean max_tokens?"),
        ({"tool_choice": {"type": "some"}}, 400, "invalid_request_error", "tool_choice.type"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tools"),
        ({"thinking": {"type": "perhaps"}}, 400, "invalid_request_error", "thinking.type"),
        ({"system": 5}, 400, "invalid_request_error", "system"),
    ],
)
async def test_errors_have_anthropic_s_form(
    http: httpx.AsyncClient, fields: dict[str, Any], status: int, kind: str, said: str
) -> None:
    response = await http.post(PATH, json={"model": "tiny", "max_tokens": 9, "messages": USER, **fields})

    body = response.json()
    assert response.status_code == status
    assert set(body) == {"type", "error"}
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert said in body["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"stop_sequences": [5]}, "stop_sequences: "),
        ({"stop_sequences": "x"}, "stop_sequences: must be a list"),
        ({"stop_sequences": ["x"] * 5000}, "stop_sequences: has 5000"),
        ({"stop_sequences": [""]}, "stop_sequences[0]: "),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "content[0].tool_use_id: must be set"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a"}]}]},
            "content[0].name: must be set",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "name": "f"}]}]},
            "content[0].id: must be set",
        ),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name: must be set"),
        ({"tools": [{"name": 5}]}, "tools[0].name: must be a string"),
        ({"tools": [{"name": "f", "description": 5}]}, "tools[0].description: "),
        ({"tools": [{"name": "f", "input_schema": "x"}]}, "tools[0].input_schema: must be an object"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "max_new_tokens"}}, "no tool 'max_new_tokens'"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name: "),
        (
            {"tools": [TOOL], "tool_choice": {"type": "auto", "disable_parallel_tool_use": "no"}},
            "tool_choice.disable_parallel_tool_use: must be true or false",
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": "9"}}, "thinking.budget_tokens: must be a whole number"),
        *((block({"type": "text", "text": "x", "citations": value}), "citations: must be a list") for value in (5, {})),
        (block({"type": "tool_use", "id": "a", "name": "f", "caller": "me"}), "caller: must be an object"),
        (block({"type": "thinking", "thinking": "x", "signature": 5}), "signature: must be a string"),
        ({"system": [{"type": "text", "text": "x", "citations": 5}]}, "system[0].citations: must be a list"),
        ({"system": [{"type": "text", "text": "x", "cache_control": 5}]}, "system[0].cache_control: must be an object"),
        ({"tools": [{**TOOL, "cache_control": True}]}, "tools[0].cache_control: must be an object"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": 5}]}]},
            "messages[0].content[0].cache_control: must be an object",
        ),
    ],
)
@pytest.mark.parametrize("path", [PATH, f"{PATH}/count_tokens"])
async def test_what_is_wrong_is_called_as_the_client_called_it(
    http: httpx.AsyncClient, path: str, fields: dict[str, Any], said: str
) -> None:
    if path.endswith("count_tokens") and fields.get("stop_sequences") == [""]:
        return  # nothing is generated that it could end
    response = await http.post(path, json={"model": "tiny", "max_tokens": 9, "messages": USER, **fields})

    assert response.status_code == 400, response.text
    assert said in response.json()["error"]["message"]


async def test_what_blocks_and_tools_have_besides_is_ignored_and_told(harness: Any, http: httpx.AsyncClient) -> None:
    text = {"type": "text", "text": "x", "x": 1}
    fields = {
        **block({**text, "citations": [], "cache_control": {"type": "ephemeral"}}),
        "system": [{**text, "citations": None}],
        "tools": [{**TOOL, "type": "custom", "defer_loading": True}],
        "tool_choice": {"type": "auto", "y": 2},
    }
    _, response = await answering(harness, http, "hello", **fields)

    ignored = {"messages[].content[].x", "system[].x", "tools[].defer_loading", "tool_choice.y"}
    assert set(response.headers["x-ignored-fields"].split(", ")) == ignored


@pytest.mark.parametrize(("method", "path", "status"), [("GET", PATH, 405), ("POST", f"{PATH}/batches", 404)])
async def test_what_has_no_route_has_anthropic_s_form(
    http: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    response = await http.request(method, path)

    assert response.status_code == status
    assert response.json()["type"] == "error"


async def test_an_error_in_the_middle_of_a_stream_is_its_last_event(harness: Any, http: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "max_tokens": 64, "messages": USER, "stream": True}
    running = asyncio.ensure_future(http.post(PATH, json=body, headers={"x-request-timeout-ms": "300"}))
    submit = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(submit.handle, harness.ids("a"))

    last = events_of(await running)[-1]
    assert (last["type"], last["error"]["type"]) == ("error", "timeout_error")


async def test_tokens_are_counted_as_they_are_used(harness: Any, http: httpx.AsyncClient) -> None:
    fields = {"messages": USER, "system": "be brief", "tools": [TOOL]}
    counted = await http.post(f"{PATH}/count_tokens", json={"model": "tiny", **fields})
    submit, _ = await answering(harness, http, "x", **fields)
    wrong = await http.post(f"{PATH}/count_tokens", json={"model": "other", **fields})

    assert counted.json() == {"input_tokens": len(submit.prompt_token_ids)}
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (404, "not_found_error")


TOOL_USE = {"type": "tool_use", "id": "a", "name": "f", "input": "@"}
DEEP = [  # with something deep in the place of "@"
    (PATH, {"messages": USER, "tools": [{"name": "f", "input_schema": "@"}]}),
    (PATH, {"messages": [*USER, {"role": "assistant", "content": [TOOL_USE]}, *USER]}),
    (
        "/v1/chat/completions",
        {"messages": USER, "tools": [{"type": "function", "function": {"name": "f", "parameters": "@"}}]},
    ),
    ("/v1/responses", {"input": "x", "tools": [{"type": "function", "name": "f", "parameters": "@"}]}),
    ("/tokenize", {"messages": USER, "chat_template_kwargs": {"a": "@"}}),
]


@pytest.mark.parametrize("depth", [400, 900, 5000])
@pytest.mark.parametrize(("path", "fields"), DEEP)
async def test_what_is_nested_too_deeply_is_the_client_s_mistake(
    http: httpx.AsyncClient, path: str, fields: dict[str, Any], depth: int
) -> None:
    body = json.dumps({"model": "tiny", **fields}).replace('"@"', '{"a":' * depth + "1" + "}" * depth)
    response = await http.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert "nested too deeply" in response.text
