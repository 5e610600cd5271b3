"""The OpenAI-compatible listener on a real deployment, through OpenAI's own clients for Python and Node."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageFunctionToolCall

from octavo.services.client.stream import finish_reason_name
from octavo.services.gateway.http.chat_request import read_chat_call

from . import node_client
from .stack import Stack, answer, until_idle, until_running

pytestmark = pytest.mark.parametrize("stack", [("--ui",)], indirect=True, ids=["ui"])
MODEL = "smollm2-135m-instruct"
CAPITAL: Any = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY: Any = {"temperature": 0, "max_tokens": 24}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather of a city", "parameters": PARAMETERS},
}


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


def weather(*cities: str) -> Any:
    """A conversation with calls for these cities. A small model repeats the pattern, and calls for the last one."""
    messages: list[Any] = []
    for number, city in enumerate(cities[:-1]):
        function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
        call = {"id": f"c{number}", "type": "function", "function": function}
        messages += [
            {"role": "user", "content": f"What is the weather in {city}?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"c{number}", "content": "sunny"},
            {"role": "assistant", "content": f"It is sunny in {city}."},
        ]
    return [*messages, {"role": "user", "content": f"What is the weather in {cities[-1]}?"}]


def test_a_tool_is_called_whole_and_streamed(sdk: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": weather("Rome", "Paris"), "tools": [TOOL], **GREEDY, "max_tokens": 60}
    whole = sdk.chat.completions.create(**options).choices[0]
    chunks = list(sdk.chat.completions.create(**options, stream=True))

    assert whole.message.tool_calls is not None
    (call,) = whole.message.tool_calls
    fragments = [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or ()]
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    assert (whole.finish_reason, call.function.name) == ("tool_calls", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    assert len(fragments) > 2
    assert "".join(each.function.arguments or "" for each in fragments if each.function) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


async def test_a_tool_is_called_over_grpc_with_the_same_arguments(stack: Stack, sdk: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": weather("Rome", "Paris"), "tools": [TOOL], **GREEDY, "max_tokens": 60}
    (http,) = sdk.chat.completions.create(**options).choices[0].message.tool_calls or ()
    chat = read_chat_call({**options, "messages": weather("Rome", "Paris")}, {}).requests[0].generation.chat
    async with stack.client() as client:
        stream = client.stream(
            messages=list(chat.messages), tools=list(chat.tools_json), temperature=0, max_new_tokens=60
        )
        fragments = [call async for delta in stream for call in delta.tool_calls]

    assert isinstance(http, ChatCompletionMessageFunctionToolCall)
    assert fragments[0].name == http.function.name
    assert "".join(call.arguments_json for call in fragments) == http.function.arguments
    assert finish_reason_name(stream.finished[0].finish_reason) == "TOOL_CALL"


def test_without_a_choice_no_tool_is_called(sdk: openai.OpenAI) -> None:
    call = sdk.chat.completions.create(
        model=MODEL, messages=weather("Rome", "Paris"), tools=[TOOL], tool_choice="none", **GREEDY
    )

    assert call.choices[0].message.tool_calls is None
    assert call.choices[0].finish_reason != "tool_calls"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_is_demanded_is_made_whatever_was_asked(sdk: openai.OpenAI, choice: Any) -> None:
    call = sdk.chat.completions.create(
        model=MODEL, messages=CAPITAL, tools=[TOOL], tool_choice=choice, seed=3, max_tokens=200
    )

    (made,) = call.choices[0].message.tool_calls or ()
    assert isinstance(made, ChatCompletionMessageFunctionToolCall)
    assert made.function.name == "get_weather"
    assert isinstance(json.loads(made.function.arguments)["city"], str)
    assert call.choices[0].finish_reason == "tool_calls"


def test_a_response_has_the_form_that_is_asked_for(sdk: openai.OpenAI) -> None:
    schema = {**PARAMETERS, "properties": {"city": {"enum": ["Paris", "Rome"]}}, "additionalProperties": False}
    form: Any = {"format": {"type": "json_schema", "name": "answer", "schema": schema}}
    response = sdk.responses.create(model=MODEL, input=CAPITAL, text=form, temperature=0, max_output_tokens=60)

    assert json.loads(response.output_text) == {"city": "Paris"}


def test_the_answer_ends_after_one_call_where_calls_are_not_parallel(sdk: openai.OpenAI) -> None:
    call = sdk.chat.completions.create(
        model=MODEL,
        messages=weather("Rome", "Oslo", "Paris"),
        tools=[TOOL],
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=100,
    )

    assert len(call.choices[0].message.tool_calls or ()) == 1
    assert call.choices[0].finish_reason == "tool_calls"


def test_a_response_has_items_whole_and_streamed(sdk: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "input": CAPITAL, "temperature": 0, "max_output_tokens": 24}
    whole = sdk.responses.create(**options)
    events = list(sdk.responses.create(**options, stream=True))

    assert "Paris" in whole.output_text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text == whole.output_text
    assert last.response.usage is not None
    assert whole.usage is not None
    assert last.response.usage.output_tokens == whole.usage.output_tokens
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_a_response_calls_a_tool_and_takes_its_output(sdk: openai.OpenAI) -> None:
    items: Any = [
        {"role": "user", "content": "What is the weather in Rome?"},
        {"type": "function_call", "call_id": "1", "name": "get_weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "1", "output": "sunny"},
        {"role": "assistant", "content": "It is sunny in Rome."},
        {"role": "user", "content": "What is the weather in Paris?"},
    ]
    tool: Any = {"type": "function", **TOOL["function"]}
    response = sdk.responses.create(model=MODEL, input=items, tools=[tool], temperature=0, max_output_tokens=60)
    (call,) = [item for item in response.output if item.type == "function_call"]
    items += [call.model_dump(), {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}]
    after = sdk.responses.create(model=MODEL, input=items, tools=[tool], temperature=0, max_output_tokens=20)

    assert json.loads(call.arguments) == {"city": "Paris"}
    assert after.output_text


def test_the_stream_helpers_put_chat_and_response_together(sdk: openai.OpenAI) -> None:
    with sdk.chat.completions.stream(model=MODEL, messages=CAPITAL, temperature=0, max_tokens=24) as chat:
        completion = chat.get_final_completion()
    with sdk.responses.stream(model=MODEL, input=CAPITAL, temperature=0) as stream:
        response = stream.get_final_response()

    assert "Paris" in (completion.choices[0].message.content or "")
    assert "Paris" in response.output_text


async def test_a_client_that_leaves_frees_what_its_call_held(stack: Stack) -> None:
    async with openai.AsyncOpenAI(base_url=f"{stack.http_url}/v1", api_key="none", max_retries=0) as sdk:
        endless: Any = {"model": MODEL, "max_tokens": 4000, "extra_body": {"ignore_eos": True}}
        chat = await sdk.chat.completions.create(messages=CAPITAL, stream=True, **endless)
        await anext(aiter(chat))
        await chat.close()
        response = await sdk.responses.create(
            model=MODEL, input="Count.", max_output_tokens=4000, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(aiter(response))
        await response.close()
        async with stack.client() as client:
            async with asyncio.timeout(60):  # what is counted then is of the call that comes
                await until_idle(client)
            whole = asyncio.ensure_future(sdk.completions.create(prompt="One", **endless))
            async with asyncio.timeout(60):
                await until_running(client)
            whole.cancel()
            async with asyncio.timeout(60):
                await until_idle(client)


@pytest.mark.parametrize(
    ("options", "kind", "param"),
    [
        ({"model": "nothing"}, openai.NotFoundError, "model"),
        ({"temperature": 1e9}, openai.BadRequestError, "temperature"),
        ({"top_p": 0}, openai.BadRequestError, "top_p"),
        ({"n": 99}, openai.BadRequestError, "n"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "max_tokens"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "x " * 20_000}]}, openai.BadRequestError, "messages"),
        ({"logit_bias": {"x": 1}}, openai.BadRequestError, "logit_bias"),
        ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature"),
        ({"audio": {"voice": "x", "format": "wav"}}, openai.BadRequestError, "audio"),
    ],
)
def test_a_wrong_call_raises_the_sdk_s_own_error(
    sdk: openai.OpenAI, options: Any, kind: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(kind) as caught:
        sdk.chat.completions.create(**{"model": MODEL, "messages": CAPITAL, **options})

    assert caught.value.param == param
    assert caught.value.request_id


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1, "temperature": 1, "seed": 1},
        {"min_p": 1, "temperature": 1, "seed": 2},
        {"repetition_penalty": 1.0, "temperature": 0},
        {"allowed_token_ids": [10, 11], "temperature": 0},
        {"logit_bias": {"10": 100}, "temperature": 0},
        {"stop_token_ids": [0], "temperature": 0},
        {"skip_special_tokens": False, "temperature": 0},
        {"prompt_cache_key": "k", "cache_salt": "s", "priority": 1, "temperature": 0},
        {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "temperature": 0},
    ],
)
def test_further_parameters_have_their_effect(sdk: openai.OpenAI, options: dict[str, Any]) -> None:
    def ask(**body: Any) -> list[int]:
        extra = {"return_token_ids": True, "min_tokens": 4, **body}
        answer = sdk.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=4, extra_body=extra)
        token_ids: list[int] = answer.choices[0].model_dump()["token_ids"]
        return token_ids

    plain, other = ask(temperature=0), ask(**options)

    if "allowed_token_ids" in options:
        assert set(other) <= {10, 11}
    elif "logit_bias" in options:
        assert other == [10] * 4
    else:
        assert other == plain


def test_token_ids_go_in_and_come_out(sdk: openai.OpenAI, stack: Stack) -> None:
    prompt = "The capital of France is"
    tokens = httpx.post(f"{stack.http_url}/tokenize", json={"model": MODEL, "prompt": prompt}).json()["tokens"]
    options: Any = {"model": MODEL, "max_tokens": 6, "temperature": 0}
    text = sdk.completions.create(**options, prompt=prompt, extra_body={"return_token_ids": True}).choices[0]
    ids = sdk.completions.create(**options, prompt=tokens).choices[0]

    assert text.text == ids.text
    assert text.model_dump()["prompt_token_ids"] == tokens
    decoded = httpx.post(
        f"{stack.http_url}/detokenize", json={"model": MODEL, "tokens": text.model_dump()["token_ids"]}
    )
    assert decoded.json()["prompt"] == text.text


def test_the_service_describes_itself(stack: Stack) -> None:
    document = httpx.get(f"{stack.http_url}/openapi.json").json()
    preflight = httpx.options(
        f"{stack.http_url}/v1/models", headers={"origin": "http://x", "access-control-request-method": "GET"}
    )
    named = httpx.get(f"{stack.http_url}/v1/models", headers={"x-request-id": "mine", "origin": "http://x"})

    assert "/v1/responses" in document["paths"]
    assert "access-control-allow-origin" not in {**preflight.headers, **named.headers}  # off, unless switched on
    assert named.headers["x-request-id"] == "mine"


@pytest.fixture(scope="module")
def node(stack: Stack) -> dict[str, str | None]:
    return node_client.run_checks(f"{stack.http_url}/v1", MODEL)


@pytest.mark.parametrize("name", node_client.NAMES)
def test_openai_s_node_client(node: dict[str, str | None], name: str) -> None:
    assert node[name] is None, node[name]


def test_the_chat_page_works_in_a_browser(stack: Stack) -> None:
    seen = node_client.use_page(stack.http_url)

    assert "Paris" in seen["answer"]
    assert "max_tokens" in seen["error"]
    assert seen["model"] == MODEL
    assert re.fullmatch(r"\d+ of \d+ blocks", seen["kv"])
    assert (seen["images"], seen["problems"]) == (0, [])
