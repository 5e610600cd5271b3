"""What is known of a call afterwards: metrics, a line in the log, and nothing that anybody wrote."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc import aio
from prometheus_client.parser import text_string_to_metric_families

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.api_keys import make_key
from octavo.services.common.logging import ACCESS
from octavo.services.gateway.app import Gateway
from octavo.services.gateway.config import GatewayConfig


@pytest.fixture
async def measured(config: GatewayConfig, scheduler: Any, tools: Any) -> AsyncIterator[Any]:
    """A harness whose gateway has metrics."""
    gateway = Gateway(dataclasses.replace(config, metrics_address="127.0.0.1:0", max_requests=1))
    await gateway.start()
    async with aio.insecure_channel(f"127.0.0.1:{gateway.port}", [("grpc.enable_retries", 0)]) as channel:
        harness = tools.Harness(gateway, scheduler, channel, tools.make_tokenizer())
        await harness.connected()
        yield harness
    await gateway.stop(0)


async def scrape(harness: Any, path: str = "/metrics") -> dict[str, float]:
    url = f"http://127.0.0.1:{harness.gateway.metrics_port}{path}"

    def read() -> str:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return str(answer.read().decode())

    return {
        sample.name + "".join(f"[{value}]" for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(await asyncio.to_thread(read))
        for sample in family.samples
    }


def access_lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.fields for record in caplog.records if record.name == ACCESS]  # type: ignore[attr-defined]


async def finished_call(harness: Any, text: str, output: str) -> Any:
    call = harness.stream(text, metadata=(("x-request-id", "req-1"),))
    submit = await harness.scheduler.next_admitted()
    tokens = harness.ids(output)
    usage = common_pb2.Usage(prompt_tokens=len(harness.ids(text)), cached_prompt_tokens=2, output_tokens=len(tokens))
    harness.scheduler.tokens(submit.handle, tokens, finish=common_pb2.FINISH_REASON_MAX_TOKENS, usage=usage)
    async for _ in call:
        pass
    return usage


async def test_a_call_is_counted_once_and_logged_in_one_line(measured: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, ACCESS)
    usage = await finished_call(measured, "hello", "wörld")

    samples = await scrape(measured)

    assert samples["octavo_requests_total[OK][]"] == 1
    assert samples["octavo_prompt_tokens_total[]"] == samples["vllm:prompt_tokens_total[tiny]"] == usage.prompt_tokens
    assert samples["octavo_cached_prompt_tokens_total[]"] == 2
    assert samples["octavo_output_tokens_total[]"] == usage.output_tokens
    assert samples["octavo_candidates_finished_total[length]"] == 1
    assert samples["vllm:request_success_total[length][tiny]"] == 1
    assert samples["octavo_time_to_first_token_seconds_count[]"] == 1
    assert 0 < samples["octavo_time_to_first_token_seconds_sum[]"] <= samples["octavo_request_duration_seconds_sum"]
    assert samples["octavo_requests_in_flight"] == 0
    assert samples["octavo_gateway_schedulers[healthy]"] == 1
    (line,) = access_lines(caplog)
    assert {key: line[key] for key in ("request_id", "tenant", "model", "code", "reason")} == {
        "request_id": "req-1", "tenant": "", "model": "tiny", "code": "OK", "reason": "",
    }  # fmt: skip
    assert (line["prompt_tokens"], line["cached_tokens"]) == (usage.prompt_tokens, 2)
    assert line["output_tokens"] == usage.output_tokens
    assert line["scheduler"] == measured.gateway.schedulers.peers[0].scheduler_id != ""
    assert 0 < line["ttft_ms"] <= line["duration_ms"]


async def test_metrics_say_which_weights_are_served_now(measured: Any, tools: Any) -> None:
    def versions(samples: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in samples.items() if name.startswith("octavo_gateway_model_schedulers")}

    before = versions(await scrape(measured))
    measured.scheduler.say_load(model_version="w2")
    await tools.until(lambda: measured.gateway.schedulers.model_version == "w2")
    assert before != versions(await scrape(measured)) == {"octavo_gateway_model_schedulers[w2]": 1}


async def test_no_line_of_any_level_has_prompt_or_output(measured: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    await finished_call(measured, "sesame-in", "sesame-out")
    call = measured.stream("sesame-in", stop={"max_new_tokens": 99999})
    with pytest.raises(aio.AioRpcError):
        await call.read()
    wrong = generation_pb2.GenerateRequest(generation=generation_pb2.Generation(model="sesame-model", text="sesame-in"))
    with pytest.raises(aio.AioRpcError):
        await measured.stub.Generate(wrong)

    said = [record.getMessage() + str(getattr(record, "fields", "")) for record in caplog.records]

    assert any("sesame-model" in line for line in said), "the lines are looked at"
    assert not [line for line in said if "sesame-in" in line or "sesame-out" in line]
    assert not [line for line in said if str(measured.ids("sesame-in"))[1:-1] in line]


async def test_refusals_are_counted_by_reason_wherever_they_come_from(measured: Any, tools: Any) -> None:
    assert (await tools.rejection(measured.stream(text="", output={"logprobs": 99}))).reason == "INVALID_FIELD"
    wrong = generation_pb2.GenerateRequest(generation=generation_pb2.Generation(model="other", text="hello"))
    assert (await tools.rejection(measured.stub.Generate(wrong))).reason == "MODEL_NOT_FOUND"
    running = measured.stream("hello")
    submit = await measured.scheduler.next("submit")
    assert (await tools.rejection(measured.stream("hello"))).reason == "QUEUE_FULL"
    rejected = {"handle": submit.handle, "code": 8, "reason": "QUOTA_EXCEEDED", "message": "later"}
    measured.scheduler.send(rejected=rejected)
    assert (await tools.rejection(running)).reason == "QUOTA_EXCEEDED"

    samples = await scrape(measured)

    reasons = ("INVALID_FIELD", "MODEL_NOT_FOUND", "QUEUE_FULL", "QUOTA_EXCEEDED")
    assert {reason: samples[f"octavo_rejections_total[{reason}]"] for reason in reasons} == dict.fromkeys(reasons, 1)
    assert samples["octavo_requests_total[RESOURCE_EXHAUSTED][]"] == 2
    assert "octavo_requests_total[OK][]" not in samples


async def test_a_call_that_its_client_leaves_counts_the_tokens_it_got(
    measured: Any, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, ACCESS)
    call = measured.stream("hello")
    submit = await measured.scheduler.next_admitted()
    measured.scheduler.tokens(submit.handle, measured.ids("hello"))
    assert (await call.read()).event.HasField("started")
    assert (await call.read()).event.HasField("delta")
    call.cancel()
    await tools.until(lambda: bool(access_lines(caplog)))

    samples = await scrape(measured)

    assert samples["octavo_requests_total[CANCELLED][]"] == 1
    assert samples["octavo_interruptions_total[CLIENT_CANCELLED]"] == 1
    assert samples["octavo_output_tokens_total[]"] == len(measured.ids("hello"))
    assert samples["octavo_request_duration_seconds_count"] == 0
    assert access_lines(caplog)[0]["code"] == "CANCELLED"


async def test_an_endpoint_picker_reads_the_load_of_all_schedulers_under_vllms_names(measured: Any, tools: Any) -> None:
    measured.scheduler.say_load(waiting=7, running=3, kv_blocks_total=100, kv_blocks_free=25)
    await tools.until(lambda: measured.gateway.schedulers.peers[0].load.waiting == 7)

    assert await scrape(measured, "/metrics/load") == {
        "vllm:num_requests_waiting": 7,
        "vllm:num_requests_running": 3,
        "vllm:kv_cache_usage_perc": 0.75,
        "vllm:cache_config_info[16][100]": 1,
    }


async def test_an_item_of_a_batch_is_one_call_however_often_it_is_tried(
    measured: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """An item that finds no room waits for it: that is no refusal, which nobody was told of."""
    caplog.set_level(logging.INFO, ACCESS)
    call = measured.stub.BatchGenerate(metadata=(("x-request-id", "batch"),))
    generation = measured.generation("hello")
    await call.write(generation_pb2.BatchGenerateRequest(item_id="a", generation=generation))
    await call.done_writing()
    for _ in range(2):
        submit = await measured.scheduler.next("submit")
        full = scheduler_pb2.Rejected(
            handle=submit.handle, code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], reason="QUEUE_FULL"
        )
        measured.scheduler.send(rejected=full)
    submit = await measured.scheduler.next_admitted()
    measured.scheduler.tokens(submit.handle, measured.ids("ok"), finish=common_pb2.FINISH_REASON_MAX_TOKENS)
    (answer,) = [response async for response in call]

    samples = await scrape(measured)

    assert answer.response.candidates[0].text == "ok"
    assert samples["octavo_requests_total[OK][]"] == 1
    assert sum(value for name, value in samples.items() if name.startswith("octavo_requests_total")) == 1
    assert not [name for name in samples if name.startswith("octavo_rejections_total") and samples[name]]
    (line,) = access_lines(caplog)
    assert (line["request_id"], line["code"]) == ("batch-0", "OK")


async def test_so_many_tenants_have_metrics_of_their_own_and_the_others_share_one_name(
    config: GatewayConfig, scheduler: Any, tools: Any, tmp_path: Path
) -> None:
    """Whoever makes keys must not fill the memory of the gateway, and of what scrapes it."""
    made = {tenant: make_key(tenant) for tenant in ("first", "second", "third", "fourth")}
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump([entry for _, entry in made.values()]))
    changes: dict[str, Any] = {"metrics_address": "127.0.0.1:0", "metrics_max_tenants": 2}
    gateway = Gateway(dataclasses.replace(config, api_keys=tmp_path / "keys.yaml", **changes))
    await gateway.start()
    async with aio.insecure_channel(f"127.0.0.1:{gateway.port}", [("grpc.enable_retries", 0)]) as channel:
        harness = tools.Harness(gateway, scheduler, channel, tools.make_tokenizer())
        await tools.until(lambda: bool(gateway.schedulers.peers))
        for key, _ in made.values():
            call = harness.stream("hello", metadata=(("authorization", f"Bearer {key}"),))
            submit = await harness.scheduler.next_admitted()
            harness.scheduler.tokens(submit.handle, harness.ids("ok"), finish=common_pb2.FINISH_REASON_MAX_TOKENS)
            assert [response async for response in call]
        samples = await scrape(harness)
    await gateway.stop(0)

    calls = {name: value for name, value in samples.items() if name.startswith("octavo_requests_total")}
    assert calls == {f"octavo_requests_total[OK][{name}]": n for name, n in (("first", 1), ("second", 1), ("other", 2))}
