"""What a request costs a gateway does not grow with the number of schedulers, and its outputs are its own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.gateway.schedulers import inboxes as peer_inboxes
from octavo.services.gateway.schedulers import recovery
from octavo.services.gateway.schedulers.inboxes import PeerInboxes
from octavo.services.gateway.schedulers.peer import SchedulerPeer
from octavo.services.gateway.schedulers.pool import SchedulerPool
from octavo.services.gateway.schedulers.request_stream import RequestStream


class Many:
    """A pool of schedulers that are connected, without sockets: what is sent is kept."""

    def __init__(self, count: int, **settings: Any) -> None:
        self.pool = SchedulerPool([f"127.0.0.1:{20000 + index}" for index in range(count)], "gw", **settings)
        self.sent: list[tuple[SchedulerPeer, scheduler_pb2.AttachRequest]] = []
        peers = self.pool._peers
        for index in range(count):
            address = f"127.0.0.1:{20000 + index}"
            peer = SchedulerPeer(address, "gw", self.pool._recovery, peers._router)
            peers._by_address[address] = peer
            peer._link.send = lambda message, peer=peer: self.sent.append((peer, message))  # type: ignore[method-assign, misc]
            load = scheduler_pb2.Load(workers_ready=1, kv_blocks_free=1000, kv_blocks_total=1000, model_version="v")
            peer.on_connected(scheduler_pb2.Welcome(scheduler_id=f"s{index}", epoch=1, protocol_revision=2, load=load))

    def submit(self, tokens: int = 100, deadline_s: float | None = None) -> RequestStream:
        submit = scheduler_pb2.Submit(request_id="r", prompt_token_ids=range(tokens), candidate_count=1)
        return self.pool.submit(submit, deadline_s)

    def take(self) -> list[tuple[SchedulerPeer, scheduler_pb2.AttachRequest]]:
        sent, self.sent[:] = list(self.sent), []
        return sent

    def refuse_all(self, stream: RequestStream, reason: str) -> int:
        """Refuse a request wherever it comes; return how often it was sent."""
        count = 0
        while stream.error is None:
            for peer, message in self.take():
                count += 1
                rejected = scheduler_pb2.Rejected(
                    handle=message.submit.handle, code=8, reason=reason, retry_after_ms=9000
                )
                peer.on_message(scheduler_pb2.AttachResponse(rejected=rejected))
        return count


@pytest.mark.parametrize(("reason", "tries"), [("QUEUE_FULL", 3), ("QUOTA_EXCEEDED", 1), ("DEADLINE_UNREACHABLE", 3)])
async def test_a_refusal_is_tried_at_a_few_schedulers_only(reason: str, tries: int) -> None:
    many = Many(50)
    stream = many.submit(deadline_s=5)
    assert many.refuse_all(stream, reason) == tries
    assert stream.error is not None
    assert (stream.error.reason, stream.error.retry_after_ms) == (reason, 9000)

    more = Many(50, max_tries=7)
    assert more.refuse_all(more.submit(), "QUEUE_FULL") == 7


async def test_a_deadline_is_not_tried_where_the_queue_is_known_to_be_longer() -> None:
    many = Many(3)
    for peer in many.pool.peers:
        peer.on_message(scheduler_pb2.AttachResponse(load=scheduler_pb2.Load(workers_ready=1, estimated_queue_ms=9000)))
    assert many.refuse_all(many.submit(deadline_s=5), "DEADLINE_UNREACHABLE") == 1


async def test_a_lost_request_is_refused_by_a_few_and_then_waits_before_it_asks_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many = Many(50)
    stream = many.submit()
    ((peer, message),) = many.take()
    peer.on_message(scheduler_pb2.AttachResponse(admitted=scheduler_pb2.Admitted(handle=message.submit.handle)))
    peer.on_disconnected()
    asked = []
    while sent := many.take():
        for other, again in sent:
            asked.append(other)
            rejected = scheduler_pb2.Rejected(
                handle=again.submit.handle, code=8, reason="QUEUE_FULL", retry_after_ms=9000
            )
            other.on_message(scheduler_pb2.AttachResponse(rejected=rejected))
    assert len(set(asked)) == len(asked) == 3
    assert stream.error is None
    (lost,) = many.pool._recovery._lost
    assert asyncio.get_running_loop().time() < lost.not_before
    monkeypatch.setattr(lost, "not_before", 0.0)
    many.pool._recovery._send_lost()
    ((other, _),) = many.take()
    assert other not in asked


async def test_a_call_that_ends_concerns_its_own_scheduler_only(monkeypatch: pytest.MonkeyPatch) -> None:
    many, asked = Many(200), []
    drop = SchedulerPeer.drop
    monkeypatch.setattr(SchedulerPeer, "drop", lambda self, *args: (asked.append(self), drop(self, *args)))
    stream = many.submit()
    ((peer, _),) = many.take()

    stream.close()

    assert asked == [peer]
    assert [message.WhichOneof("kind") for _, message in many.take()] == ["cancel"]


async def test_what_schedulers_say_of_the_model_is_read_once_until_it_changes() -> None:
    many = Many(20)
    peers = many.pool.peers
    assert (many.pool.max_model_len, many.pool.model_version) == (0, "v")
    first = peers[0]
    first.on_message(
        scheduler_pb2.AttachResponse(load=scheduler_pb2.Load(workers_ready=1, running=5, model_version="v"))
    )
    assert many.pool.peers is peers
    first.on_message(scheduler_pb2.AttachResponse(load=scheduler_pb2.Load(workers_ready=1, max_model_len=64)))
    assert many.pool.max_model_len == 64
    first.on_disconnected()
    assert many.pool.max_model_len == 0
    assert len(many.pool.peers) == 19


async def test_one_clock_watches_all_schedulers() -> None:
    many = Many(2)
    peer = SchedulerPeer("127.0.0.1:1", "gw", many.pool._recovery, many.pool._peers._router)
    tasks = peer.start()
    assert len(tasks) == 1, "a timer for each scheduler wakes a gateway 10,000 times a second at 1,000 of them"
    await peer.close()


async def test_many_lost_requests_are_submitted_again_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "_TOKENS_AT_ONCE", 1000)
    many = Many(3)
    for _ in range(60):
        many.submit(tokens=400)
    by_peer: dict[SchedulerPeer, int] = {}
    for peer, message in many.take():
        by_peer[peer] = by_peer.get(peer, 0) + 1
        peer.on_message(scheduler_pb2.AttachResponse(admitted=scheduler_pb2.Admitted(handle=message.submit.handle)))
    lost, count = max(by_peer.items(), key=lambda item: item[1])
    assert count > 6

    lost.on_disconnected()

    sizes = []
    while sent := many.take():
        sizes.append(len(sent))
        await asyncio.sleep(0)
    assert max(sizes) == 3
    assert sum(sizes) == count


# Columns


def logprob_stream(handle: int, width: int, inboxes: PeerInboxes, candidates: int = 1) -> RequestStream:
    submit = scheduler_pb2.Submit(handle=handle, candidate_count=candidates, chosen_logprob=True, logprobs=width)
    stream = RequestStream(submit, None, lambda *_: None)
    inboxes.add(handle, stream, stream.candidates)
    return stream


def step_of(*rows: tuple[int, int, int]) -> scheduler_pb2.StepOutputs:
    """A row of one token for each (handle, width, value)."""
    step = scheduler_pb2.StepOutputs()
    for handle, width, value in rows:
        step.handles.append(handle)
        step.token_ids.append(value)
        step.logprobs.append(-value)
        step.ranks.append(1)
        step.candidate_token_ids.extend([value] * width)
        step.candidate_logprobs.extend([-value] * width)
    return step


@pytest.mark.parametrize("end", ["take", "retire", "finish"])
async def test_rows_of_a_request_that_has_ended_are_skipped_with_their_columns(end: str) -> None:
    inboxes = PeerInboxes()
    first, second = logprob_stream(1, 3, inboxes), logprob_stream(2, 1, inboxes)
    if end == "take":
        inboxes.take(1)
    elif end == "retire":
        inboxes.retire(1, first)
    else:
        inboxes.on_step(scheduler_pb2.StepOutputs(finished=[scheduler_pb2.Finished(handle=1)]))

    inboxes.on_step(step_of((1, 3, 7), (2, 1, 8)))

    assert second.candidates[0].logprobs.chosen == [-8]
    assert second.candidates[0].logprobs.candidate_token_ids == [8]


async def test_columns_whose_owners_are_not_known_go_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_inboxes, "_MAX_RETIRED", 1)
    inboxes = PeerInboxes()
    known = logprob_stream(9, 1, inboxes)
    for handle in (1, 2):
        inboxes.retire(handle, logprob_stream(handle, 1, inboxes))

    with pytest.raises(ValueError, match="columns of log probabilities"):
        inboxes.on_step(step_of((9, 1, 5), (1, 1, 7)))
    assert known.candidates[0].logprobs.chosen == []
    assert known.candidates[0].token_ids == []

    unknown_without = step_of((9, 1, 5))
    unknown_without.handles.append(1234)
    unknown_without.token_ids.append(4)
    inboxes.on_step(unknown_without)  # all entries are the known row's: nothing is in doubt
    assert known.candidates[0].logprobs.chosen == [-5]
