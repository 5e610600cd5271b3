from __future__ import annotations

import asyncio
import pydoc
import subprocess
import sys
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from octavo.inference.v1 import generation_pb2, model_pb2
from octavo.services.client import BatchResult, Client, OctavoError, ProtocolError, Stream, calls
from octavo.services.client import client as client_module
from octavo.services.client.request import build_generation


def make_status(code: grpc.StatusCode, message: str, *details: Any) -> status_pb2.Status:
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


async def read(stream: Stream) -> str:
    return "".join([delta.text async for delta in stream])


async def test_a_stream_gives_deltas_then_usage(gateway: Any) -> None:
    async with Client(gateway.address) as client:
        stream = client.stream("Hi", model="fake", max_new_tokens=9, temperature=0.5, stop=["x"])

        text = await read(stream)

    assert text == "Hello, world!"
    assert stream.request_id == "r-1"
    assert stream.completed is not None
    assert stream.completed.usage.output_tokens == 4
    assert list(stream.finished) == [0]
    (request,) = gateway.requests
    assert request.text == "Hi"
    assert request.stop.max_new_tokens == 9
    assert request.stop.stop_sequences == ["x"]
    assert request.sampling.temperature == 0.5
    assert not request.sampling.HasField("top_p")  # left out, so that the model's own default holds


async def test_generate_returns_the_whole_answer(gateway: Any) -> None:
    async with Client(gateway.address, token="secret") as client:
        result = await client.generate(messages=[{"role": "user", "content": "Hi"}], request_id="mine")

    assert result.text == "Hello, world!"
    assert result.finish_reason == "END_OF_SEQUENCE"
    assert result.usage.prompt_tokens == 5
    assert gateway.requests[0].model == "fake"  # the only one there is
    assert gateway.requests[0].chat.messages[0].parts[0].text == "Hi"
    assert gateway.metadata[0]["x-request-id"] == "mine"
    assert gateway.metadata[0]["authorization"] == "Bearer secret"


async def test_without_a_model_the_server_must_have_just_one(gateway: Any) -> None:
    gateway.models.append(model_pb2.Model(name="other"))

    async with Client(gateway.address) as client:
        with pytest.raises(ValueError, match="the server has fake, other"):
            await read(client.stream("Hi"))


async def test_the_small_calls(gateway: Any) -> None:
    async with Client(gateway.address) as client:
        assert [model.name for model in await client.models()] == ["fake"]
        assert await client.tokenize("ab") == [[97, 98]]
        assert len(await client.tokenize(["a", "b"], messages=[{"role": "user", "content": "x"}])) == 3
        assert await client.detokenize([[97, 98], [99]]) == ["ab", "c"]
        assert (await client.load())[0].running == 2
        assert (await client.cancel("r-9")).was_running
    assert gateway.cancelled_ids == ["r-9"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("lost event", "event 3 came where 2 was due"),
        ("lost tokens", "token 3 of candidate 0 came where 2 was due"),
        ("no Started", "Started comes first and once"),
        ("no Completed", "the stream ended without Completed"),
        ("wrong count", "ended with 9 tokens, 4 arrived"),
        ("late delta", "candidate 0, which has ended"),
        ("after the end", "came after Completed"),
        ("wrong candidate", "candidate 3, which has ended or was not asked for"),
        ("unfinished", "Completed came before the end of candidate 0"),
    ],
)
async def test_a_broken_stream_is_a_protocol_error(gateway: Any, fake: Any, damage: str, message: str) -> None:
    answer = gateway.answer
    match damage:
        case "lost event":
            del answer[2]
        case "lost tokens":
            answer[3].delta.token_offset = 3
        case "no Started":
            answer[0].delta.text = "x"
        case "no Completed":
            del answer[-1]
        case "wrong count":
            answer[-2].candidate_finished.output_tokens = 9
        case "late delta":
            answer[-1].delta.token_offset = 4
        case "after the end":
            answer.append(fake.Event(sequence_number=len(answer), progress=generation_pb2.Progress()))
        case "wrong candidate":
            answer[1].delta.candidate_index = 3
        case "unfinished":
            answer[-2].progress.queue_position = 1

    async with Client(gateway.address) as client:
        with pytest.raises(ProtocolError, match=message):
            await read(client.stream("Hi", model="fake"))


async def test_offsets_of_a_continued_output_go_on(gateway: Any) -> None:
    for index, event in enumerate(gateway.answer[1:5]):
        event.delta.token_offset = index + 2
    gateway.answer[-2].candidate_finished.output_tokens = 6

    async with Client(gateway.address) as client:
        assert await read(client.stream("Hi", model="fake", continue_output=[7, 8])) == "Hello, world!"
        with pytest.raises(ProtocolError, match="token 2 of candidate 0 came where 3 was due"):
            await read(client.stream("Hi", model="fake", continue_output=[7, 8, 9]))


async def test_token_ids_must_be_as_many_as_the_tokens(gateway: Any) -> None:
    async with Client(gateway.address) as client:
        with pytest.raises(ProtocolError, match="a delta of 1 tokens has 0 token ids"):
            await read(client.stream("Hi", model="fake", return_token_ids=True))


