"""A simulated worker: the protocol of gpu_worker/worker.py around the fake model."""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from octavo.services.common.protocol import PROTOCOL_REVISION
from octavo.worker.v1 import worker_pb2
from tests.services.scheduler.simulation import VOCAB, FakeWorker

if TYPE_CHECKING:
    from .world import World

REPORT_S = 0.2
SILENCE_S = 5.0  # of the scheduler, as in gpu_worker/worker.py
NOT_FINITE = 0xFFFFFFFF
POISON = VOCAB  # the token that kills a worker: the fake model never makes it


class SimWorker:
    """One worker process and its restarts. Dead and hanging ones read nothing; the dead lose what waits."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.identity = name.encode()
        self.is_alive = True
        self.hangs_until = self.partitioned_until = self.slow_until = 0.0
        self.speed = 1.0
        self.is_computing = False
        self._progress, self._computed_s, self._reported_at = 0, 0.0, world.now
        self._inbox: deque[worker_pb2.WorkerFrame] = deque()
        self._answered: worker_pb2.WorkerFrame | None = None  # the last one
        self.life = 0  # of the process: timers of an earlier one do nothing
        self.spoil_next = False
        self.rng = random.Random(f"{world.swarm.seed} {name}")
        swarm, is_small = world.swarm, world.swarm.small_blocks and int(name.split("-")[1]) % 2
        self.num_blocks = swarm.small_blocks if is_small else swarm.num_blocks
        self._reset()
        world.after(0.0, self.report, self.life)

    def _reset(self) -> None:
        self.epoch = self.last_step_id = 0
        self.model = FakeWorker(self.num_blocks, windows=self.world.swarm.windows)
        self.model.max_num_batched_tokens = self.world.config.max_num_batched_tokens
        self.model.is_row_late = self._is_row_late
        self.model.max_row_tokens = most = self.world.swarm.max_row_tokens
        self.model.num_guessed = lambda: self.rng.randrange(most)
        self.heard_at = self.world.now

    def _is_row_late(self) -> bool:
        """Some rows get no token, as those whose grammar is slow."""
        is_late = not self.world.healed and self.rng.random() < self.world.swarm.lateness
        if is_late:
            self.world.count("late row")
        return is_late

    def die(self, restart_s: float) -> None:
        """End the process; another one starts under the same name."""
        self.is_alive = self.is_computing = False
        self.life += 1
        self._inbox.clear()
        self.world.after(restart_s, self.start)

    def start(self) -> None:
        if not self.is_alive:
            self.is_alive = True
            self.hangs_until = self._computed_s = 0.0
            self._progress = 0
            self._reset()
            self.world.after(0.0, self.report, self.life)

    def report(self, life: int) -> None:
        """The timer: a hello, or a sign of life."""
        if life != self.life or not self.is_alive:
            return
        self.world.after(REPORT_S, self.report, life)
        passed, self._reported_at = self.world.now - self._reported_at, self.world.now
        if self.world.now < self.hangs_until:
            return
        if self.epoch and not self.is_computing and self.world.now - self.heard_at > SILENCE_S:
            self.epoch = 0
        if self.epoch:
            self._send(worker_pb2.WorkerFrame(heartbeat=self._heartbeat(passed)))
        else:
            self._hello()

    def _heartbeat(self, passed: float) -> worker_pb2.Heartbeat:
        if not self.world.swarm.tells_progress:
            return worker_pb2.Heartbeat()
        self._progress += self.is_computing
        self._computed_s += passed if self.is_computing else 0.01 * passed
        return worker_pb2.Heartbeat(progress=self._progress, processor_time_us=int(1e6 * self._computed_s))

    def receive(self, life: int, frame: worker_pb2.WorkerFrame) -> None:
        """A frame arrived, if the process it was sent to still lives. One thread computes and reads, in order."""
        if life == self.life and self.is_alive:
            self._inbox.append(frame)
            self._read(life)

    def _read(self, life: int) -> None:
        """Handle what arrived, up to a step that has to be computed."""
        if life != self.life or not self._inbox:
            return
        if self.world.now < self.hangs_until:
            self.world.at(self.hangs_until, self._read, life)
            return
        while self._inbox and not self.is_computing:
            self._handle(self._inbox.popleft())

    def _handle(self, frame: worker_pb2.WorkerFrame) -> None:
        kind = frame.WhichOneof("kind")
        if kind == "worker_config":
            if frame.epoch >= self.epoch:
                self._reset()
                self._repeat_late()
                self.epoch = frame.epoch
                swarm = self.world.swarm
                ready = worker_pb2.WorkerReady(
                    kv_blocks=self.num_blocks, max_model_len=swarm.max_model_len, max_row_tokens=swarm.max_row_tokens,
                    kv_group_windows=swarm.windows if any(swarm.windows) else (),
                )  # fmt: skip
                self._send(worker_pb2.WorkerFrame(worker_ready=ready))
        elif frame.epoch == self.epoch and self.epoch:
            self.heard_at = self.world.now
            if kind == "step_plan":
                self._compute(frame.step_plan)
            elif kind == "fenced":
                self.epoch = 0
                self._hello()

    def _repeat_late(self) -> None:
        """The network repeats the last result of the epoch before, when this one may have got as far."""
        world, swarm = self.world, self.world.swarm
        if self._answered is not None and swarm.reordering and not world.healed and self.rng.random() < 0.5:
            world.count("stale result")
            late_s = (self._answered.step_result.step_id + self.rng.random()) * (swarm.step_s + swarm.max_delay_s)
            world.after(late_s, world.from_worker, self, self._answered)
            self._answered = None

    def _compute(self, plan: worker_pb2.StepPlan) -> None:
        if plan.step_id <= self.last_step_id:
            return
        if plan.step_id != self.last_step_id + 1:
            self._fault("STEP_GAP")
            self.epoch = 0
            self._hello()
            return
        if POISON in array("I", plan.token_ids):
            self.world.count("poison")
            self.die(restart_s=0.05)
            return
        self.last_step_id = plan.step_id
        result = self.model.execute(plan)
        if self.spoil_next and result.token_ids:
            self.spoil_next = False
            tokens = array("I", result.token_ids)
            tokens[random.Random(plan.step_id).randrange(len(tokens))] = NOT_FINITE
            result.token_ids = tokens.tobytes()
            self.world.spoiled = True
        swarm = self.world.swarm
        took_s = swarm.step_s * (20 if self.world.now < self.slow_until else 1)
        took_s += swarm.token_s * max(plan.num_tokens, 16) * self.speed  # one token reads all weights as well
        self.is_computing = True
        self.world.after(took_s, self._answer, self.life, self.epoch, result)

    def _answer(self, life: int, epoch: int, result: worker_pb2.StepResult) -> None:
        if life == self.life and self.is_alive:
            if self.world.now < self.hangs_until:
                self.world.after(self.hangs_until - self.world.now, self._answer, life, epoch, result)
            else:
                self.is_computing = False
                # A result that comes when an epoch later has got as far is the worst there is.
                late_s = result.step_id * self.world.swarm.step_s
                self._answered = worker_pb2.WorkerFrame(step_result=result)
                self._send(self._answered, epoch, late_s)
                self._read(life)

    def fault(self, reason: str) -> None:
        """End with a last word."""
        if self.is_alive and self.epoch:
            self._fault(reason, fatal=True)
            self.die(restart_s=0.05)

    def _fault(self, reason: str, fatal: bool = False) -> None:
        self._send(worker_pb2.WorkerFrame(worker_fault={"reason": reason, "fatal": fatal}))

    def _hello(self) -> None:
        hello = worker_pb2.WorkerHello(worker_id=self.name, world_size=1, device="sim")
        self._send(worker_pb2.WorkerFrame(worker_hello=hello), 0)

    def _send(self, frame: worker_pb2.WorkerFrame, epoch: int | None = None, late_s: float = 0.0) -> None:
        frame.protocol_revision = PROTOCOL_REVISION
        frame.epoch = self.epoch if epoch is None else epoch
        self.world.network.carry(self, self.world.from_worker, self, frame, late_s=late_s)


class Network:
    """The hop between scheduler and workers: delay, loss, duplication, reordering, partition."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = random.Random(world.swarm.seed ^ 0x5EED)
        self._last: dict[tuple[str, bool], float] = {}

    def carry(
        self,
        worker: SimWorker,
        arrive: Callable[..., None],
        *arguments: Any,
        to_worker: bool = False,
        late_s: float = 0.0,
    ) -> None:
        """Let a frame arrive, or not; one out of order comes later, by about `late_s` if that is given."""
        world, swarm, rng = self.world, self.world.swarm, self.rng
        if world.now < worker.partitioned_until:
            world.count("partitioned frame")
            return
        copies = 1
        if not world.healed and (swarm.loss or swarm.duplication):
            draw = rng.random()
            if draw < swarm.loss:
                world.count("lost frame")
                return
            if draw > 1 - swarm.duplication:
                world.count("doubled frame")
                copies = 2
        for _ in range(copies):
            at = world.now + rng.random() * swarm.max_delay_s
            key = worker.name, to_worker
            if not world.healed and swarm.reordering and rng.random() < swarm.reordering:
                world.count("reordered frame")
                at += rng.choice([0.01, 0.05, 0.3]) * rng.random() + rng.choice([0.0, late_s])
            else:
                at = self._last[key] = max(at, self._last.get(key, 0.0))
            world.at(at, arrive, *arguments)
