"""The connection to a scheduler: one Attach stream, opened again whenever it breaks."""

from __future__ import annotations

import asyncio
import enum
import logging
import random
from collections import deque
from typing import Any, Protocol

import grpc
from grpc import aio

from octavo.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from octavo.services.common.logging import RateLimiter
from octavo.services.common.protocol import OLDEST_REVISION, PROTOCOL_REVISION, is_spoken
from octavo.services.common.tls import hop_channel
from octavo.services.common.tls_files import TlsFiles
from octavo.services.gateway.schedulers.prefix_index import LostEventsError, PrefixIndex

_log = logging.getLogger(__name__)
_EOF: Any = aio.EOF  # type: ignore[attr-defined]  # the stubs do not know it
_BACKOFF_S = (0.05, 1.0)
_UNFIT_S = 5.0  # a scheduler that is not for this gateway is asked again: it may have been replaced
_HELLO_S = 5.0
_SILENCE_S = 2.0  # the scheduler sends its load five times a second
WATCH_S = 0.1


class UnfitError(Exception):
    """A scheduler answers, and is not one for this gateway. The message says why."""


class LinkState(enum.Enum):
    """What is known of the scheduler at an address."""

    UNTRIED = enum.auto()
    UNREACHABLE = enum.auto()
    UNFIT = enum.auto()
    CONNECTED = enum.auto()


class LinkUser(Protocol):
    """Who uses a link. An UnfitError that it raises ends the stream, like any loss."""

    def on_connected(self, welcome: scheduler_pb2.Welcome) -> None:
        """Messages can be sent now."""

    def on_message(self, message: scheduler_pb2.AttachResponse) -> None:
        """A message came. IndexError or ValueError: it does not fit its contract, and the stream is given up."""

    def on_disconnected(self) -> None:
        """The stream broke, or could not be opened; nothing that was sent on it will be answered."""


class _LostError(Exception):
    """The stream is no use any more; the message says why."""


