"""The endpoints that make text: the same calls as the GenerationService's."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Send

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2
from octavo.services.common.errors import ServingError
from octavo.services.gateway.authentication import caller
from octavo.services.gateway.http.chat_request import read_chat_call, read_completion_call
from octavo.services.gateway.http.endpoint import HttpRequest, internal_error, parse_object
from octavo.services.gateway.http.errors import in_openai_words
from octavo.services.gateway.http.formats import ChatFormat, CompletionFormat
from octavo.services.gateway.http.logprobs import TokenTexts
from octavo.services.gateway.http.messages_format import MessagesFormat
from octavo.services.gateway.http.messages_request import read_messages_call
from octavo.services.gateway.http.params import Ignored
from octavo.services.gateway.http.requests import ApiCall, GenerateRequest
from octavo.services.gateway.http.responses_format import ResponsesFormat
from octavo.services.gateway.http.responses_request import read_responses_call
from octavo.services.gateway.offload.long_json import to_json_in_pieces
from octavo.services.gateway.requests.accounting import Call
from octavo.services.gateway.requests.calls import GenerateCalls
from octavo.services.gateway.requests.generation import GenerationRun, ask_for_whole_answer, whole_answer
from octavo.services.gateway.requests.model import Models
from octavo.services.gateway.tokenization.tokenizer import INLINE_CHARS, INLINE_TOKENS

T = TypeVar("T")
_LAST_EVENT_S = 1.0
_KEEP_ALIVE_S = 15.0  # proxies close a connection on which nothing comes for a minute
_COMMENT = b": the request is being computed\n\n"


class Format(Protocol):
    """The answer to one call. The methods return server-sent events, or "" for none."""

    def start(self, started: generation_pb2.Started) -> None:
        """Learn what a prompt resolved to, before any of its events are made."""

    def first_chunks(self, first_index: int, prompt_token_ids: Sequence[int]) -> str:
        """Return the events of a prompt's candidates, from this index on, before any output."""

    def prompt_chunks(self, first_index: int, started: generation_pb2.Started, prompt_token_ids: Sequence[int]) -> str:
        """Return the events that repeat a prompt in its candidates, before any output."""

    def delta(self, index: int, delta: generation_pb2.Delta) -> str:
        """Return the events of new output."""

    def finish(self, index: int, finished: generation_pb2.CandidateFinished) -> str:
        """Return the events that end a candidate."""

    def end(self, usages: Sequence[common_pb2.Usage]) -> str:
        """Return the last events; `usages` are those of the prompts."""

    def failure(self, error: ServingError) -> str:
        """Return the last events of a stream that failed."""

    def whole(
        self, answers: Sequence[generation_pb2.GenerateResponse], prompts: Sequence[Sequence[int]]
    ) -> dict[str, Any]:
        """Return the whole answer; `prompts` are the token ids of each."""


C = TypeVar("C", bound=ApiCall)
_Read = Callable[[Mapping[str, Any], Mapping[str, str], Ignored], C]
_MakeFormat = Callable[[C, str, TokenTexts], Format]


