"""All schedulers of this gateway, and all its requests: who gets which, and where they go on after a loss.

When a scheduler is lost, its requests go to another one at once, or to the same one as soon as it is
back: with the output so far, so that their readers see no gap and no repeat. A request that was not
admitted yet is tried elsewhere too; where there is no elsewhere it fails as retryable.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

import grpc

from octavo.common.v1 import common_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.errors import Reason, ServingError
from octavo.services.common.tls_files import TlsFiles
from octavo.services.gateway import slow_readers
from octavo.services.gateway.failover import LostCandidates, continuation, interrupted
from octavo.services.gateway.prefix_index import prompt_block_hashes
from octavo.services.gateway.request_stream import CandidateInbox, RequestStream
from octavo.services.gateway.resume_token import ResumeToken
from octavo.services.gateway.routing import RouteRequest, choose
from octavo.services.gateway.scheduler_addresses import AddressBook
from octavo.services.gateway.scheduler_peer import SchedulerPeer, unreachable
from octavo.services.gateway.slow_readers import SlowReaders

_TICK_S = 0.1
_LOOKUP_S = 5.0
_REATTACH_S = 5.0
_MAX_SICK_S = 1.0  # a killed worker is back by then, or as good as lost
_MAX_REMAINING_MS = 2**32 - 1
_MAX_AVOID_S = 1.0
_RETRYABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
_PERSONAL = (Reason.DEADLINE_UNREACHABLE, Reason.QUOTA_EXCEEDED)  # the next request may well be taken


class SchedulerPool:
    """Everything runs on the event loop that called `start`."""

    def __init__(
        self, addresses: Sequence[str], gateway_id: str, failover_s: float = 30.0, tls: TlsFiles | None = None
    ) -> None:
        """`failover_s`: how long an admitted request waits for a scheduler that goes on with it."""
        self._tls = tls
        self._addresses = AddressBook(addresses)
        self._gateway_id = gateway_id
        self._peers: dict[str, SchedulerPeer] = {}  # by address
        self._next_handle = 1
        self._streams: dict[RequestStream, None] = {}  # in order of submission
        self._lost = LostCandidates(failover_s)
        self._slow_readers = SlowReaders()
        self._tasks: set[asyncio.Task[None]] = set()
        self._crashed: asyncio.Future[None] | None = None
        self.num_failovers = 0
        """Times that a running request lost its scheduler."""

    # Life

    def start(self) -> None:
        """Connect, and stay connected until `close`."""
        self._crashed = asyncio.get_running_loop().create_future()
        self._take_addresses()
        self._watch(asyncio.create_task(self._tick()))
        if self._addresses.has_names:
            self._watch(asyncio.create_task(self._look_up()))

    async def wait_crashed(self) -> None:
        """Raise what ended one of the tasks, once one ended by itself: that is a bug."""
        assert self._crashed is not None, "not started"
        await asyncio.shield(self._crashed)

    async def close(self) -> None:
        """Disconnect; requests that still run fail."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for peer in self._peers.values():
            await peer.close()
        for stream in list(self._streams):
            stream.fail(interrupted("the gateway stops"))

    def _watch(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and self._crashed is not None and not self._crashed.done():
            error = task.exception()
            assert error is not None, "a task of the pool returned"
            self._crashed.set_exception(error)

    # State

    @property
    def connected(self) -> bool:
        """Whether requests can be submitted."""
        return any(peer.usable for peer in self._peers.values())

    @property
    def healthy(self) -> bool:
        """Whether a request could be computed now."""
        return any(peer.healthy for peer in self._peers.values())

    @property
    def draining(self) -> bool:
        """Whether every scheduler that is there asked for no new requests."""
        there = [peer for peer in self._peers.values() if peer.connected]
        return bool(there) and all(peer.draining for peer in there)

    @property
    def peers(self) -> list[SchedulerPeer]:
        """The schedulers that are connected."""
        return [peer for peer in self._peers.values() if peer.connected]

    @property
    def max_model_len(self) -> int:
        """Longest context that all workers can hold; 0 if not known."""
        return min((peer.load.max_model_len for peer in self.peers if peer.load.max_model_len), default=0)

    @property
    def model_version(self) -> str:
        """Of the weights that the workers hold; empty if not known."""
        return next((peer.load.model_version for peer in self.peers if peer.load.model_version), "")

    @property
    def streams(self) -> list[RequestStream]:
        """All requests that are not closed, oldest first."""
        return list(self._streams)

    # Requests

    def submit(self, submit: scheduler_pb2.Submit, remaining_s: float | None, session_id: str = "") -> RequestStream:
        """Send a request; its handle and remaining time are filled in. Raises ServingError if that cannot work now."""
        loop = asyncio.get_running_loop()
        deadline = None if remaining_s is None else loop.time() + remaining_s
        stream = RequestStream(submit, deadline, self._close, session_id)
        peer = self._choose(stream, submit)
        if peer is None:
            if self.draining:
                raise ServingError(Reason.DRAINING, "the scheduler is stopping; try again", retry_after_ms=1000)
            raise unreachable()
        self._streams[stream] = None
        self._send(peer, stream, stream.candidates, submit)
        return stream

    async def reattach(self, token: ResumeToken) -> RequestStream:
        """Take over a request that goes on without a stream, from whichever scheduler has it.

        Its `submit` knows the shape of the output only; it is the caller's to complete. Raises RESUME_STATE_LOST.
        """
        peers = sorted(self.peers, key=lambda peer: peer.scheduler_id != token.scheduler_id)
        for peer in peers:  # it may have moved since the token was made
            submit = scheduler_pb2.Submit(
                request_id=token.request_id,
                candidate_count=token.candidate_count,
                chosen_logprob=token.chosen_logprob,
                logprobs=token.logprobs,
                resume_window_ms=1,
            )
            stream = RequestStream(submit, None, self._close)
            stream.can_move = False
            self._streams[stream] = None
            handle, self._next_handle = self._next_handle, self._next_handle + 1
            try:
                peer.reattach(stream, handle, token.first_offset)
                async with asyncio.timeout(_REATTACH_S):
                    while stream.reattached is None and stream.error is None:
                        await stream.wait()
            except TimeoutError:
                stream.close(keep=True)
                continue
            except BaseException:
                stream.close(keep=True)
                raise
            if stream.reattached is not None and stream.reattached.candidate_count == token.candidate_count:
                stream.admitted = scheduler_pb2.Admitted(handle=handle, seed=stream.reattached.seed)
                return stream
            stream.close(keep=True)
        message = "nothing is kept of the request; send it again with continue_output set to the tokens received"
        raise ServingError(Reason.RESUME_STATE_LOST, message)

    def interrupt_all(self, message: str) -> None:
        """End every request whose client has still to be told so; with a resume window they go on without it."""
        for stream in list(self._streams):
            if not stream.ended:
                error = interrupted(message)
                error.code = grpc.StatusCode.UNAVAILABLE
                self._cut_off(stream, error)

    def _cut_off(self, stream: RequestStream, error: ServingError) -> None:
        """End a stream, even in the middle of a write."""
        stream.fail(error)
        if not stream.is_reading:
            stream.interrupt()

    async def cancel_request(self, request_id: str) -> scheduler_pb2.Cancelled:
        """End a request of any gateway, at any scheduler, by its id. Raises SCHEDULER_UNREACHABLE if none answers."""
        here = self._cancel_lost(request_id)
        answers = await asyncio.gather(
            *(peer.cancel_request(request_id) for peer in self.peers), return_exceptions=True
        )
        known = [answer for answer in answers if not isinstance(answer, BaseException)]
        for failure in (answer for answer in answers if isinstance(answer, BaseException)):
            if not isinstance(failure, ServingError):
                raise failure
        if not known and not here:
            raise unreachable()
        running = [answer for answer in known if answer.was_running]
        if running:
            return running[0]
        return scheduler_pb2.Cancelled(request_id=request_id, was_running=here)

    def _choose(
        self, stream: RequestStream, submit: scheduler_pb2.Submit, refused_by: Collection[str] = ()
    ) -> SchedulerPeer | None:
        """Return who gets a request; None if nobody takes it. A sick scheduler gets it only if all are."""
        peers = [peer for peer in self._peers.values() if peer.usable and peer.address not in refused_by]
        if stream.model_version:
            peers = [peer for peer in peers if peer.load.model_version in ("", stream.model_version)]
        peers = [peer for peer in peers if peer.healthy] or peers
        if len(peers) < 2:
            return peers[0] if peers else None
        now = asyncio.get_running_loop().time()
        hashes: dict[int, list[int]] = {}
        for size in {peer.welcome.kv_block_size for peer in peers if peer.welcome and len(peer.prefixes)} - {0}:
            hashes[size] = prompt_block_hashes(submit, size)
        views = [peer.view(hashes.get(peer.welcome.kv_block_size if peer.welcome else 0, ()), now) for peer in peers]
        request = RouteRequest(
            request_id=submit.request_id,
            num_tokens=len(submit.prompt_token_ids) + len(submit.continue_token_ids),
            session_id=stream.session_id,
            remaining_ms=self._remaining_ms(stream),
        )
        return peers[choose(request, views)]

    def _send(
        self,
        peer: SchedulerPeer,
        stream: RequestStream,
        candidates: Sequence[CandidateInbox],
        submit: scheduler_pb2.Submit,
    ) -> None:
        submit.handle = self._next_handle
        self._next_handle += 1
        submit.remaining_ms = self._remaining_ms(stream)
        peer.submit(stream, candidates, submit)

    def _remaining_ms(self, stream: RequestStream) -> int:
        if stream.deadline is None:
            return 0
        remaining_s = stream.deadline - asyncio.get_running_loop().time()
        return min(max(1, int(remaining_s * 1000)), _MAX_REMAINING_MS)

    def _close(self, stream: RequestStream, candidate_index: int | None, keep: bool) -> None:
        """End one candidate, or all, and forget the request then; with `keep` it goes on without a stream."""
        if keep:
            self._lost.go_on(stream)  # what was paused is needed at a scheduler now
            self._send_lost()
            for peer in self._peers.values():
                peer.detach(stream, stream.candidates)
        self._end(stream, candidate_index)

    def _end(self, stream: RequestStream, candidate_index: int | None) -> None:
        """End one candidate, or all: tell the schedulers that have them, and forget them."""
        ended = stream.candidates if candidate_index is None else [stream.candidates[candidate_index]]
        self._lost.remove(ended)
        for peer in self._peers.values():
            peer.drop(stream, ended)
        for candidate in ended:
            candidate.handle = 0
        if candidate_index is None:
            self._streams.pop(stream, None)

    def _cancel_lost(self, request_id: str) -> bool:
        """Cancel the candidates of a request that no scheduler has now; return whether there were any."""
        found = [lost for lost in self._lost if lost.stream.submit.request_id == request_id and not lost.is_out]
        for lost in found:
            self._lost.remove([lost.candidate])
            lost.candidate.finished = scheduler_pb2.Finished(
                candidate_index=lost.candidate.index, reason=common_pb2.FINISH_REASON_CANCELLED
            )
            lost.stream.wake_at_end()
        return bool(found)

    # What becomes of requests: called by the peers

    def on_peer_ready(self, peer: SchedulerPeer) -> None:
        """Send what waits for a scheduler."""
        del peer
        self._send_lost()

    def on_peer_lost(self, peer: SchedulerPeer, lost: Sequence[tuple[RequestStream, list[CandidateInbox]]]) -> None:
        """Let requests go on elsewhere."""
        message = "the scheduler was lost before it admitted the request; try again"
        error = ServingError(Reason.SCHEDULER_UNREACHABLE, message, retry_after_ms=500)
        for stream, candidates in lost:
            if stream.ended:
                continue
            if not stream.can_move:
                stream.fail(interrupted("the scheduler was lost, and with it the prompt"))
            elif stream.admitted is None:
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
        retryable = error.code in _RETRYABLE
        if retryable and error.reason not in _PERSONAL:
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
        if failed.resumable and stream.can_move and self._lost.failover_s > 0:
            self._lose(stream, candidates)
            return
        error = ServingError.from_wire(failed.code, failed.reason, failed.message)
        # UNAVAILABLE would invite a client's retry policy to start over, in the middle of an output.
        stream.fail(interrupted(error.message) if error.code is grpc.StatusCode.UNAVAILABLE else error)

    def _try_elsewhere(self, peer: SchedulerPeer, stream: RequestStream, error: ServingError) -> None:
        """Submit a request that was not admitted to a scheduler that has not refused it; fail it without one."""
        stream.refused_by.add(peer.address)
        other = self._choose(stream, stream.submit, stream.refused_by)
        if other is None:
            stream.fail(error)
        else:
            self._send(other, stream, stream.candidates, stream.submit)

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
        """Submit every candidate that waits, alone, under its own index, with the output so far."""
        now = asyncio.get_running_loop().time()
        for lost in self._lost.due(now):
            submit = continuation(lost.stream, lost.candidate, now)
            peer = self._choose(lost.stream, submit, lost.refused_by)
            if peer is not None:
                lost.is_out = True
                self._send(peer, lost.stream, [lost.candidate], submit)
            elif lost.refused_by:  # all of them: ask them again when the last one said
                lost.wait_for_refusals()

    # Time

    async def _tick(self) -> None:
        """Give up what waited too long, and submit again what may be."""
        while True:
            await asyncio.sleep(_TICK_S)
            now = asyncio.get_running_loop().time()
            for lost in self._lost.expired(now):
                lost.stream.fail(interrupted("no scheduler took the request over in time"))
            for peer in self.peers:
                if peer.sick_for(now) > _MAX_SICK_S:
                    self._evacuate(peer)
            verdicts = self._slow_readers.check(self._streams, now)
            for stream in verdicts.pause:
                self._pause(stream)
            for stream in verdicts.go_on:
                self._lost.go_on(stream)
            for stream in verdicts.cut_off:
                self._cut_off(stream, interrupted(f"the client took nothing for {slow_readers.PATIENCE_S:g} s"))
            self._send_lost()

    def _evacuate(self, peer: SchedulerPeer) -> None:
        """Take the requests of a scheduler that makes no progress to one that does, if there is one."""
        for stream in peer.streams:
            others = [other for other in self.peers if other.healthy]
            if not any(other.load.model_version == stream.model_version for other in others):
                continue
            if stream.admitted is None or not stream.can_move:
                continue
            moving = [each for each in stream.candidates if peer.has(each.handle) and each.finished is None]
            peer.drop(stream, moving)
            self._lose(stream, moving)

    def _pause(self, stream: RequestStream) -> None:
        """Take the unfinished candidates of a request from their schedulers until the client has read."""
        if not stream.can_move:
            return
        for candidate in stream.candidates:
            if candidate.finished is None:
                for peer in self._peers.values():
                    peer.drop(stream, [candidate])
                self._lost.pause(stream, candidate)

    async def _look_up(self) -> None:
        """Follow the names' addresses."""
        while True:
            await self._addresses.refresh()
            self._take_addresses()
            await asyncio.sleep(_LOOKUP_S)

    def _take_addresses(self) -> None:
        """Connect to new addresses; leave those that are gone once nothing is there."""
        addresses = self._addresses.current
        for address in addresses:
            if address not in self._peers:
                name = self._addresses.name_of(address)
                peer = self._peers[address] = SchedulerPeer(address, self._gateway_id, self, self._tls, name)
                for task in peer.start():
                    self._watch(task)
        for address in [address for address, peer in self._peers.items() if address not in addresses]:
            if not self._peers[address].connected:
                peer = self._peers.pop(address)
                self._watch_closing(peer)

    def _watch_closing(self, peer: SchedulerPeer) -> None:
        task = asyncio.create_task(peer.close())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
