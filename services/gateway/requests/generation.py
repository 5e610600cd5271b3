"""Turns what the scheduler sends about one request into the events clients see."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.errors import Reason, ServingError
from octavo.services.gateway.output.candidate_output import CandidateOutput, OutputSettings
from octavo.services.gateway.output.parser import NOTHING
from octavo.services.gateway.requests.model import ServedModel
from octavo.services.gateway.schedulers.request_stream import CandidateInbox, RequestStream

Response = generation_pb2.GenerateStreamResponse
_MAX_NEW = 2048  # tokens that are looked at in one go: about a millisecond
_MAX_NEW_LOGPROBS = 64


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that may be submitted."""

    model: ServedModel
    submit: scheduler_pb2.Submit
    """Complete but for the handle and the remaining time."""
    started: generation_pb2.Started
    """Complete but for what admission tells: model version and cached tokens."""
    output: generation_pb2.OutputOptions
    settings: OutputSettings
    candidates: Sequence[CandidateOutput]
    """The output of each candidate, with `continue_output` already behind it."""


class _Candidate:
    """One candidate: what came in, and what has gone out."""

    __slots__ = ("done", "inbox", "output", "skip")

    def __init__(self, inbox: CandidateInbox, output: CandidateOutput, skip: int) -> None:
        self.inbox = inbox
        self.output = output
        self.skip = skip  # first tokens of inbox.token_ids that the client has already
        self.done = False


