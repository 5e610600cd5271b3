"""The worker's part of the protocol: joins a scheduler, computes its plans in order, reports faults.

One membership is an epoch. It begins with a WorkerConfig and ends when something is wrong with it
(a gap in the steps, a plan that breaks the contract, a scheduler that fell silent): then the worker
says hello again and gets the next one. Weights and KV memory outlive epochs.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.common.v1 import common_pb2
from octavo.gpu_worker.config import WorkerConfig
from octavo.gpu_worker.device_thread import DeviceThread, HostThreads
from octavo.gpu_worker.engine import Engine, make_engine
from octavo.gpu_worker.errors import DeviceError, ModelError, PlanError, RankError
from octavo.gpu_worker.lifetime import Lifetime, Progress, Pulse
from octavo.gpu_worker.link import Link, read_curve_keys
from octavo.gpu_worker.loading.loading import LoadedModel, tokenizer_of
from octavo.gpu_worker.memory import free_memory_bytes, resident_bytes
from octavo.gpu_worker.protocol import BLOCK_SIZE, PROTOCOL_REVISION, SCHEDULER_STOPS
from octavo.gpu_worker.steps.runner import MAX_STEPS_IN_FLIGHT
from octavo.gpu_worker.telemetry import WorkerTelemetry
from octavo.worker.v1 import worker_pb2

if TYPE_CHECKING:  # it needs torch
    from octavo.gpu_worker.distributed.ranks import Ranks

log = logging.getLogger("octavo.worker")

_REPORT_S = 0.1  # a hello or a heartbeat at least so often, also while a step runs
_JOINING_S = 0.01  # how often to look, while joining: start-up waits for it
_LOADING_S = 0.002  # the same, while an adapter is loaded
_POLL_S = 50e-6  # how often to look for a step's result and for the next plan, while steps run
_QUIET_S = 0.02  # after a step: the next plan may be on its way, and a piece of idle work takes some milliseconds
_SILENCE_S = 5.0  # a scheduler sends a heartbeat forty times a second, if its machine lets it
_ALONE_S = 5.0  # without a scheduler, after there was one
_MAX_RECEIVED = 1000  # frames that are taken in while a step runs: plans in flight, and what is no heartbeat
# Of google.rpc.Code.
_RESOURCE_EXHAUSTED, _FAILED_PRECONDITION, _ABORTED, _INVALID_ARGUMENT, _INTERNAL = 8, 9, 10, 3, 13
_UNAVAILABLE = 14


@dataclass(frozen=True)
class _Preparation:
    """An engine being built in the background for a WorkerConfig."""

    wanted: worker_pb2.WorkerConfig
    engine: Future[Engine]
    started: float


class Worker:
    """One worker process's loop. `stop` set from outside (a signal) ends it: at once, or as `drain_s` says."""

    def __init__(
        self,
        config: WorkerConfig,
        worker_id: str,
        loaded: LoadedModel,
        progress: Progress,
        stop: threading.Event,
        ranks: Ranks | None = None,
    ) -> None:
        """Connect to the scheduler; raise zmq.ZMQError (`worker_endpoint`) or SettingError (`alive_file`).

        ranks  the other ranks of this worker's group, connected; they end with this worker
        """
        self._config = config
        self._worker_id = worker_id
        self._loaded = loaded
        self._progress = progress
        self._lifetime = Lifetime(config, stop)
        self._ranks = ranks
        self._telemetry = WorkerTelemetry(config, worker_id)
        self._link = Link(config.worker_endpoint, worker_id.encode(), read_curve_keys(config))
        self._tokenizer: str | None = None  # what gateways compare; None until the first engine is built
        self._pulse = Pulse(self._beat, _REPORT_S / 2)
        self._device = DeviceThread() if config.device.startswith("cuda") else HostThreads()
        self._engine: Engine | None = None  # built, and its steps started, in that thread
        self._wanted = worker_pb2.WorkerConfig()  # the newest
        self._prepared = worker_pb2.WorkerConfig()  # what the engine was built for
        self._preparation: _Preparation | None = None
        self._epoch = 0  # 0: in no membership
        self._left_at = math.inf  # when the last one ended, until that was told
        self._last_step_id = 0  # started
        self._last_done_id = 0  # answered, at `_answered_at`
        self._answered_at = float("-inf")
        self._idle_work = False  # whether the engine may have something to prepare when there are no plans
        self._heard_at = 0.0
        self._reported_at = float("-inf")
        self._received: deque[worker_pb2.WorkerFrame] = deque()  # while a step ran
        self._memory_used = 0  # when that was last looked at
        self._status: int | None = None  # the exit status, once there is one
        self.num_dropped = 0

    def run(self) -> int:
        """Serve until a Shutdown frame, `stop` or a fatal fault; return the exit status."""
        log.info("worker %s: waiting for a scheduler at %s", self._worker_id, self._config.worker_endpoint)
        self._pulse.start()
        try:
            while self._status is None and not self._lifetime.is_over(is_needed=self._epoch != 0):
                self._report_if_due()
                self._check_ranks()
                self._send_finished()
                if self._received or self._link.wait(self._patience_s()):
                    frame = self._received.popleft() if self._received else self._link.receive()
                    if frame is not None:
                        self._handle(frame)
                elif self._engine is not None and self._engine.num_in_flight:
                    time.sleep(_POLL_S)
                elif self._idle_work:
                    self._idle_work = self._use_idle_time()
                elif self._epoch and time.monotonic() - self._heard_at > _SILENCE_S:
                    log.warning("the scheduler is silent; joining again")
                    self._end_epoch()
                self._finish_preparation()
                self._finish_adapters()
        finally:
            self._pulse.close()
            self._device.close()
            self._link.close(farewell=bool(self._status))
            if self._ranks is not None:
                self._ranks.close(farewell=True)
            self._telemetry.close()
        log.info("worker %s: ends", self._worker_id)
        return self._status or 0

    def _patience_s(self) -> float:
        """How long to wait for a frame before looking at other things."""
        if self._engine is not None and self._engine.num_in_flight:
            return 0.0
        if self._engine is not None and self._engine.adapters.is_loading:
            return _LOADING_S
        if self._idle_work:
            return max(0.0, self._answered_at + _QUIET_S - time.monotonic())
        return _REPORT_S / 2 if self._epoch and not self._preparation else _JOINING_S

    def _handle(self, frame: worker_pb2.WorkerFrame) -> None:
        """Handle one frame from the scheduler."""
        kind = frame.WhichOneof("kind")
        if frame.protocol_revision != PROTOCOL_REVISION:
            self.num_dropped += 1
            message = f"this worker speaks revision {PROTOCOL_REVISION}, the scheduler {frame.protocol_revision}"
            self._fault(0, _FAILED_PRECONDITION, "PROTOCOL_REVISION", f"{message}: run the same version of both")
        elif kind == "worker_config":
            self._configure(frame.epoch, frame.worker_config)
        elif frame.epoch != self._epoch or not self._epoch:
            self.num_dropped += 1
        else:
            self._heard_at = time.monotonic()
            if kind == "step_plan":
                self._compute(frame.step_plan)
            elif kind == "adapter_load" and self._engine is not None:
                self._engine.adapters.load(frame.adapter_load)
            elif kind == "adapter_drop" and self._engine is not None:
                self._engine.adapters.drop(frame.adapter_drop.adapter_id)
            elif kind == "fenced":
                level = logging.INFO if frame.fenced.reason == SCHEDULER_STOPS else logging.WARNING
                log.log(level, "fenced by the scheduler (%s); joining again", frame.fenced.reason)
                self._end_epoch()
                self._reported_at = float("-inf")
            elif kind == "shutdown":
                log.info("the scheduler ends this worker")
                self._status = 0

    def _configure(self, epoch: int, wanted: worker_pb2.WorkerConfig) -> None:
        """Begin an epoch: with the engine there is if its limits fit, else with a new one."""
        if refusal := self._refusal(wanted):
            self._epoch = epoch
            self._end(0, _FAILED_PRECONDITION, "CONFIG_REFUSED", refusal)
            return
        self._epoch = epoch
        self._telemetry.left()
        self._wanted = wanted
        self._last_step_id = self._last_done_id = 0
        self._heard_at = time.monotonic()
        if self._preparation is not None:
            return  # when it is done, it is compared with what is wanted then
        if self._engine is not None and wanted == self._prepared:
            if self._tell_ranks(worker_pb2.WorkerFrame(worker_config=wanted)):
                self._engine.reset()
                self._ready(self._engine, 0.0)
        else:
            self._prepare(wanted)

    def _refusal(self, wanted: worker_pb2.WorkerConfig) -> str:
        """Return why a WorkerConfig cannot be met, or nothing."""
        if wanted.kv_block_size not in (0, BLOCK_SIZE):
            return f"this worker's KV blocks hold {BLOCK_SIZE} tokens, the scheduler asks for {wanted.kv_block_size}"
        if wanted.weights_sha256 not in ("", self._loaded.model_version):
            return f"this worker's model is {self._loaded.model_version}, the scheduler's {wanted.weights_sha256}"
        if wanted.dtype not in ("", "auto", self._config.dtype):
            return f"this worker's dtype is {self._config.dtype}, the scheduler asks for {wanted.dtype}"
        return ""

    def _prepare(self, wanted: worker_pb2.WorkerConfig) -> None:
        """Build an engine in the background: a scheduler gives up a worker that shows no life meanwhile."""
        before, self._engine = self._engine, None
        if not self._tell_ranks(worker_pb2.WorkerFrame(worker_config=wanted)):
            return
        collectives = None if self._ranks is None else self._ranks.collectives

        def build() -> Engine:
            if before is not None:  # its memory must be free before the next one takes as much
                before.close()
            if self._tokenizer is None:
                self._tokenizer = tokenizer_of(Path(self._config.model))
            return make_engine(self._loaded, self._config, wanted, collectives)

        self._preparation = _Preparation(wanted, self._device.submit(build), time.monotonic())

    def _finish_preparation(self) -> None:
        """Join with the engine that was built, if one was."""
        done = self._preparation
        if done is None or not done.engine.done():
            return
        self._preparation = None
        if self._ranks is not None:
            self._ranks.heard_all()
        error = done.engine.exception()
        if isinstance(error, ModelError | DeviceError):
            self._end(0, _FAILED_PRECONDITION, "CONFIG_REFUSED", str(error))
        elif isinstance(error, RankError):
            self._lose_ranks(0, error)
        elif error is not None:
            fault = _device_fault(error)
            if fault[0] == _INTERNAL:  # a bug; of the others the message says all there is to know
                log.error("the device cannot be prepared", exc_info=error)
            self._end(0, *fault)
        elif done.wanted != self._wanted:
            self._prepare(self._wanted)
        else:
            self._engine = done.engine.result()
            self._prepared = done.wanted
            if self._epoch:
                self._ready(self._engine, time.monotonic() - done.started)

    def _finish_adapters(self) -> None:
        """Tell of adapters that were loaded: the next plans may have them."""
        for loaded in self._engine.adapters.finished() if self._engine is not None else ():
            if loaded.problem and not loaded.is_full:
                log.warning("an adapter cannot be loaded: %s", loaded.problem)
            self._send(worker_pb2.WorkerFrame(adapter_loaded=loaded))

    def _ready(self, engine: Engine, took_s: float) -> None:
        limits = engine.limits
        ready = worker_pb2.WorkerReady(
            kv_blocks=limits.num_blocks,
            warmup_us=round(took_s * 1e6),
            max_model_len=engine.max_model_len,
            vocab_size=limits.vocab_size,
            max_batch_tokens=engine.max_batch_tokens,
            task=common_pb2.MODEL_TASK_GENERATE if limits.pooling is None else limits.pooling.task,
            vector_size=0 if limits.pooling is None else limits.pooling.vector_size,
            whole_sequences=not limits.has_cache,
            vectors_of_last_token=limits.has_cache and limits.pooling is not None and limits.pooling.mode == "last",
            structured_output=engine.takes_grammars,
            prompt_logprobs=engine.scores_prompts,
            max_row_tokens=engine.runner.max_row_tokens,
            tokenizer_sha256=self._tokenizer or "",
            max_adapters=engine.adapters.max_adapters,
            adapter_memory_bytes=engine.adapters.memory_bytes,
            notes=self._loaded.notes,
            kv_group_windows=limits.kv_windows if any(limits.kv_windows) else (),
        )
        log.info(
            "joined with epoch %d: device %s, %d KV blocks, context %d",
            self._epoch, engine.runner.name, limits.num_blocks, engine.max_model_len,
        )  # fmt: skip
        self._send(worker_pb2.WorkerFrame(worker_ready=ready))
        self._telemetry.joined(limits.num_blocks)
        self._idle_work = True
        self._progress.emit("ready", 1, 1, device=engine.runner.name)

    def _compute(self, plan: worker_pb2.StepPlan) -> None:
        """Compute a plan, if it is the next one."""
        if plan.step_id <= self._last_step_id:
            self.num_dropped += 1  # repeated: it was computed and answered
            return
        if plan.step_id != self._last_step_id + 1 or self._engine is None:
            message = f"got step {plan.step_id} after step {self._last_step_id}"
            self._leave(plan.step_id, _ABORTED, "STEP_GAP", message)
            return
        if self._engine.num_in_flight == MAX_STEPS_IN_FLIGHT:
            self._send_finished(num_left=MAX_STEPS_IN_FLIGHT - 1)
            if self._epoch == 0 or self._status is not None:
                return
        if not self._tell_ranks(worker_pb2.WorkerFrame(step_plan=plan)):
            return
        self._telemetry.planned(plan)
        engine = self._engine
        try:
            with self._pulse.computing():
                refused = self._device.call(lambda: engine.start(plan))
        except PlanError as error:
            self._leave(plan.step_id, _INVALID_ARGUMENT, "INVALID_PLAN", str(error))
        except Exception as error:
            self._fail(plan.step_id, error)
        else:
            self._last_step_id = plan.step_id
            for slot, problem in refused:  # before the answer: the scheduler must not believe the slot's rows
                self._fault(plan.step_id, _INVALID_ARGUMENT, "INVALID_PLAN", problem, slot=slot)
            self._send_finished()

    def _send_finished(self, num_left: int = MAX_STEPS_IN_FLIGHT) -> None:
        """Send the results that are there; wait for them while more than `num_left` steps are in flight."""
        engine = self._engine
        while self._epoch and engine is not None and (engine.is_done() or engine.num_in_flight > num_left):
            try:
                with self._pulse.computing():
                    result = engine.collect()
            except Exception as error:
                self._fail(self._last_done_id + 1, error)
                return
            self._last_done_id = result.step_id
            self._answered_at = time.monotonic()
            self._telemetry.computed(result)
            if self._ranks is not None:
                self._ranks.heard_all()
            frame = worker_pb2.WorkerFrame()
            frame.step_result.CopyFrom(result)  # in the constructor it would be serialized and parsed
            self._send(frame)

    def _fail(self, step_id: int, error: Exception) -> None:
        """Report an error of the device in a step."""
        if isinstance(error, RankError):
            self._lose_ranks(step_id, error)
            return
        log.error("step %d failed", step_id, exc_info=error)
        code, reason, message = _device_fault(error)
        # Weights and cache are there: what a step takes beside them can be made less, but not while other
        # ranks wait in the middle of it.
        alone = self._ranks is None
        if reason == "OUT_OF_MEMORY" and alone and self._engine is not None and self._engine.shrink():
            message += f"; from now on steps have at most {self._engine.max_batch_tokens} tokens"
            self._leave(step_id, code, reason, message)
        else:
            self._end(step_id, code, reason, message)

    def _use_idle_time(self) -> bool:
        """Prepare a piece of what makes later steps faster, on all ranks; False if there is none left."""
        if self._engine is None or not self._tell_ranks(worker_pb2.WorkerFrame(idle_time=worker_pb2.IdleTime())):
            return False
        with self._pulse.computing():
            return self._device.call(self._engine.use_idle_time)

    def _tell_ranks(self, frame: worker_pb2.WorkerFrame) -> bool:
        """Tell the other ranks what this one does next; False, and this process ends, if one is gone."""
        try:
            if self._ranks is not None:
                self._ranks.tell(frame)
        except RankError as error:
            self._lose_ranks(self._last_step_id, error)
            return False
        return True

    def _check_ranks(self) -> None:
        """Look after the other ranks; while they prepare together with this one they cannot speak."""
        try:
            if self._ranks is not None and self._preparation is None:
                self._ranks.check()
        except RankError as error:
            self._lose_ranks(self._last_step_id, error)

    def _lose_ranks(self, step_id: int, error: RankError) -> None:
        """End the process: what the other ranks have done is not known. All of the group starts anew."""
        self._end(step_id, _UNAVAILABLE, "RANK_LOST", str(error))

    def _report_if_due(self) -> None:
        """Show life when nothing else was sent for a while."""
        if time.monotonic() - self._reported_at < _REPORT_S:
            return
        if self._epoch:
            used = resident_bytes() if self._engine is None else self._engine.runner.memory_used_bytes()
            self._memory_used = used
            self._telemetry.memory(used)
            if self._engine is None or not self._engine.num_in_flight:
                self._telemetry.idle()
            if not self._send_heartbeat():
                log.info("the scheduler is gone; joining the next one")
                self._end_epoch()
        elif not self._send(worker_pb2.WorkerFrame(worker_hello=self._hello())):
            self._reported_at -= _REPORT_S - _JOINING_S  # not connected yet: try again soon
            if time.monotonic() - self._left_at > _ALONE_S:  # sooner it is an ordinary stop or restart
                self._left_at = math.inf
                log.warning("no scheduler at %s for %g s", self._config.worker_endpoint, _ALONE_S)

    def _beat(self) -> None:
        """Show life while the main thread computes, and take in what comes.

        Else a long step would fill the socket's queue, and the pings behind it would not be answered.
        """
        while len(self._received) < _MAX_RECEIVED and self._link.wait(0.0):
            frame = self._link.receive()
            if frame is not None and frame.WhichOneof("kind") != "heartbeat":
                self._received.append(frame)
            elif frame is not None and frame.epoch == self._epoch:
                self._heard_at = time.monotonic()
        if self._epoch and time.monotonic() - self._reported_at >= _REPORT_S:
            self._send_heartbeat()  # if nobody is there, the main thread will find out

    def _send_heartbeat(self) -> bool:
        heartbeat = worker_pb2.Heartbeat(
            last_step_id=self._last_done_id,
            device_memory_used_bytes=self._memory_used,
            progress=0 if self._engine is None else self._engine.runner.progress(),
            processor_time_us=time.process_time_ns() // 1000,
        )
        return self._send(worker_pb2.WorkerFrame(heartbeat=heartbeat))

    def _hello(self) -> worker_pb2.WorkerHello:
        device = self._config.device if self._engine is None else self._engine.runner.name
        return worker_pb2.WorkerHello(
            worker_id=self._worker_id,
            rank=self._config.rank,
            world_size=self._config.world_size,
            device="cpu" if device == "auto" else device,
            free_memory_bytes=free_memory_bytes(),
            code_version=metadata.version("octavo"),
            model_version=self._loaded.model_version,
            group_id=self._config.group_id,
        )

    def _send(self, frame: worker_pb2.WorkerFrame) -> bool:
        """Send a frame of this epoch; False if there is no scheduler to send it to."""
        frame.epoch = self._epoch
        self._reported_at = time.monotonic()
        return self._link.send(frame)

    def _fault(
        self, step_id: int, code: int, reason: str, message: str, *, fatal: bool = False, slot: int | None = None
    ) -> None:
        """Report a fault; with `slot`, one that costs this slot's sequence only."""
        log.error("%s: %s", reason, message)
        self._telemetry.fault(reason)
        fault = worker_pb2.WorkerFault(
            step_id=step_id, code=code, reason=reason, message=message, fatal=fatal, slot=slot
        )
        self._send(worker_pb2.WorkerFrame(worker_fault=fault))

    def _leave(self, step_id: int, code: int, reason: str, message: str) -> None:
        """Report a fault and end the epoch; a hello follows at once."""
        self._fault(step_id, code, reason, message)
        self._end_epoch()
        self._reported_at = float("-inf")

    def _end_epoch(self) -> None:
        """Be in no membership: what is in flight is nobody's."""
        self._epoch = 0
        self._left_at = time.monotonic()
        self._telemetry.left()
        if self._engine is not None:
            self._engine.reset()

    def _end(self, step_id: int, code: int, reason: str, message: str) -> None:
        """Report a fault and end the process."""
        self._fault(step_id, code, reason, message, fatal=True)
        self._status = 1


def _device_fault(error: BaseException) -> tuple[int, str, str]:
    """Return code, reason and message of a fault for an error that a device raised."""
    message = f"{type(error).__name__}: {error}"
    # By name: this must not import torch, whose own class is for GPUs only.
    is_torchs = type(error).__name__ == "OutOfMemoryError" or "allocate memory" in message
    if isinstance(error, MemoryError) or is_torchs:
        advice = "lower --kv-cache-memory or --max-batch-tokens"
        return _RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", f"{str(error) or message}; {advice}"
    return _INTERNAL, "DEVICE_FAULT", message