class GenerateEndpoints:
    """The endpoints that produce text."""

    def __init__(self, calls: GenerateCalls, models: Models) -> None:
        self._calls = calls
        self._models = models
        self._texts = {model.name: TokenTexts(model.tokenizer) for model in models.all}

    async def chat(self, request: HttpRequest) -> Response | None:
        """Answer a conversation."""
        return await self._answer(request, read_chat_call, ChatFormat)

    async def complete(self, request: HttpRequest) -> Response | None:
        """Continue prompts."""
        return await self._answer(request, read_completion_call, CompletionFormat)

    async def respond(self, request: HttpRequest) -> Response | None:
        """Answer a conversation, in items."""
        return await self._answer(request, read_responses_call, ResponsesFormat)

    async def message(self, request: HttpRequest) -> Response | None:
        """Answer a conversation, in Anthropic's blocks."""
        return await self._answer(request, read_messages_call, MessagesFormat)

    async def _answer(self, request: HttpRequest, read: _Read[C], make_format: _MakeFormat[C]) -> Response | None:
        data = await request.body()
        names: Mapping[str, str] = {}

        def read_call() -> C:
            nonlocal names, data
            body, data = data, b""  # it is not kept while the call runs
            call = read(parse_object(body), request.headers, request.ignored)
            names = call.names
            for each in call.requests:
                self._calls.validator.check(each)
            return call

        try:
            with self._calls.refusals_counted():
                call = await self._calls.long_work.run(caller().tenant, read_call, len(data) > INLINE_CHARS)
                model = self._models.of(self._calls.mesh.model(call.requests[0].generation.model, request.headers))
            shape = make_format(call, request.request_id, self._texts[model.name])
            answering = _Answering(self._calls, request, call, shape)
            work = answering.stream() if call.stream else answering.whole()
            return await request.unless_gone(work)
        except ServingError as error:
            raise in_openai_words(error, names) from None


class _Answering:
    """One call on its way: a run for each prompt."""

    def __init__(self, calls: GenerateCalls, request: HttpRequest, call: ApiCall, answer: Format) -> None:
        self._calls = calls
        self._request = request
        self._call = call
        self._format = answer

    async def whole(self) -> Response:
        """Return everything at once."""
        for request in self._call.requests:
            ask_for_whole_answer(request.generation)

        async def one(number: int, run: GenerationRun) -> tuple[generation_pb2.GenerateResponse, Sequence[int]]:
            del number
            return await whole_answer(run, self._call.num_candidates), run.prompt_token_ids

        answers = await self._each_prompt(one)
        num_tokens = sum(answer.completed.usage.output_tokens for answer, _ in answers)
        num_values = num_tokens * (2 + (self._call.logprobs or 0)) + sum(len(prompt) for _, prompt in answers)

        def write() -> str:
            whole = self._format.whole([answer for answer, _ in answers], [prompt for _, prompt in answers])
            return to_json_in_pieces(whole)

        body = await self._calls.long_work.run(caller().tenant, write, num_values > INLINE_TOKENS)
        return Response(body, headers=self._limits(), media_type="application/json")

    async def stream(self) -> None:
        """Send chunks as they come. Once the response has begun, an error is its last event."""
        events = _EventStream(self._request, self._limits())
        try:
            await self._send_events(events)
        finally:
            events.abandon()

    async def _send_events(self, events: _EventStream) -> None:
        all_admitted = _Gate(len(self._call.requests), events.start)

        async def one(number: int, run: GenerationRun) -> common_pb2.Usage:
            make = self._format
            first_index = number * self._call.num_candidates
            make.start(run.started)
            events.add(make.first_chunks(first_index, run.prompt_token_ids))
            await all_admitted.arrive()
            async for response in run.responses(0, events.flush):
                event = response.event
                kind = event.WhichOneof("payload")
                if kind == "delta":
                    events.add(make.delta(first_index + event.delta.candidate_index, event.delta))
                elif kind == "started":
                    repeat = partial(make.prompt_chunks, first_index, event.started, run.prompt_token_ids)
                    is_long = len(run.prompt_token_ids) > INLINE_TOKENS
                    events.add(await self._calls.long_work.run(caller().tenant, repeat, is_long))
                elif kind == "candidate_finished":
                    finished = event.candidate_finished
                    events.add(make.finish(first_index + finished.candidate_index, finished))
            return run.completed.usage

        try:
            usages = await self._each_prompt(one)
        except Exception as error:
            if not events.started:
                raise
            failure = error if isinstance(error, ServingError) else internal_error(self._request)
            events.add(self._format.failure(in_openai_words(failure, self._call.names)))
            with contextlib.suppress(TimeoutError):  # a client that reads nothing is not waited for: it is cut off
                async with asyncio.timeout(_LAST_EVENT_S):
                    await events.end()
            return
        events.add(self._format.end(usages))
        await events.end()

    def _limits(self) -> dict[str, str]:
        """Return how many calls this gateway takes at once, and how many more it would take now, as OpenAI says it."""
        tenant = self._calls.mesh.tenant(caller().tenant, self._request.headers)
        return {
            "x-ratelimit-limit-requests": str(self._calls.max_requests),
            "x-ratelimit-remaining-requests": str(self._calls.num_requests_left(tenant)),
            "x-ratelimit-reset-requests": "0s",
        }

    async def _each_prompt(self, body: Callable[[int, GenerationRun], Coroutine[Any, Any, T]]) -> list[T]:
        """Run `body` for each prompt, all at once, when that prompt is admitted; return what each returned.

        Raises ServingError: the first that one of them raised; the others are cancelled then.
        """
        requests = self._call.requests
        deadline = self._request.deadline()

        async def run(number: int, request: GenerateRequest) -> T:
            request_id = self._request.request_id if len(requests) == 1 else f"{self._request.request_id}-{number}"
            call = Call(request_id, caller().tenant, self._request.headers, deadline)
            async with self._calls.admitted(request.generation, call) as admitted:
                return await body(number, admitted)

        async def run_all() -> list[T]:
            if len(requests) == 1:
                return [await run(0, requests[0])]
            async with asyncio.TaskGroup() as group:
                tasks = []
                for numbered in enumerate(requests):
                    tasks.append(group.create_task(run(*numbered)))
                    await asyncio.sleep(0)  # it is prepared now, and other calls come between
            return [task.result() for task in tasks]

        try:
            return await self._request.in_time(run_all())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None


