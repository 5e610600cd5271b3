"""The link to workers sends and receives frames over ZeroMQ. What they mean is the membership's business."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

import zmq
from google.protobuf.message import DecodeError

from octavo.services.common.logging import RateLimiter
from octavo.services.scheduler.config import CurveFiles
from octavo.services.scheduler.workers.curve import CurveServer
from octavo.worker.v1 import worker_pb2

log = logging.getLogger("octavo.scheduler")

MAX_FRAME_BYTES = 64 << 20
MAX_QUEUED_FRAMES = 1000  # on the socket, each way and worker; heartbeats past that are dropped
LAST_FRAMES_MS = 200  # what was sent last has so long to leave when the socket is closed
# ZeroMQ's own pings are answered by a thread of the worker that nothing else runs on, whatever the worker
# computes, compiles or loads. One that is not answered means a process that is frozen, a network that is cut, or a
# machine that does not let the thread run. Heartbeats tell these apart, and sooner: see `Pulse` in the worker.
PING_MS = 1000
PING_TIMEOUT_MS = 10_000
# Plain numbers: an enum's flags are made anew each time they are put together, which costs more than to send.
_NOBLOCK = int(zmq.NOBLOCK)
_MORE_NOBLOCK = int(zmq.NOBLOCK | zmq.SNDMORE)
_POLLIN = int(zmq.POLLIN)


class WorkerLink:
    """Owner of the ROUTER socket."""

    def __init__(
        self,
        endpoint: str,
        on_frame: Callable[[bytes, worker_pb2.WorkerFrame], None],
        on_disconnect: Callable[[], None],
        curve_files: CurveFiles | None = None,
    ) -> None:
        """Prepare; `open` binds.

        on_frame       gets the routing id of a worker and its frame
        on_disconnect  is called when a worker's connection has ended: which one, sending will tell
        """
        self._endpoint = endpoint
        self._on_frame = on_frame
        self._on_disconnect = on_disconnect
        self._monitor: zmq.Socket[bytes] | None = None
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._curve_files = curve_files
        self._curve: CurveServer | None = None
        self._dropped = RateLimiter(log)

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Bind the endpoint and start to read; raise zmq.ZMQError if it is taken, ValueError for bad key files."""
        socket = self._socket
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = MAX_QUEUED_FRAMES
        socket.maxmsgsize = MAX_FRAME_BYTES
        socket.router_mandatory = True  # sending to a worker that is gone fails instead of vanishing
        socket.router_handover = True  # a worker that restarts under its old name takes its place
        socket.set(zmq.HEARTBEAT_IVL, PING_MS)
        socket.set(zmq.HEARTBEAT_TIMEOUT, PING_TIMEOUT_MS)
        if self._curve_files is not None:
            self._curve = CurveServer(self._context, self._curve_files)
            self._curve.protect(socket)
        previous = os.umask(0o177)  # a unix socket is for this user alone
        try:
            socket.bind(self._endpoint)
        finally:
            os.umask(previous)
        loop.add_reader(socket.fileno(), self.receive)
        self._monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        loop.add_reader(self._monitor.fileno(), self._receive_events)

    def close(self, loop: asyncio.AbstractEventLoop) -> None:
        """Stop reading and release the endpoint. Workers wait for the next scheduler."""
        loop.remove_reader(self._socket.fileno())
        if self._monitor is not None:
            loop.remove_reader(self._monitor.fileno())
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
        self._socket.close(linger=LAST_FRAMES_MS)
        if self._curve is not None:
            self._curve.close()
        self._context.term()

    def send(self, identity: bytes, frame: worker_pb2.WorkerFrame) -> bool:
        """Send one frame; False if the worker is gone or does not read."""
        data = frame.SerializeToString()
        try:
            self._socket.send(identity, _MORE_NOBLOCK)
            self._socket.send(data, _NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def _receive_events(self) -> None:
        assert self._monitor is not None, "not open"
        while self._monitor.poll(0):
            self._monitor.recv_multipart(zmq.NOBLOCK)
            self._on_disconnect()

    def receive(self) -> None:
        """Handle every frame that has arrived.

        The socket's descriptor signals edges only, so this must read until nothing is left; the
        engine also calls it at each tick, because a send can consume an edge.
        """
        socket = self._socket
        while True:
            try:
                if not int(socket.get(zmq.EVENTS)) & _POLLIN:  # cheaper than to read until that fails
                    return
                parts = socket.recv_multipart(_NOBLOCK)
            except zmq.ZMQError:
                return
            try:
                frame = worker_pb2.WorkerFrame.FromString(parts[-1])
            except DecodeError:
                frame = worker_pb2.WorkerFrame()
            if len(parts) == 2 and frame.WhichOneof("kind") is not None:
                self._on_frame(parts[0], frame)
            else:
                self._dropped.warning("malformed", "dropped a frame that is no WorkerFrame")
