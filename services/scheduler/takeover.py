"""Requests that change their gateway, or go on without one."""

from __future__ import annotations

from google.rpc import code_pb2

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.effects import NOBODY, Effects
from octavo.services.scheduler.endings import Endings
from octavo.services.scheduler.live_requests import LiveRequests
from octavo.services.scheduler.resume import has_logprobs_from, num_output, replay
from octavo.services.scheduler.sequence import Request


class Takeover:
    """Lets go of requests whose stream broke, and gives them to whoever asks for them."""

    def __init__(self, epoch: int, requests: LiveRequests, endings: Endings, effects: Effects) -> None:
        """`epoch` names this life of the scheduler: requests of another one cannot be taken over."""
        self._epoch = epoch
        self._requests = requests
        self._resumable = requests.resumable
        self._endings = endings
        self._effects = effects

    def reattach(self, gateway_id: str, reattach: scheduler_pb2.Reattach, now: float) -> None:
        """Give a request to a gateway, with what that one has not seen of it, or tell it that nothing is kept."""
        is_known = reattach.epoch == self._epoch and reattach.HasField("tenant")
        request = self._resumable.get(reattach.request_id, reattach.tenant) if is_known else None
        offsets = list(reattach.next_token_offsets)
        if (
            request is None
            or not has_logprobs_from(request, offsets)
            or self._requests.get(gateway_id, reattach.handle) is not None
        ):
            failed = scheduler_pb2.Failed(
                handle=reattach.handle,
                code=code_pb2.DATA_LOSS,
                reason="RESUME_STATE_LOST",
                message="nothing is kept of the request; submit it again with the output so far",
            )
            self._effects.send(gateway_id, scheduler_pb2.AttachResponse(failed=failed))
            return
        if self._requests.holds(request):  # else its old call has heard its end
            self._tell_old_owner(request)
        self._requests.hand_over(request, gateway_id, reattach.handle, self._effects, now)
        reattached = scheduler_pb2.Reattached(
            handle=request.handle,
            gateway_state=request.submit.gateway_state,
            seed=request.submit.sampling.seed,
            prompt_tokens=request.sequences[0].num_prompt,
            candidate_count=len(request.sequences),
            first_candidate_index=request.submit.first_candidate_index,
        )
        self._effects.send(gateway_id, scheduler_pb2.AttachResponse(reattached=reattached))
        for message in replay(request, offsets):
            self._effects.send(gateway_id, message)

    def _tell_old_owner(self, request: Request) -> None:
        """End the call that has a request until now, if there is one: it gets no more of it."""
        failed = scheduler_pb2.Failed(
            handle=request.handle,
            code=code_pb2.ABORTED,
            reason="TAKEN_OVER",
            message="the request goes on in another call, which has resumed it",
        )
        self._effects.send(request.gateway_id, scheduler_pb2.AttachResponse(failed=failed))

    def detach(self, gateway_id: str, handle: int, now: float) -> None:
        """Let a request of a gateway go on without it for the resume window, or end it if it has none."""
        request = self._requests.get(gateway_id, handle)
        if request is None:
            return
        if not self._resumable.holds(request):
            self._endings.drop(request)
            return
        self._requests.hand_over(request, NOBODY, request.arrival, self._effects, now)
        request.resume_until = now + self._resumable.window_s(request)
        self._resumable.detached[request] = num_output(request)

    def gateway_lost(self, gateway_id: str, now: float) -> None:
        """Let go of every request of a gateway that is gone."""
        for request in self._requests.of_gateway(gateway_id):
            self.detach(gateway_id, request.handle, now)
        self._effects.forget_gateway(gateway_id)
