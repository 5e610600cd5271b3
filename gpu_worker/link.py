"""The worker's ZeroMQ socket: frames out and in, and nothing about their meaning."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import zmq
from google.protobuf.message import DecodeError
from zmq.utils import z85

from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.errors import SettingError
from octavo.gpu_worker.protocol import PROTOCOL_REVISION
from octavo.worker.v1 import worker_pb2

_MAX_QUEUED_FRAMES = 1000
_MAX_FRAME_BYTES = 64 << 20
_RECONNECT_MS = 100
_MAX_RECONNECT_MS = 1000
_HEARTBEAT_MS = 1000
_HEARTBEAT_TIMEOUT_MS = 10_000
# How long the last frame, which says why the worker ends, may take to leave.
_FAREWELL_MS = 500


# Plain numbers: an enum's flags are made anew each time they are put together.
_NOBLOCK, _POLLIN = int(zmq.NOBLOCK), int(zmq.POLLIN)


@dataclass(frozen=True)
class CurveKeys:
    """Keys of an encrypted hop (CurveZMQ), as Z85 text."""

    secret: bytes
    server_public: bytes


def read_curve_keys(config: WorkerConfig) -> CurveKeys | None:
    """Return the keys that a configuration names, or None. Raises SettingError if a file holds none."""
    if not config.curve_key:
        return None
    keys = []
    for path in (config.curve_key, config.curve_server_key):
        try:
            key = Path(path).read_bytes().strip()
            if len(z85.decode(key)) != 32:
                raise ValueError("it must have 40 characters")
        except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
            raise SettingError(f"{path} holds no key that `octavo keys curve` made: {error}") from None
        keys.append(key)
    return CurveKeys(*keys)


class Link:
    """A DEALER socket connected to the scheduler. `num_malformed` and `num_unsent` count lost frames."""

    def __init__(self, endpoint: str, identity: bytes, curve: CurveKeys | None = None) -> None:
        """Connect in the background; raise zmq.ZMQError if `endpoint` is not one."""
        self.num_malformed = 0
        self.num_unsent = 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        socket = self._socket
        socket.linger = 0
        socket.routing_id = identity
        socket.sndhwm = socket.rcvhwm = _MAX_QUEUED_FRAMES
        socket.maxmsgsize = _MAX_FRAME_BYTES
        socket.immediate = True  # without a scheduler frames are refused, not queued for the next one
        socket.reconnect_ivl = _RECONNECT_MS
        socket.reconnect_ivl_max = _MAX_RECONNECT_MS
        socket.set(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        socket.set(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
        if curve is not None:
            socket.curve_secretkey = curve.secret
            socket.curve_publickey = zmq.curve_public(curve.secret)
            socket.curve_serverkey = curve.server_public
        try:
            socket.connect(endpoint)
        except zmq.ZMQError:
            self.close()
            raise

    def send(self, frame: worker_pb2.WorkerFrame) -> bool:
        """Send a frame; False if there is no scheduler to send it to."""
        frame.protocol_revision = PROTOCOL_REVISION
        try:
            self._socket.send(frame.SerializeToString(), _NOBLOCK)
        except zmq.Again:
            self.num_unsent += 1
            return False
        return True

    def wait(self, timeout_s: float) -> bool:
        """Wait for a frame; False if none came."""
        # Without the Poller that the socket's own `poll` makes for each call.
        return bool(zmq.zmq_poll([(self._socket, _POLLIN)], max(0, round(timeout_s * 1000))))

    def receive(self) -> worker_pb2.WorkerFrame | None:
        """Return the next frame; None if none waits or it is malformed."""
        try:
            parts = self._socket.recv_multipart(_NOBLOCK)
        except zmq.Again:
            return None
        try:
            frame = worker_pb2.WorkerFrame.FromString(parts[0])
        except DecodeError:
            frame = worker_pb2.WorkerFrame()
        if len(parts) != 1 or frame.WhichOneof("kind") is None:
            self.num_malformed += 1
            return None
        return frame

    def close(self, farewell: bool = False) -> None:
        """Close; with `farewell` give frames that were sent a moment to leave."""
        self._socket.close(linger=_FAREWELL_MS if farewell else 0)
        self._context.term()