async def test_an_error_carries_what_the_server_attached(gateway: Any) -> None:
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(1500)
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="generation.sampling.top_p", description="must be at most 1")
    status = make_status(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "the queue is full",
        error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="octavo", metadata={"limit": "8"}),
        error_details_pb2.RequestInfo(request_id="r-7"),
        retry,
        bad,
    )
    gateway.errors = [(status, False), (status, False)]

    async with Client(gateway.address) as client:
        with pytest.raises(OctavoError) as caught:
            await read(client.stream("Hi", model="fake"))
        with pytest.raises(OctavoError, match="the queue is full"):
            await client.generate("Hi", model="fake")

    error = caught.value
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (error.reason, error.metadata, error.request_id) == ("QUEUE_FULL", {"limit": "8"}, "r-7")
    assert error.retry_after == 1.5
    assert error.violations[0].field == "generation.sampling.top_p"
    assert "QUEUE_FULL" in str(error)
    assert "retry in 1.5 s" in str(error)


async def test_details_that_are_not_a_status_leave_the_plain_error(gateway: Any, fake: Any) -> None:
    class Broken:
        code = grpc.StatusCode.INTERNAL.value[0]
        message = "boom"

        def SerializeToString(self) -> bytes:  # noqa: N802
            return b"\xff\xff\xff"

    gateway.errors = [(Broken(), False)]

    async with Client(gateway.address) as client:
        with pytest.raises(OctavoError, match="boom") as caught:
            await read(client.stream("Hi", model="fake"))

    assert caught.value.code is grpc.StatusCode.INTERNAL
    assert caught.value.reason == ""


async def test_a_call_that_a_stopping_server_dropped_is_tried_again_and_one_that_was_cancelled_is_not(
    gateway: Any,
) -> None:
    dropped = make_status(grpc.StatusCode.CANCELLED, "CANCELLED")
    info = error_details_pb2.ErrorInfo(reason="ADMIN_CANCELLED", domain="octavo")
    cancelled = make_status(grpc.StatusCode.CANCELLED, "by an operator", info)
    async with Client(gateway.address) as client:
        gateway.errors = [(dropped, False)]
        assert await read(client.stream("Hi", model="fake")) == "Hello, world!"

        gateway.errors = [(cancelled, False)]
        with pytest.raises(OctavoError, match="by an operator"):
            await read(client.stream("Hi", model="fake"))


