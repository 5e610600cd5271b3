"""Bugs to plant in the scheduler, to see whether the simulation finds them. Each gives the rule it breaks away."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.block_pool import BlockPool
from octavo.services.scheduler.effects import NOBODY, Effects, SendToGateway
from octavo.services.scheduler.free_blocks import Block
from octavo.services.scheduler.live_requests import LiveRequests
from octavo.services.scheduler.membership import Membership
from octavo.services.scheduler.plan_builder import PlanBuilder
from octavo.services.scheduler.scheduler import Scheduler
from octavo.services.scheduler.sequence import Sequence
from octavo.services.scheduler.takeover import Takeover
from octavo.services.scheduler.worker_group import WorkerGroup
from octavo.worker.v1 import worker_pb2


def leak_a_block_on_cancel(patch: pytest.MonkeyPatch) -> None:
    """A cancelled sequence's last block is not given back."""
    cancel, release = Scheduler.cancel, BlockPool.release
    cancelling = False

    def leaky_cancel(self: Scheduler, gateway_id: str, message: scheduler_pb2.Cancel, now: float) -> None:
        nonlocal cancelling
        cancelling = True
        cancel(self, gateway_id, message, now)
        cancelling = False

    def leaky_release(self: BlockPool, blocks: Iterable[Block]) -> None:
        release(self, list(blocks)[1 if cancelling else 0 :])

    patch.setattr(Scheduler, "cancel", leaky_cancel)
    patch.setattr(BlockPool, "release", leaky_release)


def accept_an_old_epoch(patch: pytest.MonkeyPatch) -> None:
    """Results are taken whatever epoch they are of."""
    handle = Membership.handle

    def trusting(self: Membership, identity: bytes, frame: worker_pb2.WorkerFrame, now: float) -> None:
        member = self._by_identity.get(identity)
        if member is not None and frame.HasField("step_result"):
            copy = worker_pb2.WorkerFrame()
            copy.CopyFrom(frame)
            copy.epoch, frame = member.epoch, copy
        handle(self, identity, frame, now)

    patch.setattr(Membership, "handle", trusting)


def reuse_a_slot_too_early(patch: pytest.MonkeyPatch) -> None:
    """Slots are given out again before the worker has heard that they were freed."""
    build = PlanBuilder.build
    late: dict[int, list[int]] = {}

    def forgetful(self: PlanBuilder, step_id: int, freed_slots: list[int]) -> worker_pb2.StepPlan:
        if step_id == 1:
            late.clear()
        now, late[0] = late.get(0, []), list(freed_slots)
        return build(self, step_id, now)

    patch.setattr(PlanBuilder, "build", forgetful)


def lose_the_continue_offset(patch: pytest.MonkeyPatch) -> None:
    """A request that goes on after a loss counts the output it has as prompt."""
    init = Sequence.__init__

    def forgetful(self: Sequence, *arguments: Any) -> None:
        init(self, *arguments)
        self.num_prompt = len(self.tokens)

    patch.setattr(Sequence, "__init__", forgetful)


def apply_a_repeated_result_twice(patch: pytest.MonkeyPatch) -> None:
    """A result that comes twice is taken for the next step's."""
    step_done = Scheduler.step_done

    def trusting(self: Scheduler, group_id: str, result: worker_pb2.StepResult, now: float) -> None:
        group = self._groups[group_id]
        in_flight = group.in_flight
        is_old = in_flight and result.step_id < in_flight[0].step_id
        if is_old and len(array("I", result.token_ids)) == len(in_flight[0].sampled):
            copy = worker_pb2.StepResult()
            copy.CopyFrom(result)
            copy.step_id, result = in_flight[0].step_id, copy
        step_done(self, group_id, result, now)

    patch.setattr(Scheduler, "step_done", trusting)


def know_a_request_by_its_key(patch: pytest.MonkeyPatch) -> None:
    """A request that ended is taken for the one that has its handle now, at a gateway that started again."""
    patch.setattr(LiveRequests, "holds", lambda self, request: request.key in self._by_key)


def fail_before_what_was_made_is_sent(patch: pytest.MonkeyPatch) -> None:
    """A request's failure overtakes the tokens of the same step."""

    def hasty(self: Effects, gateway_id: str, message: scheduler_pb2.AttachResponse) -> None:
        if gateway_id != NOBODY:
            self._effects.append(SendToGateway(gateway_id, message))

    patch.setattr(Effects, "send", hasty)


def keep_a_takeover_secret(patch: pytest.MonkeyPatch) -> None:
    """The call that a request is taken from hears nothing more."""
    patch.setattr(Takeover, "_tell_old_owner", lambda *_: None)


def believe_that_all_workers_are_large(patch: pytest.MonkeyPatch) -> None:
    """A sequence is placed on a worker that has no room for it, and is waited for there."""
    patch.setattr(WorkerGroup, "can_run", lambda *_: True)


Bug = Callable[[pytest.MonkeyPatch], None]

BUGS: tuple[Bug, ...] = (
    leak_a_block_on_cancel,
    accept_an_old_epoch,
    reuse_a_slot_too_early,
    lose_the_continue_offset,
    apply_a_repeated_result_twice,
    know_a_request_by_its_key,
    fail_before_what_was_made_is_sent,
    keep_a_takeover_secret,
    believe_that_all_workers_are_large,
)