class SchedulerLink:
    """Keeps one stream open. One task reads and never waits for its user, one writes; `watch` is called by a clock."""

    def __init__(
        self, address: str, gateway_id: str, user: LinkUser, tls: TlsFiles | None = None, server_name: str = ""
    ) -> None:
        """`server_name`: what the scheduler's certificate must be made out to; empty: the host in `address`.

        `gateway_id` is of one SchedulerPeers: whoever numbers its requests anew needs another one.
        """
        self._address = address
        self._tls = tls
        self._server_name = server_name
        self._gateway_id = gateway_id
        self._user = user
        self._outgoing: deque[scheduler_pb2.AttachRequest] = deque()
        self._outgoing_changed = asyncio.Event()
        self._prefixes = PrefixIndex()
        self._warnings = RateLimiter(_log)
        self._tasks: list[asyncio.Task[None]] = []
        self._call: aio.StreamStreamCall[scheduler_pb2.AttachRequest, scheduler_pb2.AttachResponse] | None = None
        self._quiet_turns = 0
        self._newest = PROTOCOL_REVISION  # that is offered
        self._unfit_because = ""  # as it was logged
        self.state = LinkState.UNTRIED

    @property
    def silence_s(self) -> float:
        """How long nothing was heard of the scheduler, in this process's own turns: its own pauses do not count."""
        return self._quiet_turns * WATCH_S

    def start(self, prefixes: PrefixIndex) -> list[asyncio.Task[None]]:
        """Connect, and stay connected until `close`; return the tasks, none of which ends by itself.

        `watch` has to be called every WATCH_S from then on.

        `prefixes` is kept equal to the scheduler's prefix cache while there is a connection.
        """
        self._prefixes = prefixes
        self._tasks = [asyncio.create_task(self._stay_connected())]
        return self._tasks

    async def close(self) -> None:
        """Disconnect, for good."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def send(self, message: scheduler_pb2.AttachRequest) -> None:
        """Send a message on the stream that is open now."""
        self._outgoing.append(message)
        self._outgoing_changed.set()

    async def _stay_connected(self) -> None:
        backoff, longest = _BACKOFF_S
        while True:
            state = LinkState.UNREACHABLE
            try:
                # A new channel for each try: it has the certificates that are on disk now.
                async with hop_channel(self._address, self._tls, self._server_name) as channel:
                    await self._attach(scheduler_pb2_grpc.SchedulerServiceStub(channel))  # type: ignore[no-untyped-call]
            except (_LostError, ValueError) as error:  # ValueError: a certificate's file is being replaced
                self._warnings.warning("lost", "scheduler at %s: %s", self._address, error)
            except aio.AioRpcError as error:
                refused = error.code() is grpc.StatusCode.FAILED_PRECONDITION and self._call is None
                if refused:  # no revision that was offered is spoken there
                    if self._newest > OLDEST_REVISION:
                        self._newest -= 1  # a release that knows no range: it is asked with each
                        continue
                    state = LinkState.UNFIT
                    self._say_unfit(error.details() or "")
                else:
                    self._warnings.warning("lost", "scheduler at %s: %s", self._address, error.details())
            except UnfitError as error:
                state = LinkState.UNFIT
                self._say_unfit(str(error))
            if self._call is not None:  # it was open
                backoff = _BACKOFF_S[0]
            self._call = None
            self._newest = PROTOCOL_REVISION  # it may come back upgraded
            self.state = state
            self._user.on_disconnected()
            pause = _UNFIT_S if state is LinkState.UNFIT else backoff
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))
            backoff = min(2 * backoff, longest)

    def _say_unfit(self, reason: str) -> None:
        """Log why a scheduler is not used, once."""
        if reason != self._unfit_because:
            _log.error("scheduler at %s is not used: %s", self._address, reason)
        self._unfit_because = reason

    async def _attach(self, stub: scheduler_pb2_grpc.SchedulerServiceStub) -> None:
        """Run one stream until it breaks; always raises."""
        call = stub.Attach()
        self._outgoing.clear()
        hello = scheduler_pb2.Hello(
            gateway_id=self._gateway_id, protocol_revision=self._newest, oldest_protocol_revision=OLDEST_REVISION
        )
        helpers: list[asyncio.Task[None]] = []
        try:
            async with asyncio.timeout(_HELLO_S):
                await call.write(scheduler_pb2.AttachRequest(hello=hello))
                welcome = _read_welcome(await call.read())
            helpers = [
                asyncio.create_task(self._write(call)),
                asyncio.create_task(watch_cache(stub, self._prefixes)),
            ]
            self._call = call
            self._quiet_turns = 0
            _log.info("connected to scheduler %s at %s, epoch %d", welcome.scheduler_id, self._address, welcome.epoch)
            self._user.on_connected(welcome)
            self.state, self._unfit_because = LinkState.CONNECTED, ""
            await self._read(call)
        except TimeoutError:
            raise _LostError("it does not answer") from None
        except asyncio.CancelledError:
            # The watch cancels the call, which looks the same as the end of this task.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise _LostError(f"nothing was heard of it for {_SILENCE_S:g} s") from None
        finally:
            call.cancel()
            for helper in helpers:
                helper.cancel()

    async def _read(self, call: Any) -> None:
        while True:
            message = await call.read()
            if message is _EOF:
                raise _LostError("it ended the stream")
            self._quiet_turns = 0
            try:
                self._user.on_message(message)
            except (IndexError, ValueError) as error:
                _log.exception("the scheduler sent %s", message.WhichOneof("kind"))
                raise _LostError("it sent a message that does not fit its contract") from error

    async def _write(self, call: Any) -> None:
        while True:
            await self._outgoing_changed.wait()
            self._outgoing_changed.clear()
            while self._outgoing:
                try:
                    await call.write(self._outgoing.popleft())
                except (aio.AioRpcError, asyncio.InvalidStateError):
                    return  # the call is over; its reader knows why

    def watch(self) -> None:
        """Give a scheduler up that hangs: its machine still answers, it does not."""
        self._quiet_turns += 1
        if self._call is not None and self.silence_s > _SILENCE_S:
            self._call.cancel()


def _read_welcome(first: Any) -> scheduler_pb2.Welcome:
    """Return what a scheduler introduces itself with, or give it up."""
    if first is _EOF or first.WhichOneof("kind") != "welcome":
        raise _LostError("it did not answer Hello with Welcome")
    welcome: scheduler_pb2.Welcome = first.welcome
    if not is_spoken(welcome.protocol_revision):
        own = f"this gateway {OLDEST_REVISION} to {PROTOCOL_REVISION}"
        raise UnfitError(f"it speaks protocol revision {welcome.protocol_revision}, {own}: install one version")
    return welcome


_RETRY_S = 1.0


async def watch_cache(stub: scheduler_pb2_grpc.SchedulerServiceStub, index: PrefixIndex) -> None:
    """Follow the cache for as long as the task runs; returns only if the scheduler does not tell.

    Without the index requests are routed by load alone, so no failure of this stream is one of the hop's.
    """
    index.clear()
    while True:
        await index.settle()
        after = scheduler_pb2.WatchCacheRequest(after_event_id=index.last_event_id, epoch=index.epoch)
        call = stub.WatchCache(after)
        try:
            while (event := await call.read()) is not _EOF:
                if event.cleared:
                    index.clear()
                    await index.settle()
                index.apply(event)
                await index.settle()
        except LostEventsError as error:
            _log.info("the prefix cache is asked for again: %s", error)
            index.clear()
        except aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return
        finally:
            call.cancel()
        await asyncio.sleep(_RETRY_S)