async def test_unavailable_is_retried_before_admission_only(gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    status = make_status(grpc.StatusCode.UNAVAILABLE, "no workers")
    async with Client(gateway.address) as client:
        gateway.errors = [(status, False), (status, False)]
        assert await read(client.stream("Hi", model="fake")) == "Hello, world!"
        assert len(gateway.requests) == 3

    async def first_of(call: Any, timeout_s: float | None) -> Any:
        headers = asyncio.ensure_future(call.initial_metadata())
        headers.add_done_callback(lambda _: gateway.headers_arrived.set())
        return await calls.first_of(call, timeout_s)

    monkeypatch.setattr(client_module, "first_of", first_of)
    async with Client(gateway.address, resume_for_s=0) as client:  # one that resumes would begin again: see test_resume
        gateway.errors = [(status, True)]
        with pytest.raises(OctavoError, match="no workers"):
            await read(client.stream("Hi", model="fake"))
        assert len(gateway.requests) == 4


async def test_an_unreachable_server_is_unavailable() -> None:
    async with Client("unix:/nonexistent/socket") as client:
        with pytest.raises(OctavoError) as caught:
            await client.models()

    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


async def test_cancel_ends_the_iteration_and_the_work(gateway: Any, fake: Any) -> None:
    gateway.answer = fake.events(["Hello"], finish=False)
    gateway.hang = True
    async with Client(gateway.address) as client:
        stream = client.stream("Hi", model="fake")
        texts = []
        async for delta in stream:
            texts.append(delta.text)
            stream.cancel()

        await gateway.cancelled.wait()
    assert texts == ["Hello"]
    assert stream.completed is None


async def test_leaving_the_context_ends_the_work(gateway: Any, fake: Any) -> None:
    gateway.answer = fake.events(["Hello"], finish=False)
    gateway.hang = True
    async with Client(gateway.address) as client:
        async with client.stream("Hi", model="fake") as stream:
            async for _ in stream:
                break

        await gateway.cancelled.wait()


async def test_a_deadline_is_an_error(gateway: Any, fake: Any) -> None:
    gateway.hang = True
    gateway.answer = fake.events(["Hello"], finish=False)
    async with Client(gateway.address, timeout_s=0.2) as client:
        with pytest.raises(OctavoError) as caught:
            await read(client.stream("Hi", model="fake"))

        assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert str(caught.value) == "took longer than timeout_s=0.2 (DEADLINE_EXCEEDED)"
        with pytest.raises(OctavoError, match=r"took longer than timeout_s=0.1 "):
            await read(client.stream("Hi", model="fake", timeout_s=0.1))


def test_every_option_reaches_its_field() -> None:
    generation = build_generation(
        "m",
        None,
        [{"role": "user", "content": "Hi"}],
        None,
        {
            "seed": 7,
            "logit_bias": {3: 1.5},
            "min_new_tokens": 2,
            "stop": "END",
            "return_token_ids": True,
            "logprobs": 4,
            "priority": 3,
            "json_schema": {"type": "object"},
            "tools": [{"name": "f"}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "continue_final_message": True,
            "continue_output": [1, 2],
            "candidate_count": 2,
        },
    )

    assert generation.sampling.seed == 7
    assert generation.sampling.logit_bias[3] == 1.5
    assert generation.stop.min_new_tokens == 2
    assert generation.stop.stop_sequences == ["END"]
    assert generation.output.token_ids
    assert generation.output.logprobs == 4
    assert generation.scheduling.priority == 3
    assert generation.constraint.json_schema == '{"type": "object"}'
    assert generation.chat.tools_json == ['{"name": "f"}']
    assert generation.chat.tool_choice.mode == generation_pb2.ToolChoice.MODE_REQUIRED
    assert generation.chat.tool_choice.name == "f"
    assert generation.chat.continue_final_message
    assert generation.continue_output.ids == [1, 2]
    assert generation.candidate_count == 2


def test_half_a_character_is_a_value_that_no_field_can_hold() -> None:
    with pytest.raises(ValueError, match=r"prompt='.ud800' is not possible"):
        build_generation("m", "\ud800", None, None, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "a", "token_ids": [1]}, "exactly one of"),
        ({}, "exactly one of"),
        ({"prompt": "a", "temprature": 1}, "did you mean 'temperature'"),
        ({"prompt": "a", "tools": []}, "only be given with messages"),
        ({"prompt": "a", "regex": "a", "any_json": True}, "give only one of"),
        ({"messages": [{"role": "user", "text": "x"}]}, "'role' and 'content'"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, r"content=\['x'\] is not possible"),
        ({"prompt": 3}, "prompt=3 is not possible"),
        ({"token_ids": ["a"]}, r"token_ids=\['a'\] is not possible"),
        ({"prompt": "a", "temperature": "hot"}, "temperature='hot' is not possible"),
        ({"prompt": "a", "temperature": 0, "max_new_tokens": 1.5}, "max_new_tokens=1.5 is not possible"),
        ({"prompt": "a", "stop": [1]}, r"stop=\[1\] is not possible"),
        ({"prompt": "a", "return_token_ids": "x"}, "return_token_ids='x' is not possible"),
        ({"prompt": "a", "candidate_count": "x"}, "candidate_count='x' is not possible"),
        ({"prompt": "a", "choices": "yes"}, "choices='yes' is not possible"),
        ({"prompt": "a", "regex": 1}, "regex=1 is not possible"),
    ],
)
def test_a_wrong_argument_is_told_before_anything_is_sent(arguments: dict[str, Any], message: str) -> None:
    prompt, messages, token_ids = (arguments.get(name) for name in ("prompt", "messages", "token_ids"))
    options: Any = {name: value for name, value in arguments.items() if name not in ("prompt", "messages", "token_ids")}

    with pytest.raises(TypeError, match=message):
        build_generation("m", prompt, messages, token_ids, options)


@pytest.mark.parametrize(
    ("choice", "mode"), [("auto", "MODE_AUTO"), ("none", "MODE_NONE"), ("required", "MODE_REQUIRED")]
)
def test_a_tool_choice_in_one_word(choice: str, mode: str) -> None:
    generation = build_generation("m", None, [{"role": "user", "content": "Hi"}], None, {"tool_choice": choice})

    assert generation.chat.tool_choice.mode == generation_pb2.ToolChoice.Mode.Value(mode)


@pytest.mark.parametrize("choice", ["any", {"type": "function"}, {"type": "function", "function": {"name": ""}}])
def test_a_tool_choice_that_is_none_is_told_before_anything_is_sent(choice: Any) -> None:
    with pytest.raises(ValueError, match="tool_choice is one of auto, none, required"):
        build_generation("m", None, [{"role": "user", "content": "Hi"}], None, {"tool_choice": choice})


async def test_what_is_shown_of_a_result_is_its_text(gateway: Any) -> None:
    async with Client(gateway.address) as client:
        result = await client.generate("Hi")
    shown = "Result('Hello, world!', finish_reason='END_OF_SEQUENCE', output_tokens=4)"
    assert repr(result) == shown
    assert repr(BatchResult(0, result, None)) == f"BatchResult(index=0, result={shown}, error=None)"


def test_the_package_lists_what_it_has() -> None:
    import octavo

    assert set(octavo.__all__) <= set(dir(octavo))
    assert "LLM" in pydoc.render_doc(octavo)


def test_the_client_needs_no_torch_and_no_numpy() -> None:
    code = "import sys, octavo.services.client; print([m for m in ('torch', 'numpy', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
