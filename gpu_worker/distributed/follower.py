"""A rank other than 0: does what rank 0 tells it, in order, and answers nothing but signs of life.

It ends with rank 0, and as soon as anything is wrong: a group starts anew as a whole.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time

from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.distributed.collectives import Collectives
from octavo.gpu_worker.distributed.ranks import GATHER_S, REPORT_S, rank_hello, rank_identity
from octavo.gpu_worker.distributed.rendezvous import open_store, own_address
from octavo.gpu_worker.engine import Engine, make_engine
from octavo.gpu_worker.errors import PlanError, RankError
from octavo.gpu_worker.lifetime import Lifetime
from octavo.gpu_worker.link import Link
from octavo.gpu_worker.loading.loading import LoadedModel
from octavo.gpu_worker.protocol import PROTOCOL_REVISION
from octavo.gpu_worker.steps.runner import MAX_STEPS_IN_FLIGHT
from octavo.worker.v1 import worker_pb2

log = logging.getLogger("octavo.worker")

_POLL_S = 0.001
_INTERNAL = 13  # of google.rpc.Code


class Follower:
    """One process's loop. `stop` set from outside (a signal) ends it: at once, or as `drain_s` says."""

    def __init__(self, config: WorkerConfig, loaded: LoadedModel, stop: threading.Event) -> None:
        """Connect to rank 0; raise zmq.ZMQError if the rendezvous is not an endpoint."""
        self._config = config
        self._loaded = loaded
        self._lifetime = Lifetime(config, stop)
        self._process_id = secrets.token_hex(8)
        self._link = Link(config.rendezvous, rank_identity(config.rank))
        self._collectives: Collectives | None = None
        self._engine: Engine | None = None
        self._prepared = worker_pb2.WorkerConfig()  # what the engine was built for
        self._epoch = 0  # rank 0's, once it has answered
        self._heard_at = time.monotonic()
        self._reported_at = float("-inf")
        self._ended = False

    def run(self) -> int:
        """Follow until rank 0 ends the group, `stop` or a fault; return the exit status."""
        log.info("rank %d: waiting for rank 0 at %s", self._config.rank, self._config.rendezvous)
        status = 0
        try:
            while not self._ended and not self._lifetime.is_over(is_needed=self._epoch != 0):
                self._report_if_due()
                if self._link.wait(_POLL_S if self._num_in_flight else REPORT_S / 2):
                    frame = self._link.receive()
                    if frame is not None:
                        self._handle(frame)
                elif self._engine is not None and self._engine.is_done():
                    self._collect(self._num_in_flight - 1)
                else:
                    self._check_silence()
        except Exception as error:  # whatever it is ends this rank, and rank 0 is told why
            status = 1
            log.error("rank %d: %s", self._config.rank, error, exc_info=not isinstance(error, RankError))
            fault = worker_pb2.WorkerFault(code=_INTERNAL, reason=type(error).__name__, message=str(error), fatal=True)
            self._send(worker_pb2.WorkerFrame(worker_fault=fault))
        self._link.close(farewell=True)
        log.info("rank %d: ends", self._config.rank)
        return status

    def _handle(self, frame: worker_pb2.WorkerFrame) -> None:
        """Do what a frame says."""
        kind = frame.WhichOneof("kind")
        if frame.protocol_revision != PROTOCOL_REVISION:
            raise RankError(f"rank 0 speaks revision {frame.protocol_revision}: run the same version on all ranks")
        if kind == "rank_config":
            self._connect(frame)
        elif not self._epoch:
            return  # meant for one that had this name before: rank 0 will find that this is another
        elif frame.epoch != self._epoch:
            raise RankError("rank 0 started over")
        elif kind == "worker_config":
            self._configure(frame.worker_config)
        elif kind == "step_plan":
            self._compute(frame.step_plan)
        elif kind == "idle_time" and self._engine is not None:
            self._collect(0)  # rank 0 had none in flight
            self._engine.use_idle_time()
        elif kind == "shutdown":
            self._ended = True
            self._send(worker_pb2.WorkerFrame(shutdown=worker_pb2.Shutdown()))  # heard
        self._heard_at = time.monotonic()

    def _connect(self, frame: worker_pb2.WorkerFrame) -> None:
        if self._epoch:
            raise RankError("rank 0 started over")
        self._epoch = frame.epoch
        config, timeout_s = self._config, self._config.rank_timeout_s
        store = open_store(frame.rank_config.store, config.world_size, timeout_s)
        address = own_address(config.rendezvous, config.rank)
        self._collectives = Collectives(store, config.rank, config.world_size, address, timeout_s)

    def _configure(self, wanted: worker_pb2.WorkerConfig) -> None:
        """Forget every slot; build an engine first if the limits are others than before, as rank 0 does."""
        if self._engine is not None and wanted == self._prepared:
            self._engine.reset()
            return
        if self._engine is not None:
            self._engine.close()  # its memory must be free before the next one takes as much
        self._engine = None
        self._engine = make_engine(self._loaded, self._config, wanted, self._collectives)
        self._prepared = wanted

    def _compute(self, plan: worker_pb2.StepPlan) -> None:
        if self._engine is None:
            raise RankError("rank 0 sent a plan before a configuration")
        self._collect(MAX_STEPS_IN_FLIGHT - 1)
        try:
            self._engine.start(plan)
        except PlanError as error:  # rank 0 finds the same, leaves the epoch and sends a configuration
            log.error("step %d: %s", plan.step_id, error)

    @property
    def _num_in_flight(self) -> int:
        return 0 if self._engine is None else self._engine.num_in_flight

    def _collect(self, num_left: int) -> None:
        """Wait for steps until so many are in flight; rank 0 sends their results."""
        while self._engine is not None and self._engine.num_in_flight > num_left:
            self._engine.collect()

    def _report_if_due(self) -> None:
        """Show life, or wait for rank 0's first word."""
        if time.monotonic() - self._reported_at < REPORT_S:
            return
        self._reported_at = time.monotonic()
        if not self._epoch:
            self._send(worker_pb2.WorkerFrame(worker_hello=rank_hello(self._config, self._loaded, self._process_id)))
        elif not self._send(worker_pb2.WorkerFrame(heartbeat=worker_pb2.Heartbeat())) and not self._link.wait(0):
            raise RankError("rank 0 is gone")  # and has not left a word why

    def _send(self, frame: worker_pb2.WorkerFrame) -> bool:
        frame.epoch = self._epoch
        return self._link.send(frame)

    def _check_silence(self) -> None:
        silent_s = time.monotonic() - self._heard_at
        if silent_s > (self._config.rank_timeout_s if self._epoch else GATHER_S):
            raise RankError(f"rank 0 is silent for {silent_s:.1f} s")
