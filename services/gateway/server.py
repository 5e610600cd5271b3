"""The GenerationService: where a request comes in and its text goes out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from grpc import aio

from octavo.inference.v1 import generation_pb2, generation_pb2_grpc
from octavo.services.common.errors import Reason, ServingError, feature_disabled
from octavo.services.common.interceptor import request_id
from octavo.services.gateway.generation import GenerationRun
from octavo.services.gateway.model import Models
from octavo.services.gateway.prepare import prepare
from octavo.services.gateway.scheduler_client import SchedulerClient
from octavo.services.gateway.validation import RequestValidator

GenerateContext = aio.ServicerContext[generation_pb2.GenerateRequest, generation_pb2.GenerateResponse]
StreamContext = aio.ServicerContext[generation_pb2.GenerateStreamRequest, generation_pb2.GenerateStreamResponse]
ResumeContext = aio.ServicerContext[generation_pb2.ResumeStreamRequest, generation_pb2.ResumeStreamResponse]
CancelContext = aio.ServicerContext[generation_pb2.CancelGenerationRequest, generation_pb2.CancelGenerationResponse]

# A unary answer needs no wake-up for each token; its end is never held back.
_UNARY_COALESCE_MS = 20


def tenant_of(context: GenerateContext | StreamContext) -> str:
    """Return whose call it is. Without authentication all calls are one tenant's."""
    del context
    return ""


def _headers_of(context: GenerateContext | StreamContext) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Every method raises ServingError; the interceptor makes the status."""

    def __init__(
        self, models: Models, scheduler: SchedulerClient, validator: RequestValidator, max_requests: int
    ) -> None:
        self._models = models
        self._scheduler = scheduler
        self._validator = validator
        self._max_requests = max_requests
        self._idle = asyncio.Event()
        self._idle.set()
        self.num_requests = 0
        """Generate calls that run now."""
        self.draining = False
        """New calls are refused."""

    async def wait_idle(self) -> None:
        """Return when no call runs."""
        await self._idle.wait()

    async def Generate(  # noqa: N802 - named by the proto
        self, request: generation_pb2.GenerateRequest, context: GenerateContext
    ) -> generation_pb2.GenerateResponse:
        """Answer with the whole output."""
        self._validator.check(request)
        async with self._admitted(request.generation, context) as run:
            answer = _Answer(request.generation.candidate_count or 1)
            coalesce_ms = max(_UNARY_COALESCE_MS, request.generation.output.max_coalesce_ms)
            async for part in run.responses(coalesce_ms):
                answer.add(part.event)
            context.set_trailing_metadata(_usage_trailers(run))
            return answer.response()

    async def GenerateStream(  # noqa: N802 - named by the proto
        self, request: generation_pb2.GenerateStreamRequest, context: StreamContext
    ) -> None:
        """Write the output as it comes."""
        self._validator.check(request)
        async with self._admitted(request.generation, context) as run:
            async for response in run.responses(request.generation.output.max_coalesce_ms):
                await context.write(response)
            context.set_trailing_metadata(_usage_trailers(run))

    async def ResumeStream(  # noqa: N802 - named by the proto
        self, request: generation_pb2.ResumeStreamRequest, context: ResumeContext
    ) -> None:
        """Refuse: no request is kept after its stream."""
        del context
        self._validator.check(request)
        message = "ResumeStream is off here; call GenerateStream with continue_output set to the tokens received"
        raise feature_disabled("resume", message)

    async def CancelGeneration(  # noqa: N802 - named by the proto
        self, request: generation_pb2.CancelGenerationRequest, context: CancelContext
    ) -> generation_pb2.CancelGenerationResponse:
        """End a request of any gateway of this scheduler."""
        del context
        self._validator.check(request)
        cancelled = await self._scheduler.cancel_request(request.request_id)
        usage = cancelled.usage if cancelled.HasField("usage") else None
        return generation_pb2.CancelGenerationResponse(was_running=cancelled.was_running, usage=usage)

    @asynccontextmanager
    async def _admitted(
        self, generation: generation_pb2.Generation, context: GenerateContext | StreamContext
    ) -> AsyncIterator[GenerationRun]:
        """Submit a request and wait for its admission; response headers are sent then, and not before.

        However the body ends, the scheduler is told unless it ended the request itself.
        """
        self._enter()
        try:
            scheduler = self._scheduler
            prepared = await prepare(
                generation,
                self._models,
                scheduler.load.max_model_len,
                request_id(),
                tenant_of(context),
                _headers_of(context),
            )
            stream = scheduler.submit(prepared.submit, context.time_remaining())
            try:
                while stream.admitted is None and stream.error is None:
                    await stream.wait()
                if stream.admitted is None:
                    assert stream.error is not None, "a stream is admitted or fails"
                    raise stream.error
                version = prepared.model.version(scheduler.load.model_version)
                run = GenerationRun(prepared, stream, version)
                await context.send_initial_metadata(
                    (
                        ("x-request-id", request_id()),
                        ("x-model-version", version),
                        ("x-scheduler-id", scheduler.welcome.scheduler_id if scheduler.welcome else ""),
                    )
                )
                yield run
            finally:
                stream.close()
        finally:
            self._leave()

    def _enter(self) -> None:
        if self.draining:
            raise ServingError(Reason.DRAINING, "the gateway is stopping; try again", retry_after_ms=500)
        if self.num_requests >= self._max_requests:
            message = f"{self.num_requests} calls are running, as many as this gateway takes; try again later"
            raise ServingError(Reason.QUEUE_FULL, message, retry_after_ms=1000)
        self.num_requests += 1
        self._idle.clear()

    def _leave(self) -> None:
        self.num_requests -= 1
        if self.num_requests == 0:
            self._idle.set()


def _usage_trailers(run: GenerationRun) -> tuple[tuple[str, str], ...]:
    usage = run.completed.usage
    return (
        ("x-request-id", run.started.request_id),
        ("x-usage-prompt-tokens", str(usage.prompt_tokens)),
        ("x-usage-cached-tokens", str(usage.cached_prompt_tokens)),
        ("x-usage-output-tokens", str(usage.output_tokens)),
    )


class _Answer:
    """Gathers the events of a stream into the answer of Generate."""

    def __init__(self, num_candidates: int) -> None:
        self._response = generation_pb2.GenerateResponse(
            candidates=[generation_pb2.Candidate(index=index) for index in range(num_candidates)]
        )
        self._texts: list[list[str]] = [[] for _ in range(num_candidates)]

    def add(self, event: generation_pb2.StreamEvent) -> None:
        """Take the next event."""
        response = self._response
        kind = event.WhichOneof("payload")
        if kind == "delta":
            delta = event.delta
            candidate = response.candidates[delta.candidate_index]
            self._texts[delta.candidate_index].append(delta.text)
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
        return self._response
