"""Rank 0's end of its group: it passes on what the other ranks must do, and notices when one is gone.

Rank 0 alone speaks to a scheduler. What it decides to do it tells the others before it does it
itself, over one socket and in order. So all ranks make the same calls in the same order whatever
happens to the scheduler, its epochs or its frames.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from importlib import metadata

import torch
import zmq
from google.protobuf.message import DecodeError

from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.distributed.collectives import Collectives
from octavo.gpu_worker.distributed.rendezvous import new_store, own_address
from octavo.gpu_worker.errors import RankError
from octavo.gpu_worker.loading.loading import LoadedModel
from octavo.gpu_worker.protocol import PROTOCOL_REVISION
from octavo.worker.v1 import worker_pb2

log = logging.getLogger("octavo.worker")

GATHER_S = 1800.0  # how long a rank waits for the others to start and to load
REPORT_S = 0.2  # a sign of life at least so often
_MAX_QUEUED_FRAMES = 1000
_MAX_FRAME_BYTES = 1 << 20  # what the other ranks send is small
_FAREWELL_MS = 500
_LEAVE_S = 2.0


class Ranks:
    """The other ranks, seen from rank 0. `collectives` is there once they are connected."""

    collectives: Collectives

    def __init__(self, config: WorkerConfig, loaded: LoadedModel) -> None:
        """Listen at the rendezvous; raise zmq.ZMQError if that cannot be done."""
        self._config = config
        self._hello = rank_hello(config, loaded, config.worker_id)
        self._epoch = secrets.randbits(63) | 1
        self._heard_at: dict[int, float] = {}
        self._ids: dict[int, str] = {}  # of the processes that have said hello
        self._told_at = 0.0
        self._leaving: set[int] = set()  # told to end, and not heard to have understood
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.sndhwm = self._socket.rcvhwm = _MAX_QUEUED_FRAMES
        self._socket.maxmsgsize = _MAX_FRAME_BYTES
        self._socket.router_mandatory = True  # sending to a rank that is gone fails instead of vanishing
        self._socket.router_handover = True
        previous = os.umask(0o177)  # a unix socket is for this user alone
        try:
            self._socket.bind(config.rendezvous)
        except zmq.ZMQError:
            self.close()
            raise
        finally:
            os.umask(previous)

    def connect(self, stop: threading.Event) -> bool:
        """Wait for all ranks and connect to them; False if `stop` was set meanwhile. Raises RankError."""
        deadline = time.monotonic() + GATHER_S
        others = self._config.world_size - 1
        while len(self._heard_at) < others:
            if stop.is_set():
                return False
            if time.monotonic() > deadline:
                raise RankError(f"{len(self._heard_at)} of {others} other ranks came within {GATHER_S:g} s")
            if self._socket.poll(50):
                self._receive(gathering=True)
        timeout_s = self._config.rank_timeout_s
        place, store = new_store(self._config.rendezvous, self._config.world_size, timeout_s)
        self.tell(worker_pb2.WorkerFrame(rank_config=worker_pb2.RankConfig(store=place)))
        address = own_address(self._config.rendezvous, 0)
        self.collectives = Collectives(store, 0, self._config.world_size, address, timeout_s)
        self.heard_all()
        log.info("connected with %d other ranks", others)
        return True

    def tell(self, frame: worker_pb2.WorkerFrame) -> None:
        """Send a frame to every other rank; raise RankError if one cannot be reached."""
        frame.protocol_revision = PROTOCOL_REVISION
        frame.epoch = self._epoch
        data = frame.SerializeToString()
        for rank in range(1, self._config.world_size):
            try:
                self._socket.send_multipart((rank_identity(rank), data), zmq.NOBLOCK)
            except zmq.ZMQError as error:
                raise RankError(f"rank {rank} is gone") from error
        self._told_at = time.monotonic()

    def check(self) -> None:
        """Show life and look for it; raise RankError if a rank is gone, silent or reports a fault.

        To be called many times a second, except while the ranks compute or prepare together.
        """
        while self._socket.poll(0):
            self._receive()
        now = time.monotonic()
        for rank, heard_at in self._heard_at.items():
            if now - heard_at > self._config.rank_timeout_s:
                raise RankError(f"rank {rank} is silent for {now - heard_at:.1f} s")
        if now - self._told_at >= REPORT_S:
            self.tell(worker_pb2.WorkerFrame(heartbeat=worker_pb2.Heartbeat()))

    def heard_all(self) -> None:
        """Count something that all ranks did together as a sign of life of each."""
        self._heard_at = dict.fromkeys(self._heard_at, time.monotonic())

    def close(self, farewell: bool = False) -> None:
        """Close; with `farewell` tell the other ranks to end, and wait a moment until they have heard it.

        A socket that loses its peer drops what it has received and not yet handed out: a rank that was
        busy would then find that rank 0 is gone, and not why.
        """
        if farewell:
            self._leaving = set(self._heard_at)
            with contextlib.suppress(RankError, zmq.ZMQError):
                self.tell(worker_pb2.WorkerFrame(shutdown=worker_pb2.Shutdown()))
                deadline = time.monotonic() + _LEAVE_S
                while self._leaving and (left_s := deadline - time.monotonic()) > 0:
                    if self._socket.poll(round(1000 * left_s)):
                        self._receive()
        self._socket.close(linger=_FAREWELL_MS if farewell else 0)
        self._context.term()

    def _receive(self, gathering: bool = False) -> None:
        """Take one frame. What is no frame of a rank of this group is dropped."""
        identity, *parts = self._socket.recv_multipart(zmq.NOBLOCK)
        try:
            frame = worker_pb2.WorkerFrame.FromString(b"".join(parts))
        except DecodeError:
            return
        kind = frame.WhichOneof("kind")
        rank = next((rank for rank in range(1, self._config.world_size) if rank_identity(rank) == identity), None)
        if rank is None or (kind != "worker_hello" and frame.epoch != self._epoch):
            return
        if kind == "worker_fault":
            raise RankError(f"rank {rank}: {frame.worker_fault.reason}: {frame.worker_fault.message}")
        if kind == "worker_hello":
            if gathering:
                self._compare(rank, frame.worker_hello)
                self._ids[rank] = frame.worker_hello.worker_id
            elif self._ids[rank] != frame.worker_hello.worker_id:  # else it was on the way before the answer
                raise RankError(f"rank {rank} starts over")
        if kind == "shutdown":
            self._leaving.discard(rank)
        self._heard_at[rank] = time.monotonic()

    def _compare(self, rank: int, theirs: worker_pb2.WorkerHello) -> None:
        """Raise RankError unless a rank would give the same bits as this one."""
        for name in ("world_size", "code_version", "model_version", "device"):
            if (mine := getattr(self._hello, name)) != (other := getattr(theirs, name)):
                raise RankError(f"rank {rank} has {name} {other!r}, rank 0 {mine!r}: start all ranks alike")


def rank_identity(rank: int) -> bytes:
    """Return a rank's name on the ranks' socket."""
    return f"rank-{rank}".encode()


def rank_hello(config: WorkerConfig, loaded: LoadedModel, process_id: str) -> worker_pb2.WorkerHello:
    """Return what a rank says of itself. All of it but rank and process must be the same on all ranks.

    `device` names whatever changes bits: each rank draws all tokens, and all must draw the same.
    """
    cuda = config.device != "reference" and torch.cuda.is_available()
    hardware = torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability()
    return worker_pb2.WorkerHello(
        worker_id=process_id,
        rank=config.rank,
        world_size=config.world_size,
        device=f"{config.device} on {hardware}, torch {torch.__version__}, context {loaded.max_model_len}, "
        f"KV cache {config.kv_cache_dtype}",
        code_version=metadata.version("octavo"),
        model_version=loaded.model_version,
    )
