"""Effects are the messages that the scheduler wants sent. It sends nothing itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.groups.worker_group import WorkerGroup
from octavo.services.scheduler.queueing.waiting_queue import WaitingQueue
from octavo.services.scheduler.requests.outbox import Outbox
from octavo.services.scheduler.requests.sequence import NOBODY
from octavo.worker.v1 import worker_pb2


class SendPlan(NamedTuple):
    """Effect: send a plan to the workers of a group."""

    group_id: str
    epoch: int
    plan: worker_pb2.StepPlan


class SendFrame(NamedTuple):
    """Effect: send another frame to the workers of a group; it comes there after the plans before it."""

    group_id: str
    epoch: int
    frame: worker_pb2.WorkerFrame


class SendToGateway(NamedTuple):
    """Effect: send a message to a gateway."""

    gateway_id: str
    message: scheduler_pb2.AttachResponse


Effect = SendPlan | SendFrame | SendToGateway


class Effects:
    """Gathers effects, in order, and what each gateway is owed of the step being digested."""

    def __init__(self, groups: Mapping[str, WorkerGroup], waiting: WaitingQueue) -> None:
        self._groups = groups
        self._waiting = waiting
        self._effects: list[Effect] = []
        self._outboxes: dict[str, Outbox] = {}  # by gateway

    def take(self) -> list[Effect]:
        """Return the effects since the last call, in order."""
        effects, self._effects = self._effects, []
        return effects

    def send_plan(self, group: WorkerGroup, plan: worker_pb2.StepPlan) -> None:
        """Send a plan to the workers of a group."""
        self._effects.append(SendPlan(group.group_id, group.epoch, plan))

    def send_frame(self, group: WorkerGroup, frame: worker_pb2.WorkerFrame) -> None:
        """Send what is no plan to the workers of a group."""
        self._effects.append(SendFrame(group.group_id, group.epoch, frame))

    def send(self, gateway_id: str, message: scheduler_pb2.AttachResponse) -> None:
        """Send a message to a gateway, if there is one, after what it is owed so far."""
        if gateway_id == NOBODY:
            return
        outbox = self._outboxes.get(gateway_id)
        if outbox is not None:
            self._flush(gateway_id, outbox, 0)
        self._effects.append(SendToGateway(gateway_id, message))

    def outbox(self, gateway_id: str) -> Outbox:
        """Return what gathers tokens and endings for a gateway until `flush`."""
        return self._outboxes.setdefault(gateway_id, Outbox())

    def forget_gateway(self, gateway_id: str) -> None:
        """Let go of a gateway that is gone: the next one of this name has other requests under its handles."""
        self._outboxes.pop(gateway_id, None)
        self._effects = [
            effect
            for effect in self._effects
            if not (isinstance(effect, SendToGateway) and effect.gateway_id == gateway_id)
        ]

    def flush(self, step_id: int = 0) -> None:
        """Send each gateway what it is owed; of a step, or of none (0)."""
        for gateway_id, outbox in self._outboxes.items():
            self._flush(gateway_id, outbox, step_id)

    def _flush(self, gateway_id: str, outbox: Outbox, step_id: int) -> None:
        message = outbox.take(step_id)
        if message is not None and gateway_id != NOBODY:
            outputs = message.step_outputs
            outputs.running = sum(group.num_running for group in self._groups.values())
            outputs.waiting = self._waiting.num_sequences
            outputs.kv_blocks_free = sum(group.pool.num_free for group in self._groups.values())
            self._effects.append(SendToGateway(gateway_id, message))
