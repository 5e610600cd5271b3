"""Candidates that no scheduler has: lost with their scheduler, waiting for one that goes on with them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.errors import Reason, ServingError
from octavo.services.gateway.schedulers.request_stream import CandidateInbox, RequestStream

_MAX_FAILOVERS = 8


class Lost:
    """A candidate that waits.

    is_out      it has been submitted, and nothing has been answered yet
    is_paused   it waits for its client, and not for a scheduler
    refused_by  addresses that would not take it now
    num_refusals  of them, since it waited last
    """

    __slots__ = (
        "candidate", "is_out", "is_paused", "not_before", "num_refusals", "refused_by", "retry_at", "stream", "until",
    )  # fmt: skip

    def __init__(self, stream: RequestStream, candidate: CandidateInbox, until: float) -> None:
        self.stream = stream
        self.candidate = candidate
        self.until = until
        self.is_out = False
        self.is_paused = False
        self.not_before = 0.0
        self.retry_at = 0.0
        self.refused_by: set[str] = set()
        self.num_refusals = 0

    def is_due(self, now: float) -> bool:
        """Return whether it may be submitted now."""
        return not (self.is_out or self.is_paused) and self.not_before <= now

    def wait_for_refusals(self) -> None:
        """Ask nobody until those that refused may have changed their minds."""
        self.not_before = self.retry_at
        self.num_refusals = 0
        self.refused_by.clear()

    def wait_for_others(self, not_before: float) -> None:
        """Ask nobody before a time, and then those that have not refused."""
        self.not_before = min(not_before, self.retry_at)
        self.num_refusals = 0


class LostCandidates:
    """All that wait, in the order they were lost. Times are the event loop's."""

    def __init__(self, failover_s: float) -> None:
        self.failover_s = failover_s
        self.max_failovers = _MAX_FAILOVERS
        self._waiting: dict[CandidateInbox, Lost] = {}

    def __iter__(self) -> Iterator[Lost]:
        return iter(list(self._waiting.values()))

    def add(self, stream: RequestStream, candidate: CandidateInbox) -> bool:
        """Let a candidate wait; False if it did already: lost again before it was admitted, its time goes on."""
        known = self._waiting.get(candidate)
        if known is not None:
            known.is_out = False
            return False
        until = asyncio.get_running_loop().time() + self.failover_s
        self._waiting[candidate] = Lost(stream, candidate, until)
        return True

    def pause(self, stream: RequestStream, candidate: CandidateInbox) -> None:
        """Let a candidate wait until `go_on`."""
        lost = self._waiting.setdefault(candidate, Lost(stream, candidate, 0.0))
        lost.is_paused = True
        lost.is_out = False

    def go_on(self, stream: RequestStream) -> None:
        """Let the candidates of a stream be submitted that were paused."""
        until = asyncio.get_running_loop().time() + self.failover_s
        for candidate in stream.candidates:
            lost = self._waiting.get(candidate)
            if lost is not None and lost.is_paused:
                lost.is_paused = False
                lost.until = until

    def remove(self, candidates: Iterable[CandidateInbox]) -> None:
        """Let candidates wait no longer, if they do."""
        for candidate in candidates:
            self._waiting.pop(candidate, None)

    def refused(self, candidate: CandidateInbox, address: str, retry_at: float) -> None:
        """Note that a scheduler would not take a candidate before a time."""
        lost = self._waiting.get(candidate)
        if lost is not None:
            lost.is_out = False
            lost.refused_by.add(address)
            lost.num_refusals += 1
            lost.retry_at = min(retry_at, lost.until)

    def due(self, now: float) -> list[Lost]:
        """Return those that may be submitted now."""
        return [lost for lost in self._waiting.values() if lost.is_due(now)]

    def holds(self, lost: Lost) -> bool:
        """Return whether it still waits."""
        return self._waiting.get(lost.candidate) is lost

    def expired(self, now: float) -> list[Lost]:
        """Remove and return those that waited too long."""
        expired = [lost for lost in self._waiting.values() if lost.until <= now and not lost.is_paused]
        self.remove([lost.candidate for lost in expired])
        return expired


def continuation(stream: RequestStream, candidate: CandidateInbox, now: float) -> scheduler_pb2.Submit:
    """Return what lets a scheduler go on with one candidate of a request, from the output so far."""
    submit = scheduler_pb2.Submit()
    submit.CopyFrom(stream.submit)
    submit.continue_token_ids.extend(candidate.token_ids)
    submit.is_failover = True
    submit.candidate_count = 1
    submit.first_candidate_index = candidate.index
    if candidate.index or not stream.num_prompt_logprobs_missing:
        submit.prompt_logprobs = 0
    if submit.HasField("pooling"):
        _keep_input(submit, candidate.index)
    if submit.stop.HasField("soft_time_limit_ms"):
        passed_ms = int((now - stream.submitted_at) * 1000)
        submit.stop.soft_time_limit_ms = max(1, submit.stop.soft_time_limit_ms - passed_ms)
    return submit


def _keep_input(submit: scheduler_pb2.Submit, index: int) -> None:
    """Leave one input of a request for vectors, without a word of the others."""
    pooling = submit.pooling
    start, length = sum(pooling.input_lengths[:index]), pooling.input_lengths[index]
    submit.prompt_token_ids[:] = submit.prompt_token_ids[start : start + length]
    pooling.input_lengths[:] = [length]
    pooling.second_segment_starts[:] = pooling.second_segment_starts[index : index + 1]


def interrupted(message: str) -> ServingError:
    """Return the error that ends a stream in the middle."""
    advice = "resume it, or send the request again with continue_output set to the tokens received"
    return ServingError(Reason.STREAM_INTERRUPTED, f"{message}; {advice}")
