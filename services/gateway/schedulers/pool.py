"""All schedulers of this gateway as one, and all its requests: what the rest of the gateway uses.

Which scheduler gets a request is decided in `scheduler_peers.py`, where it goes on after a loss in `recovery.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grpc

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.adapter_names import AdapterNames
from octavo.services.common.errors import Reason, ServingError, feature_disabled
from octavo.services.common.tls_files import TlsFiles
from octavo.services.gateway.offload.watched_tasks import WatchedTasks
from octavo.services.gateway.schedulers.failover import interrupted
from octavo.services.gateway.schedulers.link import LinkState
from octavo.services.gateway.schedulers.peer import SchedulerPeer, unreachable
from octavo.services.gateway.schedulers.peers import SchedulerPeers
from octavo.services.gateway.schedulers.recovery import Recovery
from octavo.services.gateway.schedulers.request_stream import RequestStream, places_of
from octavo.services.gateway.schedulers.resume_token import ResumeToken
from octavo.services.gateway.tokenization.model_identity import ModelIdentity

_REATTACH_S = 5.0
_MIN_RETRY_MS, _MAX_RETRY_MS = 50, 60_000


@dataclass(frozen=True, slots=True)
class _Facts:
    """What all schedulers together say of the model; see the properties of SchedulerPool."""

    max_model_len: int = 0
    may_grow: bool = False
    vector_size: int = 0
    scores_prompts: bool = False
    model_version: str = ""
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, peers: Sequence[SchedulerPeer]) -> _Facts:
        loads = [peer.load for peer in peers]
        return cls(
            max((load.max_model_len for load in loads), default=0),
            any(load.may_grow for load in loads),
            next((load.vector_size for load in loads if load.vector_size), 0),
            any(load.prompt_logprobs for load in loads),
            next((load.model_version for load in loads if load.model_version), ""),
            next((tuple(load.notes) for load in loads if load.notes), ()),
        )


class SchedulerPool:
    """Everything runs on the event loop that called `start`."""

    def __init__(
        self,
        addresses: Sequence[str],
        gateway_id: str,
        failover_s: float = 30.0,
        tls: TlsFiles | None = None,
        *,
        identity: ModelIdentity | None = None,
        max_tries: int = 3,
        min_usable_share: float = 0.0,
    ) -> None:
        """Schedulers whose workers have another model than `identity` are treated as not there.

        failover_s        how long an admitted request waits for a scheduler that goes on with it
        max_tries         most schedulers that are asked to take a request, one after the other
        min_usable_share  of the schedulers that answer, so many can be used before the gateway is ready
        """
        self._peers = SchedulerPeers(addresses, gateway_id, tls, identity)
        self._recovery = Recovery(self._peers, failover_s, max_tries)
        self._min_usable_share = min_usable_share
        self._was_ready = False
        self._facts = _Facts()
        self._facts_of: list[SchedulerPeer] | None = None  # what they were read from
        self._streams: dict[RequestStream, None] = {}  # in order of submission
        self._tasks: WatchedTasks | None = None

    # Life

    def start(self) -> None:
        """Connect, and stay connected until `close`."""
        self._tasks = WatchedTasks()
        self._peers.start(self._recovery, self._tasks)
        self._tasks.start(self._recovery.watch(self._streams))

    async def wait_crashed(self) -> None:
        """Raise what ended one of the tasks, once one ended by itself: that is a bug."""
        assert self._tasks is not None, "not started"
        await self._tasks.wait_crashed()

    async def close(self) -> None:
        """Disconnect; requests that still run fail."""
        if self._tasks is not None:
            await self._tasks.close()
        await self._peers.close()
        for stream in list(self._streams):
            stream.fail(interrupted("the gateway stops"))

    # State

    @property
    def connected(self) -> bool:
        """Whether requests can be submitted."""
        return any(peer.usable for peer in self._peers)

    @property
    def healthy(self) -> bool:
        """Whether a request could be computed now."""
        return any(peer.healthy for peer in self._peers)

    @property
    def ready(self) -> bool:
        """Whether calls may come: a request could be computed now, and this gateway fits the schedulers there are.

        A gateway of a new release or for a new model whose roll-out has reached a few schedulers must not take the
        traffic to those few. Schedulers that do not answer do not count: they are as lost to any other gateway. Once
        it was ready, only `healthy` counts.
        """
        if self._was_ready or not self.healthy:
            return self.healthy
        usable, unfit = self._peers.count(LinkState.CONNECTED), self._peers.count(LinkState.UNFIT)
        all_tried = not self._peers.count(LinkState.UNTRIED)
        self._was_ready = all_tried and usable >= self._min_usable_share * (usable + unfit)
        return self._was_ready

    @property
    def num_unfit(self) -> int:
        """Schedulers that answer and cannot be used: another model, tokenizer or protocol revision."""
        return self._peers.count(LinkState.UNFIT)

    @property
    def draining(self) -> bool:
        """Whether every scheduler that is there asked for no new requests."""
        return self._peers.draining

    @property
    def num_failovers(self) -> int:
        """Times that a running request lost its scheduler."""
        return self._recovery.num_failovers

    @property
    def peers(self) -> list[SchedulerPeer]:
        """The schedulers that are connected."""
        return self._peers.connected

    @property
    def max_model_len(self) -> int:
        """Longest context that one of the schedulers can hold; 0 if not known."""
        return self._current_facts().max_model_len

    @property
    def workers_limit(self) -> int:
        """Longest context that is worth sending; 0 if that is not known, or a larger worker may be on its way."""
        facts = self._current_facts()
        return 0 if facts.may_grow else facts.max_model_len

    @property
    def block_sizes(self) -> list[int]:
        """For which block sizes the hashes of a prompt's blocks matter to who gets a request now."""
        return self._peers.block_sizes

    @property
    def vector_size(self) -> int:
        """Elements of the vectors that the workers make; 0 if not known, or if they make none."""
        return self._current_facts().vector_size

    @property
    def scores_prompts(self) -> bool:
        """Whether log probabilities of prompts can be had."""
        return self._current_facts().scores_prompts

    @property
    def model_version(self) -> str:
        """Of the weights that the workers hold; empty if not known."""
        return self._current_facts().model_version

    @property
    def notes(self) -> tuple[str, ...]:
        """What people should know of how the workers serve it."""
        return self._current_facts().notes

    def _current_facts(self) -> _Facts:
        """Return what is known of the model; looks at all schedulers only when something has changed."""
        peers = self._peers.connected
        if peers is not self._facts_of:
            self._facts, self._facts_of = _Facts.of(peers), peers
        return self._facts

    # Adapters

    @property
    def adapter_names(self) -> AdapterNames:
        """What the names of adapters mean."""
        return self._peers.adapter_names

    def publish_adapters(self, names: Sequence[scheduler_pb2.AdapterName]) -> None:
        """Take new meanings of names, and tell them to the other gateways, over the schedulers."""
        new = scheduler_pb2.AdapterNames(names=self._peers.adapter_names.merge(names))
        for peer in self._peers.connected:
            peer.tell_adapters(new)

    async def check_adapter(self, key: str, path: str) -> str:
        """Have the workers of each scheduler load an adapter; return why none can, or nothing.

        Raises SCHEDULER_UNREACHABLE, FEATURE_DISABLED.
        """
        peers = [peer for peer in self.peers if peer.usable]
        able = [peer for peer in peers if peer.load.max_adapters]
        if not peers:
            raise unreachable()
        if not able:
            message = "no worker takes adapters now: none is ready, or they have --max-adapters 0, device cuda or ranks"
            raise feature_disabled("adapters", message)
        checks = [peer.check_adapter(self._peers.next_handle(), key, path) for peer in able]
        answers = await asyncio.gather(*checks, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, ServingError):
                raise answer
        problems = [answer for answer in answers if isinstance(answer, str)]
        if not problems:
            raise unreachable()
        return "" if "" in problems else problems[0]

    @property
    def takes_adapters(self) -> bool:
        """Whether workers of one of the schedulers take adapters."""
        return any(peer.load.max_adapters for peer in self.peers)

    @property
    def streams(self) -> list[RequestStream]:
        """All requests that are not closed, oldest first."""
        return list(self._streams)

    # Requests

    def check_in_time(self, tenant: str, priority: int, deadline: float | None) -> None:
        """Raise DEADLINE_UNREACHABLE if every scheduler has just said that it has a longer queue than there is time.

        So what would be refused anyway costs nothing but this: neither a look at its prompt nor a scheduler's time.
        """
        if deadline is None:
            return
        turns_at = [peer.turn_at(tenant, priority) for peer in self._peers.connected if peer.usable]
        turn_at = min(turns_at, default=0.0)
        if turn_at > deadline:
            now = asyncio.get_running_loop().time()
            wait_ms, left_ms = int(1000 * (turn_at - now)), max(0, int(1000 * (deadline - now)))
            message = f"the queue takes about {wait_ms} ms, and the deadline is in {left_ms} ms"
            retry_ms = min(max(wait_ms - left_ms, _MIN_RETRY_MS), _MAX_RETRY_MS)
            raise ServingError(Reason.DEADLINE_UNREACHABLE, message, retry_after_ms=retry_ms)

    def submit(
        self,
        submit: scheduler_pb2.Submit,
        remaining_s: float | None,
        session_id: str = "",
        block_hashes: Mapping[int, Sequence[int]] | None = None,
        num_output: int = 0,
    ) -> RequestStream:
        """Send a request; its handle and remaining time are filled in. Raises ServingError if that cannot work now.

        block_hashes  those of the prompt by size, for `block_sizes`; what is not there is computed when it is needed
        num_output    most tokens of output, if the client said so: who gets it has room for them
        """
        loop = asyncio.get_running_loop()
        deadline = None if remaining_s is None else loop.time() + remaining_s
        stream = RequestStream(submit, deadline, self._close, session_id, num_output)
        stream.block_hashes.update(block_hashes or {})
        peer = self._peers.choose(stream, submit)
        if peer is None:
            if self.draining:
                raise ServingError(Reason.DRAINING, "the scheduler is stopping; try again", retry_after_ms=1000)
            raise unreachable()
        self._streams[stream] = None
        self._peers.send(peer, stream, stream.candidates, submit)
        return stream

    async def reattach(self, token: ResumeToken) -> RequestStream:
        """Take over a request that goes on without a stream, from whichever scheduler has it.

        Its `submit` knows the shape of the output only; it is the caller's to complete. Raises RESUME_STATE_LOST.
        """
        peers = sorted(self.peers, key=lambda peer: peer.scheduler_id != token.scheduler_id)
        peers = [peer for peer in peers if peer.takes_over]
        for peer in peers:  # it may have moved since the token was made
            stream = await self._reattach_at(peer, token)
            if stream is not None:
                return stream
        message = "nothing is kept of the request; send it again with continue_output set to the tokens received"
        raise ServingError(Reason.RESUME_STATE_LOST, message)

    async def _reattach_at(self, peer: SchedulerPeer, token: ResumeToken) -> RequestStream | None:
        """Take over a request from a scheduler; None if that does not have it, or does not answer."""
        submit = scheduler_pb2.Submit(
            request_id=token.request_id,
            tenant=token.tenant,
            candidate_count=token.candidate_count,
            chosen_logprob=token.chosen_logprob,
            logprobs=token.logprobs,
            resume_window_ms=1,
        )
        stream = RequestStream(submit, None, self._close)
        stream.can_move = False
        self._streams[stream] = None
        handle = self._peers.next_handle()
        try:
            peer.reattach(stream, handle, token.first_offset)
            async with asyncio.timeout(_REATTACH_S):
                while stream.reattached is None and stream.error is None:
                    await stream.wait()
        except TimeoutError:
            stream.close(keep=True)
            return None
        except BaseException:
            stream.close(keep=True)
            raise
        if stream.reattached is not None and stream.reattached.candidate_count == token.candidate_count:
            stream.admitted = scheduler_pb2.Admitted(handle=handle, seed=stream.reattached.seed)
            return stream
        stream.close(keep=True)
        return None

    def interrupt_all(self, message: str) -> None:
        """End every request whose client has still to be told so; with a resume window they go on without it."""
        for stream in list(self._streams):
            if not stream.ended:
                error = interrupted(message)
                error.code = grpc.StatusCode.UNAVAILABLE
                stream.cut_off(error)

    async def cancel_request(self, request_id: str, tenant: str) -> scheduler_pb2.Cancelled:
        """End a tenant's request, of any gateway and at any scheduler. Raises SCHEDULER_UNREACHABLE if none answers."""
        here = self._recovery.cancel(request_id, tenant)
        answers = await asyncio.gather(
            *(peer.cancel_request(request_id, tenant) for peer in self.peers), return_exceptions=True
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

    def _close(self, stream: RequestStream, candidate_index: int | None, keep: bool) -> None:
        """End one candidate, or all, and forget the request then; with `keep` it goes on without a stream."""
        if keep:
            self._recovery.go_on(stream)  # what was paused is needed at a scheduler now
            for place in places_of(stream.candidates):
                place.detach(stream, stream.candidates)
        ended = stream.candidates if candidate_index is None else [stream.candidates[candidate_index]]
        self._recovery.forget(ended)
        for place in places_of(ended):
            place.drop(stream, ended)
        for candidate in ended:
            candidate.handle = 0
        if candidate_index is None:
            self._streams.pop(stream, None)
