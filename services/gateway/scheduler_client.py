"""All requests of the gateway at its scheduler.

What the scheduler sends is handed out to the requests' inboxes. When the connection breaks, requests
that were not admitted fail as retryable; admitted ones are submitted again, with the output so far,
as soon as a scheduler is back: their readers see no gap and no repeat.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

import grpc

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.errors import Reason, ServingError
from octavo.services.gateway.request_stream import CandidateInbox, RequestStream
from octavo.services.gateway.scheduler_link import SchedulerLink
from octavo.services.gateway.step_columns import StepColumns

_TICK_S = 0.1
_CANCEL_S = 10.0
_MAX_RETIRED = 4096
_MAX_REMAINING_MS = 2**32 - 1
_MAX_FAILOVERS = 8
_RETRYABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)


class SchedulerClient:
    """One scheduler. Everything runs on the event loop that called `start`."""

    def __init__(self, address: str, gateway_id: str, failover_s: float = 30.0) -> None:
        """`failover_s`: how long an admitted request waits for a scheduler that was lost."""
        self._link = SchedulerLink(address, gateway_id, self)
        self._failover_s = failover_s
        self._next_handle = 1
        self._streams: dict[RequestStream, None] = {}  # in order of submission
        self._handles: dict[int, RequestStream] = {}
        # Cancelled requests with log probabilities: tokens on their way still have columns to be skipped.
        self._retired: OrderedDict[int, RequestStream] = OrderedDict()
        self._waiting: dict[CandidateInbox, _Waiting] = {}
        self._cancels: dict[str, list[asyncio.Future[scheduler_pb2.Cancelled]]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.welcome: scheduler_pb2.Welcome | None = None
        """Of the scheduler that is connected now; None without one."""
        self.load = scheduler_pb2.Load()
        """The last one heard."""
        self.draining = False
        """The scheduler asked for no new requests."""

    @property
    def connected(self) -> bool:
        """Whether requests can be submitted."""
        return self.welcome is not None

    @property
    def silence_s(self) -> float:
        """How long ago the scheduler was last heard."""
        return self._link.silence_s

    def start(self) -> None:
        """Connect, and stay connected until `close`."""
        self._tasks = [*self._link.start(), asyncio.create_task(self._tick())]

    async def wait_crashed(self) -> None:
        """Raise what ended one of the tasks, once one ended by itself: that is a bug."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def close(self) -> None:
        """Disconnect; requests that still run fail."""
        await self._link.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for stream in list(self._streams):
            stream.fail(_interrupted("the gateway stops"))

    @property
    def streams(self) -> list[RequestStream]:
        """All requests that are not closed, oldest first."""
        return list(self._streams)

    def submit(self, submit: scheduler_pb2.Submit, remaining_s: float | None) -> RequestStream:
        """Send a request; its handle and remaining time are filled in. Raises ServingError if that cannot work now."""
        if not self.connected:
            message = "the scheduler cannot be reached; try again"
            raise ServingError(Reason.SCHEDULER_UNREACHABLE, message, retry_after_ms=500)
        if self.draining:
            raise ServingError(Reason.DRAINING, "the scheduler is stopping; try again", retry_after_ms=1000)
        loop = asyncio.get_running_loop()
        deadline = None if remaining_s is None else loop.time() + remaining_s
        stream = RequestStream(submit, deadline, self._cancel)
        self._streams[stream] = None
        self._submit(stream, stream.candidates, submit)
        return stream

    async def cancel_request(self, request_id: str) -> scheduler_pb2.Cancelled:
        """End a request of any gateway by its id. Raises SCHEDULER_UNREACHABLE."""
        here = self._finish_waiting(request_id)
        if not self.connected:
            if here:
                return scheduler_pb2.Cancelled(request_id=request_id, was_running=True)
            message = "the scheduler cannot be reached; try again"
            raise ServingError(Reason.SCHEDULER_UNREACHABLE, message, retry_after_ms=500)
        answer: asyncio.Future[scheduler_pb2.Cancelled] = asyncio.get_running_loop().create_future()
        self._cancels.setdefault(request_id, []).append(answer)
        self._link.send(scheduler_pb2.AttachRequest(cancel=scheduler_pb2.Cancel(request_id=request_id)))
        try:
            async with asyncio.timeout(_CANCEL_S):
                cancelled = await answer
        except TimeoutError:
            message = "the scheduler did not answer; try again"
            raise ServingError(Reason.SCHEDULER_UNREACHABLE, message, retry_after_ms=500) from None
        finally:
            self._forget_cancel(request_id, answer)
        if here:
            cancelled.was_running = True
        return cancelled

    # Connection

    def on_connected(self, welcome: scheduler_pb2.Welcome) -> None:
        """Take the scheduler's introduction; submit what waits for one."""
        self.load = welcome.load
        self.draining = welcome.load.draining
        self.welcome = welcome
        self._resubmit()

    def on_disconnected(self) -> None:
        """Fail what was not admitted; keep what was, to go on elsewhere."""
        self.welcome = None
        self._handles.clear()
        self._retired.clear()
        message = "the scheduler was lost before it admitted the request; try again"
        for stream in list(self._streams):
            if stream.admitted is None:
                stream.fail(ServingError(Reason.SCHEDULER_UNREACHABLE, message, retry_after_ms=500))
            elif not stream.ended:
                self._lose(stream, [candidate for candidate in stream.candidates if candidate.handle])
        for answers in self._cancels.values():
            for answer in answers:
                if not answer.done():
                    answer.set_exception(
                        ServingError(Reason.SCHEDULER_UNREACHABLE, "the scheduler was lost; try again")
                    )

    async def _tick(self) -> None:
        """Give up what waited too long, and submit again what may be."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_TICK_S)
            now = loop.time()
            for candidate, waiting in list(self._waiting.items()):
                if now >= waiting.until:
                    del self._waiting[candidate]
                    waiting.stream.fail(_interrupted("no scheduler took the request over in time"))
            if self.connected:
                self._resubmit()

    # Requests

    def _submit(
        self, stream: RequestStream, candidates: Sequence[CandidateInbox], submit: scheduler_pb2.Submit
    ) -> None:
        handle = self._next_handle
        self._next_handle += 1
        submit.handle = handle
        if stream.deadline is not None:
            remaining_s = stream.deadline - asyncio.get_running_loop().time()
            submit.remaining_ms = min(max(1, int(remaining_s * 1000)), _MAX_REMAINING_MS)
        for candidate in candidates:
            candidate.handle = handle
        self._handles[handle] = stream
        self._link.send(scheduler_pb2.AttachRequest(submit=submit))

    def _lose(self, stream: RequestStream, candidates: Sequence[CandidateInbox]) -> None:
        """Let candidates wait for a scheduler that goes on with them."""
        until = asyncio.get_running_loop().time() + self._failover_s
        newly_lost = False
        for candidate in candidates:
            candidate.handle = 0
            if candidate in self._waiting:  # lost again before it was admitted: the time goes on
                self._waiting[candidate].not_before = 0.0
            elif candidate.finished is None:
                self._waiting[candidate] = _Waiting(stream, until)
                newly_lost = True
        stream.failovers += newly_lost
        if stream.failovers > _MAX_FAILOVERS:
            stream.fail(_interrupted(f"the request was lost {_MAX_FAILOVERS} times"))

    def _resubmit(self) -> None:
        """Submit every candidate that waits, alone, under its own index, with the output so far."""
        now = asyncio.get_running_loop().time()
        for candidate, waiting in list(self._waiting.items()):
            if now < waiting.not_before:
                continue
            waiting.not_before = float("inf")  # until the scheduler's answer: Admitted, or Rejected
            stream = waiting.stream
            submit = scheduler_pb2.Submit()
            submit.CopyFrom(stream.submit)
            submit.continue_token_ids.extend(candidate.token_ids)
            submit.candidate_count = 1
            submit.first_candidate_index = candidate.index
            if submit.stop.HasField("soft_time_limit_ms"):
                passed_ms = int((now - stream.submitted_at) * 1000)
                submit.stop.soft_time_limit_ms = max(1, submit.stop.soft_time_limit_ms - passed_ms)
            self._submit(stream, [candidate], submit)

    def _cancel(self, stream: RequestStream, candidate_index: int | None) -> None:
        """End one candidate, or all: tell the scheduler if it has them, and forget them."""
        gone = stream.candidates if candidate_index is None else [stream.candidates[candidate_index]]
        by_handle: dict[int, list[CandidateInbox]] = {}
        for candidate in gone:
            self._waiting.pop(candidate, None)
            if candidate.handle and candidate.finished is None:
                by_handle.setdefault(candidate.handle, []).append(candidate)
        for handle, candidates in by_handle.items():
            known = handle in self._handles  # else it was refused, or lost with its scheduler
            cancel = scheduler_pb2.Cancel(handle=handle)
            if candidate_index is not None and self._others(stream, handle, candidate_index):
                cancel.candidate_index = candidate_index
            else:
                self._retire(handle, stream)
            for candidate in candidates:
                candidate.handle = 0
            if known:
                self._link.send(scheduler_pb2.AttachRequest(cancel=cancel))
        if candidate_index is None:
            self._streams.pop(stream, None)

    def _others(self, stream: RequestStream, handle: int, candidate_index: int) -> bool:
        return any(
            candidate.handle == handle and candidate.finished is None and candidate.index != candidate_index
            for candidate in stream.candidates
        )

    def _retire(self, handle: int, stream: RequestStream) -> None:
        self._handles.pop(handle, None)
        if stream.wants_logprobs:
            self._retired[handle] = stream
            if len(self._retired) > _MAX_RETIRED:
                self._retired.popitem(last=False)

    def _finish_waiting(self, request_id: str) -> bool:
        """Cancel the candidates of a request that no scheduler has now; return whether there were any."""
        found = False
        for candidate, waiting in list(self._waiting.items()):
            if waiting.stream.submit.request_id == request_id and not candidate.handle:
                del self._waiting[candidate]
                reason = common_pb2.FINISH_REASON_CANCELLED
                candidate.finished = scheduler_pb2.Finished(candidate_index=candidate.index, reason=reason)
                waiting.stream.wake_at_end()
                found = True
        return found

    def _forget_cancel(self, request_id: str, answer: asyncio.Future[scheduler_pb2.Cancelled]) -> None:
        answers = self._cancels.get(request_id, [])
        if answer in answers:
            answers.remove(answer)
        if not answers:
            self._cancels.pop(request_id, None)

    # Messages

    def on_message(self, message: scheduler_pb2.AttachResponse) -> None:
        """Hand one message out. IndexError or ValueError: it does not fit its contract."""
        kind = message.WhichOneof("kind")
        if kind == "step_outputs":
            self._on_step(message.step_outputs)
        elif kind == "load":
            self.load = message.load
            self.draining = message.load.draining
        elif kind == "admitted":
            self._on_admitted(message.admitted)
        elif kind == "rejected":
            self._on_rejected(message.rejected)
        elif kind == "failed":
            self._on_failed(message.failed)
        elif kind == "progress":
            self._on_progress(message.progress)
        elif kind == "cancelled":
            for answer in self._cancels.get(message.cancelled.request_id, ()):
                if not answer.done():
                    answer.set_result(message.cancelled)
        elif kind == "draining":
            self.draining = True

    def _on_step(self, step: scheduler_pb2.StepOutputs) -> None:
        if step.logprobs or step.token_counts or step.candidate_indexes:
            self._on_general_rows(step)
        else:
            handles = self._handles
            for handle, token_id in zip(step.handles, step.token_ids, strict=True):
                stream = handles.get(handle)
                if stream is not None and stream.candidates[0].finished is None:
                    stream.candidates[0].token_ids.append(token_id)
                    stream.wake()
        for finished in step.finished:
            self._on_finished(finished)

    def _on_general_rows(self, step: scheduler_pb2.StepOutputs) -> None:
        num_rows = len(step.handles)
        counts = step.token_counts or [1] * num_rows
        indexes = step.candidate_indexes or [0] * num_rows
        columns = StepColumns(step)
        at = 0
        for handle, index, count in zip(step.handles, indexes, counts, strict=True):
            start, at = at, at + count
            stream = self._handles.get(handle)
            owner = stream or self._retired.get(handle)
            if owner is not None and owner.wants_logprobs:
                columns.next(count, owner.submit.logprobs)
            if stream is None:
                continue
            candidate = stream.candidates[index]
            if candidate.handle == handle and candidate.finished is None:
                candidate.token_ids.extend(step.token_ids[start:at])
                if stream.wants_logprobs:
                    columns.append_to(candidate)
                stream.wake()

    def _on_finished(self, finished: scheduler_pb2.Finished) -> None:
        stream = self._handles.get(finished.handle)
        if stream is None:
            return
        candidate = stream.candidates[finished.candidate_index]
        if candidate.handle != finished.handle or candidate.finished is not None:
            return
        candidate.finished = finished
        candidate.handle = 0
        if not self._others(stream, finished.handle, candidate.index):
            self._handles.pop(finished.handle)
        stream.wake_at_end()

    def _on_admitted(self, admitted: scheduler_pb2.Admitted) -> None:
        stream = self._handles.get(admitted.handle)
        if stream is None:
            return
        if stream.admitted is None:
            stream.admitted = admitted
            stream.wake()
            return
        for candidate in stream.candidates:  # it goes on after a loss
            if candidate.handle == admitted.handle:
                self._waiting.pop(candidate, None)

    def _on_rejected(self, rejected: scheduler_pb2.Rejected) -> None:
        stream = self._handles.pop(rejected.handle, None)
        if stream is None:
            return
        error = ServingError.from_wire(
            rejected.code, rejected.reason, rejected.message, rejected.retry_after_ms, dict(rejected.metadata)
        )
        mine = [candidate for candidate in stream.candidates if candidate.handle == rejected.handle]
        for candidate in mine:
            candidate.handle = 0
        if stream.admitted is None:
            stream.fail(error)
        elif error.code in _RETRYABLE:
            wait_s = min(max(rejected.retry_after_ms / 1000, _TICK_S), self._failover_s)
            for candidate in mine:
                if candidate in self._waiting:
                    self._waiting[candidate].not_before = asyncio.get_running_loop().time() + wait_s
        else:
            stream.fail(_interrupted(f"the scheduler would not go on with it: {error.message}"))

    def _on_failed(self, failed: scheduler_pb2.Failed) -> None:
        stream = self._handles.pop(failed.handle, None)
        if stream is None:
            return
        mine = [candidate for candidate in stream.candidates if candidate.handle == failed.handle]
        if failed.resumable and self._failover_s > 0:
            self._lose(stream, mine)
            return
        for candidate in mine:
            candidate.handle = 0
        error = ServingError.from_wire(failed.code, failed.reason, failed.message)
        # UNAVAILABLE would invite a client's retry policy to start over, in the middle of an output.
        stream.fail(_interrupted(error.message) if error.code is grpc.StatusCode.UNAVAILABLE else error)

    def _on_progress(self, progress: scheduler_pb2.Progress) -> None:
        for handle, phase, position, done in zip(
            progress.handles, progress.phases, progress.queue_positions, progress.prefill_tokens_done, strict=True
        ):
            stream = self._handles.get(handle)
            if stream is not None:
                stream.progress = generation_pb2.Progress(
                    phase=generation_pb2.Progress.Phase.Name(phase),
                    queue_position=position,
                    prefill_tokens_done=done,
                )
                stream.wake()


class _Waiting:
    """A candidate that no scheduler has."""

    __slots__ = ("not_before", "stream", "until")

    def __init__(self, stream: RequestStream, until: float) -> None:
        self.stream = stream
        self.until = until
        self.not_before = 0.0


def _interrupted(message: str) -> ServingError:
    advice = "send the request again with continue_output set to the tokens received"
    return ServingError(Reason.STREAM_INTERRUPTED, f"{message}; {advice}")
