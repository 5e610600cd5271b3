"""One scheduler as the gateway sees it: its state, and the requests it has now.

What becomes of requests that it refuses or that are lost with it is its owner's to decide.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.adapter_names import AdapterNames
from octavo.services.common.errors import Reason, ServingError
from octavo.services.common.protocol import TAKEOVERS
from octavo.services.common.tls_files import TlsFiles
from octavo.services.gateway.schedulers.inboxes import PeerInboxes, take_candidates
from octavo.services.gateway.schedulers.link import LinkState, SchedulerLink, UnfitError
from octavo.services.gateway.schedulers.request_stream import CandidateInbox, RequestStream
from octavo.services.gateway.schedulers.router import Router
from octavo.services.gateway.tokenization.model_identity import ModelIdentity

_CANCEL_S = 10.0
_CHECK_S = 60.0  # an adapter may be large, and its file far away
_MAX_SILENCE_S = 1.0
_MAX_STEP_AGE_MS = 10_000
_QUEUE_KNOWN_S = 0.05
_MAX_QUEUES = 1024  # tenants and priorities


class PeerOwner(Protocol):
    """Decides about requests. A stream comes with those of its candidates that it is about."""

    def on_peer_ready(self, peer: SchedulerPeer) -> None:
        """The scheduler takes requests now."""

    def on_peer_load(self, peer: SchedulerPeer) -> None:
        """The scheduler, which is connected, has said how it is."""

    def on_peer_lost(self, peer: SchedulerPeer, lost: Sequence[tuple[RequestStream, list[CandidateInbox]]]) -> None:
        """The scheduler is gone, and with it these requests."""

    def on_admitted(self, stream: RequestStream, admitted: scheduler_pb2.Admitted) -> None:
        """A request was admitted."""

    def on_rejected(
        self, peer: SchedulerPeer, stream: RequestStream, candidates: list[CandidateInbox], error: ServingError
    ) -> None:
        """A request was refused."""

    def on_failed(self, stream: RequestStream, candidates: list[CandidateInbox], failed: scheduler_pb2.Failed) -> None:
        """An admitted request cannot go on there."""


class SchedulerPeer:
    """A scheduler at one address, connected or not. Everything runs on one event loop."""

    def __init__(
        self,
        address: str,
        gateway_id: str,
        owner: PeerOwner,
        router: Router,
        tls: TlsFiles | None = None,
        server_name: str = "",
        identity: ModelIdentity | None = None,
        adapter_names: AdapterNames | None = None,
    ) -> None:
        """`router` is told of its state; a scheduler whose workers have another model than `identity` is not used.

        `server_name`: what the scheduler's certificate must be made out to; empty: the host in `address`.
        """
        self.address = address
        self._owner = owner
        self._identity = identity or ModelIdentity()
        self._link = SchedulerLink(address, gateway_id, self, tls, server_name)
        self._inboxes = PeerInboxes()
        self._adapter_names = adapter_names or AdapterNames()
        self._checks: dict[int, asyncio.Future[str]] = {}  # of adapters, by handle
        self._cancels: dict[str, list[asyncio.Future[scheduler_pb2.Cancelled]]] = {}
        self._sick_since: float | None = None
        self._queues: dict[tuple[str, int], tuple[float, float]] = {}  # when it was said, and when its turn would come
        self._router = router
        self.route = router.add(address)
        """It as routing sees it."""
        self.welcome: scheduler_pb2.Welcome | None = None
        """Its introduction; None while it is not connected."""
        self.load = scheduler_pb2.Load()
        """The last one heard."""
        self.draining = False
        """It asked for no new requests."""

    def start(self) -> list[asyncio.Task[None]]:
        """Connect, and stay connected until `close`; return the tasks, none of which ends by itself."""
        return self._link.start(self.route.prefixes)

    async def close(self) -> None:
        """Disconnect, for good. Its requests are nobody's then."""
        await self._link.close()
        self._router.remove(self.route)

    def watch(self) -> None:
        """Look at the clock; to be called every `scheduler_link.WATCH_S`."""
        self._link.watch()

    @property
    def state(self) -> LinkState:
        """What is known of the scheduler at this address."""
        return self._link.state

    @property
    def scheduler_id(self) -> str:
        """Its name; the address until it has told one."""
        return (self.welcome.scheduler_id if self.welcome else "") or self.address

    @property
    def connected(self) -> bool:
        """Whether messages can be sent."""
        return self.welcome is not None

    @property
    def takes_over(self) -> bool:
        """Whether it knows Reattach and Detach."""
        return self.welcome is not None and self.welcome.protocol_revision >= TAKEOVERS

    @property
    def usable(self) -> bool:
        """Whether it would take requests, if need be into its queue."""
        return self.welcome is not None and not self.draining

    @property
    def healthy(self) -> bool:
        """Whether it makes progress: this follows from what it last said, so no state of it can get stuck."""
        load = self.load
        return (
            self.usable
            and self._link.silence_s < _MAX_SILENCE_S
            and load.workers_ready > 0
            and load.step_age_ms < _MAX_STEP_AGE_MS
        )

    @property
    def streams(self) -> list[RequestStream]:
        """The requests it has."""
        return self._inboxes.streams

    def has(self, handle: int) -> bool:
        """Return whether a request is here under this handle."""
        return handle in self._inboxes

    def sick_for(self, now: float) -> float:
        """Return for how many seconds it has been connected and made no progress; ask a few times a second."""
        if self.welcome is None or self.healthy or self.draining:
            self._sick_since = None
            return 0.0
        if self._sick_since is None:
            self._sick_since = now
        return now - self._sick_since

    def can_hold(self, num_tokens: int) -> bool:
        """Return whether a sequence of so many tokens fits one of its workers; True if that is not known."""
        limit = self.load.max_model_len
        return not limit or limit >= num_tokens or self.load.may_grow

    def is_too_late_for(self, stream: RequestStream) -> bool:
        """Return whether its queue is longer than a request has time, as it said last."""
        if stream.deadline is None:
            return False
        return self.load.estimated_queue_ms > 1000 * (stream.deadline - asyncio.get_running_loop().time())

    def turn_at(self, tenant: str, priority: int) -> float:
        """Return when a request would begin that a tenant sends now, as the scheduler just said of another; 0: unknown.

        A time of the event loop. It is known for some tens of milliseconds, or until the scheduler admits a request.
        """
        said_at, turn_at = self._queues.get((tenant, priority), (0.0, 0.0))
        return turn_at if asyncio.get_running_loop().time() < said_at + _QUEUE_KNOWN_S else 0.0

    def avoid_until(self, time: float) -> None:
        """Prefer others until a time of the event loop; with no other this changes nothing."""
        self.route.refused_until = time

    # What is sent

    def submit(self, stream: RequestStream, candidates: Sequence[CandidateInbox], submit: scheduler_pb2.Submit) -> None:
        """Send candidates of a request, under a handle that is set."""
        self._inboxes.add(submit.handle, stream, candidates, self)
        self.route.sent(len(submit.prompt_token_ids) + len(submit.continue_token_ids), len(candidates))
        stream.scheduler_id = self.scheduler_id
        self._link.send(scheduler_pb2.AttachRequest(submit=submit))

    def reattach(self, stream: RequestStream, handle: int, first_offset: int) -> None:
        """Ask for a request that goes on here without a stream, all its output included."""
        assert self.welcome is not None, "not connected"
        self._inboxes.add(handle, stream, stream.candidates, self)
        stream.scheduler_id = self.scheduler_id
        reattach = scheduler_pb2.Reattach(
            handle=handle,
            request_id=stream.submit.request_id,
            tenant=stream.submit.tenant,
            epoch=self.welcome.epoch,
            next_token_offsets=[first_offset] * len(stream.candidates),
        )
        self._link.send(scheduler_pb2.AttachRequest(reattach=reattach))

    def detach(self, stream: RequestStream, candidates: Sequence[CandidateInbox]) -> None:
        """Let candidates go on here without a stream, or end them if the scheduler knows of no such thing."""
        if not self.takes_over:
            self.drop(stream, candidates)
            return
        for handle in dict.fromkeys(each.handle for each in candidates if each.handle in self._inboxes):
            self._inboxes.retire(handle, stream)
            take_candidates(stream, handle)
            self._link.send(scheduler_pb2.AttachRequest(detach=scheduler_pb2.Detach(handle=handle)))

    def drop(self, stream: RequestStream, candidates: Sequence[CandidateInbox]) -> None:
        """End candidates here; the scheduler answers nothing, and what it still sends about them is ignored."""
        handles = dict.fromkeys(candidate.handle for candidate in candidates if candidate.handle in self._inboxes)
        for handle in handles:
            dropped = [candidate for candidate in candidates if candidate.handle == handle]
            for candidate in dropped:
                candidate.handle = 0
            if any(other.handle == handle and other.finished is None for other in stream.candidates):
                for candidate in dropped:
                    self._send_cancel(scheduler_pb2.Cancel(handle=handle, candidate_index=candidate.index))
            else:
                self._inboxes.retire(handle, stream)
                self._send_cancel(scheduler_pb2.Cancel(handle=handle))

    async def cancel_request(self, request_id: str, tenant: str) -> scheduler_pb2.Cancelled:
        """End a tenant's request, of any gateway, by its id. Raises SCHEDULER_UNREACHABLE."""
        if not self.connected:
            raise unreachable()
        answer: asyncio.Future[scheduler_pb2.Cancelled] = asyncio.get_running_loop().create_future()
        self._cancels.setdefault(request_id, []).append(answer)
        self._send_cancel(scheduler_pb2.Cancel(request_id=request_id, tenant=tenant))
        try:
            async with asyncio.timeout(_CANCEL_S):
                return await answer
        except TimeoutError:
            raise unreachable() from None
        finally:
            answers = self._cancels[request_id]
            answers.remove(answer)
            if not answers:
                del self._cancels[request_id]

    async def check_adapter(self, handle: int, key: str, path: str) -> str:
        """Have an adapter loaded there; return why it cannot be, or nothing. Raises SCHEDULER_UNREACHABLE."""
        if not self.connected:
            raise unreachable()
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._checks[handle] = answer
        check = scheduler_pb2.CheckAdapter(handle=handle, adapter=key, adapter_path=path)
        self._link.send(scheduler_pb2.AttachRequest(check_adapter=check))
        try:
            async with asyncio.timeout(_CHECK_S):
                return await answer
        except TimeoutError:
            return f"it was not loaded within {_CHECK_S:g} s; try again"
        finally:
            del self._checks[handle]

    def tell_adapters(self, names: scheduler_pb2.AdapterNames) -> None:
        """Tell what the names of adapters mean."""
        if self.connected and names.names:
            self._link.send(scheduler_pb2.AttachRequest(adapter_names=names))

    def _send_cancel(self, cancel: scheduler_pb2.Cancel) -> None:
        self._link.send(scheduler_pb2.AttachRequest(cancel=cancel))

    # Connection

    def on_connected(self, welcome: scheduler_pb2.Welcome) -> None:
        """Take the scheduler's introduction. Raises UnfitError."""
        self._check(welcome.load)
        self.welcome = welcome
        self.route.open(self.scheduler_id, welcome.kv_block_size)
        self._take_load(welcome.load)
        self.tell_adapters(self._adapter_names.all())
        self._owner.on_peer_ready(self)

    def on_disconnected(self) -> None:
        """Give back what the scheduler had."""
        if self.welcome is None:
            return
        self.welcome = None
        self._queues.clear()
        self.route.close()
        lost = self._inboxes.take_all()
        for answers in self._cancels.values():
            for answer in answers:
                if not answer.done():
                    answer.set_exception(unreachable())
        for check in self._checks.values():
            if not check.done():
                check.set_exception(unreachable())
        self._owner.on_peer_lost(self, lost)

    def _check(self, load: scheduler_pb2.Load) -> None:
        """Raise UnfitError if the scheduler has workers with another model."""
        if problem := self._identity.mismatch(load):
            raise UnfitError(problem)

    def _take_load(self, load: scheduler_pb2.Load) -> None:
        self.load = load
        self.draining = load.draining
        if self._queues:
            fresh = asyncio.get_running_loop().time() - _QUEUE_KNOWN_S
            self._queues = {who: said for who, said in self._queues.items() if said[0] > fresh}
        self.route.take_load(load)

    # Messages

    def on_message(self, message: scheduler_pb2.AttachResponse) -> None:
        """Hand one message out. IndexError or ValueError: it does not fit its contract. Raises UnfitError."""
        kind = message.WhichOneof("kind")
        if kind == "step_outputs":
            self._inboxes.on_step(message.step_outputs)
        elif kind == "load":
            self._check(message.load)
            self._take_load(message.load)
            self._owner.on_peer_load(self)
        elif kind == "admitted":
            self._on_admitted(message.admitted)
        elif kind == "rejected":
            self._on_rejected(message.rejected)
        elif kind == "failed":
            self._on_failed(message.failed)
        elif kind == "progress":
            self._inboxes.on_progress(message.progress)
        elif kind == "cancelled":
            # In the order of the questions: two tenants may ask for the same id.
            waiting = (answer for answer in self._cancels.get(message.cancelled.request_id, ()) if not answer.done())
            if (answer := next(waiting, None)) is not None:
                answer.set_result(message.cancelled)
        elif kind == "draining":
            self.draining = True
        elif kind == "adapter_checked":
            check = self._checks.get(message.adapter_checked.handle)
            if check is not None and not check.done():
                check.set_result(message.adapter_checked.problem)
        elif kind == "adapter_names":
            self._adapter_names.merge(message.adapter_names.names)
        elif kind == "reattached":
            self._on_reattached(message.reattached)

    def _on_admitted(self, admitted: scheduler_pb2.Admitted) -> None:
        stream = self._inboxes.get(admitted.handle)
        if stream is not None:
            self._queues.pop((stream.submit.tenant, stream.submit.priority), None)
            stream.model_version = stream.model_version or self.load.model_version
            self._owner.on_admitted(stream, admitted)

    def _on_reattached(self, reattached: scheduler_pb2.Reattached) -> None:
        stream = self._inboxes.get(reattached.handle)
        if stream is not None:
            stream.model_version = self.load.model_version
            stream.reattached = reattached
            stream.wake()

    def _on_rejected(self, rejected: scheduler_pb2.Rejected) -> None:
        taken = self._inboxes.take(rejected.handle)
        if taken is not None:
            error = ServingError.from_wire(
                rejected.code, rejected.reason, rejected.message, rejected.retry_after_ms, dict(rejected.metadata)
            )
            self._learn_queue(taken[0].submit, error)
            self._owner.on_rejected(self, *taken, error)

    def _learn_queue(self, submit: scheduler_pb2.Submit, error: ServingError) -> None:
        """Keep what a refusal says of the queue: of the same tenant and priority it holds for the next request, too."""
        queue_ms = error.metadata.get("queue_ms", "")
        if error.reason == Reason.DEADLINE_UNREACHABLE and queue_ms.isdecimal() and len(self._queues) < _MAX_QUEUES:
            now = asyncio.get_running_loop().time()
            self._queues[submit.tenant, submit.priority] = now, now + int(queue_ms) / 1000

    def _on_failed(self, failed: scheduler_pb2.Failed) -> None:
        taken = self._inboxes.take(failed.handle)
        if taken is not None:
            self._owner.on_failed(*taken, failed)


def unreachable() -> ServingError:
    """Return the error of a call that no scheduler is there for."""
    message = "no scheduler can be reached; try again"
    return ServingError(Reason.SCHEDULER_UNREACHABLE, message, retry_after_ms=500)
