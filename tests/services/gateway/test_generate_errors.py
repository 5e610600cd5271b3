"""How a generate call fails: every row of the table that a gateway can cause, with its details."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.gateway.app import Gateway
from octavo.services.gateway.config import GatewayConfig

Code = grpc.StatusCode


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        (
            {"sampling": {"temperature": -1, "top_p": 7}},
            ["generation.sampling.temperature", "generation.sampling.top_p"],
        ),
        ({"text": ""}, ["generation.text"]),
        ({"token_ids": {}}, ["generation.token_ids.ids"]),
        ({"token_ids": {"ids": [1, 272]}}, ["generation.token_ids.ids[1]"]),
        ({"sampling": {"allowed_token_ids": [3, 999]}}, ["generation.sampling.allowed_token_ids[1]"]),
        ({"sampling": {"bad_words": ["a", ""]}}, ["generation.sampling.bad_words[1]"]),
        ({"sampling": {"bad_words": ["a"] * 10_000}}, ["generation.sampling.bad_words"]),
        ({"sampling": {"bad_words": ["a" * 2**20]}}, ["generation.sampling.bad_words[0]"]),
        ({"sampling": {"bad_words": ["q" * 255] * 1024}}, ["generation.sampling.bad_words"]),
        ({"sampling": {"bad_words_token_ids": [{"ids": [1]}]}}, ["generation.sampling.bad_words_token_ids"]),
        ({"sampling": {"logit_bias": {999: 1}}}, ["generation.sampling.logit_bias[999]"]),
        ({"stop": {"stop_token_ids": [272]}}, ["generation.stop.stop_token_ids[0]"]),
        ({"stop": {"min_new_tokens": 5, "max_new_tokens": 4}}, ["generation.stop.min_new_tokens"]),
        ({"continue_output": {"ids": [999]}}, ["generation.continue_output.ids[0]"]),
        ({"continue_output": {"ids": [5, 6]}, "stop": {"max_new_tokens": 2}}, ["generation.continue_output.ids"]),
        ({"continue_output": {"ids": [5]}, "candidate_count": 2}, ["generation.candidate_count"]),
        ({"continue_output": {"ids": [5, 0, 6]}}, ["generation.continue_output.ids[1]"]),
        ({"chat": {"messages": [{"role": "pirate", "parts": [{"text": "x"}]}]}}, ["generation.chat.messages[0].role"]),
        ({"chat": {"messages": [{"role": "critic", "parts": [{"text": "x"}]}]}}, ["generation.chat.messages"]),
        (
            {"chat": {"messages": [{"role": "user", "parts": [{"text": "x"}]}], "tools_json": ["{", "[]"]}},
            ["generation.chat.tools_json[0]", "generation.chat.tools_json[1]"],
        ),
    ],
)
async def test_a_wrong_field_is_named_and_nothing_reaches_the_scheduler(
    harness: Any, tools: Any, fields: dict[str, Any], wrong: list[str]
) -> None:
    failure = await tools.rejection(harness.stream(**fields))

    assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert failure.fields == wrong
    assert await harness.scheduler_is_silent()


async def test_a_stop_string_in_the_continued_output_leaves_nothing_to_produce(harness: Any, tools: Any) -> None:
    fields = {"continue_output": {"ids": harness.ids("a STOP b")}, "stop": {"stop_sequences": ["STOP"]}}

    failure = await tools.rejection(harness.stream(**fields))

    assert (failure.reason, failure.fields) == ("INVALID_FIELD", ["generation.continue_output.ids"])


@pytest.mark.parametrize(
    ("fields", "metadata"),
    [
        ({"text": "x" * 64}, {"prompt": "64", "limit": "64"}),
        ({"text": "x" * 60, "stop": {"max_new_tokens": 5}}, {"prompt": "60", "limit": "64"}),
    ],
)
async def test_what_does_not_fit_the_context_says_how_long_it_is(
    harness: Any, tools: Any, fields: dict[str, Any], metadata: dict[str, str]
) -> None:
    failure = await tools.rejection(harness.stream(**fields))

    assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED")
    info = failure.details["ErrorInfo"]
    assert {key: info.metadata[key] for key in metadata} == metadata
    assert len(failure.fields) == 1


@pytest.mark.parametrize(
    ("fields", "feature"),
    [
        ({"constraint": {"regex": "a"}}, "structured_output"),
        ({"idempotency_key": "k"}, "idempotency"),
        (
            {
                "chat": {
                    "messages": [{"role": "user", "parts": [{"media": {"mime_type": "image/png", "inline": b"x"}}]}]
                }
            },
            "media",
        ),
    ],
)
async def test_a_feature_that_is_off_is_named(harness: Any, tools: Any, fields: dict[str, Any], feature: str) -> None:
    failure = await tools.rejection(harness.stream(**fields))

    assert (failure.code, failure.reason) == (Code.FAILED_PRECONDITION, "FEATURE_DISABLED")
    assert failure.details["PreconditionFailure"].violations[0].subject == feature


async def test_an_unknown_model_and_adapter_are_not_found_with_their_names(harness: Any, tools: Any) -> None:
    generation = harness.generation()
    generation.model = "huge"
    model = await tools.rejection(harness.stub.Generate(generation_pb2.GenerateRequest(generation=generation)))
    adapter = await tools.rejection(harness.stream(adapter="lora"))

    assert (model.code, model.reason) == (Code.NOT_FOUND, "MODEL_NOT_FOUND")
    assert (model.details["ResourceInfo"].resource_type, model.details["ResourceInfo"].resource_name) == (
        "model",
        "huge",
    )
    assert "tiny" in model.message
    assert (adapter.code, adapter.reason) == (Code.NOT_FOUND, "ADAPTER_NOT_FOUND")


async def test_headers_that_contradict_the_body_are_refused_and_equal_ones_are_not(harness: Any, tools: Any) -> None:
    model = await tools.rejection(harness.stream(metadata=(("x-model", "other"),)))
    session = await tools.rejection(harness.stream(metadata=(("x-session-id", "s1"),), scheduling={"session_id": "s2"}))
    harness.stream(metadata=(("x-model", "tiny"), ("x-session-id", "s")), scheduling={"session_id": "s"})

    assert (model.reason, model.fields) == ("INVALID_FIELD", ["generation.model"])
    assert (session.reason, session.fields) == ("INVALID_FIELD", ["generation.scheduling.session_id"])
    await harness.scheduler.next("submit")


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xff\xff",
        # generation { model: "\xff" }: a string that is not UTF-8.
        b"\x0a\x03\x0a\x01\xff",
    ],
)
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_bytes_that_are_no_request_are_an_invalid_argument(
    harness: Any, tools: Any, body: bytes, method: str
) -> None:
    path = f"/octavo.inference.v1.GenerationService/{method}"
    make = harness.channel.unary_unary if method == "Generate" else harness.channel.unary_stream

    failure = await tools.rejection(make(path)(body))

    assert (failure.code, failure.reason) == (Code.INVALID_ARGUMENT, "MALFORMED_REQUEST")
    assert failure.details["RequestInfo"].request_id


async def test_a_request_id_is_cleaned_returned_and_made_up_if_missing(harness: Any, tools: Any) -> None:
    given = await tools.rejection(harness.stream(metadata=(("x-request-id", 'a b;"c' + "d" * 200),), adapter="x"))
    made = await tools.rejection(harness.stream(adapter="x"))

    assert given.trailers["x-request-id"] == given.details["RequestInfo"].request_id == "abc" + "d" * 125
    assert made.trailers["x-request-id"]


@pytest.mark.parametrize(
    ("code", "reason", "retry_after_ms"),
    [
        (Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", 700),
        (Code.RESOURCE_EXHAUSTED, "DEADLINE_UNREACHABLE", 20),
        (Code.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED", 10),
        (Code.UNAVAILABLE, "NO_WORKERS", 1000),
        (Code.UNAVAILABLE, "DRAINING", 5),
        (Code.INVALID_ARGUMENT, "KV_CAPACITY_EXCEEDED", 0),
        (Code.DEADLINE_EXCEEDED, "QUEUE_TIMEOUT", 0),
    ],
)
async def test_a_refusal_by_the_scheduler_keeps_code_reason_and_delay(
    harness: Any, tools: Any, code: Code, reason: str, retry_after_ms: int
) -> None:
    call = harness.stream()
    submit = await harness.scheduler.next("submit")
    harness.scheduler.send(
        rejected=scheduler_pb2.Rejected(
            handle=submit.handle,
            code=code.value[0],
            reason=reason,
            message="no",
            retry_after_ms=retry_after_ms,
            metadata={"k": "v"},
        )
    )

    failure = await tools.rejection(call)

    assert (failure.code, failure.reason, failure.message) == (code, reason, "no")
    assert failure.details["ErrorInfo"].metadata["k"] == "v"
    assert failure.trailers.get("grpc-retry-pushback-ms") == (str(retry_after_ms) if retry_after_ms else None)
    assert ("RetryInfo" in failure.details) == bool(retry_after_ms)
    assert ("QuotaFailure" in failure.details) == (reason == "QUOTA_EXCEEDED")
    assert "x-model-version" not in dict(await call.initial_metadata())
    assert await harness.scheduler_is_silent()


@pytest.mark.parametrize(
    ("code", "reason", "seen_code", "seen_reason"),
    [
        (Code.ABORTED, "STREAM_INTERRUPTED", Code.ABORTED, "STREAM_INTERRUPTED"),
        (Code.UNAVAILABLE, "NO_WORKERS", Code.ABORTED, "STREAM_INTERRUPTED"),
        (Code.DEADLINE_EXCEEDED, "GENERATION_TIMEOUT", Code.DEADLINE_EXCEEDED, "GENERATION_TIMEOUT"),
        (Code.INTERNAL, "WORKER_FAULT", Code.INTERNAL, "WORKER_FAULT"),
        (Code.CANCELLED, "ADMIN_CANCELLED", Code.CANCELLED, "ADMIN_CANCELLED"),
    ],
)
async def test_a_failure_after_admission_comes_after_the_tokens_and_invites_no_blind_retry(
    harness: Any, tools: Any, code: Code, reason: str, seen_code: Code, seen_reason: str
) -> None:
    call = harness.stream()
    submit = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(submit.handle, harness.ids("abc"))
    harness.scheduler.send(
        failed=scheduler_pb2.Failed(handle=submit.handle, code=code.value[0], reason=reason, message="gone")
    )

    assert (await call.read()).event.HasField("started")
    assert (await call.read()).event.delta.text == "abc"
    failure = await tools.rejection(call)

    assert (failure.code, failure.reason) == (seen_code, seen_reason)
    if seen_reason == "STREAM_INTERRUPTED":
        assert failure.details["ErrorInfo"].metadata["last_sequence_number"] == "1"
    assert await harness.scheduler_is_silent()


async def test_cancelling_a_call_cancels_the_request(harness: Any) -> None:
    call = harness.stream()
    submit = await harness.scheduler.next_admitted()
    await call.read()

    call.cancel()

    cancel = await harness.scheduler.next("cancel")
    assert cancel.handle == submit.handle
    assert not cancel.HasField("candidate_index")


async def test_cancelling_a_call_that_waits_for_admission_cancels_the_request(harness: Any) -> None:
    call = harness.stream()
    submit = await harness.scheduler.next("submit")

    call.cancel()

    assert (await harness.scheduler.next("cancel")).handle == submit.handle


async def test_a_deadline_travels_as_remaining_time_and_cancels_the_request_when_it_passes(harness: Any) -> None:
    call = harness.stream(timeout=0.5)
    submit = await harness.scheduler.next_admitted()

    with pytest.raises(aio.AioRpcError) as failure:
        async for _ in call:
            pass

    assert failure.value.code() is Code.DEADLINE_EXCEEDED
    assert 0 < submit.remaining_ms <= 500
    assert (await harness.scheduler.next("cancel")).handle == submit.handle


async def test_without_a_deadline_none_is_sent(harness: Any) -> None:
    harness.stream()

    assert (await harness.scheduler.next("submit")).remaining_ms == 0


async def test_without_a_scheduler_a_call_is_refused_as_retryable(harness: Any, tools: Any) -> None:
    await harness.scheduler.stop()
    await tools.until(lambda: not harness.gateway.schedulers.connected)

    failure = await tools.rejection(harness.stream())

    assert (failure.code, failure.reason) == (Code.UNAVAILABLE, "SCHEDULER_UNREACHABLE")
    assert int(failure.trailers["grpc-retry-pushback-ms"]) > 0


async def test_a_draining_scheduler_gets_no_new_requests(harness: Any, tools: Any) -> None:
    harness.scheduler.send(draining=scheduler_pb2.Draining(deadline_ms=1000))
    await tools.until(lambda: harness.gateway.schedulers.draining)

    failure = await tools.rejection(harness.stream())

    assert (failure.code, failure.reason) == (Code.UNAVAILABLE, "DRAINING")


async def test_more_calls_than_allowed_are_refused_with_a_delay(
    config: GatewayConfig, scheduler: Any, tools: Any
) -> None:
    gateway = Gateway(dataclasses.replace(config, max_requests=1, admin_address=""))
    await gateway.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:
            harness = tools.Harness(gateway, scheduler, channel, tools.make_tokenizer())
            await harness.connected()
            harness.stream()
            await scheduler.next("submit")

            failure = await tools.rejection(harness.stream())

            assert (failure.code, failure.reason) == (Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
            assert int(failure.trailers["grpc-retry-pushback-ms"]) > 0
    finally:
        await gateway.stop(0)


async def test_a_chat_needs_a_template(config: GatewayConfig, scheduler: Any, tools: Any, tmp_path: Path) -> None:
    bare = tools.write_model(tmp_path / "tiny", template=None)
    gateway = Gateway(dataclasses.replace(config, model=bare, admin_address=""))
    await gateway.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:
            stub = tools.Harness(gateway, scheduler, channel, tools.make_tokenizer()).stub
            chat = {"messages": [{"role": "user", "parts": [{"text": "x"}]}]}
            generation = generation_pb2.Generation(model="tiny", chat=chat)

            failure = await tools.rejection(stub.Generate(generation_pb2.GenerateRequest(generation=generation)))

            assert (failure.code, failure.reason) == (Code.FAILED_PRECONDITION, "FEATURE_DISABLED")
    finally:
        await gateway.stop(0)


async def test_a_bug_is_internal_and_shows_the_client_nothing_of_it(
    harness: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(harness.gateway.schedulers, "submit", broken)

    failure = await tools.rejection(harness.stream())

    assert (failure.code, failure.reason) == (Code.INTERNAL, "INTERNAL")
    assert "secret" not in str(failure.status)


async def test_cancel_generation_says_whether_it_was_running(harness: Any) -> None:
    harness.scheduler.running_ids.add("r1")

    running = await harness.stub.CancelGeneration(generation_pb2.CancelGenerationRequest(request_id="r1"))
    unknown = await harness.stub.CancelGeneration(generation_pb2.CancelGenerationRequest(request_id="r2"))

    assert (running.was_running, running.usage.output_tokens) == (True, 3)
    assert (unknown.was_running, unknown.HasField("usage")) == (False, False)


async def test_a_request_cancelled_by_id_ends_with_the_reason_cancelled(harness: Any) -> None:
    call = harness.stream()
    submit = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(submit.handle, harness.ids("ab"), finish=common_pb2.FINISH_REASON_CANCELLED)

    events = [response.event async for response in call]

    assert events[-2].candidate_finished.finish_reason == common_pb2.FINISH_REASON_CANCELLED
    assert events[-1].HasField("completed")
