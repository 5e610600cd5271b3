"""From a request's inbox to its events, without a server."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.errors import Reason, ServingError
from octavo.services.gateway.requests.generation import GenerationRun, Prepared
from octavo.services.gateway.requests.model import Models, ServedModel
from octavo.services.gateway.requests.prepare import prepare
from octavo.services.gateway.schedulers.request_stream import RequestStream
from octavo.services.gateway.tokenization.tokenizer import ModelTokenizer


async def prepared(model_path: Path, tenant: str = "", text: str = "he", **fields: Any) -> Prepared:
    model = ServedModel("tiny", (), ModelTokenizer.load(model_path), 64)
    return await prepare(generation_pb2.Generation(model="tiny", text=text, **fields), Models([model]), 0, "r", tenant)


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


async def test_several_candidates_are_billed_together_and_what_all_found_in_the_cache_counts_once(
    model_path: Path,
) -> None:
    request = await prepared(model_path, candidate_count=3, text="hello hello hello")
    stream = admitted(request)
    for candidate, cached, accepted in zip(stream.candidates, (7, 2, 5), (1, 4, 2), strict=True):
        candidate.token_ids += [70, 71]
        usage = common_pb2.Usage(cached_prompt_tokens=cached, speculative_accepted_tokens=accepted)
        reason = common_pb2.FINISH_REASON_MAX_TOKENS
        candidate.finished = scheduler_pb2.Finished(candidate_index=candidate.index, reason=reason, usage=usage)
    stream.wake_at_end()

    async with asyncio.timeout(10):
        events = [response.event async for response in GenerationRun(request, stream).responses(0)]

    usage = events[-1].completed.usage
    assert (usage.output_tokens, usage.speculative_accepted_tokens) == (6, 7)
    assert usage.cached_prompt_tokens == 2  # what was computed for one of them was not cached for the request


def texts_of(parts: list[str]) -> list[str]:
    return ["".join(chosen) for count in range(3) for chosen in itertools.product(parts, repeat=count)]


async def test_no_tenant_can_name_the_cached_prefixes_of_another_one(model_path: Path) -> None:
    """Whatever stands in names and salts: those that only look alike when they are joined differ."""
    models = Models([ServedModel("tiny", (), ModelTokenizer.load(model_path), 64)])
    texts, salts = texts_of(["a", ":", "1"]), {}
    for tenant, salt in itertools.product(texts, texts):
        generation = generation_pb2.Generation(model="tiny", text="he", scheduling={"cache_salt": salt})
        salts[tenant, salt] = (await prepare(generation, models, 0, "r", tenant)).submit.cache_salt

    assert len(set(salts.values())) == len(salts)
