"""Models, tokenizer, load, health, reflection, and the operators' service."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from octavo.admin.v1 import admin_pb2, admin_pb2_grpc
from octavo.inference.v1 import (
    load_pb2,
    load_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.gateway.app import Gateway
from octavo.services.gateway.config import GatewayConfig
from octavo.services.gateway.rpc.health import SERVICE_NAMES

Code = grpc.StatusCode
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
GENERATION = "octavo.inference.v1.GenerationService"


async def test_models_are_listed_and_found_by_name_and_alias(harness: Any, tools: Any) -> None:
    stub = harness.service(model_pb2_grpc.ModelServiceStub)

    (model,) = (await stub.ListModels(model_pb2.ListModelsRequest())).models
    by_alias = (await stub.GetModel(model_pb2.GetModelRequest(name="little"))).model
    unknown = await tools.rejection(stub.GetModel(model_pb2.GetModelRequest(name="x")))
    empty = await tools.rejection(stub.GetModel(model_pb2.GetModelRequest()))

    assert model == by_alias
    assert (model.name, list(model.aliases)) == ("tiny", ["little"])
    assert (model.max_context_tokens, model.vocab_size, list(model.end_of_sequence_ids)) == (64, 272, [0])
    assert set(model.features) == {"generate", "chat", "tools", "logprobs", "resume"}
    assert model.version
    assert model.default_sampling.temperature == 1
    assert model.api_revision == 1
    assert (unknown.code, unknown.reason) == (Code.NOT_FOUND, "MODEL_NOT_FOUND")
    assert empty.fields == ["name"]


async def test_the_version_and_the_context_follow_the_workers(harness: Any, tools: Any) -> None:
    stub = harness.service(model_pb2_grpc.ModelServiceStub)
    before = (await stub.GetModel(model_pb2.GetModelRequest(name="tiny"))).model

    harness.scheduler.set_load(scheduler_pb2.Load(workers_ready=1, model_version="w2", max_model_len=40))
    await tools.until(lambda: harness.gateway.schedulers.max_model_len == 40)
    after = (await stub.GetModel(model_pb2.GetModelRequest(name="tiny"))).model

    assert before.version != after.version
    assert after.max_context_tokens == 40


async def test_texts_and_a_chat_are_tokenized_in_order_and_detokenized(harness: Any, tools: Any) -> None:
    stub = harness.service(tokenizer_pb2_grpc.TokenizerServiceStub)
    chat = {"messages": [{"role": "user", "parts": [{"text": "he"}]}]}
    request = tokenizer_pb2.TokenizeRequest(model="tiny", texts=["hello", "é!"], chat=chat, byte_offsets=True)

    first, second, third = (await stub.Tokenize(request)).tokenizations
    ids = [{"ids": first.token_ids}, {"ids": [1, *second.token_ids]}, {}]
    texts = await stub.Detokenize(tokenizer_pb2.DetokenizeRequest(model="tiny", sequences=ids))
    kept = await stub.Detokenize(
        tokenizer_pb2.DetokenizeRequest(model="tiny", sequences=ids[1:2], keep_special_tokens=True)
    )

    assert list(first.token_ids) == harness.ids("hello")
    assert list(second.byte_offsets) == [0, 0, 2]
    assert list(third.token_ids) == harness.ids("<|start|>user\nhe<|end|>\n<|start|>assistant\n")
    assert list(texts.texts) == ["hello", "é!", ""]
    assert list(kept.texts) == ["<|start|>é!"]
    wrong = await tools.rejection(
        stub.Detokenize(tokenizer_pb2.DetokenizeRequest(model="tiny", sequences=[{}, {"ids": [272]}]))
    )
    nothing = await tools.rejection(stub.Tokenize(tokenizer_pb2.TokenizeRequest(model="tiny")))
    role = tokenizer_pb2.TokenizeRequest(model="tiny", chat={"messages": [{"role": "pirate"}]})
    assert wrong.fields == ["sequences[1].ids"]
    assert nothing.fields == ["texts"]
    assert (await tools.rejection(stub.Tokenize(role))).fields == ["chat.messages[0].role"]


async def test_the_tokenizer_downloads_whole_with_hashes(harness: Any, model_path: Path) -> None:
    stub = harness.service(tokenizer_pb2_grpc.TokenizerServiceStub)
    files: dict[str, bytes] = {}
    hashes: dict[str, str] = {}

    async for part in stub.GetTokenizer(tokenizer_pb2.GetTokenizerRequest(model="tiny")):
        assert part.file_name not in hashes
        assert len(part.chunk) <= 262_144
        files[part.file_name] = files.get(part.file_name, b"") + part.chunk
        if part.sha256:
            hashes[part.file_name] = part.sha256

    assert files["tokenizer.json"] == (model_path / "tokenizer.json").read_bytes()
    assert json.loads(files["tokenizer_config.json"])["bos_token"] == "<|start|>"
    assert "<|start|>" in files["chat_template.jinja"].decode()
    assert hashes == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


async def test_load_is_the_scheduler_s_and_watched_again_and_again(harness: Any) -> None:
    stub = harness.service(load_pb2_grpc.LoadServiceStub)

    (load,) = (await stub.GetLoad(load_pb2.GetLoadRequest())).schedulers
    watch = stub.WatchLoad(load_pb2.WatchLoadRequest(interval_ms=1))
    first = await watch.read()
    second = await watch.read()
    watch.cancel()

    assert (load.scheduler_id, load.model, load.kv_blocks_total, load.kv_blocks_free) == ("sched", "tiny", 100, 90)
    assert load.workers_ready == 1
    assert list(first.schedulers) == list(second.schedulers) == [load]


async def test_health_follows_the_scheduler_and_watch_sees_each_change(harness: Any) -> None:
    stub = harness.service(health_pb2_grpc.HealthStub)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=GENERATION))

    async def wait_for(status: int) -> None:
        async with asyncio.timeout(10):
            while (await watch.read()).status != status:
                pass

    await wait_for(SERVING)
    harness.scheduler.set_load(scheduler_pb2.Load(workers_ready=0))
    await wait_for(NOT_SERVING)
    harness.scheduler.set_load(scheduler_pb2.Load(workers_ready=1))
    await wait_for(SERVING)
    harness.scheduler.set_load(scheduler_pb2.Load(workers_ready=1, step_age_ms=31_000))
    await wait_for(NOT_SERVING)
    harness.scheduler.set_load(scheduler_pb2.Load(workers_ready=1))
    await wait_for(SERVING)
    await harness.scheduler.stop()
    await wait_for(NOT_SERVING)
    assert (await stub.Check(health_pb2.HealthCheckRequest(service=""))).status == NOT_SERVING
    models = health_pb2.HealthCheckRequest(service="octavo.inference.v1.ModelService")
    assert (await stub.Check(models)).status == SERVING
    with pytest.raises(aio.AioRpcError) as unknown:
        await stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert unknown.value.code() is Code.NOT_FOUND
    listed = (await stub.List(health_pb2.HealthListRequest())).statuses
    assert {name: each.status for name, each in listed.items()} == {
        name: (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status for name in ("", *SERVICE_NAMES)
    }


async def test_reflection_lists_the_services(harness: Any) -> None:
    stub = harness.service(reflection_pb2_grpc.ServerReflectionStub)
    call = stub.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    answer = await call.read()
    await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=GENERATION))
    files = await call.read()
    call.cancel()

    names = {service.name for service in answer.list_services_response.service}
    assert {GENERATION, "grpc.health.v1.Health", "octavo.inference.v1.ModelService"} <= names
    assert "octavo.scheduler.v1.SchedulerService" not in names
    assert files.file_descriptor_response.file_descriptor_proto


async def test_an_unknown_method_is_unimplemented(harness: Any) -> None:
    with pytest.raises(aio.AioRpcError) as failure:
        await harness.channel.unary_unary("/octavo.inference.v1.GenerationService/Nothing")(b"")

    assert failure.value.code() is Code.UNIMPLEMENTED


async def test_operators_see_requests_and_drain_the_gateway(harness: Any, tools: Any) -> None:
    async with aio.insecure_channel(f"127.0.0.1:{harness.gateway.admin_port}") as channel:
        stub = tools.Harness(harness.gateway, harness.scheduler, channel, None).service(admin_pb2_grpc.AdminServiceStub)
        call = harness.stream("hello", metadata=(("x-request-id", "r1"),))
        submit = await harness.scheduler.next_admitted()
        await call.read()

        (listed,) = (await stub.ListRequests(admin_pb2.ListRequestsRequest())).requests
        drained = await stub.Drain(admin_pb2.DrainRequest(grace_ms=1))
        refused = await tools.rejection(harness.stream())
        flush = await tools.rejection(stub.FlushPrefixCache(admin_pb2.FlushPrefixCacheRequest()))
        health = harness.service(health_pb2_grpc.HealthStub)
        status = (await health.Check(health_pb2.HealthCheckRequest())).status
        harness.scheduler.tokens(submit.handle, harness.ids("ok"), finish=4)
        texts = []
        while (response := await call.read()) is not tools.EOF:
            texts.append(response.event.delta.text)
        again = await stub.Drain(admin_pb2.DrainRequest())

    assert (listed.request_id, listed.gateway_id) == ("r1", "gw")
    assert listed.state == admin_pb2.RequestInfo.STATE_WAITING
    assert listed.prompt_tokens == len(submit.prompt_token_ids)
    assert (drained.requests_left, again.requests_left) == (1, 0)
    assert (refused.code, refused.reason) == (Code.UNAVAILABLE, "DRAINING")
    assert (flush.code, flush.reason) == (Code.FAILED_PRECONDITION, "FEATURE_DISABLED")
    assert status == NOT_SERVING
    assert "".join(texts) == "ok"


async def test_a_gateway_that_was_drained_takes_calls_again_when_it_is_told_to(harness: Any, tools: Any) -> None:
    health = harness.service(health_pb2_grpc.HealthStub)

    async def says(service: str) -> int:
        status: int = (await health.Check(health_pb2.HealthCheckRequest(service=service))).status
        return status

    async with aio.insecure_channel(f"127.0.0.1:{harness.gateway.admin_port}") as channel:
        stub = tools.Harness(harness.gateway, harness.scheduler, channel, None).service(admin_pb2_grpc.AdminServiceStub)
        await stub.Drain(admin_pb2.DrainRequest(grace_ms=1))
        harness.scheduler.set_load(scheduler_pb2.Load(workers_ready=0))
        await tools.until(lambda: not harness.gateway.schedulers.ready)
        harness.scheduler.set_load(scheduler_pb2.Load(workers_ready=1))
        await tools.until(lambda: harness.gateway.schedulers.ready)
        await asyncio.sleep(0.1)  # the monitor has looked: a scheduler that comes back ends no drain
        assert [await says(name) for name in ("", *SERVICE_NAMES)] == [NOT_SERVING] * (1 + len(SERVICE_NAMES))

        await stub.Undrain(admin_pb2.UndrainRequest())

        assert [await says(name) for name in ("", *SERVICE_NAMES)] == [SERVING] * (1 + len(SERVICE_NAMES))
        call = harness.stream("hello")
        taken = await harness.scheduler.next_admitted()
        harness.scheduler.tokens(taken.handle, harness.ids("ok"), finish=4)
        assert (await call.read()) is not tools.EOF
        refused = [
            await tools.rejection(getattr(stub, name)(getattr(admin_pb2, f"{name}Request")()))
            for name in ("SetTenant", "EvictWorker", "LiftQuarantine", "CancelRequests")
        ]
    assert {failure.reason for failure in refused} == {"FEATURE_DISABLED"}


async def test_the_admin_service_is_not_on_the_public_address(harness: Any) -> None:
    stub = harness.service(admin_pb2_grpc.AdminServiceStub)

    with pytest.raises(aio.AioRpcError) as failure:
        await stub.Drain(admin_pb2.DrainRequest())

    assert failure.value.code() is Code.UNIMPLEMENTED


async def test_a_gateway_that_lost_its_last_scheduler_stays_for_what_it_can_do(
    config: GatewayConfig, scheduler: Any, tools: Any, tmp_path: Path
) -> None:
    scheduler.set_load(scheduler_pb2.Load(workers_ready=0))
    probes = f"unix:{tmp_path}/probes.sock"
    gateway = Gateway(dataclasses.replace(config, health_address=probes, failover_s=0.0))
    await gateway.start()
    public = aio.insecure_channel(f"127.0.0.1:{gateway.port}")
    try:
        async with aio.insecure_channel(probes) as channel:

            async def says(channel: Any, service: str = "") -> int:
                asked = health_pb2.HealthCheckRequest(service=service)
                return (await health_pb2_grpc.HealthStub(channel).Check(asked)).status

            await tools.until(lambda: bool(gateway.schedulers.peers))
            assert await says(channel, "readiness") == NOT_SERVING, "it has not served yet: others go on"

            scheduler.set_load(scheduler_pb2.Load(workers_ready=1, model_version="w1"))
            await tools.until(lambda: gateway.schedulers.ready)
            assert await says(channel, "readiness") == SERVING

            scheduler.set_load(scheduler_pb2.Load(workers_ready=0))
            await tools.until(lambda: not gateway.schedulers.ready)
            assert await says(channel, "readiness") == SERVING
            async with asyncio.timeout(10):
                while await says(public) != NOT_SERVING:  # noqa: ASYNC110 - it tells by answers
                    await asyncio.sleep(0.01)
            models = model_pb2_grpc.ModelServiceStub(public)
            assert (await models.ListModels(model_pb2.ListModelsRequest())).models

            await gateway.stop(0)
    finally:
        await public.close()
