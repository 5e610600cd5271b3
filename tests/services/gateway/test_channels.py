"""A chat model that writes messages in channels: its prompt, its output, and constrained answers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from octavo.common.v1 import common_pb2
from octavo.services.gateway.config import GatewayConfig

SPECIAL = ["<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>"]  # beside every model's own two
CALL = 264
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}"
    "<|end|>{% endif %}{% for call in m.tool_calls or [] %}<|start|>assistant to=functions.{{ call.function.name }}"
    "<|channel|>commentary json<|message|>{{ call.function.arguments | tojson }}<|call|>{% endfor %}{{ m.content }}"
    "{% endfor %}{{ tools and '' }}<|start|>assistant"
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
USER = {"role": "user", "parts": [{"text": "hi"}]}


@pytest.fixture
def template() -> str:
    return TEMPLATE


@pytest.fixture
def model_path(tmp_path: Path, tools: Any, template: str) -> Path:
    folder: Path = tools.write_model(
        tmp_path / "m", template, context=4096, special_tokens=SPECIAL, eos_token_id=[CALL]
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|return|>", "chat_template": template}))
    return folder


@pytest.fixture
def tokenizer(model_path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model_path / "tokenizer.json"))


@pytest.fixture
def config(config: GatewayConfig) -> GatewayConfig:
    return dataclasses.replace(config, model_name="tiny", constraint_processes=1)


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"chat": {"messages": messages or [USER], "tools_json": [json.dumps(TOOL)], **fields}}


async def prompt_of(harness: Any, tokenizer: Tokenizer, **fields: Any) -> str:
    harness.stream(**fields)
    submit = await harness.scheduler.next_admitted()
    text: str = tokenizer.decode(submit.prompt_token_ids, skip_special_tokens=False)
    return text


async def test_reasoning_and_a_call_come_out_of_their_channels(harness: Any, tokenizer: Tokenizer) -> None:
    call = harness.stream(**chat())
    submit = await harness.scheduler.next_admitted()
    text = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.f "
        '<|constrain|>json<|message|>{"x": 1}'
    )
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.token_to_id("<|call|>") == CALL
    finish = common_pb2.FINISH_REASON_END_OF_SEQUENCE
    harness.scheduler.tokens(submit.handle, [*ids, CALL], finish=finish, stop_token_id=CALL)
    events = [response.event async for response in call]

    assert "".join(event.delta.reasoning_text for event in events) == "hm"
    assert "".join(event.delta.text for event in events) == ""
    calls = [call for event in events for call in event.delta.tool_calls]
    assert (calls[0].name, "".join(call.arguments_json for call in calls)) == ("f", '{"x": 1}')
    (finished,) = [event.candidate_finished for event in events if event.HasField("candidate_finished")]
    assert finished.finish_reason == common_pb2.FINISH_REASON_TOOL_CALL


async def test_what_the_model_thought_before_a_call_is_in_the_prompt_under_the_template_s_name(
    harness: Any, tokenizer: Tokenizer
) -> None:
    parts = [{"reasoning": "hm"}, {"tool_call": {"id": "1", "name": "f", "arguments_json": "{}"}}]
    assert await prompt_of(harness, tokenizer, **chat(USER, {"role": "assistant", "parts": parts})) == (
        "<|start|>userhi<|start|>assistant<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.f"
        "<|channel|>commentary json<|message|>{}<|call|><|start|>assistant"
    )


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({"constraint": {"json_schema": '{"type": "object"}'}, **chat()}, "assistant<|channel|>final<|message|>"),
        (
            {"constraint": {"regex": "a"}, "output": {"parsing": {"reasoning_format": "none"}}, **chat()},
            "assistant<|channel|>final<|message|>",
        ),
        (chat(tool_choice={"mode": "MODE_REQUIRED"}), "assistant<|channel|>final<|message|>"),
        (chat(), "<|start|>assistant"),
    ],
)
async def test_an_answer_that_is_constrained_begins_in_the_final_channel(
    harness: Any, tokenizer: Tokenizer, fields: dict[str, Any], end: str
) -> None:
    assert (await prompt_of(harness, tokenizer, **fields)).endswith(end)


@pytest.mark.parametrize("template", [f"{TEMPLATE}<|channel|>final<|message|>"])
async def test_a_final_channel_that_the_template_begins_is_begun_once(harness: Any, tokenizer: Tokenizer) -> None:
    prompt = await prompt_of(harness, tokenizer, **chat(tool_choice={"mode": "MODE_REQUIRED"}))

    assert prompt.endswith("assistant<|channel|>final<|message|>")
    assert prompt.count("<|channel|>") == 1
