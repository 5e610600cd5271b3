"""What becomes of requests that were refused, or lost with their scheduler, or whose client does not read.

When a scheduler is lost, its requests go to another one at once, or to the same one as soon as it is
back: with the output so far, so that their readers see no gap and no repeat. A request that was not
admitted yet is tried elsewhere too; where there is no elsewhere it fails as retryable.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import grpc

from octavo.common.v1 import common_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.errors import Reason, ServingError
from octavo.services.gateway.schedulers.failover import Lost, LostCandidates, continuation, interrupted
from octavo.services.gateway.schedulers.peer import SchedulerPeer
from octavo.services.gateway.schedulers.peers import SchedulerPeers
from octavo.services.gateway.schedulers.request_stream import CandidateInbox, RequestStream, places_of

MAX_UNREAD = 256
"""Tokens of a candidate. A token is at most 172 bytes here, with 20 alternatives: so this is below 64 KiB."""
PATIENCE_S = 30.0


@dataclass
class Verdicts:
    """What is to be done about streams."""

    pause: list[RequestStream] = field(default_factory=list)
    go_on: list[RequestStream] = field(default_factory=list)
    cut_off: list[RequestStream] = field(default_factory=list)


class SlowReaders:
    """Watches all streams, a few times a second: what was not read is bounded, and so is the patience.

    A candidate with more than MAX_UNREAD tokens that its client has not taken is paused: it is ended at its
    scheduler, which frees its blocks for others, and goes on like a lost one, from the tokens that are known, once
    the client has read. Nothing else is needed to pause, and the cache makes it cheap.
    """

    def __init__(self) -> None:
        self._paused: dict[RequestStream, tuple[int, float]] = {}  # rounds of its handler, and since when

    def check(self, streams: Iterable[RequestStream], now: float) -> Verdicts:
        """Return what changes now; `now` is a time of the event loop."""
        verdicts = Verdicts()
        seen = self._paused
        self._paused = {}
        for stream in streams:
            known = seen.get(stream)
            if stream.is_reading or stream.ended:
                if known is not None:
                    verdicts.go_on.append(stream)
            elif known is not None:
                rounds, since = known
                since = since if rounds == stream.num_rounds else now
                self._paused[stream] = stream.num_rounds, since
                if now - since >= PATIENCE_S:
                    verdicts.cut_off.append(stream)
            elif any(len(each.token_ids) - each.num_read > MAX_UNREAD for each in stream.candidates):
                self._paused[stream] = stream.num_rounds, now
                verdicts.pause.append(stream)
        return verdicts


_TICK_S = 0.1
_MAX_SICK_S = 1.0  # of a scheduler whose worker takes too long for a step
_MAX_WORKERLESS_S = 10.0  # a killed worker is back by then, or as good as lost
_MAX_AVOID_S = 1.0
_TOKENS_AT_ONCE = 65_536  # of lost requests, submitted in one turn of the event loop: some 5 ms of hashing and copying
_RETRYABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
_PERSONAL = (Reason.DEADLINE_UNREACHABLE, Reason.QUOTA_EXCEEDED)  # the next request may well be taken


class Recovery:
    """Owner of the candidates that no scheduler has. It is what the peers turn to: see PeerOwner."""

    def __init__(self, peers: SchedulerPeers, failover_s: float, max_tries: int = 3) -> None:
        """Set up without any candidate.

        failover_s  how long an admitted request waits for a scheduler that goes on with it
        max_tries   most schedulers that are asked to take a request, one after the other
        """
        self._peers = peers
        self._max_tries = max_tries
        self._to_send: deque[Lost] = deque()  # due when they were put here
        self._is_sending = False
        self._lost = LostCandidates(failover_s)
        self._slow_readers = SlowReaders()
        self.num_failovers = 0
        """Times that a running request lost its scheduler."""

    def go_on(self, stream: RequestStream) -> None:
        """Let a request go on that was paused."""
        self._lost.go_on(stream)
        self._send_lost()

    def forget(self, candidates: Iterable[CandidateInbox]) -> None:
        """Let go of candidates that have ended."""
        self._lost.remove(candidates)

    def cancel(self, request_id: str, tenant: str) -> bool:
        """Cancel the candidates of a tenant's request that no scheduler has now; return whether there were any."""
        wanted = request_id, tenant
        submits = [(lost, lost.stream.submit) for lost in self._lost if not lost.is_out]
        found = [lost for lost, submit in submits if (submit.request_id, submit.tenant) == wanted]
        for lost in found:
            self._lost.remove([lost.candidate])
            lost.candidate.finished = scheduler_pb2.Finished(
                candidate_index=lost.candidate.index, reason=common_pb2.FINISH_REASON_CANCELLED
            )
            lost.stream.wake_at_end()
        return bool(found)

    # What the peers tell

    def on_peer_ready(self, peer: SchedulerPeer) -> None:
        """Send what waits for a scheduler."""
        del peer
        self._send_lost()

    def on_peer_load(self, peer: SchedulerPeer) -> None:
        """Take requests away from a scheduler that has just lost its worker."""
        if not peer.load.workers_ready:
            self._relieve(peer, asyncio.get_running_loop().time())
            self._send_lost()

    def on_peer_lost(self, peer: SchedulerPeer, lost: Sequence[tuple[RequestStream, list[CandidateInbox]]]) -> None:
        """Let requests go on elsewhere."""
        message = "the scheduler was lost before it admitted the request; try again"
        for stream, candidates in lost:
            if stream.ended:
                continue
            if not stream.can_move:
                stream.fail(interrupted("the scheduler was lost, and with it the prompt"))
            elif stream.admitted is None:
                error = ServingError(Reason.SCHEDULER_UNREACHABLE, message, retry_after_ms=500)
                self._try_elsewhere(peer, stream, error)
            else:
                self._lose(stream, candidates)
        self._send_lost()

    def on_admitted(self, stream: RequestStream, admitted: scheduler_pb2.Admitted) -> None:
        """Note that a scheduler has a request."""
        if stream.admitted is None:
            stream.admitted = admitted
            stream.wake()
        else:  # it goes on after a loss
            self._lost.remove([each for each in stream.candidates if each.handle == admitted.handle])
            if stream.lost_at:
                stream.takeovers.append((stream.lost_at, asyncio.get_running_loop().time()))
                stream.lost_at = 0.0

    def on_rejected(
        self, peer: SchedulerPeer, stream: RequestStream, candidates: list[CandidateInbox], error: ServingError
    ) -> None:
        """Try a request elsewhere, or later, if that can help."""
        now = asyncio.get_running_loop().time()
        is_too_long = error.reason == Reason.KV_CAPACITY_EXCEEDED
        retryable = error.code in _RETRYABLE or (is_too_long and self._others_hold(stream, peer))
        if retryable and not is_too_long and error.reason not in _PERSONAL:
            peer.avoid_until(now + min(error.retry_after_ms / 1000, _MAX_AVOID_S))
        if stream.admitted is None:
            if retryable:
                self._try_elsewhere(peer, stream, error)
            else:
                stream.fail(error)
        elif retryable:
            for candidate in candidates:
                self._lost.refused(candidate, peer.address, now + max(error.retry_after_ms / 1000, _TICK_S))
            self._send_lost()
        else:
            stream.fail(interrupted(f"the scheduler would not go on with it: {error.message}"))

    def on_failed(self, stream: RequestStream, candidates: list[CandidateInbox], failed: scheduler_pb2.Failed) -> None:
        """Let a request go on elsewhere, if that is possible, or end it."""
        is_too_long = failed.reason == Reason.KV_CAPACITY_EXCEEDED
        can_go_on = failed.resumable or (is_too_long and self._others_hold(stream))
        if can_go_on and stream.can_move and self._lost.failover_s > 0:
            self._lose(stream, candidates)
            return
        error = ServingError.from_wire(failed.code, failed.reason, failed.message)
        # UNAVAILABLE would invite a client's retry policy to start over, in the middle of an output.
        stream.fail(interrupted(error.message) if error.code is grpc.StatusCode.UNAVAILABLE else error)

    def _try_elsewhere(self, peer: SchedulerPeer, stream: RequestStream, error: ServingError) -> None:
        """Submit a request that was not admitted to a scheduler that has not refused it; fail it without one.

        A few refusals are enough: where all are full, asking each of many would multiply the load. A quota is the
        tenant's at each scheduler, so one that is used up is an answer: asking on would give it as many quotas as
        there are schedulers.
        """
        stream.refused_by.add(peer.address)
        is_final = error.reason == Reason.QUOTA_EXCEEDED or len(stream.refused_by) >= self._max_tries
        other = None if is_final else self._peers.choose(stream, stream.submit, stream.refused_by)
        if other is not None and error.reason == Reason.DEADLINE_UNREACHABLE and other.is_too_late_for(stream):
            other = None
        if other is None:
            stream.fail(error)
        else:
            self._peers.send(other, stream, stream.candidates, stream.submit)

    def _others_hold(self, stream: RequestStream, peer: SchedulerPeer | None = None) -> bool:
        """Return whether a scheduler that is not `peer` says that it can hold a request, as long as it is now."""
        return any(
            (other.load.max_model_len >= stream.num_longest or other.load.may_grow)
            for other in self._peers.connected
            if other is not peer and other.address not in stream.refused_by
        )

    def _lose(self, stream: RequestStream, candidates: Sequence[CandidateInbox]) -> None:
        """Let candidates wait for a scheduler that goes on with them."""
        newly = [self._lost.add(stream, candidate) for candidate in candidates if candidate.finished is None]
        if any(newly):
            stream.failovers += 1
            self.num_failovers += 1
            stream.lost_at = stream.lost_at or asyncio.get_running_loop().time()
        if stream.failovers > self._lost.max_failovers:
            stream.fail(interrupted(f"the request was lost {self._lost.max_failovers} times"))

    def _send_lost(self) -> None:
        """Submit every candidate that waits, some now and the others in the event loop's next turns."""
        if not self._is_sending:
            self._to_send.extend(self._lost.due(asyncio.get_running_loop().time()))
            self._send_some()

    def _send_some(self) -> None:
        """Submit the next candidates, each alone, under its own index, with the output so far."""
        loop = asyncio.get_running_loop()
        now, num_tokens = loop.time(), 0
        while self._to_send and num_tokens < _TOKENS_AT_ONCE:
            lost = self._to_send.popleft()
            if not lost.is_due(now) or not self._lost.holds(lost):
                continue
            if lost.num_refusals >= self._max_tries:
                lost.wait_for_others(now + _MAX_AVOID_S)
                continue
            submit = continuation(lost.stream, lost.candidate, now)
            num_tokens += len(submit.prompt_token_ids) + len(submit.continue_token_ids)
            peer = self._peers.choose(lost.stream, submit, lost.refused_by)
            if peer is not None:
                lost.is_out = True
                self._peers.send(peer, lost.stream, [lost.candidate], submit)
            elif lost.refused_by:  # all of them: ask them again when the last one said
                lost.wait_for_refusals()
        self._is_sending = bool(self._to_send)
        if self._is_sending:
            loop.call_soon(self._send_some)

    # Time

    async def watch(self, streams: Iterable[RequestStream]) -> None:
        """Give up what waited too long, and submit again what may be; never returns.

        `streams` are all requests, whenever it is iterated over.
        """
        while True:
            await asyncio.sleep(_TICK_S)
            now = asyncio.get_running_loop().time()
            for lost in self._lost.expired(now):
                lost.stream.fail(interrupted("no scheduler took the request over in time"))
            for peer in self._peers.connected:
                self._relieve(peer, now)
            self._judge_readers(streams, now)
            self._send_lost()

    def _relieve(self, peer: SchedulerPeer, now: float) -> None:
        """Take requests of a scheduler that makes no progress to one that does, if there is one.

        What it had cached was lost with its last worker, so nothing is gained by waiting for the next one. But a
        request that was lost before may be what workers die of. Finding that out takes several deaths at one
        scheduler, which knows the suspects: so it stays.
        """
        sick_s = peer.sick_for(now)
        is_workerless = not peer.load.workers_ready
        if not is_workerless and sick_s <= _MAX_SICK_S:
            return
        versions = {other.load.model_version for other in self._peers.connected if other.healthy and other is not peer}
        for stream in peer.streams:
            stays = is_workerless and stream.failovers > 0 and sick_s <= _MAX_WORKERLESS_S
            if stays or stream.admitted is None or not stream.can_move or stream.model_version not in versions:
                continue
            moving = [each for each in stream.candidates if peer.has(each.handle) and each.finished is None]
            peer.drop(stream, moving)
            self._lose(stream, moving)

    def _judge_readers(self, streams: Iterable[RequestStream], now: float) -> None:
        """Pause requests whose clients do not read, and let them go on or cut them off."""
        verdicts = self._slow_readers.check(streams, now)
        for stream in verdicts.pause:
            self._pause(stream)
        for stream in verdicts.go_on:
            self._lost.go_on(stream)
        for stream in verdicts.cut_off:
            stream.cut_off(interrupted(f"the client took nothing for {PATIENCE_S:g} s"))

    def _pause(self, stream: RequestStream) -> None:
        """Take the unfinished candidates of a request from their schedulers until the client has read."""
        if not stream.can_move:
            return
        for candidate in stream.candidates:
            if candidate.finished is None:
                for place in places_of([candidate]):
                    place.drop(stream, [candidate])
                self._lost.pause(stream, candidate)
