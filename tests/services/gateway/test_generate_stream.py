"""GenerateStream and Generate: events, numbers, text."""

from __future__ import annotations

from typing import Any

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2


async def test_a_stream_is_started_deltas_finished_completed_with_numbers_without_gaps(harness: Any) -> None:
    call = harness.stream("hello", output={"token_ids": True})
    submit = await harness.scheduler.next_admitted()
    wanted = harness.ids("hello wörld")
    for token_id in wanted:
        harness.scheduler.tokens(submit.handle, [token_id])
    harness.scheduler.tokens(
        submit.handle,
        [0],
        finish=common_pb2.FINISH_REASON_END_OF_SEQUENCE,
        stop_token_id=0,
        usage=common_pb2.Usage(prompt_tokens=3, cached_prompt_tokens=2, output_tokens=len(wanted) + 1),
        timing=common_pb2.Timing(queue_us=1, prefill_us=2, decode_us=3, preemptions=4),
    )

    events = [response.event async for response in call]

    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].WhichOneof("payload") == "started"
    assert [event.WhichOneof("payload") for event in events[-2:]] == ["candidate_finished", "completed"]
    deltas = [event.delta for event in events[1:-2]]
    offset = 0
    for delta in deltas:
        assert delta.token_offset == offset
        assert delta.token_count == len(delta.token_ids) > 0
        offset += delta.token_count
    assert [token for delta in deltas for token in delta.token_ids] == [*wanted, 0]
    assert "".join(delta.text for delta in deltas) == "hello wörld"
    finished, completed = events[-2].candidate_finished, events[-1].completed
    assert finished.finish_reason == common_pb2.FINISH_REASON_END_OF_SEQUENCE
    assert (finished.WhichOneof("matched"), finished.stop_token_id) == ("stop_token_id", 0)
    assert finished.output_tokens == len(wanted) + 1
    assert completed.usage == common_pb2.Usage(prompt_tokens=3, cached_prompt_tokens=2, output_tokens=len(wanted) + 1)
    assert completed.timing == common_pb2.Timing(queue_us=1, prefill_us=2, decode_us=3, preemptions=4)
    assert completed.failovers == 0
    trailers = dict(await call.trailing_metadata())
    assert trailers["x-usage-prompt-tokens"] == "3"
    assert trailers["x-usage-cached-tokens"] == "2"
    assert trailers["x-usage-output-tokens"] == str(len(wanted) + 1)
    assert await harness.scheduler_is_silent()


async def test_nothing_is_sent_before_admission_and_headers_and_started_at_it(harness: Any) -> None:
    call = harness.stream(metadata=(("x-request-id", "req-7"),))
    submit = await harness.scheduler.next("submit")
    harness.scheduler.admit(submit.handle, cached=1)

    headers = dict(await call.initial_metadata())
    started = (await call.read()).event.started

    assert headers["x-request-id"] == started.request_id == submit.request_id == "req-7"
    assert headers["x-model-version"] == started.model_version != ""
    assert headers["x-scheduler-id"] == "sched"
    assert started.model == "tiny"
    assert (started.prompt_tokens, started.cached_prompt_tokens) == (len(submit.prompt_token_ids), 1)


async def test_the_unary_answer_equals_the_concatenated_stream(harness: Any) -> None:
    request = generation_pb2.GenerateRequest(generation=harness.generation(output={"token_ids": True}))
    call = harness.stub.Generate(request)
    submit = await harness.scheduler.next_admitted()
    ids = harness.ids("to be € or not")
    for token_id in ids[:-1]:
        harness.scheduler.tokens(submit.handle, [token_id])
    harness.scheduler.tokens(submit.handle, ids[-1:], finish=common_pb2.FINISH_REASON_MAX_TOKENS)

    answer = await call

    assert answer.started.request_id == submit.request_id
    (candidate,) = answer.candidates
    assert candidate.text == "to be € or not"
    assert list(candidate.token_ids) == ids
    assert candidate.finished.finish_reason == common_pb2.FINISH_REASON_MAX_TOKENS
    assert candidate.finished.WhichOneof("matched") is None
    assert answer.completed.usage.output_tokens == len(ids)
