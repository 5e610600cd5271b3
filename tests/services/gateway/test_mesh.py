"""What a gateway and the mesh around it tell each other."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc import aio

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2, generation_pb2_grpc
from octavo.services.gateway.app import Gateway
from octavo.services.gateway.config import GatewayConfig
from octavo.services.gateway.mesh import LoadReports

SERVICE_CONFIG = Path(__file__).resolve().parents[3] / "docs" / "service-config.json"
# xds/data/orca/v3/orca_load_report.proto of github.com/cncf/xds, as far as it is used here.
ORCA = """
cpu_utilization:1 mem_utilization:2 rps:3=uint64 request_cost:4=map utilization:5=map rps_fractional:6 eps:7
named_metrics:8=map application_utilization:9
"""


def orca_report(data: bytes) -> Any:
    """Parse a report as somebody else's program would, who has the official message."""
    file = descriptor_pb2.FileDescriptorProto(name="orca.proto", package="xds.data.orca.v3", syntax="proto3")
    message = file.message_type.add(name="OrcaLoadReport")
    field_types = descriptor_pb2.FieldDescriptorProto
    for name, number, kind in re.findall(r"(\w+):(\d)(?:=(\w+))?", ORCA):
        field = message.field.add(name=name, number=int(number), label=field_types.LABEL_OPTIONAL)
        field.type = field_types.TYPE_UINT64 if kind == "uint64" else field_types.TYPE_DOUBLE
        if kind == "map":
            entry = message.nested_type.add(name="".join(word.capitalize() for word in name.split("_")) + "Entry")
            entry.options.map_entry = True
            entry.field.add(name="key", number=1, label=field.label, type=field_types.TYPE_STRING)
            entry.field.add(name="value", number=2, label=field.label, type=field_types.TYPE_DOUBLE)
            field.label, field.type = field_types.LABEL_REPEATED, field_types.TYPE_MESSAGE
            field.type_name = f".xds.data.orca.v3.OrcaLoadReport.{entry.name}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    official = message_factory.GetMessageClass(pool.FindMessageTypeByName("xds.data.orca.v3.OrcaLoadReport"))
    return official.FromString(data)


@pytest.fixture
async def meshed(config: GatewayConfig, scheduler: Any, tools: Any) -> AsyncIterator[Any]:
    """A harness whose gateway believes the headers of a mesh."""
    changes = {"mesh_headers": True, "mesh_objectives": ("premium=7",), "http_address": "127.0.0.1:0"}
    gateway = Gateway(dataclasses.replace(config, **changes))
    await gateway.start()
    async with aio.insecure_channel(f"127.0.0.1:{gateway.port}", [("grpc.enable_retries", 0)]) as channel:
        harness = tools.Harness(gateway, scheduler, channel, tools.make_tokenizer())
        await harness.connected()
        yield harness
    await gateway.stop(0)


def headers(**values: str) -> tuple[tuple[str, str], ...]:
    return tuple((name.replace("_", "-"), value) for name, value in values.items())


async def test_a_trusted_mesh_says_which_model_whose_call_and_how_urgent(meshed: Any) -> None:
    said = headers(
        x_gateway_model_name_rewrite="little", x_gateway_inference_fairness_id="team-a",
        x_gateway_inference_objective="premium", x_model="public-name",
    )  # fmt: skip
    generation = generation_pb2.Generation(model="public-name", text="hello")
    call = meshed.stub.GenerateStream(generation_pb2.GenerateStreamRequest(generation=generation), metadata=said)
    submit = await meshed.scheduler.next_admitted()

    assert (submit.tenant, submit.priority) == ("team-a", 7)
    assert (await call.read()).event.started.model == "tiny"
    call.cancel()


async def test_http_believes_the_same_headers(meshed: Any) -> None:
    said = dict(headers(x_gateway_model_name_rewrite="tiny", x_gateway_inference_fairness_id="team-a"))
    url = f"http://127.0.0.1:{meshed.gateway.http_port}/v1/completions"
    async with httpx.AsyncClient() as client:
        call = asyncio.create_task(client.post(url, json={"model": "public", "prompt": "hello"}, headers=said))
        submit = await meshed.scheduler.next_admitted()
        meshed.scheduler.tokens(submit.handle, meshed.ids("hello"), finish=common_pb2.FINISH_REASON_MAX_TOKENS)
        answer = await call

    assert submit.tenant == "team-a"
    assert answer.status_code == 200, answer.text


async def test_headers_that_a_client_could_have_set_change_nothing(harness: Any, tools: Any) -> None:
    said = headers(x_gateway_inference_fairness_id="team-a", x_gateway_inference_objective="premium")
    call = harness.stream(metadata=said)
    submit = await harness.scheduler.next_admitted()
    assert (submit.tenant, submit.priority) == ("", 0)
    call.cancel()
    rewrite = headers(x_gateway_model_name_rewrite="other")
    call = harness.stream(metadata=rewrite)
    assert (await harness.scheduler.next("cancel")).handle == submit.handle
    await harness.scheduler.next_admitted()
    assert (await call.read()).event.started.model == "tiny"
    call.cancel()


