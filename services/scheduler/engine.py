"""The engine is the shell around a Node: it connects it to gateways and workers on one event loop.

Events are handled as they arrive and change the scheduler at once; planning happens once for all
events of one turn of the loop. Nothing here decides anything about a request or a worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.adapter_names import AdapterNames, key_of
from octavo.services.common.files import WatchedFile
from octavo.services.common.process import Reports
from octavo.services.scheduler.cache_watchers import CacheWatchers
from octavo.services.scheduler.config import SchedulerConfig
from octavo.services.scheduler.core.effects import SendToGateway
from octavo.services.scheduler.node import Node
from octavo.services.scheduler.queueing.tenants import Tenants, parse_tenants
from octavo.services.scheduler.telemetry import SchedulerTelemetry
from octavo.services.scheduler.workers.membership import HEARTBEAT_S
from octavo.services.scheduler.workers.worker_link import WorkerLink
from octavo.worker.v1 import worker_pb2

log = logging.getLogger("octavo.scheduler")

LOAD_INTERVAL_S = 0.2
PROBE_S = 0.001
MAX_UNSENT_MESSAGES = 10_000  # to a gateway that does not read: then it is cut off
IDLE_CHECK_S = 1.0

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class GatewayConnection:
    """The messages that wait to be written to one gateway."""

    def __init__(self, gateway_id: str) -> None:
        self.gateway_id = gateway_id
        self.unsent: asyncio.Queue[scheduler_pb2.AttachResponse] = asyncio.Queue(MAX_UNSENT_MESSAGES)
        self.closed = asyncio.Event()

    def send(self, message: scheduler_pb2.AttachResponse) -> None:
        """Queue a message; a gateway whose queue is full is cut off, and its requests end."""
        if self.closed.is_set():
            return  # what came after a message that had no room must not be read
        try:
            self.unsent.put_nowait(message)
        except asyncio.QueueFull:
            self.closed.set()


class Engine:
    """Runs one Node. All methods are called on the event loop's thread.

    Whatever the loop calls to change the node goes through `_enter`. An exception that left it otherwise would be
    logged by the loop, which goes on, with half an event handled.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        """Raises ValueError if a file that the settings name cannot be used."""
        self._config = config
        self._tenants_file: WatchedFile[Tenants] | None = None
        if config.tenants_file is not None:
            base = Tenants.of(config)
            self._tenants_file = WatchedFile(config.tenants_file, lambda data: parse_tenants(data, base))
        self.scheduler_id = config.scheduler_id or f"scheduler-{os.getpid()}"
        self.link = WorkerLink(
            config.worker_endpoint,
            lambda identity, frame: self._enter(self._on_frame, identity, frame),
            self._on_disconnect,
            config.curve_files,
        )
        self.reports = Reports(config.progress_fd)
        self.telemetry = SchedulerTelemetry(config, self.scheduler_id)
        self.node = Node(
            config,
            self.scheduler_id,
            int(time.time() * 1000),  # so that epochs grow from one start to the next
            time.monotonic(),
            send=self.link.send,
            deliver=self._send,
            changed=self._on_workers_changed,
            fenced=self.reports.fenced,
            metrics=self.telemetry.metrics,
        )
        self.core = self.node.core
        self.cache_watchers = CacheWatchers(self.core.cache_events)
        self._tenants_seen = self.core.tenants
        self._follow_tenants(time.monotonic())
        self._gateways: dict[str, GatewayConnection] = {}
        self._adapter_names = AdapterNames()
        self._pump_scheduled = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._next_load = self._next_idle_check = 0.0
        self._steps_checked = 0
        self._checked_idle = False
        self._no_requests = asyncio.Event()

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bind the worker endpoint and begin to tick. Must be called in a running loop. Raises OSError."""
        self._loop = asyncio.get_running_loop()
        self.link.open(self._loop)
        self.telemetry.serve(self.load, lambda: len(self.core.quarantine.quarantined(time.monotonic())))
        self._ticker = asyncio.create_task(self._tick_forever())

    async def stop(self) -> None:
        """Refuse new requests, let the running ones end for `grace_s`, then close everything."""
        self.reports.draining(self.core.num_requests, self._config.grace_s)
        await self.drain(self._config.grace_s)
        if self._ticker is not None:
            self._ticker.cancel()
        for connection in self._gateways.values():
            connection.closed.set()
        self.node.members.dismiss(time.monotonic())
        if self._loop is not None:
            self.link.close(self._loop)
        await asyncio.to_thread(self.telemetry.close)

    def undrain(self) -> None:
        """Take new requests again, and tell the gateways."""
        self.core.undrain()
        self._broadcast_load()

    def change_tenants(self, tenants: Tenants) -> None:
        """Let other quotas and weights count, until the file of tenants changes."""
        self._enter(self.core.change_tenants, tenants, time.monotonic())

    def end_requests(self, request_ids: Iterable[str], tenant: str | None) -> int:
        """End requests by id or tenant; return how many."""
        ended = self._enter(self.core.end_requests, request_ids, tenant)
        self._pump_soon()
        return ended

    def evict(self, worker_id: str, hold_s: float) -> int:
        """Take a worker out; return how many requests it had, or -1 if there is none of this name."""
        running = {load.worker_id: load.running for load in self.load().workers}
        group_id = self._enter(self.node.members.evict, worker_id, hold_s, time.monotonic())
        return running.get(group_id, 0) if group_id else -1

    async def drain(self, grace_s: float) -> int:
        """Refuse new requests, wait until the running ones have ended or time is up; return how many are left."""
        self.core.drain()
        draining = scheduler_pb2.AttachResponse(draining=scheduler_pb2.Draining(deadline_ms=int(grace_s * 1000)))
        for connection in self._gateways.values():
            connection.send(draining)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._no_requests.wait(), grace_s)
        return self.core.num_requests

    def flush_prefix_cache(self) -> int:
        """Forget every cached block that nobody holds; return how many there were."""
        return self._enter(self.core.flush_prefix_cache)

    # -- gateways --------------------------------------------------------------------------------

    def attach(self, hello: scheduler_pb2.Hello) -> GatewayConnection:
        """Take a gateway in and greet it. An older connection of the same gateway is closed."""
        return self._enter(self._attach, hello)

    def _attach(self, hello: scheduler_pb2.Hello) -> GatewayConnection:
        old = self._gateways.pop(hello.gateway_id, None)
        if old is not None:
            self._close(old)
        connection = self._gateways[hello.gateway_id] = GatewayConnection(hello.gateway_id)
        welcome = self.node.welcome(hello.protocol_revision, time.monotonic())
        connection.send(scheduler_pb2.AttachResponse(welcome=welcome))
        known = self._adapter_names.all()
        if known.names:
            connection.send(scheduler_pb2.AttachResponse(adapter_names=known))
        return connection

    def detach(self, connection: GatewayConnection) -> None:
        """Let a gateway go, and those of its requests that it cannot resume."""
        if self._gateways.get(connection.gateway_id) is connection:
            del self._gateways[connection.gateway_id]
            self._enter(self._close, connection)

    def _close(self, connection: GatewayConnection) -> None:
        connection.closed.set()
        self.node.gateway_lost(connection.gateway_id, time.monotonic())
        self._pump_soon()

    def on_gateway_message(self, connection: GatewayConnection, message: scheduler_pb2.AttachRequest) -> None:
        """Hand one message of a gateway to the scheduler."""
        if connection.closed.is_set():
            return
        if message.HasField("adapter_names"):
            self._enter(self._on_adapter_names, connection, message.adapter_names)
        else:
            self._enter(self.node.on_gateway_message, connection.gateway_id, message, time.monotonic())
        self._pump_soon()

    def _on_adapter_names(self, connection: GatewayConnection, names: scheduler_pb2.AdapterNames) -> None:
        """Pass what is new on to the other gateways, and let adapters go whose names are gone."""
        new = self._adapter_names.merge(names.names)
        for entry in new:
            if entry.is_removed:
                self.core.forget_adapter(key_of(entry.name, entry.sha256))
        for other in self._gateways.values() if new else ():
            if other is not connection:
                message = scheduler_pb2.AdapterNames(names=new)
                other.send(scheduler_pb2.AttachResponse(adapter_names=message))

    # -- workers ---------------------------------------------------------------------------------

    def _on_frame(self, identity: bytes, frame: worker_pb2.WorkerFrame) -> None:
        now = time.monotonic()
        self.node.on_frame(identity, frame, now)
        if frame.HasField("step_result"):
            # At once and not at the loop's next turn: the worker may have nothing to do.
            self._pump()
        else:
            self._pump_soon()

    def _on_disconnect(self) -> None:
        """Look for the worker that is gone, once the socket knows it too."""
        if self._loop is not None:
            self._loop.call_later(PROBE_S, self._enter, self._probe)

    def _probe(self) -> None:
        self.node.probe(time.monotonic())
        self._pump_soon()

    def _on_workers_changed(self) -> None:
        self._broadcast_load()
        self._pump_soon()

    # -- the loop --------------------------------------------------------------------------------

    def _pump_soon(self) -> None:
        """Plan and deliver after the events that are already here."""
        if not self._pump_scheduled and self._loop is not None:
            self._pump_scheduled = True
            self._loop.call_soon(self._enter, self._pump_now)

    def _enter(
        self, event: Callable[Parameters, Result], *arguments: Parameters.args, **options: Parameters.kwargs
    ) -> Result:
        """Handle an event. What is wrong with a message was answered further in: an exception here is a bug."""
        try:
            return event(*arguments, **options)
        except Exception as error:
            self._crash(error)
            raise

    def _pump_now(self) -> None:
        self._pump_scheduled = False
        self._pump()

    def _pump(self) -> None:
        """Plan what can be planned and deliver all effects."""
        self._checked_idle = False
        num_plans, started = self.node.num_plans, time.perf_counter()
        self.node.pump(time.monotonic())
        if self.node.num_plans != num_plans:
            self.telemetry.plan_time.observe(time.perf_counter() - started)
        if self.core.num_requests:
            self._no_requests.clear()
        else:
            self._no_requests.set()

    def _send(self, effect: SendToGateway) -> None:
        connection = self._gateways.get(effect.gateway_id)
        if connection is not None:
            connection.send(effect.message)

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self._enter(self._tick)

    def _tick(self) -> None:
        """Watch time: deadlines, liveness, load reports, bookkeeping checks."""
        now = time.monotonic()
        self.link.receive()
        self.node.tick(now)
        self._pump()
        if now >= self._next_load:
            self._next_load = now + LOAD_INTERVAL_S
            self._broadcast_load()
            self.cache_watchers.flush(now)
            self.telemetry.send_spans()
        if now >= self._next_idle_check:
            self._next_idle_check = now + IDLE_CHECK_S
            self._follow_tenants(now)
            self._check_books()

    def _check_books(self) -> None:
        """Verify the scheduler's invariants, when idle and every `check_every_steps`."""
        every = self._config.check_every_steps
        is_due = bool(every) and self.node.num_steps - self._steps_checked >= every
        if is_due or (self.core.is_idle and not self._checked_idle):
            self.core.check_invariants()
            self._steps_checked = self.node.num_steps
            self._checked_idle = self.core.is_idle

    def _follow_tenants(self, now: float) -> None:
        """Take over what the file of tenants says, when that has changed."""
        if self._tenants_file is not None and (tenants := self._tenants_file.get()) is not self._tenants_seen:
            self._tenants_seen = tenants
            self.core.change_tenants(tenants, now)

    def load(self) -> scheduler_pb2.Load:
        """Describe the state of the scheduler."""
        return self.node.load(time.monotonic())

    @property
    def is_ready(self) -> bool:
        """Whether new requests are taken and there is a worker for them."""
        load = self.load()
        return load.workers_ready > 0 and not load.draining

    def _broadcast_load(self) -> None:
        """Tell every gateway the state of the scheduler."""
        if self._gateways:
            message = scheduler_pb2.AttachResponse(load=self.load())
            for connection in self._gateways.values():
                connection.send(message)

    def _crash(self, error: BaseException) -> None:
        """End the process: its books cannot be trusted, and half a scheduler is worse than none.

        Gateways and workers find the next one.
        """
        log.critical("the scheduler has a bug and ends: %s", error, exc_info=error)
        logging.shutdown()
        os._exit(70)
