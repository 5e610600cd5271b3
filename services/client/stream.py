"""A running generation, which goes on by itself when its call breaks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import grpc

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2
from octavo.services.client.errors import OctavoError, from_rpc_error
from octavo.services.client.progress import Progress

Code = grpc.StatusCode
_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs do not know it
_NOT_KEPT = (Code.DATA_LOSS, Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION, Code.NOT_FOUND, Code.UNIMPLEMENTED)
_BUSY = (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED)


class StreamCalls(Protocol):
    """Makes the calls of a stream. Each returns the call and its first message. Raises OctavoError."""

    @property
    def timeout_s(self) -> float | None:
        """How long all of them may take together; None: as long as they do."""

    def check_open(self) -> None:
        """See Endpoints."""

    async def pause(self, attempt: int, error: OctavoError, deadline: float | None) -> None:
        """See Endpoints."""

    async def generate(self, generation: generation_pb2.Generation) -> tuple[Any, Any]:
        """Start a request."""

    async def resume(self, token: str, cursors: Sequence[generation_pb2.Cursor]) -> tuple[Any, Any]:
        """Pick one up."""

    async def cancel(self, request_id: str) -> None:
        """End one that would go on without its call."""


class Stream:
    """Iterates over the Deltas of one request. Used as a context manager, it ends the request when left.

    A call that breaks is resumed, where a resume window was asked for, and else, or if nothing was kept, continued
    from the tokens received: the caller sees no gap and no repeat. With several candidates only the first way
    exists. `num_resumed` counts.
    """

    def __init__(
        self,
        calls: Callable[[], Awaitable[StreamCalls]],
        request: generation_pb2.Generation,
        resume_for_s: float,
    ) -> None:
        """`calls` is asked when the first event is; `resume_for_s`: how long a broken call is tried to be resumed."""
        self._make_calls = calls
        self._calls: StreamCalls | None = None
        self._request = request
        self._progress = Progress(request, request.output.token_ids)
        self._resume_for_s = resume_for_s
        self._call: Any = None
        self._begun = False
        self._cancelled = False
        self._ending: asyncio.Task[None] | None = None
        self.num_resumed = 0
        self.on_retry: Callable[[OctavoError], None] | None = None
        """Is called with what happened when a call broke or found no server, and is about to be tried again."""
        if resume_for_s > 0:
            request.output.token_ids = True

    @property
    def started(self) -> generation_pb2.Started | None:
        """What the request resolved to; None until the first event came."""
        return self._progress.started

    @property
    def finished(self) -> dict[int, generation_pb2.CandidateFinished]:
        """How each candidate ended, by its index."""
        return self._progress.finished

    @property
    def completed(self) -> generation_pb2.Completed | None:
        """Usage and timing; None unless the output ended as it should."""
        return self._progress.completed

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
        assert not self._begun, "a stream can be read only once"
        self._begun = True
        if self._cancelled:
            return
        try:
            self._calls = await self._make_calls()
            self._call, response = await self._begin(self._calls)
            while True:
                try:
                    while response is not None and response is not _EOF:
                        if self._progress.take(response.event):
                            yield response.event
                        response = await self._call.read()
                    if not self._cancelled:
                        self._progress.check_end()
                    return
                except grpc.aio.AioRpcError as error:
                    if self._cancelled:
                        return
                    self._call, response = await self._recover(from_rpc_error(error, self._calls.timeout_s))
        except asyncio.CancelledError:
            if not self._cancelled:  # the client was closed, or it is the caller's task that was cancelled
                if self._calls is not None:
                    self._calls.check_open()
                raise
        finally:
            self._end_call()

    def cancel(self) -> None:
        """End the request; the server stops the work. Iteration ends without an error."""
        self._cancelled = True
        self._end_call()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()
        if self._ending is not None:
            await self._ending

    def _end_call(self) -> None:
        if self._call is not None:
            self._call.cancel()  # nothing, if it has ended
        if self.started and self.started.resume_token and not self.completed and self._ending is None:
            # A broken call and a cancelled one look alike: the server would keep the request for its window.
            self._ending = asyncio.ensure_future(self._end_request())

    async def _end_request(self) -> None:
        assert self._calls is not None, "a request without calls"
        with contextlib.suppress(OctavoError):  # then it ends with its window
            await self._calls.cancel(self.request_id)

    async def _begin(self, calls: StreamCalls) -> tuple[Any, Any]:
        """Return a call that was admitted, with its first response."""
        try:
            return await calls.generate(self._request)
        except OctavoError as failure:
            if not failure.admitted:
                raise
            return await self._recover(failure)  # it broke between its headers and its first response

    async def _recover(self, failure: OctavoError) -> tuple[Any, Any]:
        """Return a call that goes on where the last one broke; raise `failure` if that is not possible."""
        if self._resume_for_s <= 0 or not failure.is_broken_call or self._calls is None:
            raise failure
        if self.on_retry is not None:
            self.on_retry(failure)
        deadline = asyncio.get_running_loop().time() + self._resume_for_s
        token = self.started.resume_token if self.started else ""
        leave_out = 0
        attempt = 0
        while True:
            try:
                if token:
                    found = await self._calls.resume(token, self._progress.cursors)
                else:
                    rest = self._progress.rest(leave_out)
                    if rest is None:
                        raise failure
                    found = await self._calls.generate(rest)
                self.num_resumed += 1
                self._progress.restart()
                return found
            except OctavoError as error:
                if error is failure:
                    raise
                if token and error.code in _NOT_KEPT:
                    token = ""
                elif error.has_ended_already and not leave_out:
                    leave_out = 1  # all tokens are here, their ending is not: produce the last one again
                elif error.code in _BUSY or error.is_broken_call:
                    await self._calls.pause(attempt, error, deadline)
                    attempt += 1
                else:
                    raise


@dataclass(frozen=True, repr=False)
class Result:
    """A whole answer. The properties are those of the first candidate; `response` has everything."""

    response: generation_pb2.GenerateResponse

    def __repr__(self) -> str:
        others = len(self.response.candidates) - 1
        more = f", and {others} more candidates in response" if others > 0 else ""
        tokens = f"output_tokens={self.usage.output_tokens}"
        return f"Result({self.text!r}, finish_reason={self.finish_reason!r}, {tokens}{more})"

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
