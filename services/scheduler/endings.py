"""How sequences and requests end, and who hears of it."""

from __future__ import annotations

from google.rpc import code_pb2

from octavo.common.v1 import common_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.effects import Effects
from octavo.services.scheduler.expected_output import ExpectedOutput
from octavo.services.scheduler.forecast import Forecast
from octavo.services.scheduler.live_requests import LiveRequests
from octavo.services.scheduler.outputs import timing, usage
from octavo.services.scheduler.quotas import Quotas
from octavo.services.scheduler.resume import num_output
from octavo.services.scheduler.sequence import Request, Sequence, SequenceState
from octavo.services.scheduler.sequence_states import SequenceStates
from octavo.services.scheduler.suspects import Suspects
from octavo.services.scheduler.tally import Tally


class Endings:
    """Ends sequences and requests everywhere they are known. A request ends with its last sequence."""

    def __init__(
        self,
        states: SequenceStates,
        requests: LiveRequests,
        suspects: Suspects,
        quotas: Quotas,
        outputs: ExpectedOutput,
        effects: Effects,
        forecast: Forecast,
        tally: Tally,
    ) -> None:
        self._tally = tally
        self._states = states
        self._requests = requests
        self._suspects = suspects
        self._quotas = quotas
        self._outputs = outputs
        self._effects = effects
        self._forecast = forecast

    def stop(self, seq: Sequence, is_cut: bool = False) -> None:
        """End a sequence, whatever its state, without a word to the gateway; `is_cut`: not where it would have."""
        if seq.state is SequenceState.FINISHED:
            return
        self._states.finish(seq)
        self._suspects.forget(seq)
        self._tally.ended(seq)
        request = seq.request
        if seq.num_output:
            self._outputs.ended(request.submit.tenant, seq.num_output, is_cut)
        request.num_unfinished -= 1
        if request.num_unfinished == 0:
            self._requests.remove(request)
            self._quotas.ended(request.submit, num_output(request))

    def finish(self, seq: Sequence, reason: common_pb2.FinishReason, now: float, stop_token_id: int = 0) -> None:
        """End a sequence with a reason."""
        seq.last_token_at = seq.last_token_at or now
        self.stop(seq, is_cut=reason == common_pb2.FINISH_REASON_TIME_LIMIT)
        seq.ending = scheduler_pb2.Finished(
            handle=seq.handle,
            candidate_index=seq.candidate_index,
            reason=reason,
            stop_token_id=stop_token_id,
            usage=usage(seq),
            timing=timing(seq, now),
        )
        seq.outbox.finished.append(seq.ending)
        if seq.request.num_unfinished == 0:
            self._requests.resumable.ended(seq.request, now)
            self._forecast.ended(seq.request, now > seq.request.deadline, now)

    def drop(self, request: Request) -> None:
        """End a request without a word."""
        self._requests.resumable.forget(request)
        for seq in request.sequences:
            self.stop(seq, is_cut=True)

    def fail(self, request: Request, code: int, reason: str, message: str, resumable: bool = False) -> None:
        """End a request with an error."""
        self.drop(request)
        failed = scheduler_pb2.Failed(
            handle=request.handle, code=code, reason=reason, message=message, resumable=resumable
        )
        self._effects.send(request.gateway_id, scheduler_pb2.AttachResponse(failed=failed))

    def spoil(self, seq: Sequence, message: str = "the model's output is not finite") -> None:
        """End a request of which nothing right can be computed, and let nobody use what was."""
        request = seq.request
        request.is_spoiled = True
        for other in request.sequences:
            if other.group is not None and not other.group.is_lost:
                other.group.allocator.spoil(other)
        self.fail(request, code_pb2.INTERNAL, "WORKER_FAULT", message)

    def expire(self, request: Request, now: float) -> None:
        """End a request whose hard or soft deadline has passed."""
        if request.deadline <= now:
            self._forecast.ended(request, True, now)
            started = any(seq.first_scheduled_at for seq in request.sequences)
            reason = "GENERATION_TIMEOUT" if started else "QUEUE_TIMEOUT"
            where = "while the output was being made" if started else "in the queue"
            self.fail(request, code_pb2.DEADLINE_EXCEEDED, reason, f"the deadline passed {where}")
        elif request.soft_deadline <= now:
            for seq in request.sequences:
                if seq.state is not SequenceState.FINISHED:
                    self.finish(seq, common_pb2.FINISH_REASON_TIME_LIMIT, now)

    def expire_early(self, request: Request, now: float) -> None:
        """End a request that cannot meet its deadline any more."""
        self._forecast.ended(request, True, now)
        started = any(seq.first_scheduled_at for seq in request.sequences)
        reason = "GENERATION_TIMEOUT" if started else "QUEUE_TIMEOUT"
        message = f"the deadline, in {1000 * (request.deadline - now):.0f} ms, cannot be met any more"
        self.fail(request, code_pb2.DEADLINE_EXCEEDED, reason, message)
