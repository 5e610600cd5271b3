"""The GenerationService: where a request comes in and its text goes out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from grpc import aio

from octavo.inference.v1 import generation_pb2, generation_pb2_grpc
from octavo.services.common.interceptor import request_id
from octavo.services.gateway.authentication import caller
from octavo.services.gateway.mesh import LoadReports
from octavo.services.gateway.requests.accounting import Call
from octavo.services.gateway.requests.calls import GenerateCalls
from octavo.services.gateway.requests.generation import GenerationRun, ask_for_whole_answer, whole_answer
from octavo.services.gateway.rpc.batch import BatchCall, BatchLimits
from octavo.services.gateway.schedulers.pool import SchedulerPool
from octavo.services.gateway.validation import RequestValidator

GenerateContext = aio.ServicerContext[generation_pb2.GenerateRequest, generation_pb2.GenerateResponse]
StreamContext = aio.ServicerContext[generation_pb2.GenerateStreamRequest, generation_pb2.GenerateStreamResponse]
ResumeContext = aio.ServicerContext[generation_pb2.ResumeStreamRequest, generation_pb2.ResumeStreamResponse]
CancelContext = aio.ServicerContext[generation_pb2.CancelGenerationRequest, generation_pb2.CancelGenerationResponse]
BatchContext = aio.ServicerContext[generation_pb2.BatchGenerateRequest, generation_pb2.BatchGenerateResponse]
AnyContext = GenerateContext | StreamContext | ResumeContext


def call_of(context: aio.ServicerContext[Any, Any]) -> Call:
    """Return what is known of a call besides its request: of the metadata those that are text."""
    headers = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    remaining_s = context.time_remaining()
    deadline = None if remaining_s is None else asyncio.get_running_loop().time() + remaining_s
    return Call(request_id(), caller().tenant, headers, deadline)


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Every method raises ServingError; the interceptor makes the status."""

    def __init__(
        self,
        calls: GenerateCalls,
        schedulers: SchedulerPool,
        validator: RequestValidator,
        batch_limits: BatchLimits,
        load_reports: LoadReports,
    ) -> None:
        self._load_reports = load_reports
        self._calls = calls
        self._batch_limits = batch_limits
        self._schedulers = schedulers
        self._validator = validator

    async def Generate(  # noqa: N802 - named by the proto
        self, request: generation_pb2.GenerateRequest, context: GenerateContext
    ) -> generation_pb2.GenerateResponse:
        """Answer with the whole output."""
        await self._calls.check(request, caller().tenant)
        ask_for_whole_answer(request.generation)
        async with self._admitted(request.generation, context) as run:
            coalesce_ms = request.generation.output.max_coalesce_ms
            answer = await whole_answer(run, request.generation.candidate_count or 1, coalesce_ms)
            context.set_trailing_metadata(self._trailers(run))
            return answer

    async def GenerateStream(  # noqa: N802 - named by the proto
        self, request: generation_pb2.GenerateStreamRequest, context: StreamContext
    ) -> None:
        """Write the output as it comes."""
        await self._calls.check(request, caller().tenant)
        async with self._admitted(request.generation, context, can_resume=True) as run:
            async for response in run.responses(request.generation.output.max_coalesce_ms):
                await context.write(response)
            context.set_trailing_metadata(self._trailers(run))

    async def ResumeStream(  # noqa: N802 - named by the proto
        self, request: generation_pb2.ResumeStreamRequest, context: ResumeContext
    ) -> None:
        """Write the rest of an output whose stream broke, from the client's cursors on."""
        await self._calls.check(request, caller().tenant)
        async with self._calls.resumed(request, call_of(context)) as run:
            await self._send_headers(context, run)
            async for response in run.responses(run.max_coalesce_ms):
                await context.write(generation_pb2.ResumeStreamResponse(event=response.event))
            context.set_trailing_metadata(self._trailers(run))

    async def BatchGenerate(  # noqa: N802 - named by the proto
        self, requests: AsyncIterator[generation_pb2.BatchGenerateRequest], context: BatchContext
    ) -> None:
        """Answer each item of a call as soon as it is done."""
        await context.send_initial_metadata((("x-request-id", request_id()),))
        await BatchCall(self._calls, self._batch_limits, call_of(context)).run(requests, context.write)

    async def CancelGeneration(  # noqa: N802 - named by the proto
        self, request: generation_pb2.CancelGenerationRequest, context: CancelContext
    ) -> generation_pb2.CancelGenerationResponse:
        """End a request of the caller's tenant, of any gateway and at any scheduler."""
        del context
        self._validator.check(request)
        cancelled = await self._schedulers.cancel_request(request.request_id, caller().tenant)
        usage = cancelled.usage if cancelled.HasField("usage") else None
        return generation_pb2.CancelGenerationResponse(was_running=cancelled.was_running, usage=usage)

    @asynccontextmanager
    async def _admitted(
        self,
        generation: generation_pb2.Generation,
        context: GenerateContext | StreamContext,
        can_resume: bool = False,
    ) -> AsyncIterator[GenerationRun]:
        """Submit a request and wait for its admission; response headers are sent then, and not before."""
        async with self._calls.admitted(generation, call_of(context), can_resume) as run:
            await self._send_headers(context, run)
            yield run

    async def _send_headers(self, context: AnyContext, run: GenerationRun) -> None:
        """Send the response headers: they tell the client that the request was admitted."""
        await context.send_initial_metadata(
            (
                ("x-request-id", run.started.request_id),
                ("x-model-version", run.started.model_version),
                ("x-scheduler-id", run.scheduler_id),
            )
        )

    def _trailers(self, run: GenerationRun) -> tuple[tuple[str, str | bytes], ...]:
        """Return what a call used, and how busy this gateway's schedulers are."""
        usage = run.completed.usage
        used = {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_prompt_tokens,
            "output_tokens": usage.output_tokens,
        }
        return (
            ("x-request-id", run.started.request_id),
            *((f"x-usage-{name.replace('_', '-')}", str(count)) for name, count in used.items()),
            self._load_reports.trailer(used),
        )
