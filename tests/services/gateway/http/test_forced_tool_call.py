"""A tool call that has to be made, over HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2
from octavo.services.gateway.config import GatewayConfig
from octavo.services.gateway.requests.parsing import force_tool_call

END = common_pb2.FINISH_REASON_END_OF_SEQUENCE
USER: Any = [{"role": "user", "content": "hi"}]
TOOLS: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.fixture
def model_path(tmp_path: Path, tools: Any) -> Path:
    return tools.write_model(tmp_path / "tiny", "{{ tools }}<tool_call>{{ messages[0].content }}", context=4096)


@pytest.fixture
def config(config: GatewayConfig) -> GatewayConfig:
    return dataclasses.replace(config, constraint_processes=1)


@pytest.mark.parametrize(
    ("choice", "names"), [("required", ["f", "g"]), ({"type": "function", "function": {"name": "g"}}, ["g"])]
)
async def test_a_call_that_is_demanded_constrains_the_output(
    harness: Any, sdk: openai.AsyncOpenAI, choice: Any, names: list[str]
) -> None:
    defined = {"$defs": {"n": {"type": "integer"}}, "type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}
    tools: Any = [*TOOLS, {"type": "function", "function": {"name": "g", "parameters": defined}}]
    call = sdk.chat.completions.create(model="tiny", messages=USER, tools=tools, tool_choice=choice)
    running = asyncio.ensure_future(call)
    submit = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(submit.handle, [*harness.ids('{"name": "g", "arguments": {"n": 1}}'), 0], finish=END)
    answer = await running

    (made,) = answer.choices[0].message.tool_calls or ()
    assert (made.function.name, made.function.arguments) == ("g", '{"n": 1}')
    assert answer.choices[0].finish_reason == "tool_calls"
    grammar = submit.constraint.grammar
    assert [f'"const": "{name}"' in grammar.replace('\\"', '"') for name in ("f", "g")] == [
        name in names for name in ("f", "g")
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": {"type": "function", "function": {"name": "unknown"}}},
        {"tool_choice": "required", "tools": []},
        {"tool_choice": "sometimes"},
    ],
)
async def test_a_choice_that_cannot_be_made_is_refused(http: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    body = {"model": "tiny", "messages": USER, "tools": TOOLS, **fields}
    response = await http.post("/v1/chat/completions", json=body)

    assert (response.status_code, response.json()["error"]["param"]) == (400, "tool_choice")


def test_a_request_stays_as_it_was_so_that_it_can_be_tried_again() -> None:
    generation = generation_pb2.Generation()
    generation.chat.tools_json.append(json.dumps(TOOLS[0]))
    generation.chat.tool_choice.mode = generation_pb2.ToolChoice.MODE_REQUIRED
    before = generation.SerializeToString(deterministic=True)
    forced = force_tool_call(generation)
    assert generation.SerializeToString(deterministic=True) == before
    assert force_tool_call(generation) == forced
    assert forced.HasField("constraint")
