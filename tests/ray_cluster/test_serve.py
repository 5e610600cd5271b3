"""Ray Serve: the same APIs, and an engine that dies costs no token of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import openai
import psutil
import pytest
from ray import serve

import octavo.ray
from octavo import Client, OctavoError
from tests.ports import free_port

from .processes import kill_tree, titled

MODEL = "smollm2-135m-instruct"
RESOURCES = {"num_cpus": 0.5}
LONG: dict[str, Any] = {"max_new_tokens": 160, "temperature": 0, "ignore_end_of_sequence": True}
PROMPT = "Once upon a time"


@dataclass
class App:
    """Where it serves, and the process that Ray's are descendants of."""

    http: str
    grpc: str
    cluster: psutil.Process


@pytest.fixture(scope="module")
def app(cluster: psutil.Process) -> Iterator[App]:
    http, port = free_port(), free_port()
    octavo.ray.start(http_address=f"127.0.0.1:{http}", grpc_port=port)
    application = octavo.ray.application(
        "demo",
        engines={"min_replicas": 2, "max_replicas": 2},
        engine_options={"device": "cpu", "kv_cache_memory": "256MiB"},
        engine_resources=RESOURCES,
        gateway_resources=RESOURCES,
    )
    serve.run(application, name="octavo", route_prefix="/")
    yield App(f"http://127.0.0.1:{http}/v1", f"127.0.0.1:{port}", cluster)
    serve.shutdown()


def sdk(app: App) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=app.http, api_key="none", max_retries=0)


async def grpc_text(app: App) -> tuple[str, int]:
    """Return what a long stream says, and how often it was resumed."""
    async with Client(app.grpc) as client:
        stream = client.stream(PROMPT, **LONG)
        text = "".join([delta.text async for delta in stream])
        assert stream.completed is not None
        assert stream.completed.usage.output_tokens == LONG["max_new_tokens"]
        return text, stream.num_resumed


async def http_text(app: App) -> str:
    stream = await sdk(app).completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=LONG["max_new_tokens"], temperature=0, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])


async def test_the_openai_sdk_gets_answers_streams_and_errors(app: App) -> None:
    client = sdk(app)
    assert [model.id async for model in client.models.list()] == [MODEL]
    question: Any = [{"role": "user", "content": "What is the capital of France?"}]
    answer = await client.chat.completions.create(model=MODEL, messages=question, temperature=0, max_tokens=16)
    assert "Paris" in (answer.choices[0].message.content or "")
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(
            model=MODEL, messages=question, temperature=0, max_tokens=16, stream=True, logprobs=True
        )
    ]
    assert len(chunks) > 3, "it comes in pieces, of several tokens where some were guessed"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await client.chat.completions.create(model=MODEL, messages=question, temperature=-1)
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="no-such-model", messages=question)


async def test_every_kind_of_grpc_call_goes_through(app: App) -> None:
    async with Client(app.grpc) as client:
        (model,) = await client.models()
        assert model.name == MODEL
        assert await client.detokenize(await client.tokenize(PROMPT)) == [PROMPT]
        whole = await client.generate("The capital of France is", max_new_tokens=8, temperature=0)
        stream = client.stream("The capital of France is", max_new_tokens=8, temperature=0, logprobs=1)
        deltas = [delta.text async for delta in stream]
        assert len(deltas) > 1
        assert "".join(deltas) == whole.text
        items: Any = [{"prompt": "The capital of France is", "max_new_tokens": 8, "temperature": 0}] * 3
        assert [each.result.text async for each in client.batch(items) if each.result] == [whole.text] * 3
        with pytest.raises(OctavoError) as failed:
            await client.generate("x", temperature=-1.0)
        assert failed.value.violations  # details are passed on
        with pytest.raises(OctavoError, match="temperature") as failed:
            await anext(aiter(client.stream("x", temperature=-1.0)))
        assert failed.value.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_call_that_is_cancelled_ends_in_the_engine(app: App) -> None:
    async with Client(app.grpc) as client:
        async with client.stream(PROMPT, **(LONG | {"max_new_tokens": 4000})) as stream:
            await anext(aiter(stream))
        await loads_until(client, lambda loads: not any(load.running for load in loads))


async def test_an_engine_that_is_killed_costs_no_token_over_http_and_grpc(app: App) -> None:
    undisturbed, _ = await grpc_text(app)
    assert await http_text(app) == undisturbed
    async with Client(app.grpc) as client:
        running = [asyncio.create_task(grpc_text(app)), *(asyncio.create_task(http_text(app)) for _ in range(2))]
        victim = await busy_engine(client, app)
        kill_tree(victim)
        (text, num_resumed), *texts = await asyncio.gather(*running)
        assert [text, *texts] == [undisturbed] * 3
        assert num_resumed == 0, "the gateway moves a request by itself"
        # Serve replaces the replica, and the gateway finds it.
        await loads_until(client, lambda loads: len([load for load in loads if load.workers_ready]) == 2)


async def test_a_gateway_process_that_is_killed_costs_no_grpc_stream_and_no_new_http_request(app: App) -> None:
    undisturbed, _ = await grpc_text(app)
    async with Client(app.grpc) as client:
        stream = client.stream(PROMPT, **LONG)
        deltas = aiter(stream)
        text = (await anext(deltas)).text
        (gateway,) = titled("octavo gateway", app.cluster)
        gateway.kill()
        answer = await sdk(app).completions.create(
            model=MODEL, prompt="The capital of France is", max_tokens=4, temperature=0
        )
        assert "Paris" in answer.choices[0].text
        assert text + "".join([delta.text async for delta in deltas]) == undisturbed
        assert stream.num_resumed >= 1


async def loads_until(client: Client, wanted: Callable[[Sequence[Any]], bool]) -> Sequence[Any]:
    """Ask how busy the engines are until it is as wanted."""
    async with asyncio.timeout(60):
        while not wanted(loads := await client.load()):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.02)
        return loads


async def busy_engine(client: Client, app: App) -> psutil.Process:
    """Wait until an engine computes; return the process of its replica."""
    loads = await loads_until(client, lambda loads: any(load.running for load in loads))
    busy = [load.scheduler_id for load in loads if load.running]
    (scheduler,) = [
        each for each in titled("octavo scheduler", app.cluster) if f"--scheduler-address={busy[0]}" in each.cmdline()
    ]
    (replica,) = [each for each in scheduler.parents() if "ServeReplica" in " ".join(each.cmdline())]
    return replica
