"""What a worker says of itself, however absurd, costs its own membership at most."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.protocol import PROTOCOL_REVISION
from octavo.services.scheduler.config import SchedulerConfig
from octavo.services.scheduler.node import Node
from octavo.services.scheduler.workers.membership import MAX_KV_BLOCKS
from octavo.worker.v1 import worker_pb2

MOST = (1 << 64) - 1


class OneWorker:
    """A node, and a worker that says what it is told to."""

    def __init__(self) -> None:
        self.now = 1.0
        self.epoch = 0
        self.lost: list[str] = []
        self.plans: list[worker_pb2.StepPlan] = []
        self.messages: list[scheduler_pb2.AttachResponse] = []
        self.node = Node(
            SchedulerConfig(worker_endpoint="ipc://unused"),
            "scheduler-0",
            1,
            self.now,
            send=self._send,
            deliver=lambda effect: self.messages.append(effect.message),
            changed=lambda: None,
            fenced=lambda _, reason: self.lost.append(reason),
        )

    def _send(self, _: bytes, frame: worker_pb2.WorkerFrame) -> bool:
        self.epoch = frame.epoch
        if frame.HasField("step_plan"):
            self.plans.append(frame.step_plan)
        return True

    def say(self, **kind: Any) -> None:
        """Send a frame of the worker."""
        frame = worker_pb2.WorkerFrame(protocol_revision=PROTOCOL_REVISION, epoch=self.epoch, **kind)
        self.node.on_frame(b"w", worker_pb2.WorkerFrame.FromString(frame.SerializeToString()), self.now)
        self.node.tick(self.now)
        self.node.pump(self.now)
        self.node.core.check_invariants()

    def join(self, **ready: Any) -> None:
        self.epoch = 0
        self.say(worker_hello={"worker_id": "w", "world_size": 1, "model_version": "m"})
        self.say(worker_ready={"kv_blocks": 16, "max_model_len": 100, **ready})

    def submit(self, handle: int = 1, **fields: Any) -> None:
        submit = {"handle": handle, "request_id": f"r{handle}", "prompt_token_ids": [5] * 4, **fields}
        self.node.on_gateway_message("g", scheduler_pb2.AttachRequest(submit=submit), self.now)
        self.node.pump(self.now)

    def answer(self, **fields: Any) -> None:
        """Answer the oldest plan with a token for each row."""
        self.now += 0.01
        plan = self.plans.pop(0)
        tokens = array("I", [9] * sum(flags & 1 for flags in plan.row_flags)).tobytes()
        self.say(step_result={"step_id": plan.step_id, "token_ids": tokens, **fields})


@pytest.mark.parametrize(
    "ready",
    [
        {"kv_blocks": MAX_KV_BLOCKS + 1},
        {"kv_blocks": 1, "whole_sequences": True},
        {"whole_sequences": True, "vector_size": 4, "kv_group_windows": [0, 5]},
        {"kv_group_windows": [5] * 9},
        {"max_row_tokens": (1 << 32) - 1},
    ],
    ids=[
        "more blocks than can be accounted for",
        "whole sequences and no vectors",
        "whole sequences and KV groups",
        "more KV groups than can be accounted for",
        "any number of tokens in a row",
    ],
)
def test_a_worker_that_cannot_be_is_not_taken_into_service(ready: dict[str, Any]) -> None:
    world = OneWorker()
    world.join(**ready)
    assert len(world.lost) == 1
    assert world.node.load(world.now).workers_ready == 0
    world.submit(stop={"max_new_tokens": 3})
    world.join()
    while world.plans:
        world.answer()
    assert any(message.step_outputs.finished for message in world.messages)


def test_absurd_numbers_of_a_worker_change_nothing() -> None:
    world = OneWorker()
    world.join()
    world.submit(stop={"max_new_tokens": 5})
    for progress, processor_time_us in ((MOST, MOST), (0, 0), (MOST, 1), (1, MOST)):
        world.say(heartbeat={"progress": progress, "processor_time_us": processor_time_us, "last_step_id": MOST})
    step = world.plans[0].step_id
    for step_id, slot in ((0, 0), (MOST, 0), (step, 255), (step, (1 << 32) - 1)):
        world.say(worker_fault={"step_id": step_id, "slot": slot, "message": "no"})
    world.say(step_result={"step_id": 0})
    while world.plans:
        world.answer(forward_us=MOST, sample_us=MOST)
        world.say(worker_fault={"step_id": step, "slot": 0, "message": "what has ended"})
    assert not world.lost
    assert any(message.step_outputs.finished for message in world.messages)


@pytest.mark.parametrize("logprobs", [b"", b"\0", b"\0" * 4])
def test_an_answer_that_breaks_off_in_the_middle_loses_no_token(logprobs: bytes) -> None:
    world = OneWorker()
    world.join()
    world.submit(1, stop={"max_new_tokens": 4})
    world.submit(2, stop={"max_new_tokens": 4}, logprobs=1)
    while world.plans and not world.lost:
        world.answer(logprobs=logprobs, ranks=b"\1\0\0\0")
    assert len(world.lost) == 1
    world.plans.clear()
    world.join()
    columns = {
        "logprobs": array("f", [-1.0]).tobytes(), "ranks": array("I", [1]).tobytes(),
        "candidate_token_ids": array("I", [9]).tobytes(), "candidate_logprobs": array("f", [-1.0]).tobytes(),
    }  # fmt: skip
    while world.plans:
        world.answer(**columns)
    outputs = [message.step_outputs for message in world.messages if message.HasField("step_outputs")]
    assert sorted(handle for output in outputs for handle in output.handles) == [1] * 4 + [2] * 4
    assert sum(len(output.finished) for output in outputs) == 2
