"""A slow worker is waited for, one that hangs is given up, and only a hang is held against its request."""

from __future__ import annotations

import pytest

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.protocol import PROTOCOL_REVISION
from octavo.services.scheduler.config import SchedulerConfig
from octavo.services.scheduler.core.effects import SendToGateway
from octavo.services.scheduler.node import Node
from octavo.worker.v1 import worker_pb2

from .simulation import FakeWorker

TICK_S = 0.025
PROMPT = list(range(100, 140))
STEP_TIMEOUT_S = 5.0
IDENTITY = b"w"


class Deployment:
    """A scheduler with one worker, on a clock of their own. Times are seconds."""

    def __init__(self, prepares_s: float = 0.0) -> None:
        self.now = 0.0
        self.fenced: list[str] = []
        self.failed: list[str] = []
        self.plans: list[worker_pb2.StepPlan] = []
        self.epoch = 0
        self.processor_s = 0.0
        self.progress = 0
        config = SchedulerConfig(worker_endpoint="ipc://unused", step_timeout_s=STEP_TIMEOUT_S)
        self.node = Node(
            config,
            "scheduler-0",
            1,
            0.0,
            send=self._send,
            deliver=self._deliver,
            changed=lambda: None,
            fenced=lambda _, reason: self.fenced.append(reason),
        )
        self.join(prepares_s)

    def _send(self, _: bytes, frame: worker_pb2.WorkerFrame) -> bool:
        if frame.HasField("step_plan"):
            plan = worker_pb2.StepPlan()
            plan.CopyFrom(frame.step_plan)
            self.plans.append(plan)
        elif frame.HasField("worker_config"):
            self.epoch = frame.epoch
        return True

    def _deliver(self, effect: SendToGateway) -> None:
        if effect.message.HasField("failed"):
            self.failed.append(effect.message.failed.reason)

    def frame(self, epoch: int | None = None, **kind: object) -> None:
        frame = worker_pb2.WorkerFrame(
            protocol_revision=PROTOCOL_REVISION, epoch=self.epoch if epoch is None else epoch
        )
        for name, message in kind.items():
            getattr(frame, name).CopyFrom(message)
        self.node.on_frame(IDENTITY, frame, self.now)
        self.node.pump(self.now)

    def join(self, prepares_s: float = 0.0) -> None:
        self.model = FakeWorker(64)
        self.plans.clear()
        hello = worker_pb2.WorkerHello(worker_id="w", group_id="g", world_size=1, model_version="m")
        self.frame(epoch=0, worker_hello=hello)
        self.now += prepares_s
        self.frame(worker_ready=worker_pb2.WorkerReady(kv_blocks=64, max_model_len=512))

    def submit(self, max_new_tokens: int) -> None:
        submit = scheduler_pb2.Submit(handle=1, request_id="r", prompt_token_ids=PROMPT)
        submit.stop.max_new_tokens = max_new_tokens
        self.node.on_gateway_message("gateway", scheduler_pb2.AttachRequest(submit=submit), self.now)
        self.node.pump(self.now)

    def answer(self) -> None:
        """Compute the oldest plan."""
        self.frame(step_result=self.model.execute(self.plans.pop(0)))

    def run(self, seconds: float, share: float, progress: int) -> bool:
        """Let the worker compute with a share of a processor; return whether it is still there."""
        before = len(self.fenced)
        beats = 0.0
        end = self.now + seconds
        while self.now < end and len(self.fenced) == before:
            self.now += TICK_S
            if self.now >= beats:
                beats = self.now + 0.1
                self.processor_s += share * 0.1
                self.progress += progress
                heartbeat = worker_pb2.Heartbeat(
                    progress=self.progress, processor_time_us=round(self.processor_s * 1e6) + 1
                )
                self.frame(heartbeat=heartbeat)
            self.node.tick(self.now)
            self.node.pump(self.now)
        return len(self.fenced) == before


def warmed_up(prepares_s: float = 0.0) -> Deployment:
    """A deployment that runs a request and has answered steps so quickly that it is given a second for each."""
    deployment = Deployment(prepares_s)
    deployment.submit(max_new_tokens=100)
    for _ in range(50):
        assert deployment.run(0.05, share=1.0, progress=1)
        deployment.answer()
    return deployment


def test_a_step_may_take_a_thousand_times_as_long_as_usual_on_a_busy_machine() -> None:
    deployment = warmed_up()
    assert deployment.run(50.0, share=0.02, progress=1)
    deployment.answer()
    assert deployment.run(0.1, share=1.0, progress=1)
    assert not deployment.failed


def test_time_in_which_nobody_looked_is_not_held_against_a_step() -> None:
    deployment = Deployment()
    deployment.submit(max_new_tokens=100)
    for _ in range(20):
        assert deployment.run(0.05, share=1.0, progress=0)
        deployment.answer()
    for _ in range(2):
        deployment.now += 7200.0  # the machine was suspended
        assert deployment.run(0.5, share=1.0, progress=0)
    assert not deployment.run(10.0, share=1.0, progress=0), "a hang is still found"
    assert deployment.fenced[0].startswith("hangs")


def test_a_request_whose_worker_makes_no_progress_twice_is_quarantined() -> None:
    deployment = warmed_up()
    for _ in range(2):
        started = deployment.now
        assert not deployment.run(100.0, share=1.0, progress=0)
        assert deployment.now - started < 11.0
        deployment.join()
    assert deployment.fenced[0].startswith("hangs: no progress")
    assert deployment.failed == ["QUARANTINED"]


@pytest.mark.parametrize("prepares_s", [0.0, 9.0])
def test_a_frozen_worker_is_given_up_while_it_owes_a_step(prepares_s: float) -> None:
    deployment = warmed_up(prepares_s)
    started = deployment.now
    while not deployment.fenced:
        deployment.now += TICK_S
        deployment.node.tick(deployment.now)
    assert deployment.now - started <= 1.5
    assert "is silent" in deployment.fenced[0]
