"""A gateway without a model: what it answers is a script. Used over a real socket."""

# ruff: noqa: N802

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.rpc import status_pb2

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    load_pb2,
    load_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)

Event = generation_pb2.StreamEvent
Script = Callable[[generation_pb2.Generation], AsyncIterator[Event]]


def events(words: Sequence[str], finish: bool = True) -> list[Event]:
    """Return the events of an answer that has one token for each word."""
    started = generation_pb2.Started(request_id="r-1", model="fake", prompt_tokens=5)
    answer = [Event(started=started)]
    answer += [
        Event(delta=generation_pb2.Delta(token_offset=i, token_count=1, text=word)) for i, word in enumerate(words)
    ]
    if finish:
        reason = common_pb2.FINISH_REASON_END_OF_SEQUENCE
        answer.append(
            Event(candidate_finished=generation_pb2.CandidateFinished(finish_reason=reason, output_tokens=len(words)))
        )
        usage = common_pb2.Usage(prompt_tokens=5, output_tokens=len(words))
        answer.append(Event(completed=generation_pb2.Completed(usage=usage)))
    for number, event in enumerate(answer):
        event.sequence_number = number
    return answer


class FakeGateway(
    generation_pb2_grpc.GenerationServiceServicer,
    model_pb2_grpc.ModelServiceServicer,
    tokenizer_pb2_grpc.TokenizerServiceServicer,
    load_pb2_grpc.LoadServiceServicer,
):
    """Answers each stream with `answers`, or with the error that `fail` names."""

    def __init__(self) -> None:
        self.address = ""
        self.models = [model_pb2.Model(name="fake", features=["generate", "chat"])]
        self.answer: list[Event] = events(["Hello", ", ", "world", "!"])
        self.hang = False  # after the answer's events, the stream stays open without another one
        self.errors: list[tuple[status_pb2.Status, bool]] = []  # one for each call: its status, and if headers go first
        self.headers_arrived = asyncio.Event()  # set by tests; grpc.aio loses headers that come with a status
        self.requests: list[generation_pb2.Generation] = []
        self.metadata: list[dict[str, Any]] = []
        self.cancelled = asyncio.Event()
        self.cancelled_ids: list[str] = []
        self.batch_calls = 0
        self.batch: Any = None  # if set, answers each BatchGenerate
        self.stream: Any = None  # if set, makes the events of each stream
        self.resume: Any = None  # the same of each ResumeStream

    async def GenerateStream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._begin(request.generation, context)
        if self.stream is not None:
            async for event in self.stream(request.generation, context):
                yield generation_pb2.GenerateStreamResponse(event=event)
            return
        try:
            for event in self.answer:
                yield generation_pb2.GenerateStreamResponse(event=event)
            if self.hang:
                await asyncio.Event().wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    async def ResumeStream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for event in self.resume(request, context):
            yield generation_pb2.ResumeStreamResponse(event=event)

    async def Generate(self, request: Any, context: Any) -> Any:
        await self._begin(request.generation, context)
        response = generation_pb2.GenerateResponse(started=self.answer[0].started, completed=self.answer[-1].completed)
        text = "".join(event.delta.text for event in self.answer)
        response.candidates.add(text=text, finished=self.answer[-2].candidate_finished)
        return response

    async def BatchGenerate(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        self.batch_calls += 1
        async for response in self.batch(requests, context):
            yield response

    async def CancelGeneration(self, request: Any, context: Any) -> Any:
        self.cancelled_ids.append(request.request_id)
        return generation_pb2.CancelGenerationResponse(was_running=True)

    async def ListModels(self, request: Any, context: Any) -> Any:
        return model_pb2.ListModelsResponse(models=self.models)

    async def Tokenize(self, request: Any, context: Any) -> Any:
        answer = tokenizer_pb2.TokenizeResponse()
        for text in [*request.texts, *(["chat"] if request.HasField("chat") else [])]:
            answer.tokenizations.add(token_ids=text.encode())
        return answer

    async def Detokenize(self, request: Any, context: Any) -> Any:
        return tokenizer_pb2.DetokenizeResponse(texts=[bytes(s.ids).decode() for s in request.sequences])

    async def GetLoad(self, request: Any, context: Any) -> Any:
        return load_pb2.GetLoadResponse(schedulers=[load_pb2.SchedulerLoad(scheduler_id="s", running=2)])

    async def _begin(self, generation: generation_pb2.Generation, context: Any) -> None:
        self.requests.append(generation)
        self.metadata.append(dict(context.invocation_metadata()))
        if self.errors:
            status, headers_first = self.errors.pop(0)
            if headers_first:
                await context.send_initial_metadata((("x-request-id", "r-1"),))
                await self.headers_arrived.wait()
            code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
            details = (("grpc-status-details-bin", status.SerializeToString()),)
            await context.abort(code, status.message, details)


@asynccontextmanager
async def serve(credentials: grpc.ServerCredentials | None = None) -> AsyncIterator[FakeGateway]:
    """Run a fake gateway on a free port of 127.0.0.1, with TLS if there are credentials."""
    server = grpc.aio.server()
    gateway = FakeGateway()
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(gateway, server)  # type: ignore[no-untyped-call]
    model_pb2_grpc.add_ModelServiceServicer_to_server(gateway, server)  # type: ignore[no-untyped-call]
    tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(gateway, server)  # type: ignore[no-untyped-call]
    load_pb2_grpc.add_LoadServiceServicer_to_server(gateway, server)  # type: ignore[no-untyped-call]
    port = (
        server.add_insecure_port("127.0.0.1:0")
        if credentials is None
        else server.add_secure_port("127.0.0.1:0", credentials)
    )
    gateway.address = f"127.0.0.1:{port}"
    await server.start()
    try:
        yield gateway
    finally:
        await server.stop(0)