class GenerationRun:
    """An admitted request. `responses` yields its stream, once."""

    def __init__(
        self,
        prepared: Prepared,
        stream: RequestStream,
        resume_token: str = "",
        next_token_offsets: Mapping[int, int] | None = None,
    ) -> None:
        """`next_token_offsets`: by candidate, where the output goes on for the client of a resumed stream."""
        assert stream.admitted is not None, "the request was not admitted"
        self.started = prepared.started
        self.started.model_version = prepared.model.version(stream.model_version)
        self.started.resume_token = resume_token
        self.scheduler_id = stream.scheduler_id
        self.started.cached_prompt_tokens = stream.admitted.cached_prompt_tokens
        self.completed = generation_pb2.Completed()
        self.prompt_token_ids = prepared.submit.prompt_token_ids
        self.stream = stream
        self._options = prepared.output
        self.max_coalesce_ms = prepared.output.max_coalesce_ms
        self._is_parsed = prepared.settings.parser is not None
        self._wants_logprobs = stream.wants_logprobs
        self._max_new = _MAX_NEW_LOGPROBS if stream.wants_logprobs else _MAX_NEW
        self._base = len(prepared.submit.continue_token_ids)
        offsets = next_token_offsets or {}
        self._candidates = [
            _Candidate(inbox, output, offsets.get(inbox.index, self._base) - self._base)
            for inbox, output in zip(stream.candidates, prepared.candidates, strict=True)
        ]
        self._sequence_number = 0
        self._delta_response = Response()  # filled again for each delta
        self._admitted_at = time.monotonic()
        self.first_token_at = 0.0
        """When the first token was taken, as a time of time.monotonic(); 0 before."""
        self.finish_reasons: list[common_pb2.FinishReason] = []
        """Of the candidates that have ended."""

    @property
    def num_delivered(self) -> int:
        """Tokens that went out to this call's client."""
        return sum(max(0, candidate.inbox.num_read - candidate.skip) for candidate in self._candidates)

    async def responses(
        self, coalesce_ms: int, before_wait: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncIterator[Response]:
        """Yield Started, deltas, endings and Completed; a response is valid until the next is asked for.

        With log probabilities of the prompt Started comes when all of them are there, or the request has ended.

        coalesce_ms: how long tokens after the first may gather before a delta.
        before_wait: called when all that is known has been yielded: the time to write it. Raises ServingError.
        """
        stream = self.stream
        while stream.num_prompt_logprobs_missing and not stream.ended:
            await stream.wait()
        if stream.submit.prompt_logprobs:
            self.started.prompt_logprobs.CopyFrom(stream.prompt_logprobs)
        stream.is_reading = False
        yield self._event(started=self.started)
        while True:  # tokens may have come with the admission: look first, then wait
            stream.num_rounds += 1
            error = stream.error  # seen before the tokens are taken: what comes during a yield is for the next round
            for candidate in self._candidates:
                if candidate.done:
                    continue
                ended = candidate.inbox.finished is not None
                end = len(candidate.inbox.token_ids)
                while candidate.inbox.num_read < end - self._max_new and not candidate.output.is_complete:
                    delta = self._delta(candidate, False)  # much at once: of a stream that goes on, or a slow reader's
                    if delta is not None:
                        yield delta
                    if before_wait is not None:
                        await before_wait()
                    await asyncio.sleep(0)  # others come between
                if not candidate.output.is_complete:
                    delta = self._delta(candidate, ended)
                    if delta is not None:
                        yield delta
                if ended or candidate.output.is_complete:
                    yield self._finish(candidate)
            if all(candidate.done for candidate in self._candidates):
                break
            if error is not None:
                raise self.with_position(error)
            if stream.progress is not None:
                progress, stream.progress = stream.progress, None
                yield self._event(progress=progress)
            if before_wait is not None:
                await before_wait()
            stream.is_reading = True
            await stream.wait()
            if coalesce_ms and self.first_token_at:
                await stream.hold(coalesce_ms / 1000)
            stream.is_reading = False
        self._complete()
        yield self._event(completed=self.completed)

    def _event(
        self,
        started: generation_pb2.Started | None = None,
        candidate_finished: generation_pb2.CandidateFinished | None = None,
        completed: generation_pb2.Completed | None = None,
        progress: generation_pb2.Progress | None = None,
    ) -> Response:
        event = generation_pb2.StreamEvent(
            sequence_number=self._sequence_number,
            started=started,
            candidate_finished=candidate_finished,
            completed=completed,
            progress=progress,
        )
        self._sequence_number += 1
        return Response(event=event)

    def _delta(self, candidate: _Candidate, ended: bool) -> Response | None:
        """Return what is new of a candidate, `_max_new` tokens at most, in one delta, or None if there is nothing.

        ended: no further tokens follow, so nothing is held back.
        """
        inbox = candidate.inbox
        if inbox.num_read < candidate.skip and not self._skip(candidate):
            return None
        start = inbox.num_read
        new = inbox.token_ids[start : start + self._max_new]
        piece, taken = candidate.output.push(new) if new else (NOTHING, 0)
        inbox.num_read += taken
        if ended and not candidate.output.is_complete:
            piece = piece.followed_by(candidate.output.finish())
        if not taken and not any(piece):
            return None
        if not self.first_token_at:
            self.first_token_at = time.monotonic()
        event = self._delta_response.event
        event.sequence_number = self._sequence_number
        self._sequence_number += 1
        delta = event.delta
        delta.candidate_index = inbox.index
        delta.token_offset = self._base + start
        delta.token_count = taken
        delta.text = piece.text
        if self._is_parsed:
            delta.reasoning_text = piece.reasoning
            del delta.tool_calls[:]
            delta.tool_calls.extend(piece.tool_calls)
        if self._options.token_ids:
            delta.token_ids[:] = new[:taken]
        if self._wants_logprobs:
            delta.logprobs.CopyFrom(inbox.logprobs.take(taken, self._options.logprobs))
        return self._delta_response

    def _skip(self, candidate: _Candidate) -> bool:
        """Take of what the client has already; return whether tokens after that are to be sent.

        The text that is out after k tokens depends on these only: so the client has that, too.
        """
        inbox = candidate.inbox
        end = min(candidate.skip, inbox.num_read + self._max_new)
        _, taken = candidate.output.push(inbox.token_ids[inbox.num_read : end])
        inbox.num_read += taken
        if self._wants_logprobs:
            inbox.logprobs.take(taken, self._options.logprobs)
        return inbox.num_read == candidate.skip and not candidate.output.is_complete

    def _finish(self, candidate: _Candidate) -> Response:
        """End a candidate; if a stop string or a tool call did it, the scheduler does not know yet."""
        candidate.done = True
        finished = generation_pb2.CandidateFinished(
            candidate_index=candidate.inbox.index, output_tokens=candidate.output.num_tokens
        )
        matched, ending = candidate.output.matched, candidate.inbox.finished
        if matched is not None:
            self.stream.cancel(candidate.inbox.index)
            finished.finish_reason = common_pb2.FINISH_REASON_STOP_SEQUENCE
            finished.stop_sequence = matched
        elif candidate.output.is_complete:
            self.stream.cancel(candidate.inbox.index)
            finished.finish_reason = common_pb2.FINISH_REASON_TOOL_CALL
        else:
            assert ending is not None, "a candidate ends by its own output or by the scheduler"
            finished.finish_reason = ending.reason
            if ending.reason in (common_pb2.FINISH_REASON_END_OF_SEQUENCE, common_pb2.FINISH_REASON_STOP_TOKEN):
                finished.stop_token_id = ending.stop_token_id
                if candidate.output.has_tool_calls:
                    finished.finish_reason = common_pb2.FINISH_REASON_TOOL_CALL
        self.finish_reasons.append(finished.finish_reason)
        return self._event(candidate_finished=finished)

    def _complete(self) -> None:
        """Add the candidates up. What a stop string ended has no account of the scheduler's."""
        usage, timing = self.completed.usage, self.completed.timing
        endings = [ending for candidate in self._candidates if (ending := candidate.inbox.finished) is not None]
        accounts = [ending for ending in endings if ending.HasField("usage")]
        usage.prompt_tokens = self.started.prompt_tokens
        usage.output_tokens = sum(candidate.output.num_tokens for candidate in self._candidates)
        cached = [ending.usage.cached_prompt_tokens for ending in accounts]
        if not cached or self.stream.failovers:  # after a loss the scheduler counts output as prompt, too
            cached = [self.started.cached_prompt_tokens]
        usage.cached_prompt_tokens = min(*cached, usage.prompt_tokens)
        usage.reasoning_tokens = sum(candidate.output.num_reasoning_tokens for candidate in self._candidates)
        usage.speculative_accepted_tokens = sum(ending.usage.speculative_accepted_tokens for ending in accounts)
        if accounts:
            slowest = max(accounts, key=lambda e: e.timing.queue_us + e.timing.prefill_us + e.timing.decode_us)
            timing.CopyFrom(slowest.timing)
        else:
            # Seen from here, waiting and computing the prompt look alike.
            first = self.first_token_at or time.monotonic()
            timing.prefill_us = int((first - self._admitted_at) * 1e6)
            timing.decode_us = int((time.monotonic() - first) * 1e6)
        self.completed.failovers = self.stream.failovers

    def with_position(self, error: ServingError) -> ServingError:
        """Say how far a stream got that ends in the middle, and how it can be picked up."""
        if error.reason == Reason.STREAM_INTERRUPTED:
            error.metadata.setdefault("last_sequence_number", str(self._sequence_number - 1))
            if self.started.resume_token:
                error.metadata["resume_token"] = self.started.resume_token
        return error


# A whole answer needs no wake-up for each token; its end is never held back.
_COALESCE_MS = 20


def ask_for_whole_answer(generation: generation_pb2.Generation) -> None:
    """Change a request, before it is admitted, into one whose answer can be whole."""
    generation.output.parsing.whole_tool_calls = True


async def whole_answer(
    run: GenerationRun, num_candidates: int, max_coalesce_ms: int = 0
) -> generation_pb2.GenerateResponse:
    """Return everything that an admitted request, as `ask_for_whole_answer` makes it, produces. Raises ServingError."""
    answer = _Answer(num_candidates)
    async for part in run.responses(max(_COALESCE_MS, max_coalesce_ms)):
        answer.add(part.event)
    return answer.response()


class _Answer:
    """Gathers the events of a stream into the answer of Generate."""

    def __init__(self, num_candidates: int) -> None:
        self._response = generation_pb2.GenerateResponse(
            candidates=[generation_pb2.Candidate(index=index) for index in range(num_candidates)]
        )
        self._texts: list[list[str]] = [[] for _ in range(num_candidates)]
        self._reasoning: list[list[str]] = [[] for _ in range(num_candidates)]

    def add(self, event: generation_pb2.StreamEvent) -> None:
        """Take the next event."""
        response = self._response
        kind = event.WhichOneof("payload")
        if kind == "delta":
            delta = event.delta
            candidate = response.candidates[delta.candidate_index]
            self._texts[delta.candidate_index].append(delta.text)
            self._reasoning[delta.candidate_index].append(delta.reasoning_text)
            candidate.tool_calls.extend(delta.tool_calls)  # whole ones: see `ask_for_whole_answer`
            candidate.token_ids.extend(delta.token_ids)
            if delta.HasField("logprobs"):
                candidate.logprobs.MergeFrom(delta.logprobs)  # appends to each column
        elif kind == "candidate_finished":
            response.candidates[event.candidate_finished.candidate_index].finished.CopyFrom(event.candidate_finished)
        elif kind == "started":
            response.started.CopyFrom(event.started)
        elif kind == "completed":
            response.completed.CopyFrom(event.completed)

    def response(self) -> generation_pb2.GenerateResponse:
        """Return the answer, once the last event is in."""
        for candidate in self._response.candidates:
            candidate.text = "".join(self._texts[candidate.index])
            candidate.reasoning_text = "".join(self._reasoning[candidate.index])
        return self._response
