"""A simulated gateway, and what its clients see: the failover rules of services/gateway in short."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.engine import MAX_UNSENT_MESSAGES, GatewayConnection

if TYPE_CHECKING:
    from .world import World

RECONNECT_S = 0.05
RESUBMIT_S = 0.1
READ_S = 0.001  # from the scheduler to a gateway that reads
CUT_OFF_S = 0.002  # until the stream of one that does not read is closed: what was queued may still be written


@dataclass(eq=False)
class Call:
    """One client's request and all that its client has seen."""

    submit: scheduler_pb2.Submit
    gateway: SimGateway
    submitted_at: float  # for the first time
    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    finished: dict[int, scheduler_pb2.Finished] = field(default_factory=dict)
    handles: dict[int, int] = field(default_factory=dict)  # of each candidate at the scheduler, 0: none
    admitted: bool = False
    ending: str = ""  # "finished", "cancelled", "broken" or a reason
    epoch: int = 0
    is_again: bool = False  # asks for the output of another call

    @property
    def candidates(self) -> range:
        return range(max(self.submit.candidate_count, 1))

    def end(self, how: str) -> None:
        assert not self.ending, f"{self.submit.request_id} ended as {self.ending}, then as {how}"
        self.ending = how


class SimGateway:
    """A gateway process with its stream to the scheduler."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.calls: dict[int, Call] = {}  # by handle
        self.num_handles = 0  # of this life: the next one begins anew
        self.submits: dict[int, scheduler_pb2.Submit] = {}  # by handle: the shape of rows that come for it
        self.ended: set[int] = set()  # handles of which nothing may come any more
        self.orphans: list[tuple[Call, tuple[int, ...]]] = []  # candidates that no scheduler has
        self.connection = 0  # numbers the streams; 0: none is open
        self.last_connection = 0
        self.epoch = 0
        self.slow_until = 0.0  # it reads nothing
        self._stream = self._new_stream()
        self._is_read_due = False

    def _new_stream(self) -> GatewayConnection:
        return GatewayConnection(self.name)

    def be_slow(self, seconds: float) -> None:
        """Read nothing for a while, with room for few messages."""
        self.slow_until = self.world.now + seconds
        unsent = self._stream.unsent
        self._stream.unsent = asyncio.Queue(unsent.qsize() + self.world.swarm.max_unsent)
        while not unsent.empty():
            self._stream.unsent.put_nowait(unsent.get_nowait())

    def connect(self) -> None:
        """Open a stream, and hand over what waits for one."""
        if self.connection or not self.world.is_up:
            return
        self.last_connection += 1
        self.connection = self.last_connection
        self.epoch = self.world.epoch
        self._stream, self._is_read_due = self._new_stream(), False
        orphans, self.orphans = self.orphans, []
        for call, candidates in orphans:
            self.resume(call, candidates)

    def die(self) -> None:
        """The process ends, and starts again under its name a moment later."""
        self.connection = self.num_handles = 0
        self.slow_until = 0.0
        for state in (self.calls, self.orphans, self.submits, self.ended):
            state.clear()  # type: ignore[attr-defined]
        self.world.after(0.3, self.connect)

    def disconnect(self) -> None:
        """The stream broke: what was on its way is lost."""
        self.connection = 0
        lost: dict[Call, list[int]] = {}
        for call in dict.fromkeys(self.calls.values()):
            lost[call] = [index for index in call.candidates if call.handles.get(index) and index not in call.finished]
        self.calls.clear()
        for call, candidates in lost.items():
            if call.ending:
                continue
            for index in candidates:
                call.handles[index] = 0
            if call.admitted:
                self.orphans.append((call, tuple(candidates)))
            else:
                call.end("UNAVAILABLE")
        self.world.after(RECONNECT_S, self.connect)

    def submit(self, call: Call) -> None:
        if not self.connection:
            call.end("UNAVAILABLE")
            return
        self._submit(call, tuple(call.candidates), call.submit)

    def resume(self, call: Call, candidates: tuple[int, ...]) -> None:
        """Go on with candidates of a call that no scheduler has, as far as this gateway knows."""
        wanted = tuple(index for index in candidates if index not in call.finished and not call.handles.get(index))
        if call.ending or not wanted:
            return
        call.gateway = self
        if not self.connection:
            self.orphans.append((call, wanted))
            return
        whole = len(wanted) + len(call.finished) == len(call.candidates) and call.epoch == self.epoch
        if call.submit.resume_window_ms and whole and call.admitted:
            self.world.count("reattach")
            handle = self._handle(call, wanted)
            offsets = [len(call.tokens[index]) for index in call.candidates]
            reattach = scheduler_pb2.Reattach(
                handle=handle,
                request_id=call.submit.request_id,
                epoch=call.epoch,
                next_token_offsets=offsets,
                tenant=call.submit.tenant,
            )
            self._send(scheduler_pb2.AttachRequest(reattach=reattach))
            return
        for index in wanted:
            submit = scheduler_pb2.Submit()
            submit.CopyFrom(call.submit)
            submit.continue_token_ids.extend(call.tokens[index])
            submit.candidate_count, submit.first_candidate_index = 1, index
            submit.remaining_ms = 0
            submit.is_failover = True
            if len(call.candidates) > 1:
                submit.resume_window_ms = 0
            self.world.count("resubmission")
            self._submit(call, (index,), submit)

    def _submit(self, call: Call, candidates: tuple[int, ...], submit: scheduler_pb2.Submit) -> None:
        submit.handle = self._handle(call, candidates)
        self._send(scheduler_pb2.AttachRequest(submit=submit))

    def _handle(self, call: Call, candidates: tuple[int, ...]) -> int:
        self.num_handles += 1
        for index in candidates:
            call.handles[index] = self.num_handles
        call.gateway = self
        self.calls[self.num_handles] = call
        self.submits[self.num_handles] = call.submit
        return self.num_handles

    def cancel(self, call: Call) -> None:
        handles = {call.handles[index] for index in call.candidates if call.handles.get(index)}
        call.end("cancelled")
        for handle in handles:
            self.calls.pop(handle, None)
            self._send(scheduler_pb2.AttachRequest(cancel=scheduler_pb2.Cancel(handle=handle)))

    def _send(self, message: scheduler_pb2.AttachRequest) -> None:
        if self.connection:
            copy = scheduler_pb2.AttachRequest()
            copy.CopyFrom(message)
            self.world.to_scheduler(self, copy)

    # -- what comes back -------------------------------------------------------------------------

    def deliver(self, message: scheduler_pb2.AttachResponse) -> None:
        """Queue a message of the scheduler. Without room the stream is cut off, a moment later."""
        if not self.connection:
            return
        was_closed = self._stream.closed.is_set()
        self._stream.send(message)
        if self._stream.closed.is_set() and not was_closed:
            self.world.count("gateway cut off")
            self.world.after(CUT_OFF_S, self.world.cut_off, self, self.connection)
        self._read_at(max(self.world.now + READ_S, self.slow_until))

    @property
    def is_cut_off(self) -> bool:
        """Whether the scheduler takes nothing more from this stream."""
        return self._stream.closed.is_set()

    def _read_at(self, time: float) -> None:
        if not self._is_read_due:
            self._is_read_due = True
            self.world.at(time, self._read, self.connection)

    def _read(self, connection: int) -> None:
        """Read all that waits, if its stream is still the one that is open."""
        if connection != self.connection:
            return
        self._is_read_due = False
        if self.world.now < self.slow_until:
            self._read_at(self.slow_until)
            return
        unsent = self._stream.unsent
        while not unsent.empty():
            self._receive(unsent.get_nowait())
        if unsent.maxsize < MAX_UNSENT_MESSAGES:
            self._stream.unsent = asyncio.Queue(MAX_UNSENT_MESSAGES)

    def _receive(self, message: scheduler_pb2.AttachResponse) -> None:
        kind = message.WhichOneof("kind")
        if kind == "step_outputs":
            self._on_outputs(message.step_outputs)
        elif kind == "admitted":
            call = self.calls.get(message.admitted.handle)
            if call is not None:
                call.admitted, call.epoch = True, self.epoch
        elif kind == "rejected":
            self.ended.add(message.rejected.handle)
            rejected = message.rejected
            self._on_end(rejected.handle, rejected.reason, retry=True, retry_s=rejected.retry_after_ms / 1000)
        elif kind == "failed":
            failed = message.failed
            self.ended.add(failed.handle)
            self._on_end(failed.handle, failed.reason, failed.resumable or failed.reason == "RESUME_STATE_LOST")

    def _on_outputs(self, outputs: scheduler_pb2.StepOutputs) -> None:
        tokens, indexes = iter(outputs.token_ids), outputs.candidate_indexes or [0] * len(outputs.handles)
        counts = outputs.token_counts or [1] * len(outputs.handles)
        logprobs = iter(outputs.logprobs)
        for handle, index, count in zip(outputs.handles, indexes, counts, strict=True):
            assert handle not in self.ended, f"{self.submits[handle].request_id}: output after its end"
            new = [next(tokens) for _ in range(count)]
            if self.submits[handle].chosen_logprob:
                assert [next(logprobs) for _ in new] == [-float(token % 7) for token in new], "of another row"
            call = self.calls.get(handle)
            if call is not None and call.handles.get(index) == handle:
                assert not call.ending, f"{call.submit.request_id}: output after its end"
                assert index not in call.finished, f"{call.submit.request_id}: output after a candidate's end"
                call.tokens[index] += new
                self.world.check_tokens(call, index)
        assert next(tokens, None) is None
        assert next(logprobs, None) is None
        for finished in outputs.finished:
            call = self.calls.get(finished.handle)
            index = finished.candidate_index
            if call is not None and call.handles.get(index) == finished.handle:
                assert index not in call.finished, f"{call.submit.request_id}: a candidate ended twice"
                call.finished[index] = finished
                assert finished.usage.output_tokens == len(call.tokens[index]), (call.submit.request_id, finished.usage)
                if len(call.finished) == len(call.candidates):
                    call.end("finished")

    def _on_end(self, handle: int, reason: str, retry: bool, retry_s: float = 0.0) -> None:
        call = self.calls.pop(handle, None)
        if call is None or call.ending:
            return
        candidates = tuple(index for index in call.candidates if call.handles.get(index) == handle)
        for index in candidates:
            call.handles[index] = 0
        if reason == "RESUME_STATE_LOST":
            call.epoch = 0  # from here on by submitting it again
            self.resume(call, candidates)
        elif call.admitted and retry and reason not in ("QUARANTINED", "KV_CAPACITY_EXCEEDED"):
            self.world.after(max(RESUBMIT_S, retry_s), self.resume, call, candidates)
        else:
            call.end(reason)
            for other in set(call.handles.values()) - {0}:
                self.calls.pop(other, None)
                self._send(scheduler_pb2.AttachRequest(cancel=scheduler_pb2.Cancel(handle=other)))
