"""Losing the scheduler and finding it again."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import grpc
import pytest
from grpc import aio

from octavo.common.v1 import common_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.gateway.app import Gateway
from octavo.services.gateway.config import GatewayConfig
from octavo.services.gateway.schedulers import link as scheduler_link
from octavo.services.gateway.schedulers.pool import SchedulerPool

Code = grpc.StatusCode


async def restart(scheduler: Any) -> None:
    await scheduler.stop()
    await scheduler.start()


async def test_an_admitted_request_goes_on_at_a_restarted_scheduler_without_gap_or_repeat(
    harness: Any, tools: Any
) -> None:
    call = harness.stream(
        continue_output={"ids": harness.ids("0")}, sampling={"seed": 77}, stop={"max_new_tokens": 30}, timeout=60
    )
    first = await harness.scheduler.next_admitted()
    await call.read()
    harness.scheduler.tokens(first.handle, harness.ids("12"))
    text = (await call.read()).event.delta.text

    await restart(harness.scheduler)
    second = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(second.handle, harness.ids("34"), finish=common_pb2.FINISH_REASON_MAX_TOKENS)

    offsets = [1]
    events = []
    while (response := await call.read()) is not tools.EOF:
        events.append(response.event)
    for event in events:
        if event.HasField("delta"):
            offsets.append(event.delta.token_offset)
            text += event.delta.text
    assert text == "1234"
    assert offsets == [1, 3]
    assert second.handle != first.handle
    assert list(second.continue_token_ids) == harness.ids("012")
    assert second.is_failover
    assert not first.is_failover, "what a client goes on from is no failover"
    assert second.request_id == first.request_id
    assert second.sampling.seed == 77
    assert second.stop.max_new_tokens == 30
    assert (second.first_candidate_index, second.candidate_count) == (0, 1)
    assert 0 < second.remaining_ms <= first.remaining_ms
    assert events[-1].completed.failovers == 1
    assert [event.sequence_number for event in events] == list(range(2, 2 + len(events)))


async def test_each_unfinished_candidate_goes_on_alone_under_its_own_index(harness: Any, tools: Any) -> None:
    call = harness.stream(candidate_count=3)
    first = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(first.handle, harness.ids("a"), candidate=0)
    harness.scheduler.tokens(first.handle, harness.ids("b"), candidate=1, finish=common_pb2.FINISH_REASON_MAX_TOKENS)
    harness.scheduler.tokens(first.handle, harness.ids("c"), candidate=2)
    stream = harness.gateway.schedulers.streams[0]
    await tools.until(lambda: stream.num_output_tokens == 3)

    await restart(harness.scheduler)
    again = [await harness.scheduler.next_admitted() for _ in range(2)]
    for submit in again:
        harness.scheduler.tokens(
            submit.handle,
            harness.ids("!"),
            candidate=submit.first_candidate_index,
            finish=common_pb2.FINISH_REASON_MAX_TOKENS,
        )

    texts = ["", "", ""]
    async for response in call:
        texts[response.event.delta.candidate_index] += response.event.delta.text
    assert [submit.first_candidate_index for submit in again] == [0, 2]
    assert texts == ["a!", "b", "c!"]


async def test_a_request_that_was_not_admitted_fails_as_retryable(harness: Any, tools: Any) -> None:
    call = harness.stream()
    await harness.scheduler.next("submit")

    await harness.scheduler.stop()

    failure = await tools.rejection(call)
    assert (failure.code, failure.reason) == (Code.UNAVAILABLE, "SCHEDULER_UNREACHABLE")
    assert "grpc-retry-pushback-ms" in failure.trailers


async def test_a_scheduler_that_cannot_take_a_lost_request_yet_is_asked_again(harness: Any) -> None:
    call = harness.stream()
    await harness.scheduler.next_admitted()
    await call.initial_metadata()
    await restart(harness.scheduler)
    refused = await harness.scheduler.next("submit")
    harness.scheduler.send(
        rejected=scheduler_pb2.Rejected(
            handle=refused.handle, code=Code.UNAVAILABLE.value[0], reason="NO_WORKERS", retry_after_ms=20
        )
    )

    taken = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(taken.handle, harness.ids("a"), finish=common_pb2.FINISH_REASON_MAX_TOKENS)

    events = [response.event async for response in call]
    assert taken.handle != refused.handle
    assert events[-1].completed.failovers == 1


async def test_a_scheduler_that_refuses_a_lost_request_for_good_ends_it_as_interrupted(
    harness: Any, tools: Any
) -> None:
    call = harness.stream()
    await harness.scheduler.next_admitted()
    await call.initial_metadata()
    await restart(harness.scheduler)
    refused = await harness.scheduler.next("submit")
    harness.scheduler.send(
        rejected=scheduler_pb2.Rejected(
            handle=refused.handle, code=Code.INVALID_ARGUMENT.value[0], reason="KV_CAPACITY_EXCEEDED"
        )
    )

    failure = await tools.rejection(call)

    assert (failure.code, failure.reason) == (Code.ABORTED, "STREAM_INTERRUPTED")
    assert failure.details["ErrorInfo"].metadata["last_sequence_number"] == "0"


async def test_a_resumable_failure_is_a_loss_and_not_an_end(harness: Any) -> None:
    call = harness.stream()
    first = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(first.handle, harness.ids("a"))
    harness.scheduler.send(failed=scheduler_pb2.Failed(handle=first.handle, code=14, resumable=True))

    second = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(second.handle, harness.ids("b"), finish=common_pb2.FINISH_REASON_MAX_TOKENS)

    assert list(second.continue_token_ids) == harness.ids("a")
    assert "".join([response.event.delta.text async for response in call]) == "ab"


async def test_a_lost_request_waits_no_longer_than_it_may(config: GatewayConfig, scheduler: Any, tools: Any) -> None:
    gateway = Gateway(dataclasses.replace(config, failover_s=0.05, admin_address=""))
    await gateway.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:
            harness = tools.Harness(gateway, scheduler, channel, tools.make_tokenizer())
            await harness.connected()
            call = harness.stream()
            await scheduler.next_admitted()
            await call.initial_metadata()  # the gateway knows that it was admitted

            await scheduler.stop()

            failure = await tools.rejection(call)
            assert (failure.code, failure.reason) == (Code.ABORTED, "STREAM_INTERRUPTED")
    finally:
        await gateway.stop(0)


async def test_a_call_that_ends_while_its_request_waits_is_not_submitted_again(harness: Any, tools: Any) -> None:
    call = harness.stream()
    await harness.scheduler.next_admitted()
    await call.initial_metadata()
    await harness.scheduler.stop()
    await tools.until(lambda: not harness.gateway.schedulers.connected)

    call.cancel()
    await tools.until(lambda: not harness.gateway.schedulers.streams)
    await harness.scheduler.start()
    await harness.connected()

    assert await harness.scheduler_is_silent()


async def test_a_request_cancelled_by_id_while_it_waits_ends_as_cancelled(harness: Any, tools: Any) -> None:
    call = harness.stream(metadata=(("x-request-id", "lost"),))
    await harness.scheduler.next_admitted()
    await call.initial_metadata()
    await harness.scheduler.stop()
    await tools.until(lambda: not harness.gateway.schedulers.connected)

    answer = await harness.gateway.schedulers.cancel_request("lost", "")

    assert answer.was_running
    events = [response.event async for response in call]
    assert events[-2].candidate_finished.finish_reason == common_pb2.FINISH_REASON_CANCELLED


async def test_another_protocol_revision_is_refused(scheduler: Any) -> None:
    scheduler.protocol_revision = 99
    client = SchedulerPool((scheduler.address,), "gw")
    client.start()
    try:
        await asyncio.wait_for(scheduler.attached.wait(), 10)
        scheduler.attached.clear()
        await asyncio.wait_for(scheduler.attached.wait(), 10)  # it tried again: the first answer was refused

        assert not client.connected
    finally:
        await client.close()


async def test_a_message_that_makes_no_sense_costs_the_connection_and_no_request(harness: Any, tools: Any) -> None:
    call = harness.stream()
    first = await harness.scheduler.next_admitted()
    await call.read()

    harness.scheduler.send(step_outputs={"handles": [first.handle], "token_ids": [1, 2, 3]})
    second = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(second.handle, harness.ids("ok"), finish=common_pb2.FINISH_REASON_MAX_TOKENS)

    texts = []
    while (response := await call.read()) is not tools.EOF:
        texts.append(response.event.delta.text)
    assert "".join(texts).endswith("ok")


async def test_a_scheduler_that_hangs_is_given_up(harness: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call = harness.stream()
    await harness.scheduler.next_admitted()
    harness.scheduler.attached.clear()

    harness.scheduler.hangs = True  # it says nothing, and its connection stays open
    monkeypatch.setattr(scheduler_link, "_SILENCE_S", 0.01)
    await asyncio.wait_for(harness.scheduler.attached.wait(), 10)
    monkeypatch.undo()
    harness.scheduler.hangs = False

    again = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(again.handle, harness.ids("ok"), finish=common_pb2.FINISH_REASON_MAX_TOKENS)
    assert "".join([response.event.delta.text async for response in call]) == "ok"


async def test_many_streams_at_once_each_get_their_own_tokens(harness: Any) -> None:
    calls = [harness.stream() for _ in range(20)]
    submits = [await harness.scheduler.next_admitted() for _ in calls]
    by_id = {submit.request_id: submit.handle for submit in submits}
    letters = [harness.ids(chr(97 + index))[0] for index in range(20)]
    handles = list(by_id.values())
    for _ in range(5):
        harness.scheduler.send(step_outputs={"handles": handles, "token_ids": letters})
    finished = [{"handle": handle, "reason": "FINISH_REASON_MAX_TOKENS"} for handle in handles]
    harness.scheduler.send(step_outputs={"finished": finished})

    async def read(call: Any) -> tuple[str, str]:
        events = [response.event async for response in call]
        return events[0].started.request_id, "".join(event.delta.text for event in events)

    texts = dict(await asyncio.gather(*(read(call) for call in calls)))

    for index, request_id in enumerate(by_id):
        assert texts[request_id] == chr(97 + index) * 5


async def test_a_call_whose_request_another_one_has_taken_over_ends_and_is_not_computed_again(
    harness: Any, tools: Any
) -> None:
    call = harness.stream(scheduling={"resume_window_ms": 60_000})
    first = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(first.handle, harness.ids("a"))
    message = "the request goes on in another call"
    failed = {"handle": first.handle, "code": Code.ABORTED.value[0], "reason": "TAKEN_OVER", "message": message}
    harness.scheduler.send(failed=failed)
    failure = await tools.rejection(call)
    assert (failure.code, failure.reason) == (Code.ABORTED, "TAKEN_OVER")
    assert harness.gateway._calls.num_requests == 0
    await restart(harness.scheduler)
    await harness.connected()
    again = harness.stream()
    assert (await harness.scheduler.next_admitted()).request_id != first.request_id
    again.cancel()
