"""A gateway with two schedulers: who gets requests, and where they go on."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2, load_pb2, load_pb2_grpc
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.gateway.app import Gateway
from octavo.services.gateway.config import GatewayConfig
from octavo.services.gateway.schedulers import peer as scheduler_peer
from octavo.services.gateway.schedulers.addresses import AddressBook
from octavo.services.gateway.schedulers.prefix_index import prompt_block_hashes

Code = grpc.StatusCode
MAX_TOKENS = common_pb2.FINISH_REASON_MAX_TOKENS


@dataclasses.dataclass
class Pair:
    """Two schedulers, and a harness whose gateway knows both; `first` is preferred while both are idle."""

    harness: Any
    first: Any
    second: Any
    tools: Any

    async def prefer_first(self) -> None:
        """Make the second scheduler the busier one, and wait until the gateway knows."""
        self.second.say_load(running=10)
        await self.tools.until(lambda: any(peer.load.running == 10 for peer in self.harness.gateway.schedulers.peers))

    def peer(self, scheduler: Any) -> Any:
        (peer,) = [p for p in self.harness.gateway.schedulers.peers if p.scheduler_id == scheduler.scheduler_id]
        return peer


@pytest.fixture
async def pair(config: GatewayConfig, scheduler: Any, tmp_path: Path, tools: Any) -> AsyncIterator[Pair]:
    second = tools.FakeScheduler(f"unix:{tmp_path}/s2.sock", "second")
    await second.start()
    gateway = Gateway(dataclasses.replace(config, scheduler_addresses=(scheduler.address, second.address)))
    await gateway.start()
    async with aio.insecure_channel(f"127.0.0.1:{gateway.port}", [("grpc.enable_retries", 0)]) as channel:
        pair = Pair(tools.Harness(gateway, scheduler, channel, tools.make_tokenizer()), scheduler, second, tools)
        await tools.until(lambda: len(gateway.schedulers.peers) == 2)
        await pair.prefer_first()
        yield pair
    await gateway.stop(0)
    await second.stop()


def reject(scheduler: Any, submit: Any, code: grpc.StatusCode, reason: str, retry_after_ms: int = 50) -> None:
    rejected = scheduler_pb2.Rejected(
        handle=submit.handle, code=code.value[0], reason=reason, message="no", retry_after_ms=retry_after_ms
    )
    scheduler.send(rejected=rejected)


async def finish(scheduler: Any, submit: Any, ids: list[int]) -> None:
    scheduler.tokens(submit.handle, ids, finish=MAX_TOKENS)


async def test_a_lost_stream_goes_on_at_the_other_scheduler_at_once(pair: Pair) -> None:
    call = pair.harness.stream(sampling={"seed": 5}, stop={"stop_sequences": ["STOP"], "min_new_tokens": 3})
    submit = await pair.first.next_admitted()
    await call.read()
    pair.first.tokens(submit.handle, pair.harness.ids("a S"))
    text = (await call.read()).event.delta.text

    await pair.first.stop()
    again = await pair.second.next_admitted()
    await finish(pair.second, again, pair.harness.ids("TOPx"))
    events = []
    while (response := await call.read()) is not pair.tools.EOF:
        events.append(response.event)

    assert list(again.continue_token_ids) == pair.harness.ids("a S")
    assert (again.sampling.seed, again.stop.min_new_tokens) == (5, 3)
    assert text + "".join(event.delta.text for event in events) == "a "  # a stop string across the loss
    assert events[-2].candidate_finished.stop_sequence == "STOP"
    assert events[-1].completed.failovers == 1


async def test_a_request_that_was_not_admitted_is_tried_at_the_other_scheduler(pair: Pair) -> None:
    call = pair.harness.stream(candidate_count=2)
    await pair.first.next("submit")

    await pair.first.stop()
    again = await pair.second.next_admitted()
    for candidate in range(2):
        pair.second.tokens(again.handle, pair.harness.ids("x"), candidate=candidate, finish=MAX_TOKENS)

    events = [response.event async for response in call]
    assert again.candidate_count == 2
    assert events[-1].completed.failovers == 0
    assert dict(await call.initial_metadata())["x-scheduler-id"] == "second"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (Code.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
        (Code.RESOURCE_EXHAUSTED, "DEADLINE_UNREACHABLE"),
        (Code.UNAVAILABLE, "NO_WORKERS"),
        (Code.UNAVAILABLE, "DRAINING"),
    ],
)
async def test_what_one_scheduler_cannot_take_the_other_gets(pair: Pair, code: grpc.StatusCode, reason: str) -> None:
    call = pair.harness.stream()
    reject(pair.first, await pair.first.next("submit"), code, reason)

    taken = await pair.second.next_admitted()
    await finish(pair.second, taken, pair.harness.ids("ok"))

    assert "".join([response.event.delta.text async for response in call]) == "ok"


async def test_a_request_that_all_refuse_fails_once_with_the_last_answer(pair: Pair) -> None:
    call = pair.harness.stream()
    reject(pair.first, await pair.first.next("submit"), Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    reject(pair.second, await pair.second.next("submit"), Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", 70)

    failure = await pair.tools.rejection(call)

    assert (failure.code, failure.reason) == (Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    assert failure.trailers["grpc-retry-pushback-ms"] == "70"
    later = pair.harness.stream()  # refusing once closes nothing: there is no state to get stuck in
    await pair.first.next_admitted()
    later.cancel()


async def test_a_wrong_request_is_not_tried_elsewhere(pair: Pair) -> None:
    call = pair.harness.stream()
    reject(pair.first, await pair.first.next("submit"), Code.INVALID_ARGUMENT, "KV_CAPACITY_EXCEEDED")

    assert (await pair.tools.rejection(call)).code is Code.INVALID_ARGUMENT
    assert pair.second.received.empty()


def too_late(scheduler: Any, submit: Any, queue_ms: int) -> None:
    """Refuse a request, because the queue takes so long."""
    scheduler.send(
        rejected=scheduler_pb2.Rejected(
            handle=submit.handle,
            code=Code.RESOURCE_EXHAUSTED.value[0],
            reason="DEADLINE_UNREACHABLE",
            retry_after_ms=50,
            metadata={"queue_ms": str(queue_ms)},
        )
    )


async def test_what_all_schedulers_would_refuse_for_their_queues_is_refused_here(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_peer, "_QUEUE_KNOWN_S", 60.0)
    first = pair.harness.stream(timeout=20)
    too_late(pair.first, await pair.first.next("submit"), 100_000)
    too_late(pair.second, await pair.second.next("submit"), 200_000)
    assert (await pair.tools.rejection(first)).reason == "DEADLINE_UNREACHABLE"

    again = await pair.tools.rejection(pair.harness.stream(timeout=20))

    assert (again.code, again.reason) == (Code.RESOURCE_EXHAUSTED, "DEADLINE_UNREACHABLE")
    assert int(again.trailers["grpc-retry-pushback-ms"]) > 10_000
    assert pair.first.received.empty()
    assert pair.second.received.empty()
    for each in ({"timeout": 1000}, {}, {"timeout": 20, "scheduling": {"priority": 1}}):  # that may be in time
        call = pair.harness.stream(**each)
        await pair.first.next("submit")
        call.cancel()
        await pair.first.next("cancel")
    wrong = await pair.tools.rejection(pair.harness.stream(timeout=20, candidate_count=1000))
    assert wrong.reason == "INVALID_FIELD"  # it is not told to come again


@pytest.mark.parametrize("change", ["other", "admission", "time", "loss"])
async def test_a_scheduler_is_asked_again_unless_it_has_just_said_so(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(scheduler_peer, "_QUEUE_KNOWN_S", 0.0 if change == "time" else 60.0)
    monkeypatch.setattr(scheduler_peer.SchedulerPeer, "is_too_late_for", lambda *_: change == "other")
    call = pair.harness.stream(timeout=20)
    too_late(pair.first, await pair.first.next("submit"), 100_000)
    if change != "other":
        too_late(pair.second, await pair.second.next("submit"), 100_000)
    await pair.tools.rejection(call)

    if change == "admission":
        free = pair.harness.stream()
        pair.first.tokens((await pair.first.next_admitted()).handle, [9], finish=MAX_TOKENS)
        assert [response async for response in free]
    if change == "loss":
        await pair.first.stop()
        await pair.tools.until(lambda: len(pair.harness.gateway.schedulers.peers) == 1)  # the loss was noticed
        await pair.first.start()
        await pair.tools.until(lambda: len(pair.harness.gateway.schedulers.peers) == 2)

    call = pair.harness.stream(timeout=20)
    await pair.tools.until(lambda: not (pair.first.received.empty() and pair.second.received.empty()))
    call.cancel()


async def sizes(pair: Pair, first: int, second: int) -> None:
    """Let the schedulers hold so many tokens of a sequence."""
    for scheduler, size in ((pair.first, first), (pair.second, second)):
        scheduler.say_load(max_model_len=size)
        await pair.tools.until(lambda each=scheduler, size=size: pair.peer(each).load.max_model_len == size)


async def test_the_context_is_that_of_the_largest_scheduler_and_long_requests_go_there(pair: Pair) -> None:
    await sizes(pair, 32, 48)
    assert pair.harness.gateway.schedulers.max_model_len == 48

    calls = [pair.harness.stream(token_ids={"ids": [3] * 40})]
    await pair.second.next_admitted()
    calls.append(pair.harness.stream(token_ids={"ids": [3] * 8}, stop={"max_new_tokens": 30}))
    await pair.second.next_admitted()
    calls.append(pair.harness.stream(token_ids={"ids": [3] * 8}))  # as long as there is room
    await pair.first.next_admitted()
    failure = await pair.tools.rejection(pair.harness.stream(token_ids={"ids": [3] * 48}))
    assert failure.reason == "CONTEXT_LENGTH_EXCEEDED"


async def test_what_a_scheduler_might_hold_soon_is_sent_to_it(pair: Pair) -> None:
    await sizes(pair, 24, 24)
    pair.first.say_load(may_grow=True)
    await pair.tools.until(lambda: pair.peer(pair.first).load.may_grow)
    call = pair.harness.stream(token_ids={"ids": [3] * 40})
    await pair.first.next_admitted()
    call.cancel()
    pair.first.load.ClearField("may_grow")
    pair.first.say_load()
    await pair.tools.until(lambda: not pair.peer(pair.first).load.may_grow)
    failure = await pair.tools.rejection(pair.harness.stream(token_ids={"ids": [3] * 40}))
    assert failure.reason == "CONTEXT_LENGTH_EXCEEDED"


async def test_a_request_that_one_scheduler_cannot_hold_is_tried_at_one_that_might_soon(pair: Pair) -> None:
    await sizes(pair, 48, 24)
    pair.second.say_load(may_grow=True)
    await pair.tools.until(lambda: pair.peer(pair.second).load.may_grow)
    call = pair.harness.stream(token_ids={"ids": [3] * 40})
    reject(pair.first, await pair.first.next("submit"), Code.INVALID_ARGUMENT, "KV_CAPACITY_EXCEEDED")

    await pair.second.next_admitted()
    call.cancel()


async def test_a_request_that_one_scheduler_cannot_hold_is_tried_at_a_larger_one(pair: Pair) -> None:
    await sizes(pair, 48, 48)
    call = pair.harness.stream(token_ids={"ids": [3] * 40})
    reject(pair.first, await pair.first.next("submit"), Code.INVALID_ARGUMENT, "KV_CAPACITY_EXCEEDED")

    taken = await pair.second.next_admitted()
    await finish(pair.second, taken, pair.harness.ids("ok"))

    assert "".join([response.event.delta.text async for response in call]) == "ok"


async def test_a_long_request_that_the_largest_scheduler_refuses_is_not_cut_short_by_a_smaller_one(pair: Pair) -> None:
    await sizes(pair, 48, 24)
    call = pair.harness.stream(token_ids={"ids": [3] * 8}, stop={"max_new_tokens": 30})
    reject(pair.first, await pair.first.next("submit"), Code.RESOURCE_EXHAUSTED, "QUEUE_FULL")

    assert (await pair.tools.rejection(call)).reason == "QUEUE_FULL"
    assert pair.second.received.empty()


async def test_a_lost_stream_goes_on_where_it_fits_and_is_cut_short_rather_than_lost(pair: Pair) -> None:
    await sizes(pair, 48, 24)
    calls = [pair.harness.stream(token_ids={"ids": [3] * 8}, stop={"max_new_tokens": 30}) for _ in range(2)]
    submits = [await pair.first.next_admitted() for _ in calls]
    for count, submit in zip((20, 2), submits, strict=True):
        pair.first.tokens(submit.handle, [40] * count)
    for call in calls:
        await call.read()
        await call.read()

    await pair.first.stop()
    moved = await pair.second.next_admitted()
    assert len(moved.continue_token_ids) == 2
    assert pair.second.received.empty()
    await pair.first.start()
    assert len((await pair.first.next_admitted()).continue_token_ids) == 20
    for call in calls:
        call.cancel()


async def test_requests_that_are_lost_together_fail_with_an_error_each(pair: Pair) -> None:
    """One for all would be written to by all of their calls at once."""
    schedulers = pair.harness.gateway.schedulers
    await pair.second.stop()
    await pair.tools.until(lambda: len(schedulers.peers) == 1)
    calls = [pair.harness.stream() for _ in range(2)]
    for _ in calls:
        await pair.first.next("submit")
    streams = schedulers.streams

    await pair.first.stop()
    failures = [await pair.tools.rejection(call) for call in calls]

    assert [failure.reason for failure in failures] == ["SCHEDULER_UNREACHABLE"] * 2
    assert streams[0].error is not streams[1].error


@pytest.mark.parametrize("sick", [{"draining": True}, {"step_age_ms": 60_000}])
async def test_a_scheduler_that_drains_or_makes_no_progress_gets_nothing(pair: Pair, sick: dict[str, Any]) -> None:
    pair.first.say_load(**sick)
    await pair.tools.until(lambda: not pair.peer(pair.first).healthy)

    calls = []  # one that nobody holds is cancelled
    for _ in range(3):
        calls.append(pair.harness.stream())
        await pair.second.next_admitted()

    pair.first.load.CopyFrom(scheduler_pb2.Load(workers_ready=1, kv_blocks_free=90, model_version="w1"))
    pair.first.send(load=pair.first.load)
    await pair.tools.until(lambda: pair.peer(pair.first).healthy)
    calls.append(pair.harness.stream())
    await pair.first.next_admitted()  # well again, it is used again


async def test_requests_leave_a_scheduler_that_has_no_worker_any_more(pair: Pair) -> None:
    call = pair.harness.stream()
    submit = await pair.first.next_admitted()
    await call.initial_metadata()
    pair.first.tokens(submit.handle, pair.harness.ids("o"))

    pair.first.set_load(scheduler_pb2.Load(workers_ready=0, model_version="w1"))
    moved = await pair.second.next_admitted()
    assert (await pair.first.next("cancel")).handle == submit.handle
    await finish(pair.second, moved, pair.harness.ids("k"))

    assert "".join([response.event.delta.text async for response in call]) == "ok"


async def test_a_request_that_was_lost_before_waits_for_the_next_worker(pair: Pair) -> None:
    call = pair.harness.stream()
    submit = await pair.first.next_admitted()
    await call.initial_metadata()
    pair.first.tokens(submit.handle, pair.harness.ids("o"))
    pair.first.set_load(scheduler_pb2.Load(workers_ready=0, model_version="w1"))
    moved = await pair.second.next_admitted()
    pair.first.set_load(scheduler_pb2.Load(workers_ready=1, model_version="w1"))
    await pair.tools.until(lambda: pair.peer(pair.first).healthy)

    pair.second.set_load(scheduler_pb2.Load(workers_ready=0, model_version="w1"))  # it may be what they die of
    await pair.tools.until(lambda: not pair.peer(pair.second).healthy)
    pair.second.set_load(scheduler_pb2.Load(workers_ready=1, model_version="w1"))
    await finish(pair.second, moved, pair.harness.ids("k"))

    assert "".join([response.event.delta.text async for response in call]) == "ok"


async def test_a_request_goes_where_its_prefix_is_cached(pair: Pair) -> None:
    prompt = list(range(3, 43))
    calls = [pair.harness.stream(token_ids={"ids": prompt})]
    submit = await pair.first.next_admitted()
    stored = prompt_block_hashes(submit, 16)
    pair.second.load.running = 0
    pair.second.say_load()
    pair.second.cache_events.put_nowait(
        scheduler_pb2.WatchCacheResponse(event_id=1, cleared=True, stored_block_hashes=stored)
    )
    await pair.tools.until(
        lambda: (
            pair.peer(pair.second).route.prefixes.count_cached(stored) == 2 and not pair.peer(pair.second).load.running
        )
    )

    for _ in range(3):
        pair.second.send(load=pair.second.load)
        await pair.tools.until(lambda: pair.peer(pair.second).route.sent_tokens == 0)
        calls.append(pair.harness.stream(token_ids={"ids": [*prompt[:-1], 50]}))
        await pair.second.next_admitted()


async def test_a_gap_in_the_cache_s_events_starts_the_index_over(pair: Pair) -> None:
    for event_id in (3, 5):
        pair.first.cache_events.put_nowait(
            scheduler_pb2.WatchCacheResponse(event_id=event_id, cleared=event_id == 3, stored_block_hashes=[event_id])
        )
    await pair.tools.until(lambda: pair.first.watched_from == [0, 0])
    assert pair.peer(pair.first).route.prefixes.count_cached([3]) == 0


async def test_cancel_generation_finds_a_request_at_any_scheduler(pair: Pair) -> None:
    pair.second.running_ids.add("elsewhere")

    answer = await pair.harness.stub.CancelGeneration(generation_pb2.CancelGenerationRequest(request_id="elsewhere"))

    assert answer.was_running
    assert answer.usage.output_tokens == 3


async def test_an_output_goes_on_with_the_same_weights_only(pair: Pair) -> None:
    pair.second.say_load(model_version="w2")
    await pair.tools.until(lambda: pair.peer(pair.second).load.model_version == "w2")
    call = pair.harness.stream()
    await pair.first.next_admitted()
    await call.initial_metadata()  # the gateway knows that it was admitted
    await pair.first.stop()
    await pair.first.start()

    again = await pair.first.next_admitted()
    await finish(pair.first, again, pair.harness.ids("ok"))

    assert "".join([response.event.delta.text async for response in call]) == "ok"
    assert pair.second.received.empty()


async def test_the_load_of_each_scheduler_is_reported(pair: Pair) -> None:
    stub = pair.harness.service(load_pb2_grpc.LoadServiceStub)
    answer = await stub.GetLoad(load_pb2.GetLoadRequest())
    assert [(load.scheduler_id, load.running) for load in answer.schedulers] == [("sched", 0), ("second", 10)]


async def test_a_name_stands_for_all_its_addresses_and_keeps_them_while_dns_is_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    book = AddressBook(["10.0.0.9:1", "schedulers:50052", "unix:/run/s", "10.0.0.9:1"])
    answers: list[list[str] | OSError] = [["10.0.0.2", "10.0.0.1"], socket.gaierror("down"), ["10.0.0.3"]]

    async def getaddrinfo(host: str, port: int, **_: object) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        v6 = [(socket.AF_INET6, None, 0, "", ("fd00::1", port, 0, 0))]
        return [(socket.AF_INET, None, 0, "", (address, port)) for address in answer] + v6

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo, raising=False)
    seen = [book.current]
    for _ in range(3):
        await book.refresh()
        seen.append(book.current)

    fixed = ["10.0.0.9:1", "unix:/run/s"]
    assert book.can_change
    assert sorted(seen[0]) == fixed
    assert sorted(seen[1]) == sorted(seen[2]) == sorted([*fixed, "10.0.0.1:50052", "10.0.0.2:50052"])
    assert sorted(seen[3]) == sorted([*fixed, "10.0.0.3:50052"])


async def test_a_file_stands_for_the_addresses_in_its_lines_and_keeps_them_while_it_cannot_be_read(
    tmp_path: Path,
) -> None:
    file = tmp_path / "schedulers"
    book = AddressBook([f"file:{file}", "10.0.0.9:1"])
    seen = []
    for text in (None, "10.0.0.1:1\n10.0.0.2:1\n10.0.0.1:1\n", None, "10.0.0.2:1\n", ""):
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        await book.refresh()
        seen.append(sorted(book.current))

    assert book.can_change
    assert book.name_of("10.0.0.2:1") == ""
    both = ["10.0.0.1:1", "10.0.0.2:1", "10.0.0.9:1"]
    assert seen == [both[2:], both, both, both[1:], both[2:]]


async def test_a_request_that_goes_on_elsewhere_keeps_what_is_left_of_its_soft_time_limit(pair: Pair) -> None:
    call = pair.harness.stream(stop={"soft_time_limit_ms": 60_000})
    submit = await pair.first.next_admitted()
    await call.read()
    pair.first.tokens(submit.handle, pair.harness.ids("a"))
    await call.read()
    (stream,) = pair.harness.gateway.schedulers.streams
    stream.submitted_at -= 50.0

    await pair.first.stop()
    again = await pair.second.next_admitted()
    await finish(pair.second, again, pair.harness.ids("x"))
    async with asyncio.timeout(10):
        while await call.read() is not pair.tools.EOF:
            pass

    assert submit.stop.soft_time_limit_ms == 60_000
    assert 1 <= again.stop.soft_time_limit_ms <= 10_000
