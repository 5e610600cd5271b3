"""Requests are received after their caller is known, and counted before they are parsed: nobody takes the memory."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc import aio

from octavo.inference.v1 import generation_pb2
from octavo.services.common import grpc_options
from octavo.services.common.api_keys import make_key
from octavo.services.gateway.app import Gateway
from octavo.services.gateway.config import GatewayConfig

GENERATE = "/octavo.inference.v1.GenerationService/Generate"
MIB = 1 << 20


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def empty_messages(num_bytes: int) -> bytes:
    """A GenerateRequest with as many empty chat messages as fit."""
    messages = b"\x0a\x00" * (num_bytes // 2)
    chat = b"\x2a" + varint(len(messages)) + messages
    return b"\x0a" + varint(len(chat)) + chat


async def outcome(call: Any) -> tuple[grpc.StatusCode, str]:
    try:
        await call
    except aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


async def test_a_stranger_is_refused_before_a_byte_of_the_request_is_there(
    config: GatewayConfig, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(yaml.safe_dump([make_key("acme")[1]]))
    gateway = Gateway(dataclasses.replace(config, api_keys=keys))
    await gateway.start()
    never = asyncio.Event()

    async def nothing() -> AsyncIterator[bytes]:
        await never.wait()
        yield b""

    try:
        for port, method in (
            (gateway.port, GENERATE),
            (gateway.port, "/octavo.inference.v1.GenerationService/GenerateStream"),
            (gateway.port, "/octavo.inference.v1.TokenizerService/Tokenize"),
            (gateway.admin_port, "/octavo.admin.v1.AdminService/ListRequests"),
        ):
            async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                code, _ = await outcome(channel.stream_unary(method)(nothing(), timeout=10))
                assert code == grpc.StatusCode.UNAUTHENTICATED, method
    finally:
        await gateway.stop(0)


async def test_a_connection_that_says_nothing_is_closed(config: GatewayConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_options, "_HANDSHAKE_MS", 200)
    gateway = Gateway(config)
    await gateway.start()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        async with asyncio.timeout(10):
            while await reader.read(1000):
                pass  # its own settings
        writer.close()
    finally:
        await gateway.stop(0)


async def test_a_request_longer_than_any_prompt_is_refused(harness: Any) -> None:
    async with aio.insecure_channel(
        f"127.0.0.1:{harness.gateway.port}", [("grpc.max_send_message_length", -1)]
    ) as channel:
        code, message = await outcome(channel.unary_unary(GENERATE)(bytes(9 * MIB), timeout=10))

    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in message


def test_the_longest_request_grows_with_the_context(config: GatewayConfig) -> None:
    assert config.max_message_bytes(131_072) == 8 * MIB
    assert config.max_message_bytes(1 << 20) == 16 * MIB
    assert config.max_message_bytes(1 << 30) == 64 * MIB
    assert dataclasses.replace(config, grpc_max_message_bytes=1000).max_message_bytes(1 << 20) == 1000


async def test_a_running_call_holds_the_memory_of_its_request_until_it_ends(
    config: GatewayConfig, scheduler: Any, tools: Any
) -> None:
    gateway = Gateway(dataclasses.replace(config, request_memory_bytes=2000, admin_address=""))
    await gateway.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:
            harness = tools.Harness(gateway, scheduler, channel, tools.make_tokenizer())
            await harness.connected()
            for _ in range(2):  # the end of the first makes room for the second
                running = harness.stream("hello", scheduling={"cache_salt": "x" * 250})
                submit = await scheduler.next_admitted()

                failure = await tools.rejection(harness.stream("hello", scheduling={"cache_salt": "x" * 250}))
                assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")

                scheduler.tokens(submit.handle, [0], finish=1)
                while await running.read() is not tools.EOF:
                    pass
    finally:
        await gateway.stop(0)


async def test_items_of_a_batch_hold_their_memory_until_they_are_answered(
    config: GatewayConfig, scheduler: Any, tools: Any
) -> None:
    """And the rest waits: it is not refused."""
    gateway = Gateway(dataclasses.replace(config, request_memory_bytes=2000, admin_address=""))
    await gateway.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:
            harness = tools.Harness(gateway, scheduler, channel, tools.make_tokenizer())
            await harness.connected()
            call = harness.stub.BatchGenerate()
            for number in range(3):
                generation = harness.generation("hello", scheduling={"cache_salt": f"{number}" * 250})
                await call.write(generation_pb2.BatchGenerateRequest(item_id=str(number), generation=generation))
            await call.done_writing()
            answered = []
            for _ in range(3):
                submit = await scheduler.next_admitted()
                assert await harness.scheduler_is_silent()  # the next item has no room
                scheduler.tokens(submit.handle, [0], finish=1)
                answered.append((await call.read()).item_id)
            assert answered == ["0", "1", "2"]
    finally:
        await gateway.stop(0)


async def test_an_item_that_cannot_be_read_ends_its_batch_with_the_reason(harness: Any) -> None:
    method = "/octavo.inference.v1.GenerationService/BatchGenerate"

    async def requests() -> AsyncIterator[bytes]:
        yield empty_messages(20_000)[:-1]

    call = harness.channel.stream_stream(method)(requests(), timeout=10)
    assert (await outcome(call.read()))[0] == grpc.StatusCode.INVALID_ARGUMENT


@asynccontextmanager
async def gateway_process(model: Path, folder: Path, *flags: str) -> AsyncIterator[tuple[aio.Channel, int]]:
    """A gateway of its own, whose memory is only its own."""
    address = f"unix:{folder}/g.sock"
    command = [sys.executable, "-m", "octavo.services.gateway", str(model), f"--grpc-address={address}"]
    command += [f"--scheduler-addresses=unix:{folder}/nobody.sock", "--constraint-processes=0", *flags]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    try:
        async with aio.insecure_channel(address, [("grpc.max_send_message_length", -1)]) as channel:
            await asyncio.wait_for(channel.channel_ready(), 60)
            yield channel, process.pid
    finally:
        process.kill()
        await process.wait()


def memory_mb(pid: int, kind: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1]) // 1000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("count", "limit_mb"), [(1, 32), (8, 128)])
async def test_empty_messages_cost_no_memory_without_a_credential(
    model_path: Path, tmp_path: Path, count: int, limit_mb: int
) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(yaml.safe_dump([make_key("acme")[1]]))
    async with gateway_process(model_path, tmp_path, f"--api-keys={keys}", "--model-name=tiny") as (channel, pid):
        await outcome(channel.unary_unary(GENERATE)(b""))
        before = memory_mb(pid, "VmRSS")

        request = empty_messages(24_000_000)
        outcomes = await asyncio.gather(*(outcome(channel.unary_unary(GENERATE)(request)) for _ in range(count)))

        assert {code for code, _ in outcomes} == {grpc.StatusCode.UNAUTHENTICATED}
        assert memory_mb(pid, "VmHWM") - before < limit_mb


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_a_caller_with_all_rights_cannot_fill_the_memory(model_path: Path, tmp_path: Path) -> None:
    """Sixty-four requests of eight megabytes are 512 on the wire, and ten times that when parsed."""
    async with gateway_process(model_path, tmp_path, "--model-name=tiny") as (channel, pid):
        await outcome(channel.unary_unary(GENERATE)(b""))
        before = memory_mb(pid, "VmRSS")

        request = empty_messages(8_000_000)
        outcomes = await asyncio.gather(*(outcome(channel.unary_unary(GENERATE)(request)) for _ in range(64)))

        assert {code for code, _ in outcomes} == {grpc.StatusCode.INVALID_ARGUMENT}
        assert memory_mb(pid, "VmHWM") - before < 400
