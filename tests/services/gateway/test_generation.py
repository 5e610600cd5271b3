"""From a request's inbox to its events, without a server."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.errors import Reason, ServingError
from octavo.services.gateway.generation import GenerationRun
from octavo.services.gateway.model import Models, ServedModel
from octavo.services.gateway.prepare import Prepared, prepare
from octavo.services.gateway.request_stream import RequestStream
from octavo.services.gateway.tokenizer import ModelTokenizer


async def prepared(model_path: Path) -> Prepared:
    model = ServedModel("tiny", (), ModelTokenizer.load(model_path), 64)
    return await prepare(generation_pb2.Generation(model="tiny", text="he"), Models([model]), 0, "r", "")


def admitted(request: Prepared) -> RequestStream:
    stream = RequestStream(request.submit, None, lambda _stream, _index, _keep: None)
    stream.admitted = scheduler_pb2.Admitted()
    stream.wake()
    return stream


async def test_tokens_and_the_end_that_came_with_the_admission_are_not_waited_for(model_path: Path) -> None:
    request = await prepared(model_path)
    stream = admitted(request)
    stream.candidates[0].token_ids += [70, 71]
    stream.candidates[0].finished = scheduler_pb2.Finished(reason=common_pb2.FINISH_REASON_MAX_TOKENS)
    stream.wake_at_end()
    await stream.wait()  # as the handler does for the admission

    run = GenerationRun(request, stream)
    async with asyncio.timeout(10):
        kinds = [response.event.WhichOneof("payload") async for response in run.responses(0)]

    assert kinds == ["started", "delta", "candidate_finished", "completed"]


async def test_what_comes_while_a_delta_is_written_is_in_the_next_one(model_path: Path) -> None:
    request = await prepared(model_path)
    stream = admitted(request)
    candidate = stream.candidates[0]
    candidate.token_ids.append(70)
    kinds, counts = [], []

    async with asyncio.timeout(10):
        async for response in GenerationRun(request, stream).responses(0):
            kinds.append(response.event.WhichOneof("payload"))
            counts.append(response.event.delta.token_count)
            if kinds == ["started", "delta"]:
                candidate.token_ids += [71, 72]
                candidate.finished = scheduler_pb2.Finished(reason=common_pb2.FINISH_REASON_MAX_TOKENS)
                stream.wake_at_end()

    assert kinds == ["started", "delta", "delta", "candidate_finished", "completed"]
    assert counts == [0, 1, 2, 0, 0]


async def test_an_error_comes_after_the_tokens_before_it(model_path: Path) -> None:
    request = await prepared(model_path)
    stream = admitted(request)
    stream.candidates[0].token_ids.append(70)
    stream.fail(ServingError(Reason.WORKER_FAULT, "lost"))
    kinds = []

    async def read() -> None:
        async for response in GenerationRun(request, stream).responses(0):
            kinds.append(response.event.WhichOneof("payload"))  # noqa: PERF401 - kept when an error ends it

    with pytest.raises(ServingError, match="lost"):
        await read()

    assert kinds == ["started", "delta"]
