"""Streams that break are picked up where their clients are."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2
from octavo.services.common import files
from octavo.services.common.errors import ServingError
from octavo.services.gateway.app import Gateway
from octavo.services.gateway.config import GatewayConfig
from octavo.services.gateway.schedulers import recovery
from octavo.services.gateway.schedulers.resume_token import KeyFileError, ResumeToken, ResumeTokens

Code = grpc.StatusCode
MAX_TOKENS = common_pb2.FINISH_REASON_MAX_TOKENS
KEEP = {"resume_window_ms": 60_000}
TOKEN = ResumeToken("r", "s", "t", 2, 0, False, 0)


@pytest.fixture
def config(config: GatewayConfig, tmp_path: Path) -> GatewayConfig:
    key = tmp_path / "key"
    key.write_text("0123456789abcdef0123456789abcdef")
    return dataclasses.replace(config, resume_key_file=key)


@pytest.fixture
async def other(config: GatewayConfig, harness: Any, tools: Any) -> AsyncIterator[Any]:
    """Another gateway of the same deployment. The scheduler talks to whichever attached last: this one."""
    harness.scheduler.attached.clear()
    gateway = Gateway(dataclasses.replace(config, gateway_id="other", admin_address=""))
    await gateway.start()
    async with aio.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:
        other = tools.Harness(gateway, harness.scheduler, channel, harness.tokenizer)
        await other.connected()
        yield other
    await gateway.stop(0)


def resume(harness: Any, token: str, *offsets: int) -> Any:
    cursors = [generation_pb2.Cursor(candidate_index=n, next_token_offset=at) for n, at in enumerate(offsets)]
    return harness.stub.ResumeStream(generation_pb2.ResumeStreamRequest(resume_token=token, cursors=cursors))


async def read_all(call: Any) -> list[Any]:
    return [response.event async for response in call]


async def reattached(scheduler: Any, submit: Any, ids: list[int]) -> Any:
    """Answer the next Reattach with the state of a request, and with its tokens."""
    asked = await scheduler.next("reattach")
    assert asked.request_id == submit.request_id
    scheduler.send(
        reattached={
            "handle": asked.handle,
            "gateway_state": submit.gateway_state,
            "prompt_tokens": len(submit.prompt_token_ids),
            "candidate_count": 1,
        }
    )
    scheduler.tokens(asked.handle, ids)
    return asked


async def test_a_broken_stream_is_detached_and_goes_on_at_any_gateway_from_the_cursor(harness: Any, other: Any) -> None:
    # The first gateway's words go unread here: it attached first, and the second one is listened to.
    stop = {"stop_sequences": ["STOP"], "min_new_tokens": 4, "max_new_tokens": 30}
    call = other.stream(scheduling=KEEP, stop=stop, sampling={"seed": 9}, output={"token_ids": True})
    submit = await harness.scheduler.next_admitted()
    started = (await call.read()).event.started
    ids = harness.ids("one ST")
    harness.scheduler.tokens(submit.handle, ids)
    delta = (await call.read()).event.delta
    assert (delta.text, delta.token_count) == ("one ", len(ids))
    call.cancel()
    assert (await harness.scheduler.next("detach")).handle == submit.handle

    again = resume(other, started.resume_token, len(ids))
    asked = await reattached(harness.scheduler, submit, [*ids, *harness.ids("OPx")])
    events = await read_all(again)

    assert list(asked.next_token_offsets) == [0]
    assert (events[0].started.request_id, events[0].started.effective_sampling.seed) == (submit.request_id, 9)
    assert events[0].started.prompt_tokens == started.prompt_tokens
    assert "".join(event.delta.text for event in events) == ""  # "ST" was held back, and became the stop string
    assert events[1].delta.token_offset == len(ids)
    assert list(events[1].delta.token_ids) == harness.ids("OP")
    assert events[-2].candidate_finished.stop_sequence == "STOP"
    assert events[-2].candidate_finished.output_tokens == len(ids) + 2
    assert [event.sequence_number for event in events] == list(range(len(events)))


async def test_text_goes_on_inside_a_character_and_log_probabilities_with_their_tokens(harness: Any) -> None:
    call = harness.stream(scheduling=KEEP, output={"logprobs": 1, "token_ids": True})
    submit = await harness.scheduler.next_admitted()
    token = (await call.read()).event.started.resume_token
    call.cancel()
    await harness.scheduler.next("detach")
    ids = harness.ids("aé!")  # four tokens: é is two bytes
    for cursor, text in ((0, "aé!"), (1, "é!"), (2, "é!"), (3, "!"), (4, "")):
        again = resume(harness, token, cursor)
        asked = await reattached(harness.scheduler, submit, [])
        step: dict[str, Any] = {
            "handles": [asked.handle],
            "token_counts": [4],
            "token_ids": ids,
            "logprobs": [0, -1, -2, -3],
            "ranks": [1, 2, 3, 4],
            "candidate_token_ids": ids,
            "candidate_logprobs": [0, -1, -2, -3],
            "finished": [{"handle": asked.handle, "reason": "FINISH_REASON_MAX_TOKENS"}],
        }
        harness.scheduler.send(step_outputs=step)

        events = await read_all(again)

        deltas = [event.delta for event in events if event.HasField("delta")]
        assert "".join(delta.text for delta in deltas) == text
        assert [token_id for delta in deltas for token_id in delta.token_ids] == ids[cursor:]
        assert [-value for delta in deltas for value in delta.logprobs.chosen] == [*range(cursor, 4)]
        assert events[-2].candidate_finished.output_tokens == 4


async def test_a_resumed_stream_survives_the_loss_of_its_scheduler(harness: Any) -> None:
    call = harness.stream(scheduling=KEEP, continue_output={"ids": harness.ids("0")})
    submit = await harness.scheduler.next_admitted()
    token = (await call.read()).event.started.resume_token
    call.cancel()
    await harness.scheduler.next("detach")
    again = resume(harness, token, 2)
    await reattached(harness.scheduler, submit, harness.ids("12"))
    first = await again.read()
    assert first.event.HasField("started")
    assert (await again.read()).event.delta.text == "2"

    await harness.scheduler.stop()
    await harness.scheduler.start()
    moved = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(moved.handle, harness.ids("3"), finish=MAX_TOKENS)

    assert (await again.read()).event.delta.text == "3"
    assert list(moved.continue_token_ids) == harness.ids("012")
    assert moved.prompt_token_ids == submit.prompt_token_ids
    assert moved.sampling == submit.sampling


async def test_what_is_not_kept_is_said_to_be_lost_and_how_to_go_on(harness: Any, tools: Any) -> None:
    call = harness.stream(scheduling=KEEP)
    await harness.scheduler.next_admitted()
    token = (await call.read()).event.started.resume_token
    again = resume(harness, token, 0)
    asked = await harness.scheduler.next("reattach")
    harness.scheduler.send(
        failed={"handle": asked.handle, "code": Code.DATA_LOSS.value[0], "reason": "RESUME_STATE_LOST"}
    )

    failure = await tools.rejection(again)

    assert (failure.code, failure.reason) == (Code.DATA_LOSS, "RESUME_STATE_LOST")
    assert "continue_output" in failure.message
    await harness.scheduler.stop()
    await tools.until(lambda: not harness.gateway.schedulers.peers)
    assert (await tools.rejection(resume(harness, token, 0))).code is Code.DATA_LOSS


async def test_without_a_window_nothing_is_kept_and_there_is_no_token(harness: Any) -> None:
    call = harness.stream()
    submit = await harness.scheduler.next_admitted()
    assert (await call.read()).event.started.resume_token == ""
    assert (submit.resume_window_ms, submit.gateway_state) == (0, b"")
    call.cancel()
    assert (await harness.scheduler.next("cancel")).handle == submit.handle


async def test_an_unary_call_keeps_nothing_for_it_has_no_token_to_give(harness: Any) -> None:
    request = generation_pb2.GenerateRequest(generation=harness.generation(scheduling=KEEP))
    harness.stub.Generate(request)
    submit = await harness.scheduler.next("submit")
    assert (submit.resume_window_ms, submit.gateway_state) == (0, b"")


@pytest.mark.parametrize("spoil", [lambda t: t[:-1], lambda t: "A" + t[1:], lambda t: "???", lambda t: t + "AAAA"])
async def test_a_token_that_was_not_signed_here_is_refused(harness: Any, tools: Any, spoil: Any) -> None:
    good = ResumeTokens(b"another key of this length").sign(TOKEN)
    for token in (spoil(good), good):
        failure = await tools.rejection(resume(harness, token, 0))
        assert (failure.code, failure.fields) == (Code.INVALID_ARGUMENT, ["resume_token"])


def test_a_token_is_of_its_tenant_and_short() -> None:
    tokens = ResumeTokens(b"k" * 32)
    text = tokens.sign(dataclasses.replace(TOKEN, request_id="r" * 128, scheduler_id="s" * 63))
    assert len(text) < 400
    assert tokens.read(tokens.sign(TOKEN), "t") == TOKEN
    with pytest.raises(ServingError, match="is not a token"):
        tokens.read(tokens.sign(TOKEN), "other")


def test_a_key_is_changed_without_a_token_that_is_refused(tmp_path: Path) -> None:
    old, new, file = "o" * 32, "n" * 32, tmp_path / "resume.key"
    file.write_text(old)
    tokens = ResumeTokens.load(file)
    of_old, of_new = tokens.sign(TOKEN), ResumeTokens(new.encode()).sign(TOKEN)

    for lines, signs, believed in (
        ([old, new], of_old, (of_old, of_new)),  # first it is known everywhere
        ([new, old], of_new, (of_old, of_new)),
        ([new], of_new, (of_new,)),
    ):
        file.write_text("\n".join(lines) + "\n")
        tokens = ResumeTokens.load(file)
        assert tokens.sign(TOKEN) == signs
        for text in (of_old, of_new):
            if text in believed:
                assert tokens.read(text, TOKEN.tenant) == TOKEN
            else:
                with pytest.raises(ServingError, match="is not a token"):
                    tokens.read(text, TOKEN.tenant)


def test_a_file_of_keys_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_LOOK_S", -1.0)  # whenever it is asked
    file = tmp_path / "resume.key"
    file.write_text("o" * 32)
    tokens = ResumeTokens.load(file)
    file.write_text("n" * 32 + "\n" + "o" * 32)
    assert tokens.sign(TOKEN) == ResumeTokens(b"n" * 32).sign(TOKEN)
    file.write_text("short")
    assert tokens.sign(TOKEN) == ResumeTokens(b"n" * 32).sign(TOKEN), "the last good ones stay in force"


def test_a_key_of_bytes_is_one_whatever_is_in_it(tmp_path: Path) -> None:
    key = b"\xff" + b"\n" * 3 + bytes(range(40, 70))
    (tmp_path / "key").write_bytes(key)
    assert ResumeTokens.load(tmp_path / "key").sign(TOKEN) == ResumeTokens(key).sign(TOKEN)


def test_a_key_that_is_short_or_not_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("short\n")
    (tmp_path / "long_and_short").write_text("k" * 32 + "\nshort\n")
    (tmp_path / "many").write_text("\n".join(["k" * 32] * 17))
    for name in ("short", "long_and_short", "many", "none"):
        with pytest.raises(KeyFileError, match=name):
            ResumeTokens.load(tmp_path / name)


@pytest.mark.parametrize(
    ("cursors", "field"),
    [
        ([{"candidate_index": 1}], "cursors[0].candidate_index"),
        ([{"next_token_offset": 9}, {"next_token_offset": 9}], "cursors[1].candidate_index"),
        ([{"next_token_offset": 1}], "cursors[0].next_token_offset"),
    ],
)
async def test_cursors_must_fit_the_request(
    harness: Any, tools: Any, cursors: list[dict[str, int]], field: str
) -> None:
    call = harness.stream(scheduling=KEEP, continue_output={"ids": harness.ids("ab")})
    submit = await harness.scheduler.next_admitted()
    token = (await call.read()).event.started.resume_token
    again = harness.stub.ResumeStream(generation_pb2.ResumeStreamRequest(resume_token=token, cursors=cursors))
    await reattached(harness.scheduler, submit, [])

    assert (await tools.rejection(again)).fields == [field]


async def test_a_stopping_gateway_ends_what_is_left_with_what_is_needed_to_go_on(
    config: GatewayConfig, scheduler: Any, tools: Any
) -> None:
    gateway = Gateway(dataclasses.replace(config, admin_address=""))
    await gateway.start()
    async with aio.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:
        harness = tools.Harness(gateway, scheduler, channel, tools.make_tokenizer())
        await harness.connected()
        call = harness.stream(scheduling=KEEP)
        submit = await scheduler.next_admitted()
        token = (await call.read()).event.started.resume_token
        scheduler.tokens(submit.handle, harness.ids("ab"))
        await call.read()

        stopping = asyncio.create_task(gateway.stop(0.05))
        failure = await tools.rejection(call)
        await stopping

    assert (failure.code, failure.reason) == (Code.UNAVAILABLE, "STREAM_INTERRUPTED")
    metadata = failure.details["ErrorInfo"].metadata
    assert (metadata["resume_token"], metadata["last_sequence_number"]) == (token, "1")


async def test_a_stopping_gateway_lets_running_streams_end(config: GatewayConfig, scheduler: Any, tools: Any) -> None:
    gateway = Gateway(dataclasses.replace(config, admin_address=""))
    await gateway.start()
    async with aio.insecure_channel(f"127.0.0.1:{gateway.port}", [("grpc.enable_retries", 0)]) as channel:
        harness = tools.Harness(gateway, scheduler, channel, tools.make_tokenizer())
        await harness.connected()
        call = harness.stream()
        submit = await scheduler.next_admitted()
        await call.read()

        stopping = asyncio.create_task(gateway.stop(30))
        # Until its connection is told (GOAWAY), a call can still come in on it, and be cancelled unbegun.
        await tools.until(lambda: channel.get_state() is not grpc.ChannelConnectivity.READY)
        new = harness.stream()
        with pytest.raises(aio.AioRpcError) as refused:
            await new.read()
        scheduler.tokens(submit.handle, harness.ids("ab"), finish=MAX_TOKENS)
        kinds = []
        while (response := await call.read()) is not tools.EOF:
            kinds.append(response.event.WhichOneof("payload"))
        await stopping  # long before the grace is over

    assert refused.value.code() is Code.UNAVAILABLE
    assert kinds[-1] == "completed"


class SlowClient:
    """A stream whose client reads nothing, behind a small window."""

    def __init__(self, harness: Any, tools: Any, channel: aio.Channel) -> None:
        self.harness = tools.Harness(harness.gateway, harness.scheduler, channel, harness.tokenizer)
        self.tools = tools

    async def fill(self, submit: Any) -> None:
        """Send tokens until the gateway has had enough."""
        scheduler = self.harness.scheduler
        (stream,) = self.harness.gateway.schedulers.streams
        while stream.candidates[0].handle:
            scheduler.tokens(submit.handle, [70] * 200)
            await asyncio.sleep(0)


@pytest.fixture
async def slow(harness: Any, tools: Any) -> AsyncIterator[SlowClient]:
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16_384), ("grpc.enable_retries", 0)]
    async with aio.insecure_channel(f"127.0.0.1:{harness.gateway.port}", options) as channel:
        yield SlowClient(harness, tools, channel)


async def test_a_client_that_does_not_read_pauses_its_request_which_goes_on_when_it_does(slow: SlowClient) -> None:
    scheduler = slow.harness.scheduler
    call = slow.harness.stream(output={"token_ids": True})
    submit = await scheduler.next_admitted()

    await slow.fill(submit)
    assert (await scheduler.next("cancel")).handle == submit.handle  # its blocks are free
    assert scheduler.received.empty()
    reading = asyncio.create_task(read_all(call))
    again = await scheduler.next_admitted()
    scheduler.tokens(again.handle, [71], finish=MAX_TOKENS)
    events = await reading

    ids = [token_id for event in events for token_id in event.delta.token_ids]
    assert ids == [*again.continue_token_ids, 71]
    assert len(ids) > recovery.MAX_UNREAD
    assert events[-1].completed.failovers == 0


async def test_a_client_that_reads_nothing_for_long_is_cut_off_and_can_resume(
    slow: SlowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "PATIENCE_S", 0.3)
    scheduler = slow.harness.scheduler
    call = slow.harness.stream(output={"token_ids": True}, scheduling=KEEP)
    submit = await scheduler.next_admitted()

    await slow.fill(submit)
    await scheduler.next("cancel")
    kept = await scheduler.next("submit")  # to go on without a stream
    assert (await scheduler.next("detach")).handle == kept.handle
    assert kept.gateway_state == submit.gateway_state
    await slow.tools.until(lambda: not slow.harness.gateway.schedulers.streams)

    failure = await slow.tools.rejection(call)
    assert (failure.code, failure.reason) == (Code.ABORTED, "STREAM_INTERRUPTED")
    assert failure.details["ErrorInfo"].metadata["resume_token"]
