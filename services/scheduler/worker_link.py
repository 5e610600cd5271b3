"""The ZeroMQ end of the scheduler: membership, epochs and liveness of workers. Decides no schedule.

A worker says hello, gets a configuration with a new epoch, and is ready. From then on it gets
plans and answers with results, all in that epoch. A worker that breaks the protocol, owes a step
for too long, or cannot be reached is out: its epoch ends, and it has to say hello again.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Container
from dataclasses import dataclass, field

import zmq
from google.protobuf.message import DecodeError

from octavo.services.common.logging import RateLimiter
from octavo.services.common.protocol import PROTOCOL_REVISION
from octavo.services.scheduler.config import BLOCK_SIZE, SchedulerConfig
from octavo.worker.v1 import worker_pb2

log = logging.getLogger("octavo.scheduler")

HEARTBEAT_S = 0.025  # a heartbeat that cannot be delivered is how a dead worker is noticed
SILENCE_S = 3.0  # a worker that owes nothing reports at least five times a second
MAX_FRAME_BYTES = 64 << 20
MAX_QUEUED_FRAMES = 1000  # on the socket, each way and worker; heartbeats past that are dropped
MAX_WORKERS = 256


@dataclass(eq=False)
class Member:
    """One worker process that has said hello. `identity` is its ZeroMQ routing id."""

    identity: bytes
    hello: worker_pb2.WorkerHello
    epoch: int
    ready: worker_pb2.WorkerReady | None = None
    last_heard: float = 0.0
    last_sent: float = 0.0


@dataclass
class LinkEvents:
    """What the link reports; each is called with `now` last. Called from the event loop only."""

    group_ready: Callable[[str, int, worker_pb2.WorkerReady, float], None]
    group_lost: Callable[[str, float], None]
    step_done: Callable[[str, worker_pb2.StepResult, float], None]


@dataclass(eq=False)
class Group:
    """The ranks of one model copy."""

    epoch: int = 0
    members: dict[int, Member] = field(default_factory=dict)  # by rank
    is_ready: bool = False


class WorkerLink:
    """Owner of the ROUTER socket and of what is known of each worker process."""

    def __init__(
        self, config: SchedulerConfig, first_epoch: int, events: LinkEvents, clock: Callable[[], float]
    ) -> None:
        """Prepare; `open` binds. Epochs are given out from `first_epoch` on."""
        self._config = config
        self._events = events
        self._clock = clock
        self._epoch = first_epoch
        self._groups: dict[str, Group] = {}
        self._by_identity: dict[bytes, Member] = {}
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._dropped = RateLimiter(log)
        self.model_version = ""

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Bind the endpoint and start to read; raise zmq.ZMQError if it is taken."""
        socket = self._socket
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = MAX_QUEUED_FRAMES
        socket.maxmsgsize = MAX_FRAME_BYTES
        socket.router_mandatory = True  # sending to a worker that is gone fails instead of vanishing
        socket.router_handover = True  # a worker that restarts under its old name takes its place
        socket.set(zmq.HEARTBEAT_IVL, 1000)
        socket.set(zmq.HEARTBEAT_TIMEOUT, 5000)
        endpoint = self._config.worker_endpoint
        previous = os.umask(0o177)  # a unix socket is for this user alone
        try:
            socket.bind(endpoint)
        finally:
            os.umask(previous)
        loop.add_reader(socket.fileno(), self.receive)

    def close(self, loop: asyncio.AbstractEventLoop) -> None:
        """Stop reading and release the endpoint. Workers wait for the next scheduler."""
        loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self._context.term()

    # -- sending ---------------------------------------------------------------------------------

    def send_plan(self, group_id: str, epoch: int, plan: worker_pb2.StepPlan) -> None:
        """Send a plan to every rank of a group. A group that cannot be reached is lost."""
        group = self._groups.get(group_id)
        if group is None or group.epoch != epoch:
            return  # lost in the meantime: the core hears of it, or has heard
        data = self._encode(epoch, step_plan=plan)
        for member in list(group.members.values()):
            if not self._send(member, data):
                self._lose(group_id, f"worker {member.hello.worker_id} cannot be reached")
                return

    def _encode(
        self,
        epoch: int,
        *,
        step_plan: worker_pb2.StepPlan | None = None,
        worker_config: worker_pb2.WorkerConfig | None = None,
        heartbeat: worker_pb2.Heartbeat | None = None,
    ) -> bytes:
        return worker_pb2.WorkerFrame(
            protocol_revision=PROTOCOL_REVISION,
            epoch=epoch,
            step_plan=step_plan,
            worker_config=worker_config,
            heartbeat=heartbeat,
        ).SerializeToString()

    def _send(self, member: Member, data: bytes) -> bool:
        """Send one frame; False if the worker is gone or does not read."""
        try:
            self._socket.send_multipart((member.identity, data), zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        member.last_sent = self._clock()
        return True

    # -- receiving -------------------------------------------------------------------------------

    def receive(self) -> None:
        """Handle every frame that has arrived.

        The socket's descriptor signals edges only, so this must read until nothing is left; the
        engine also calls it at each tick, because a send can consume an edge.
        """
        while True:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.ZMQError:
                return
            if len(parts) == 2:
                self._handle(*parts)

    def _handle(self, identity: bytes, data: bytes) -> None:
        """Handle one frame. Whatever is wrong with it costs its sender, never this process."""
        now = self._clock()
        try:
            frame = worker_pb2.WorkerFrame.FromString(data)
        except DecodeError:
            self._dropped.warning("malformed", "dropped a frame that is no WorkerFrame")
            return
        if frame.protocol_revision != PROTOCOL_REVISION:
            self._dropped.warning(
                "revision",
                "refused a worker with protocol revision %d; this scheduler has %d: run the same version on both",
                frame.protocol_revision,
                PROTOCOL_REVISION,
            )
            return
        kind = frame.WhichOneof("kind")
        if kind == "worker_hello":
            self._on_hello(identity, frame.worker_hello, now)
            return
        member = self._by_identity.get(identity)
        if member is None or frame.epoch != member.epoch:
            self._dropped.warning("epoch", "dropped a frame of an ended epoch or an unknown worker")
            return
        member.last_heard = now
        if kind == "step_result" and self._groups[member.hello.group_id].is_ready:
            if member.hello.rank == 0:
                self._events.step_done(member.hello.group_id, frame.step_result, now)
        elif kind == "worker_ready":
            self._on_ready(member, frame.worker_ready, now)
        elif kind == "worker_fault":
            fault = frame.worker_fault
            self._lose(member.hello.group_id, f"worker {member.hello.worker_id}: {fault.reason}: {fault.message}")

    def _on_hello(self, identity: bytes, hello: worker_pb2.WorkerHello, now: float) -> None:
        """Give a worker its configuration and a new epoch."""
        group_id = hello.group_id or hello.worker_id
        hello.group_id = group_id
        if hello.world_size < 1 or hello.rank >= hello.world_size or len(self._by_identity) >= MAX_WORKERS:
            self._dropped.warning("hello", "refused worker %s: rank %d of %d", identity, hello.rank, hello.world_size)
            return
        if self._groups and self.model_version and hello.model_version != self.model_version:
            self._dropped.warning(
                "model",
                "refused worker %s: it has model version %s, the others have %s",
                hello.worker_id,
                hello.model_version,
                self.model_version,
            )
            return
        known = self._by_identity.get(identity)
        if known is not None and known.ready is None and now - known.last_sent < 1.0:
            return  # its configuration is on the way
        if group_id in self._groups and (self._groups[group_id].is_ready or known is not None):
            self._lose(group_id, f"worker {hello.worker_id} starts over")
        group = self._groups.setdefault(group_id, Group())
        if not group.members:
            self._epoch += 1
            group.epoch = self._epoch
        member = Member(identity, hello, group.epoch, last_heard=now)
        replaced = group.members.get(hello.rank)
        if replaced is not None:
            self._by_identity.pop(replaced.identity, None)
        group.members[hello.rank] = self._by_identity[identity] = member
        self.model_version = hello.model_version
        worker_config = worker_pb2.WorkerConfig(
            kv_block_size=BLOCK_SIZE,
            max_batch_tokens=self._config.max_batch_tokens,
            max_running=self._config.max_running,
        )
        self._send(member, self._encode(member.epoch, worker_config=worker_config))

    def _on_ready(self, member: Member, ready: worker_pb2.WorkerReady, now: float) -> None:
        """Take a group into service when all of its ranks are ready."""
        group = self._groups[member.hello.group_id]
        if group.is_ready:
            return
        if ready.kv_blocks < 2 or not ready.max_model_len:
            self._lose(member.hello.group_id, f"worker {member.hello.worker_id} has no room for a KV cache")
            return
        member.ready = ready
        ranks = [member.ready for member in group.members.values() if member.ready is not None]
        if len(ranks) < member.hello.world_size:
            return
        group.is_ready = True
        log.info(
            "worker %s joined: %s, %d KV blocks, context %d",
            member.hello.worker_id,
            member.hello.device,
            ready.kv_blocks,
            ready.max_model_len,
        )
        smallest = min(ranks, key=lambda rank: rank.kv_blocks)
        self._events.group_ready(member.hello.group_id, group.epoch, smallest, now)

    # -- liveness --------------------------------------------------------------------------------

    def check(self, now: float, busy: Container[str]) -> None:
        """Send heartbeats where nothing else was sent, and give up workers that are gone or silent.

        The groups in `busy` owe a step: their workers cannot speak, and the engine watches the time.
        """
        for group_id, group in list(self._groups.items()):
            for member in list(group.members.values()):
                if group_id not in busy and now - member.last_heard > SILENCE_S:
                    self._lose(group_id, f"worker {member.hello.worker_id} is silent")
                    break
                is_due = now - member.last_sent >= HEARTBEAT_S
                heartbeat = self._encode(member.epoch, heartbeat=worker_pb2.Heartbeat()) if is_due else b""
                if is_due and not self._send(member, heartbeat):
                    self._lose(group_id, f"worker {member.hello.worker_id} is gone")
                    break

    def give_up(self, group_id: str, reason: str) -> None:
        """Take a group out of service because of what it did; its workers have to say hello again."""
        self._lose(group_id, reason)

    def _lose(self, group_id: str, reason: str) -> None:
        """Forget a group."""
        group = self._groups.pop(group_id, None)
        if group is None:
            return
        for member in group.members.values():
            self._by_identity.pop(member.identity, None)
        log.warning("lost worker group %s: %s", group_id, reason)
        if group.is_ready:
            self._events.group_lost(group_id, self._clock())
