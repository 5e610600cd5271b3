"""Bugs to plant in the scheduler, to see whether the simulation finds them. Each gives the rule it breaks away."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from google.rpc import code_pb2

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.admission.admission import Admission
from octavo.services.scheduler.admission.deadlines import DeadlineWatch
from octavo.services.scheduler.admission.forecast import Forecast
from octavo.services.scheduler.admission.validation import reject
from octavo.services.scheduler.core.effects import NOBODY, Effects, SendToGateway
from octavo.services.scheduler.core.lifecycle import Lifecycle
from octavo.services.scheduler.core.output_processor import OutputProcessor
from octavo.services.scheduler.core.plan_builder import PlanBuilder
from octavo.services.scheduler.core.scheduler import Scheduler
from octavo.services.scheduler.engine import GatewayConnection
from octavo.services.scheduler.groups.worker_group import WorkerGroup
from octavo.services.scheduler.kv_cache.block_pool import BlockPool
from octavo.services.scheduler.kv_cache.free_blocks import Block
from octavo.services.scheduler.node import Node
from octavo.services.scheduler.queueing.fair_share import FairShare
from octavo.services.scheduler.requests.request_table import RequestTable
from octavo.services.scheduler.requests.sequence import Request, Sequence
from octavo.services.scheduler.workers.membership import Membership
from octavo.worker.v1 import worker_pb2


def leak_a_block_on_cancel(patch: pytest.MonkeyPatch) -> None:
    """A cancelled sequence's last block is not given back."""
    cancel, release = Scheduler.cancel, BlockPool.free_blocks
    cancelling = False

    def leaky_cancel(self: Scheduler, gateway_id: str, message: scheduler_pb2.Cancel, now: float) -> None:
        nonlocal cancelling
        cancelling = True
        cancel(self, gateway_id, message, now)
        cancelling = False

    def leaky_release(self: BlockPool, blocks: Iterable[Block]) -> None:
        release(self, list(blocks)[1 if cancelling else 0 :])

    patch.setattr(Scheduler, "cancel", leaky_cancel)
    patch.setattr(BlockPool, "free_blocks", leaky_release)


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
        self.num_prompt_tokens = len(self.tokens)

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
    patch.setattr(RequestTable, "holds", lambda self, request: request.key in self._by_key)


def fail_before_what_was_made_is_sent(patch: pytest.MonkeyPatch) -> None:
    """A request's failure overtakes the tokens of the same step."""

    def hasty(self: Effects, gateway_id: str, message: scheduler_pb2.AttachResponse) -> None:
        if gateway_id != NOBODY:
            self._effects.append(SendToGateway(gateway_id, message))

    patch.setattr(Effects, "send", hasty)


def keep_a_takeover_secret(patch: pytest.MonkeyPatch) -> None:
    """The call that a request is taken from hears nothing more."""
    patch.setattr(Lifecycle, "_tell_old_owner", lambda *_: None)


def end_what_outgrows_its_worker(patch: pytest.MonkeyPatch) -> None:
    """A sequence ends where its worker has no room for more, though another worker has."""

    def hasty(self: OutputProcessor, seq: Sequence, now: float) -> None:
        self._lifecycle.finish(seq, seq.length_reason(), now)

    patch.setattr(OutputProcessor, "_at_full_length", hasty)


def go_on_without_what_did_not_fit(patch: pytest.MonkeyPatch) -> None:
    """A gateway that does not read loses messages, and is not cut off."""

    def lossy(self: GatewayConnection, message: scheduler_pb2.AttachResponse) -> None:
        if not self.unsent.full():
            self.unsent.put_nowait(message)

    patch.setattr(GatewayConnection, "send", lossy)


def take_a_long_step_for_a_hang(patch: pytest.MonkeyPatch) -> None:
    """A worker that tells its progress is given up all the same when a step takes long."""
    patch.setattr(Membership, "tells_progress", lambda *_: False)


def take_a_leap_of_the_clock_for_a_hang(patch: pytest.MonkeyPatch) -> None:
    """Steps are held for hangs after time in which nobody looked."""
    patch.setattr(Scheduler, "was_away", lambda *_: None)


def divide_by_the_time_of_a_step(patch: pytest.MonkeyPatch) -> None:
    """A step that took no time on the clock has no rate."""
    end_step = WorkerGroup.end_step

    def careless(self: WorkerGroup, now: float) -> float:
        step = self.in_flight[0]
        assert step.num_tokens / (now - self._started_at(step)) > 0
        return end_step(self, now)

    patch.setattr(WorkerGroup, "end_step", careless)


def forget_tenants_when_there_are_many(patch: pytest.MonkeyPatch) -> None:
    """A tenant's turn never comes if a hundred others wait."""
    next_turn = FairShare.next_turn

    def forgetful(self: FairShare) -> tuple[float, int, str] | None:
        return None if len(self._joined) > 100 else next_turn(self)

    patch.setattr(FairShare, "next_turn", forgetful)


def swallow_exceptions(patch: pytest.MonkeyPatch) -> None:
    """What is wrong with a worker's frame is ignored."""
    on_frame = Node.on_frame

    def careless(self: Node, identity: bytes, frame: worker_pb2.WorkerFrame, now: float) -> None:
        with contextlib.suppress(Exception):
            on_frame(self, identity, frame, now)

    patch.setattr(Node, "on_frame", careless)


def refuse_for_no_reason(patch: pytest.MonkeyPatch) -> None:
    """The queue is called full when anybody waits."""
    refuse = Admission.refuse

    def anxious(
        self: Admission, submit: scheduler_pb2.Submit, max_model_len: int, now: float
    ) -> scheduler_pb2.Rejected | None:
        if self._waiting.num_sequences:
            return reject(submit, code_pb2.RESOURCE_EXHAUSTED, "QUEUE_FULL", "")
        return refuse(self, submit, max_model_len, now)

    patch.setattr(Admission, "refuse", anxious)


def turn_away_who_asks_for_little(patch: pytest.MonkeyPatch) -> None:
    """A tenant's requests with a deadline are refused as if it had asked for more than its part."""
    patch.setattr(Forecast, "has_its_turn", lambda *_: False)


def end_requests_that_have_no_deadline(patch: pytest.MonkeyPatch) -> None:
    """A request without a deadline is looked at as if it had one, a second after it came."""
    push = DeadlineWatch.add

    def hasty(self: DeadlineWatch, request: Request, now: float) -> None:
        if not request.submit.remaining_ms:
            request.deadline = min(request.deadline, now + 1.0)
        push(self, request, now)

    patch.setattr(DeadlineWatch, "add", hasty)


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
    end_what_outgrows_its_worker,
    go_on_without_what_did_not_fit,
    take_a_long_step_for_a_hang,
    take_a_leap_of_the_clock_for_a_hang,
    divide_by_the_time_of_a_step,
    forget_tenants_when_there_are_many,
    swallow_exceptions,
    refuse_for_no_reason,
    turn_away_who_asks_for_little,
    end_requests_that_have_no_deadline,
)
