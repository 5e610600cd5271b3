"""Streams that break go on by themselves; several gateways are one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2
from octavo.services.client import Client, OctavoError, SyncClient

Code = grpc.StatusCode
WORDS = ["a", "b", "c", "d", "e"]


class BreakingGateway:
    """Serves an answer of five words; each call breaks where `breaks` says, after so many events."""

    def __init__(self, gateway: Any, fake: Any) -> None:
        self.gateway = gateway
        self.fake = fake
        self.breaks: list[tuple[int, status_pb2.Status | None]] = []
        self.resumed: list[generation_pb2.ResumeStreamRequest] = []
        self.keeps = True
        self.token = ""
        gateway.stream = self.stream
        gateway.resume = self.resume

    def events(self, first: int, with_tail: bool = False) -> list[Any]:
        answer = self.fake.events(WORDS)
        answer[0].started.resume_token = self.token
        answer[0].started.effective_sampling.seed = 77
        answer[0].started.effective_stop.max_new_tokens = 50
        for place, event in enumerate(answer[1:6]):
            event.delta.token_ids.append(100 + place)
        del answer[1 : 1 + first]
        if with_tail:
            answer.insert(-2, self.fake.Event(delta=generation_pb2.Delta(token_offset=5, text="!")))
        for number, event in enumerate(answer):
            event.sequence_number = number
        return list(answer)

    async def stream(self, generation: generation_pb2.Generation, context: Any) -> AsyncIterator[Any]:
        first = len(generation.continue_output.ids)
        if first >= 5:
            bad = error_details_pb2.BadRequest()
            bad.field_violations.add(field="generation.continue_output.ids[4]", description="already ended")
            await fail(context, Code.INVALID_ARGUMENT, bad)
        async for event in self._until_broken(self.events(first), context):
            yield event

    async def resume(self, request: generation_pb2.ResumeStreamRequest, context: Any) -> AsyncIterator[Any]:
        self.resumed.append(request)
        if not self.keeps:
            await fail(context, Code.DATA_LOSS)
        async for event in self._until_broken(self.events(request.cursors[0].next_token_offset, True), context):
            yield event

    async def _until_broken(self, events: list[Any], context: Any) -> AsyncIterator[Any]:
        await context.send_initial_metadata((("x-request-id", "r-1"),))
        count, _ = self.breaks.pop(0) if self.breaks else (len(events), None)
        for event in events[:count]:
            yield event
        if count < len(events):
            await fail(context, Code.UNAVAILABLE)


async def fail(context: Any, code: grpc.StatusCode, *details: Any) -> None:
    status = status_pb2.Status(code=code.value[0], message="broken")
    for detail in details:
        status.details.add().Pack(detail)
    await context.abort(code, "broken", (("grpc-status-details-bin", status.SerializeToString()),))


@pytest.fixture
def breaking(gateway: Any, fake: Any) -> BreakingGateway:
    return BreakingGateway(gateway, fake)


async def read(client: Client, **options: Any) -> tuple[str, Any, list[str]]:
    stream = client.stream("Hi", model="fake", **options)
    kinds, text = [], ""
    async for event in stream.events():
        kinds.append(event.WhichOneof("payload"))
        text += event.delta.text
        assert not event.delta.token_ids or options.get("return_token_ids")
    return text, stream, kinds


@pytest.mark.parametrize("first_break", [0, 1, 2, 5, 6, 7])
async def test_a_broken_stream_is_continued_from_the_tokens_received(breaking: Any, first_break: int) -> None:
    breaking.breaks = [(first_break, None), (2, None)]
    async with Client(breaking.gateway.address) as client:
        text, stream, kinds = await read(client)

    assert text == "abcde"
    assert (kinds.count("started"), kinds.count("candidate_finished"), kinds.count("completed")) == (1, 1, 1)
    assert stream.num_resumed >= 1
    last = breaking.gateway.requests[-1]
    assert last.sampling.seed == 77
    assert last.stop.max_new_tokens == 50


async def test_token_ids_come_if_asked_for_over_a_break_too(breaking: Any) -> None:
    breaking.breaks = [(3, None)]
    async with Client(breaking.gateway.address) as client:
        stream = client.stream("Hi", model="fake", return_token_ids=True)
        assert [token async for delta in stream for token in delta.token_ids] == [100, 101, 102, 103, 104]


async def test_a_call_that_broke_before_its_first_event_is_begun_again(breaking: Any) -> None:
    breaking.breaks = [(0, None)]
    async with Client(breaking.gateway.address) as client:
        text, stream, _ = await read(client, resume_window_ms=1000)
    assert text == "abcde"
    assert stream.num_resumed == 1
    assert not breaking.resumed  # there was no token yet to ask with


@pytest.mark.parametrize("first_break", [1, 3, 6, 7])
async def test_with_a_window_the_request_itself_is_picked_up(breaking: Any, first_break: int) -> None:
    breaking.token = "t"
    breaking.breaks = [(first_break, None), (2, None)]
    async with Client(breaking.gateway.address) as client:
        text, stream, kinds = await read(client, resume_window_ms=1000)

    assert text.removesuffix("!") == "abcde"
    assert len(text) <= 6  # the tail comes once, however often it is sent
    assert kinds.count("candidate_finished") == 1
    assert stream.num_resumed == len(breaking.resumed) >= 1
    assert len(breaking.gateway.requests) == 1
    assert breaking.resumed[0].cursors[0].next_token_offset == min(first_break - 1, 5)


async def test_what_was_not_kept_is_continued(breaking: Any) -> None:
    breaking.token, breaking.keeps = "t", False
    breaking.breaks = [(3, None)]
    async with Client(breaking.gateway.address) as client:
        text, _, _ = await read(client, resume_window_ms=1000)

    assert text == "abcde"
    assert len(breaking.resumed) == 1
    assert list(breaking.gateway.requests[-1].continue_output.ids) == [100, 101]


async def test_resuming_can_be_switched_off_and_is_given_up_in_time(breaking: Any) -> None:
    breaking.breaks = [(3, None), (1, None)]
    async with Client(breaking.gateway.address, resume_for_s=0) as client:
        with pytest.raises(OctavoError, match="broken") as caught:
            await read(client)
    assert caught.value.code is Code.UNAVAILABLE


async def test_leaving_a_request_with_a_window_ends_it(breaking: Any) -> None:
    breaking.token = "t"
    breaking.gateway.hang = True
    async with Client(breaking.gateway.address) as client:
        async with client.stream("Hi", model="fake", resume_window_ms=1000) as stream:
            async for _ in stream:
                break
        assert breaking.gateway.cancelled_ids == ["r-1"]


async def test_several_gateways_take_turns_and_a_dead_one_is_passed_over(fake: Any) -> None:
    async with fake.serve() as first, fake.serve() as second:
        async with Client([first.address, "unix:/nonexistent/socket", second.address]) as client:
            for _ in range(4):
                assert "".join([delta.text async for delta in client.stream("Hi", model="fake")]) == "Hello, world!"
            assert (await client.generate("Hi", model="fake")).text == "Hello, world!"
        assert len(first.requests) + len(second.requests) == 5
        assert min(len(first.requests), len(second.requests)) >= 1


async def test_a_stream_goes_on_at_another_gateway(fake: Any) -> None:
    async with fake.serve() as first, fake.serve() as second:
        one, two = BreakingGateway(first, fake), BreakingGateway(second, fake)
        one.breaks = two.breaks = [(2, None), (3, None)]
        async with Client([first.address, second.address]) as client:
            text, stream, _ = await read(client)
        assert text == "abcde"
        assert stream.num_resumed == 2
        assert min(len(first.requests), len(second.requests)) >= 1


async def test_a_retry_waits_as_long_as_the_server_says_and_no_longer_than_the_deadline(gateway: Any) -> None:
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromSeconds(60)
    status = status_pb2.Status(code=Code.UNAVAILABLE.value[0], message="later")
    status.details.add().Pack(retry)
    gateway.errors = [(status, False)]

    async with Client(gateway.address, timeout_s=10) as client:
        with pytest.raises(OctavoError, match="later"):
            await client.generate("Hi", model="fake")
    assert len(gateway.requests) == 1


def test_the_client_without_asyncio(fake: Any) -> None:
    import asyncio
    import threading

    ready, stop = threading.Event(), threading.Event()
    found: dict[str, Any] = {}

    async def main() -> None:
        async with fake.serve() as gateway:
            found["gateway"] = gateway
            ready.set()
            await asyncio.to_thread(stop.wait)

    server = threading.Thread(target=asyncio.run, args=(main(),))
    server.start()
    try:
        assert ready.wait(10)
        with SyncClient(found["gateway"].address) as client:
            with client.stream("Hi", model="fake", max_new_tokens=4) as stream:
                assert "".join(delta.text for delta in stream) == "Hello, world!"
            assert stream.stream.completed is not None
            assert client.generate("Hi").text == "Hello, world!"
            assert client.tokenize("ab") == [[97, 98]]
            assert client.detokenize([[97]]) == ["a"]
            assert [model.name for model in client.models()] == ["fake"]
            assert client.load()[0].running == 2
            assert client.cancel("r-9").was_running
            for _ in client.stream("Hi", model="fake"):
                break
            with pytest.raises(TypeError, match="did you mean"):
                client.generate("Hi", temprature=1)  # type: ignore[call-arg]
        client.close()
    finally:
        stop.set()
        server.join()


def test_the_two_clients_take_the_same_arguments() -> None:
    import inspect

    for name in ("stream", "generate", "cancel", "models", "tokenize", "detokenize", "load", "close", "__init__"):
        mine, theirs = (inspect.signature(getattr(each, name)) for each in (SyncClient, Client))
        assert list(mine.parameters.values()) == list(theirs.parameters.values()), name


def test_finish_reasons_of_the_future_stay_numbers() -> None:
    from octavo.services.client.stream import finish_reason_name

    assert finish_reason_name(99) == "99"  # type: ignore[arg-type]
    assert finish_reason_name(common_pb2.FINISH_REASON_MAX_TOKENS) == "MAX_TOKENS"