class _Gate:
    """Lets all through when the last has arrived, and not before `begin` is done."""

    def __init__(self, count: int, begin: Callable[[], Awaitable[None]]) -> None:
        self._missing = count
        self._begin = begin
        self._open = asyncio.Event()

    async def arrive(self) -> None:
        """Wait for the others."""
        self._missing -= 1
        if self._missing == 0:
            await self._begin()
            self._open.set()
        await self._open.wait()


class _EventStream:
    """Server-sent events; what gathers between two flushes is one write."""

    def __init__(self, request: HttpRequest, headers: Mapping[str, str]) -> None:
        """`headers`: further ones of the response."""
        self._headers = headers
        self._send: Send = request.send
        self._request = request
        self._request_id = request.request_id
        self._pending: list[str] = []
        self.started = False
        self._is_idle = True  # since the last look
        self._look: asyncio.TimerHandle | None = None
        self._comment: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Send the headers."""
        self.started = True
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # nginx would gather events
            "x-request-id": self._request_id,
            **self._request.extra_headers,
            **self._headers,
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})
        self._look = asyncio.get_running_loop().call_later(_KEEP_ALIVE_S, self._keep_alive)

    def _keep_alive(self) -> None:
        """Write a comment, which clients skip, if nothing else was written for a while, as while a prompt is read."""
        if self._is_idle and (self._comment is None or self._comment.done()):
            self._comment = asyncio.create_task(self._write(_COMMENT))
        self._is_idle = True
        self._look = asyncio.get_running_loop().call_later(_KEEP_ALIVE_S, self._keep_alive)

    async def _write(self, body: bytes) -> None:
        with contextlib.suppress(OSError):  # the client is gone, which is noticed elsewhere
            await self._send({"type": "http.response.body", "body": body, "more_body": True})

    def abandon(self) -> None:
        """Write no comments any more."""
        if self._look is not None:
            self._look.cancel()
        if self._comment is not None:
            self._comment.cancel()

    def add(self, events: str) -> None:
        """Add events to the next write."""
        if events:
            self._pending.append(events)

    async def flush(self) -> None:
        """Write what there is; waits while the client reads too slowly."""
        if self._pending:
            body = "".join(self._pending).encode()
            self._pending.clear()
            self._is_idle = False
            await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self) -> None:
        """Write what there is, and end the response."""
        self.abandon()
        body = "".join(self._pending).encode()
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
