"""A running generation, and the checks that nothing of it was lost on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2
from octavo.services.client.errors import ProtocolError, from_rpc_error


class Stream:
    """Iterates over the Deltas of one call. Used as a context manager, it ends the call when left.

    started     what the request resolved to; None until the first event came
    finished    how each candidate ended, by its index
    completed   usage and timing; None unless the output ended as it should
    """

    def __init__(self, start: Callable[[], Awaitable[Any]], request: generation_pb2.Generation) -> None:
        self._start = start  # makes the call; it is made when the first event is asked for
        self._call: Any = None
        self._checker = _Checker(request)
        self._cancelled = False
        self.started: generation_pb2.Started | None = None
        self.finished: dict[int, generation_pb2.CandidateFinished] = {}
        self.completed: generation_pb2.Completed | None = None

    @property
    def request_id(self) -> str:
        """The request's name for logs and Client.cancel; empty before it was admitted."""
        return self.started.request_id if self.started else ""

    async def __aiter__(self) -> AsyncIterator[generation_pb2.Delta]:
        """Yield each Delta. Raises OctavoError if the call fails; after `cancel`, just ends."""
        async for event in self.events():
            if event.WhichOneof("payload") == "delta":
                yield event.delta

    async def events(self) -> AsyncIterator[generation_pb2.StreamEvent]:
        """Yield every event, Started, Progress and the endings included. Raises what iteration raises."""
        assert self._call is None, "a stream can be read only once"
        if self._cancelled:
            return
        self._call = await self._start()
        try:
            async for response in self._call:
                self._checker.check(response.event)
                self._record(response.event)
                yield response.event
            if not self._cancelled:
                self._checker.check_end()
        except grpc.aio.AioRpcError as error:
            if not self._cancelled:
                raise from_rpc_error(error) from None
        except asyncio.CancelledError:
            if not self._cancelled:  # it is the caller's task that was cancelled
                raise
        finally:
            self._call.cancel()  # nothing, if it has ended

    def cancel(self) -> None:
        """End the call; the server stops the work. Iteration ends without an error."""
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def _record(self, event: generation_pb2.StreamEvent) -> None:
        match event.WhichOneof("payload"):
            case "started":
                self.started = event.started
            case "candidate_finished":
                self.finished[event.candidate_finished.candidate_index] = event.candidate_finished
            case "completed":
                self.completed = event.completed


class _Checker:
    """Holds a stream to its contract: events without a gap, tokens without a gap, exactly one ending."""

    def __init__(self, request: generation_pb2.Generation) -> None:
        count = request.candidate_count or 1
        # Offsets of a continued output go on where it was interrupted.
        self._next_offsets = [len(request.continue_output.ids)] * count
        self._open = set(range(count))
        self._with_ids = request.output.token_ids
        self._next_event = 0
        self._completed = False
        self._request_id = ""

    def check(self, event: generation_pb2.StreamEvent) -> None:
        """Raise ProtocolError if `event` cannot follow the events before it."""
        kind = event.WhichOneof("payload")
        if event.sequence_number != self._next_event:
            self._fail(f"event {event.sequence_number} came where {self._next_event} was due")
        if (kind == "started") != (self._next_event == 0):
            self._fail(f"event {event.sequence_number} is {kind}; Started comes first and once")
        if self._completed:
            self._fail(f"{kind} came after Completed")
        self._next_event += 1
        match kind:
            case "started":
                self._request_id = event.started.request_id
            case "delta":
                self._check_delta(event.delta)
            case "candidate_finished":
                self._check_finished(event.candidate_finished)
            case "completed":
                if self._open:
                    self._fail(f"Completed came before the end of candidate {min(self._open)}")
                self._completed = True

    def check_end(self) -> None:
        """Raise ProtocolError if the stream may not end here."""
        if not self._completed:
            self._fail("the stream ended without Completed")

    def _check_delta(self, delta: generation_pb2.Delta) -> None:
        index = delta.candidate_index
        if index not in self._open:
            self._fail(f"a delta came for candidate {index}, which has ended or was not asked for")
        if delta.token_offset != self._next_offsets[index]:
            self._fail(
                f"token {delta.token_offset} of candidate {index} came where {self._next_offsets[index]} was due"
            )
        if self._with_ids and len(delta.token_ids) != delta.token_count:
            self._fail(f"a delta of {delta.token_count} tokens has {len(delta.token_ids)} token ids")
        self._next_offsets[index] += delta.token_count

    def _check_finished(self, finished: generation_pb2.CandidateFinished) -> None:
        index = finished.candidate_index
        if index not in self._open:
            self._fail(f"candidate {index} ended twice or was not asked for")
        if finished.output_tokens != self._next_offsets[index]:
            self._fail(
                f"candidate {index} ended with {finished.output_tokens} tokens, {self._next_offsets[index]} arrived"
            )
        self._open.remove(index)

    def _fail(self, message: str) -> None:
        raise ProtocolError(message, request_id=self._request_id)


@dataclass(frozen=True)
class Result:
    """A whole answer. The properties are those of the first candidate; `response` has everything."""

    response: generation_pb2.GenerateResponse

    @property
    def text(self) -> str:
        """The text."""
        return self.response.candidates[0].text

    @property
    def token_ids(self) -> Sequence[int]:
        """The token ids; empty unless asked for by `return_token_ids`."""
        return self.response.candidates[0].token_ids

    @property
    def finish_reason(self) -> str:
        """Why it ended, for example "MAX_TOKENS"."""
        return finish_reason_name(self.response.candidates[0].finished.finish_reason)

    @property
    def usage(self) -> common_pb2.Usage:
        """Tokens used."""
        return self.response.completed.usage


def finish_reason_name(reason: common_pb2.FinishReason) -> str:
    """Return the reason's name without its prefix; a number the client does not know stays a number."""
    if reason not in common_pb2.FinishReason.values():
        return str(reason)
    return common_pb2.FinishReason.Name(reason).removeprefix("FINISH_REASON_")
