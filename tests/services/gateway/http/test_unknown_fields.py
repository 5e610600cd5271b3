"""Fields that are ignored: which, how a client learns of it, and which are refused all the same."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import httpx
import openai
import pytest

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2
from octavo.services.common.errors import ServingError
from octavo.services.gateway.config import GatewayConfig
from octavo.services.gateway.http.chat_request import read_chat_call, read_completion_call
from octavo.services.gateway.http.params import Ignored
from octavo.services.gateway.http.responses_request import read_responses_call

END = common_pb2.FINISH_REASON_END_OF_SEQUENCE
USER: Any = [{"role": "user", "content": "hi"}]
MODES = {"auto": generation_pb2.ToolChoice.MODE_AUTO, "required": generation_pb2.ToolChoice.MODE_REQUIRED}
READERS: Any = {"chat": read_chat_call, "completion": read_completion_call, "responses": read_responses_call}
BASES: Any = {"chat": {"messages": USER}, "completion": {"prompt": "x"}, "responses": {"input": "x"}}
FUNCTION: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
OTHER: Any = {"type": "function", "function": {"name": "g"}}


def read(endpoint: str, fields: dict[str, Any], *, refuses: bool = False) -> tuple[Any, str]:
    """What a body asks for, and what of it is ignored."""
    ignored = Ignored(refuses=refuses)
    call = READERS[endpoint]({"model": "m", **BASES[endpoint], **fields}, {}, ignored)
    return call.requests[0].generation, ignored.header


def refusal(endpoint: str, fields: dict[str, Any], *, refuses: bool = False) -> ServingError:
    with pytest.raises(ServingError) as caught:
        read(endpoint, fields, refuses=refuses)
    return caught.value


# What clients by others send, as it was seen or is documented.
HINTS: list[tuple[str, dict[str, Any], str]] = [
    ("responses", {"client_metadata": {"session": "x"}, "store": True}, "client_metadata, store"),
    ("responses", {"truncation": "auto", "text": {"verbosity": "low"}}, "text.verbosity, truncation"),
    ("responses", {"tools": [{"type": "namespace", "name": "x", "tools": []}]}, "tools[type=namespace]"),
    ("responses", {"tools": [{"type": "web_search"}], "tool_choice": "auto"}, "tools[type=web_search]"),
    ("responses", {"include": ["web_search_call.action.sources"]}, ""),
    ("responses", {"stream": True, "stream_options": {"include_obfuscation": True}}, "include_obfuscation"),
    ("responses", {"reasoning": {"effort": "low", "summary": "detailed", "context": "auto"}}, "reasoning.context"),
    ("chat", {"store": True, "service_tier": "flex", "verbosity": "low"}, "service_tier, store, verbosity"),
    ("chat", {"store": False, "service_tier": "auto", "verbosity": "medium"}, ""),
    ("chat", {"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[type=custom]"),
    ("chat", {"cache_prompt": True, "options": {"num_ctx": 4096}, "chat_id": "1", "session_id": "2"}, "chat_id"),
    ("chat", {"provider": {"order": ["a"]}, "reasoning": {"effort": "low"}, "thinking": {"type": "off"}}, "thinking"),
    ("chat", {"messages": [{"role": "user", "content": "x", "id": "1", "createdAt": 5}] * 3}, "messages[].createdAt"),
    ("chat", {"do_magic": 1, "top_a": 0.5, "models": ["a"], "extra_body": {}, "tags": []}, "do_magic"),
    ("completion", {"typical_p": 0.9, "mirostat": 2, "dry_multiplier": 0.8, "slot_id": 1}, "mirostat"),
]  # fmt: skip


@pytest.mark.parametrize(("endpoint", "fields", "named"), HINTS)
def test_what_was_meant_for_other_servers_is_ignored_and_named(
    endpoint: str, fields: dict[str, Any], named: str
) -> None:
    _, header = read(endpoint, fields)

    assert set(named.split(", ")) <= {*header.split(", "), *header.replace("stream_options.", "").split(", ")}
    assert bool(named) == bool(header)


@pytest.mark.parametrize(("endpoint", "fields"), [(endpoint, fields) for endpoint, fields, named in HINTS if named])
def test_a_strict_server_refuses_the_same(endpoint: str, fields: dict[str, Any]) -> None:
    assert refusal(endpoint, fields, refuses=True).code.name == "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("endpoint", "field", "advice"),
    [
        ("chat", "temprature", "did you mean temperature?"),
        ("chat", "maxTokens", "did you mean max_tokens?"),
        ("chat", "top-p", "did you mean top_p?"),
        ("chat", "stops", "did you mean stop?"),
        ("chat", "response_fromat", "did you mean response_format?"),
        ("chat", "max_output_tokens", "it is a field of /v1/responses, not of this endpoint"),
        (
            "completion",
            "messages",
            "it is a field of /v1/chat/completions and /v1/messages and /tokenize, not of this endpoint",
        ),
        (
            "responses",
            "max_tokens",
            "it is a field of /v1/chat/completions and /v1/completions and /v1/messages, not of this endpoint",
        ),
    ],
)
def test_what_seems_to_be_meant_is_not_ignored(endpoint: str, field: str, advice: str) -> None:
    error = refusal(endpoint, {field: 1})

    assert error.violations[0].field == field
    assert error.message == f"Unrecognized request argument supplied: {field}; {advice}"


def test_a_misspelt_field_of_an_object_inside_is_found_too() -> None:
    message = refusal("chat", {"messages": [{"role": "user", "tool_call": []}]})
    form = refusal("chat", {"response_format": {"type": "json_schema", "json_schemas": {}}})

    assert (message.violations[0].field, message.violations[0].description) == (
        "messages[0].tool_call",
        "is not known here; did you mean tool_calls?",
    )
    assert form.violations[0].field == "response_format.json_schema"
    assert refusal("chat", {"structured_outputs": {"grammer": "a"}}).violations[0].field == "structured_outputs.grammer"


def test_only_so_many_fields_are_ignored() -> None:
    few, many = ({f"x_{number}": 1 for number in range(count)} for count in (32, 33))

    assert read("chat", few)[1].count("x_") == 32
    assert "at most 32 are ignored" in refusal("chat", many).message
    messages = [{"role": "user", "content": "x", f"x_{number}": 1} for number in range(33)]
    assert "at most 32 are ignored" in refusal("chat", {"messages": messages}).message


def test_other_servers_names_of_what_there_is_are_honoured() -> None:
    fields = {"repeat_penalty": 1.5, "n_predict": 7, "grammar": "start: /a/", "enable_thinking": False}

    chat, header = read("chat", fields)

    assert (chat.sampling.repetition_penalty, chat.stop.max_new_tokens) == (1.5, 7)
    assert chat.constraint.grammar == "start: /a/"
    assert json.loads(chat.chat.template_options_json) == {"enable_thinking": False}
    assert not header
    assert not read("chat", {"n_predict": -1})[0].stop.HasField("max_new_tokens")
    schema = {"type": "array"}
    assert json.loads(read("chat", {"json_schema": schema})[0].constraint.json_schema) == schema
    form = {"type": "json_object", "schema": schema}
    assert json.loads(read("chat", {"response_format": form})[0].constraint.json_schema) == schema


@pytest.mark.parametrize("kind", [{"json": {"type": "array"}}, {"json": '{"type": "array"}'}, {"json_object": True}])
def test_json_with_or_without_line_breaks_can_be_asked_for(kind: dict[str, Any]) -> None:
    def options(**more: Any) -> Any:
        schema = read("chat", {"structured_outputs": {**kind, **more}})[0].constraint.json_schema
        return json.loads(schema).get("x-guidance")

    assert options(disable_any_whitespace=True) == {"whitespace_flexible": False}
    assert options(disable_any_whitespace=False) == {"whitespace_flexible": True}
    assert options() is None


@pytest.mark.parametrize(
    ("endpoint", "form"),
    [
        ("chat", lambda tools: {"allowed_tools": tools}),
        ("responses", lambda tools: tools),
    ],
)
@pytest.mark.parametrize("mode", ["auto", "required"])
def test_only_allowed_tools_are_offered(endpoint: str, form: Any, mode: str) -> None:
    def in_shape(tool: Any) -> Any:
        return tool if endpoint == "chat" else {"type": "function", **tool["function"]}

    allowed = {"mode": mode, "tools": [{"type": "web_search"}, in_shape(OTHER)]}
    choice = {"type": "allowed_tools", **form(allowed)}
    generation, _ = read(endpoint, {"tools": [in_shape(FUNCTION), in_shape(OTHER)], "tool_choice": choice})

    assert [json.loads(tool)["function"]["name"] for tool in generation.chat.tools_json] == ["g"]
    assert generation.chat.tool_choice.mode == MODES[mode]


def test_each_tool_is_not_compared_with_each_allowed_one() -> None:
    compared: list[str] = []

    class Name(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            compared.append(self)
            return str.__eq__(self, other)  # type: ignore[arg-type]

        __hash__ = str.__hash__

    tools = [{"type": "function", "function": {"name": Name(f"f{index}")}} for index in range(300)]
    allowed = [{"type": "function", "function": {"name": Name(f"g{index}")}} for index in range(300)]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": allowed}}
    generation, _ = read("chat", {"tools": tools, "tool_choice": choice})

    assert not generation.chat.tools_json
    assert len(compared) < 1000


def test_a_demanded_call_wins_over_the_format_of_texts() -> None:
    form = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}}
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    responses, _ = read("responses", {"text": form, "tools": [tool], "tool_choice": "required"})
    chat, _ = read("chat", {"response_format": {"type": "json_object"}, "tools": [FUNCTION], "tool_choice": "required"})

    assert not responses.HasField("constraint")
    assert not chat.HasField("constraint")
    assert read("responses", {"text": form, "tools": [tool]})[0].HasField("constraint")


def test_a_conversation_with_other_servers_items_goes_on() -> None:
    items = [
        {"role": "user", "content": "hi"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "x"}},
        {"type": "custom_tool_call", "call_id": "c1", "name": "f", "input": 'a "b"'},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "done"},
    ]
    generation, header = read("responses", {"input": items})

    _, call, result = generation.chat.messages
    assert json.loads(call.parts[0].tool_call.arguments_json) == {"input": 'a "b"'}
    assert (result.role, result.parts[0].tool_result.text) == ("tool", "done")
    assert header == "input[type=web_search_call]"


async def test_answers_and_streams_say_what_was_ignored(harness: Any, http: httpx.AsyncClient) -> None:
    for stream in (False, True):
        body = {"model": "tiny", "prompt": "x", "stream": stream, "max_tokens": 1, "user": "me", "do_magic": 1}
        running = asyncio.ensure_future(http.post("/v1/completions", json=body))
        submit = await harness.scheduler.next_admitted()
        harness.scheduler.tokens(submit.handle, [0], finish=END)

        assert (await running).headers["x-ignored-fields"] == "do_magic, user"
    plain = await http.post("/tokenize", json={"model": "tiny", "prompt": "x"})
    assert "x-ignored-fields" not in plain.headers


async def test_a_name_cannot_write_into_the_answer_s_head(harness: Any, http: httpx.AsyncClient) -> None:
    body = {"model": "tiny", "prompt": "x", "evil\r\nset-cookie: a=b": 1, "\u00e4" * 1000: 1}
    response = await http.post("/tokenize", json=body)

    assert response.status_code == 200
    assert "set-cookie" not in response.headers
    names = response.headers["x-ignored-fields"]
    assert names == "evil??set-cookie??a=b, " + "?" * 64


@pytest.mark.parametrize("count", [1, 2])
async def test_every_chunk_has_the_usage_so_far_where_it_is_asked_for(
    harness: Any, sdk: openai.AsyncOpenAI, count: int
) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    call = sdk.completions.create(model="tiny", prompt="hello", n=count, stream=True, stream_options=options)
    opening = asyncio.ensure_future(call)
    submit = await harness.scheduler.next_admitted()
    stream = await opening
    ids = harness.ids("hello")
    for index in range(count):
        for token_id in ids[:-1]:
            harness.scheduler.tokens(submit.handle, [token_id], candidate=index)
        harness.scheduler.tokens(submit.handle, ids[-1:], candidate=index, finish=END)
    chunks = [chunk async for chunk in stream]

    assert all(chunk.usage and chunk.usage.prompt_tokens == len(submit.prompt_token_ids) for chunk in chunks)
    for index in range(count):
        counts = [
            chunk.usage.completion_tokens for chunk in chunks if chunk.choices and chunk.choices[0].index == index
        ]
        assert counts == sorted(counts)
        assert counts[-1] == len(ids)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == count * len(ids)


class TestStrict:
    @pytest.fixture
    def config(self, config: GatewayConfig) -> GatewayConfig:
        return dataclasses.replace(config, unknown_fields="refuse")

    @pytest.mark.parametrize("field", ["do_magic", "store", "client_metadata"])
    async def test_a_strict_gateway_refuses_what_it_does_not_know(self, http: httpx.AsyncClient, field: str) -> None:
        body = {"model": "tiny", "prompt": "x", field: True}
        response = await http.post("/v1/completions", json=body)

        assert response.status_code == 400
        assert response.json()["error"]["param"] == field
