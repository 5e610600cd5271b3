"""The life of sequences and requests: they run, wait again, end, and change their gateway."""

from __future__ import annotations

from collections.abc import Mapping

from google.rpc import code_pb2

from octavo.common.v1 import common_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.adapter_names import name_of
from octavo.services.scheduler.admission.admission import OutputLengths
from octavo.services.scheduler.admission.forecast import Forecast
from octavo.services.scheduler.core.effects import Effects
from octavo.services.scheduler.core.metrics import SchedulerMetrics
from octavo.services.scheduler.core.quarantine import Quarantine
from octavo.services.scheduler.groups.worker_group import WorkerGroup
from octavo.services.scheduler.kv_cache.free_blocks import Block
from octavo.services.scheduler.queueing.quotas import Quotas
from octavo.services.scheduler.queueing.waiting_queue import WaitingQueue
from octavo.services.scheduler.requests.request_table import RequestTable
from octavo.services.scheduler.requests.resume import can_replay_from, replay
from octavo.services.scheduler.requests.sequence import NOBODY, Request, Sequence, SequenceState


class Lifecycle:
    """Moves sequences between queue and groups, and ends them everywhere they are known.

    A request ends with its last sequence. One whose stream broke goes on without it, and is given to whoever
    reattaches to it.
    """

    def __init__(
        self,
        epoch: int,
        groups: Mapping[str, WorkerGroup],
        waiting: WaitingQueue,
        requests: RequestTable,
        quarantine: Quarantine,
        quotas: Quotas,
        output_lengths: OutputLengths,
        effects: Effects,
        forecast: Forecast,
        metrics: SchedulerMetrics,
    ) -> None:
        """`epoch` names this life of the scheduler: nobody can reattach to requests of another one."""
        self._epoch = epoch
        self._groups = groups
        self._waiting = waiting
        self._requests = requests
        self._resumable = requests.resumable
        self._quarantine = quarantine
        self._quotas = quotas
        self._output_lengths = output_lengths
        self._effects = effects
        self._forecast = forecast
        self._metrics = metrics

    # -- a sequence runs and waits -----------------------------------------------------------------

    def run(self, seq: Sequence, group: WorkerGroup, hits: list[list[Block]], now: float) -> None:
        """Move a sequence that waits to a slot of a group that has room for it; `hits` are its cached blocks."""
        num_hits = len(hits[0])
        group.run(seq, hits)
        self._waiting.serve(seq)
        self._metrics.started(seq, num_hits, now)
        self._forecast.opened(seq, now)

    def preempt(self, seq: Sequence) -> None:
        """Take everything back from a running sequence and queue it again, to be computed anew."""
        seq.preempt()
        self._metrics.preempted()
        self._requeue(seq, self._groups[seq.group_id])

    def recover(self, group: WorkerGroup) -> list[Sequence]:
        """Queue what ran on a group that is lost, and what waited for its steps in flight; return all of it."""
        lost = list(group.running())
        awaiting = [seq for seq in self._waiting.awaiting_output if seq.group_id == group.group_id]
        for seq in (*lost, *awaiting):
            seq.recover()
        for seq in lost:
            self._requeue(seq, group)
        for seq in awaiting:
            self._waiting.add(seq)
        return lost + awaiting

    def file_again(self, request: Request) -> None:
        """Put what waits of a request where it belongs in the queue: it lost its worker, or is blamed for that."""
        for seq in request.sequences:
            if seq in self._waiting:
                self._waiting.file_again(seq)

    def _requeue(self, seq: Sequence, group: WorkerGroup) -> None:
        """Queue a running sequence again, once what steps in flight sample of it is known."""
        group.release(seq)
        self._waiting.await_output(seq)
        self.settle(seq)

    def settle(self, seq: Sequence) -> None:
        """Queue a sequence that waits for its output if everything that was sampled is now known."""
        if seq.num_output_placeholders == 0:
            self._waiting.add(seq)

    def compute_again(self, seq: Sequence) -> None:
        """Let a sequence, of which a row got no token, go on from its newest known token."""
        if seq.state is SequenceState.WAITING:
            self.settle(seq)
        else:
            self._groups[seq.group_id].compute_again(seq)

    # -- sequences and requests end ------------------------------------------------------------------

    def stop(self, seq: Sequence, is_cut: bool = False) -> None:
        """End a sequence, whatever its state, without a word to the gateway; `is_cut`: not where it would have."""
        if seq.state is SequenceState.FINISHED:
            return
        if seq.state is SequenceState.RUNNING:
            self._groups[seq.group_id].release(seq)
        else:
            self._waiting.discard(seq)
        seq.stop()
        self._quarantine.forget(seq)
        self._metrics.ended(seq)
        request = seq.request
        if seq.num_output_tokens:
            self._output_lengths.ended(request.submit.tenant, seq.num_output_tokens, is_cut)
        request.num_unfinished -= 1
        if request.num_unfinished == 0:
            self._requests.remove(request)
            self._quotas.ended(request.submit, request.num_output_tokens)

    def finish(self, seq: Sequence, reason: common_pb2.FinishReason, now: float, stop_token_id: int = 0) -> None:
        """End a sequence with a reason."""
        self.stop(seq, is_cut=reason == common_pb2.FINISH_REASON_TIME_LIMIT)
        seq.finish(reason, stop_token_id, now)
        if seq.request.num_unfinished == 0:
            self._resumable.ended(seq.request, now)
            self._forecast.ended(seq.request, now > seq.request.deadline, now)

    def abort(self, request: Request) -> None:
        """End a request without a word."""
        self._resumable.forget(request)
        for seq in request.sequences:
            self.stop(seq, is_cut=True)

    def fail(self, request: Request, code: int, reason: str, message: str, resumable: bool = False) -> None:
        """End a request with an error."""
        self.abort(request)
        self._send_failed(request.gateway_id, request.handle, code, reason, message, resumable)

    def _send_failed(
        self, gateway_id: str, handle: int, code: int, reason: str, message: str, resumable: bool = False
    ) -> None:
        failed = scheduler_pb2.Failed(handle=handle, code=code, reason=reason, message=message, resumable=resumable)
        self._effects.send(gateway_id, scheduler_pb2.AttachResponse(failed=failed))

    def invalidate(self, seq: Sequence, message: str = "") -> None:
        """End a request of which nothing right can be computed, and let nobody use what was.

        Without a message: the output was not finite.
        """
        request = seq.request
        if not message:
            of = f" with the adapter {name_of(request.adapter)!r}" if request.adapter else ""
            message = f"the model's output{of} is not finite"
        request.is_invalid = True
        for other in request.sequences:
            group = self._groups.get(other.group_id)
            if group is not None:
                group.allocator.invalidate(other)
        self.fail(request, code_pb2.INTERNAL, "WORKER_FAULT", message)

    def expire(self, request: Request, now: float) -> None:
        """End a request whose hard or soft deadline has passed."""
        if request.deadline <= now:
            where = "while the output was being made" if request.was_scheduled else "in the queue"
            self._expire(request, f"the deadline passed {where}", now)
        elif request.soft_deadline <= now:
            for seq in request.sequences:
                if seq.state is not SequenceState.FINISHED:
                    self.finish(seq, common_pb2.FINISH_REASON_TIME_LIMIT, now)

    def expire_early(self, request: Request, now: float) -> None:
        """End a request that cannot meet its deadline any more."""
        left_ms = 1000 * (request.deadline - now)
        self._expire(request, f"the deadline, in {left_ms:.0f} ms, cannot be met any more", now)

    def _expire(self, request: Request, message: str, now: float) -> None:
        self._forecast.ended(request, True, now)
        reason = "GENERATION_TIMEOUT" if request.was_scheduled else "QUEUE_TIMEOUT"
        self.fail(request, code_pb2.DEADLINE_EXCEEDED, reason, message)

    # -- requests change their gateway ---------------------------------------------------------------

    def reattach(self, gateway_id: str, reattach: scheduler_pb2.Reattach, now: float) -> None:
        """Give a request to a gateway, with what that one has not seen of it, or tell it that nothing is kept."""
        is_known = reattach.epoch == self._epoch and reattach.HasField("tenant")
        request = self._resumable.get(reattach.request_id, reattach.tenant) if is_known else None
        offsets = list(reattach.next_token_offsets)
        if (
            request is None
            or not can_replay_from(request, offsets)
            or self._requests.get(gateway_id, reattach.handle) is not None
        ):
            message = "nothing is kept of the request; submit it again with the output so far"
            self._send_failed(gateway_id, reattach.handle, code_pb2.DATA_LOSS, "RESUME_STATE_LOST", message)
            return
        if self._requests.holds(request):  # else its old call has heard its end
            self._tell_old_owner(request)
        self._requests.hand_over(request, gateway_id, reattach.handle, self._effects.outbox(gateway_id), now)
        reattached = scheduler_pb2.Reattached(
            handle=request.handle,
            gateway_state=request.submit.gateway_state,
            seed=request.submit.sampling.seed,
            prompt_tokens=request.sequences[0].num_prompt_tokens,
            candidate_count=len(request.sequences),
            first_candidate_index=request.submit.first_candidate_index,
        )
        self._effects.send(gateway_id, scheduler_pb2.AttachResponse(reattached=reattached))
        for unseen in replay(request, offsets):
            self._effects.send(gateway_id, unseen)

    def _tell_old_owner(self, request: Request) -> None:
        """End the call that has a request until now, if there is one: it gets no more of it."""
        message = "the request goes on in another call, which has resumed it"
        self._send_failed(request.gateway_id, request.handle, code_pb2.ABORTED, "TAKEN_OVER", message)

    def detach(self, gateway_id: str, handle: int, now: float) -> None:
        """Let a request of a gateway go on without it for the resume window, or end it if it has none."""
        request = self._requests.get(gateway_id, handle)
        if request is None:
            return
        if not self._resumable.holds(request):
            self.abort(request)
            return
        self._requests.hand_over(request, NOBODY, request.arrival, self._effects.outbox(NOBODY), now)
        self._resumable.detach(request, now)

    def gateway_lost(self, gateway_id: str, now: float) -> None:
        """Detach every request of a gateway that is gone."""
        for request in self._requests.of_gateway(gateway_id):
            self.detach(gateway_id, request.handle, now)
        self._effects.forget_gateway(gateway_id)