@pytest.mark.parametrize("objectives", ["premium", "=1", "premium=high", "premium=101"])
def test_objectives_are_checked(config: GatewayConfig, objectives: str) -> None:
    with pytest.raises(ValueError, match="--mesh-objectives"):
        dataclasses.replace(config, mesh_objectives=(objectives,))


async def test_the_trailers_have_usage_and_a_report_that_orca_clients_read(harness: Any, tools: Any) -> None:
    harness.scheduler.say_load(waiting=6, running=3, kv_blocks_total=100, kv_blocks_free=25)
    await tools.until(lambda: harness.gateway.schedulers.peers[0].load.waiting == 6)
    clock = [0.0]
    reports = LoadReports(lambda: [peer.load for peer in harness.gateway.schedulers.peers], lambda: clock[0])
    for failed in (False, False, True, False):
        reports.call_ended(failed)
    clock[0] = 2.0

    report = orca_report(reports.trailer({"output_tokens": 5})[1])

    assert (report.rps_fractional, report.eps) == (2.0, 0.5)
    assert report.utilization["kv_cache"] == 0.75
    assert report.application_utilization == 0.75 + 6 / 3
    assert dict(report.named_metrics) == {"running": 3, "waiting": 6}
    assert dict(report.request_cost) == {"output_tokens": 5}


async def test_a_client_that_weighs_by_orca_reports_prefers_the_gateway_that_is_less_busy(
    config: GatewayConfig, scheduler: Any, tools: Any, tmp_path: Path
) -> None:
    """gRPC keeps the report of a call to itself: so what it makes of it is looked at."""
    weighted = {"weighted_round_robin": {"blackoutPeriod": "0s", "weightUpdatePeriod": "0.1s"}}
    async with two_gateways(config, scheduler, tools, tmp_path, {"loadBalancingConfig": [weighted]}) as (
        busy,
        idle,
        stub,
    ):
        busy.say_load(kv_blocks_total=100, kv_blocks_free=5)
        idle.say_load(kv_blocks_total=100, kv_blocks_free=80)
        served = {busy: 0, idle: 0}

        async def answer(each: Any) -> None:
            while True:
                submit = (await each.received.get()).submit
                if submit.handle:
                    served[each] += 1
                    each.admit(submit.handle)
                    each.tokens(submit.handle, [1], finish=common_pb2.FINISH_REASON_MAX_TOKENS)

        answering = [asyncio.create_task(answer(each)) for each in served]
        generation = generation_pb2.Generation(model="tiny", text="hello")

        async def prefers_idle() -> bool:
            served.update({busy: 0, idle: 0})
            for _ in range(30):
                await stub.Generate(generation_pb2.GenerateRequest(generation=generation), timeout=30)
            return served[idle] > 1.5 * served[busy]

        async with asyncio.timeout(20):
            while not await prefers_idle():
                pass
        for task in answering:
            task.cancel()


async def test_a_plain_grpc_client_with_the_service_config_shares_its_calls_among_gateways(
    config: GatewayConfig, scheduler: Any, tools: Any, tmp_path: Path
) -> None:
    service_config = json.loads(SERVICE_CONFIG.read_text())
    async with two_gateways(config, scheduler, tools, tmp_path, service_config) as (first, second, stub):
        request = generation_pb2.GenerateStreamRequest(generation=generation_pb2.Generation(model="tiny", text="hello"))
        calls = []

        async def send(count: int) -> tuple[int, int]:
            """Send so many calls more; return how many of all have come to each."""
            calls.extend(stub.GenerateStream(request, timeout=30) for _ in range(count))
            await tools.until(lambda: first.received.qsize() + second.received.qsize() >= len(calls))
            return first.received.qsize(), second.received.qsize()

        async with asyncio.timeout(20):
            while not all(before := await send(1)):
                pass  # round robin goes among those that it is connected to: at first that may be one
        after = await send(20)

        assert abs((after[0] - before[0]) - (after[1] - before[1])) <= 2
        for call in calls:
            call.cancel()


@asynccontextmanager
async def two_gateways(
    config: GatewayConfig, scheduler: Any, tools: Any, folder: Path, service_config: dict[str, Any]
) -> AsyncIterator[tuple[Any, Any, Any]]:
    """Give two schedulers, each with a gateway of its own, and a stub of a plain client of both gateways."""
    second = tools.FakeScheduler(f"unix:{folder}/second.sock")
    await second.start()
    schedulers = (scheduler, second)
    gateways = [Gateway(dataclasses.replace(config, scheduler_addresses=(each.address,))) for each in schedulers]
    for gateway in gateways:
        await gateway.start()
    await tools.until(lambda: all(gateway.schedulers.healthy for gateway in gateways))
    addresses = ",".join(f"127.0.0.1:{gateway.port}" for gateway in gateways)
    options = [("grpc.service_config", json.dumps(service_config))]
    async with aio.insecure_channel(f"ipv4:{addresses}", options) as channel:
        yield scheduler, second, generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
    for gateway in gateways:
        await gateway.stop(0)
    await second.stop()
