"""Schedulers that answer and are not for this gateway: of another model, or of another release."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from octavo.common.v1 import common_pb2
from octavo.gpu_worker.sampling.vocabulary import tokenizer_sha256
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.protocol import OLDEST_REVISION, PROTOCOL_REVISION, REVISIONS, choose_revision
from octavo.services.gateway.app import Gateway
from octavo.services.gateway.config import GatewayConfig
from octavo.services.gateway.schedulers import link as scheduler_link
from octavo.services.gateway.schedulers.pool import SchedulerPool
from octavo.services.gateway.tokenization.model_files import read_model
from octavo.services.gateway.tokenization.model_identity import ModelIdentity

MAX_TOKENS = common_pb2.FINISH_REASON_MAX_TOKENS


@pytest.fixture(autouse=True)
def ask_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_link, "_UNFIT_S", 0.02)


@asynccontextmanager
async def schedulers(tools: Any, folder: Path, count: int) -> AsyncIterator[list[Any]]:
    fakes = [tools.FakeScheduler(f"unix:{folder}/f{index}.sock", f"f{index}") for index in range(count)]
    for fake in fakes:
        await fake.start()
    yield fakes
    for fake in fakes:
        await fake.stop()


@asynccontextmanager
async def pool_of(fakes: list[Any], **settings: Any) -> AsyncIterator[SchedulerPool]:
    pool = SchedulerPool([fake.address for fake in fakes], "gw", **settings)
    pool.start()
    try:
        yield pool
    finally:
        await pool.close()


def submit(tokens: int = 3, **fields: Any) -> scheduler_pb2.Submit:
    return scheduler_pb2.Submit(request_id="r", prompt_token_ids=range(tokens), candidate_count=1, **fields)


# Models


@pytest.mark.parametrize("tokens", [{"tokenizer_sha256": "json:other"}, {"vocab_size": 999}, {"model_version": "w2"}])
async def test_a_scheduler_with_another_model_gets_nothing_and_is_named_once(
    config: GatewayConfig, scheduler: Any, caplog: pytest.LogCaptureFixture, tools: Any, tokens: dict[str, Any]
) -> None:
    right = scheduler_pb2.Load()
    right.CopyFrom(scheduler.load)
    scheduler.load.MergeFrom(scheduler_pb2.Load(**tokens))
    gateway = Gateway(dataclasses.replace(config, model_version="w1"))
    await gateway.start()
    await tools.until(lambda: len(scheduler.hellos) >= 3)  # it is asked again and again

    assert not gateway.schedulers.connected
    assert (gateway.schedulers.num_unfit, gateway.schedulers.ready) == (1, False)
    lines = [record.message for record in caplog.records if "is not used" in record.message]
    assert len(lines) == 1, lines
    assert str(next(iter(tokens.values()))) in lines[0]

    scheduler.load = right
    await tools.until(lambda: gateway.schedulers.ready)
    assert gateway.schedulers.num_unfit == 0
    await gateway.stop(0)


async def test_requests_leave_a_scheduler_whose_worker_was_replaced_by_one_of_another_model(
    tmp_path: Path, tools: Any
) -> None:
    async with (
        schedulers(tools, tmp_path, 2) as (first, second),
        pool_of([first, second], identity=ModelIdentity(272, "json:own")) as pool,
    ):
        await tools.until(lambda: len(pool.peers) == 2)
        stream = pool.submit(submit(), None)
        holder = first if stream.scheduler_id == "f0" else second
        other = second if holder is first else first
        await holder.next_admitted()
        await tools.until(lambda: stream.admitted is not None)

        holder.say_load(tokenizer_sha256="json:other", vocab_size=500)
        again = await other.next_admitted()

        assert again.request_id == "r"
        assert [peer.scheduler_id for peer in pool.peers] == [other.scheduler_id]
        stream.close()


def test_tokenizers_are_compared_only_with_their_like() -> None:
    own = ModelIdentity(100, "json:ab", "w1")

    def mismatch(**load: Any) -> str:
        return own.mismatch(scheduler_pb2.Load(**load))

    assert mismatch() == ""  # an older scheduler, or one that has had no worker
    assert mismatch(tokenizer_sha256="json:ab", vocab_size=128) == ""  # the embedding may have more rows
    assert mismatch(tokenizer_sha256="gguf:ff", vocab_size=100) == ""
    assert "128 token ids" in mismatch(tokenizer_sha256="gguf:ff", vocab_size=128)
    assert "json:ff" in mismatch(tokenizer_sha256="json:ff", vocab_size=100)
    assert "w2" in mismatch(model_version="w2")


def test_gateways_and_workers_find_the_same_digest_and_another_one_for_other_tokens(tmp_path: Path, tools: Any) -> None:
    from .test_tokenizer import gguf_bytes, gguf_of

    folder = tools.write_model(tmp_path / "one")
    own = read_model(folder).tokens_sha256
    assert own == tokenizer_sha256(folder) != ""
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["truncation"], definition["version"] = None, "1.1"  # says nothing of what ids mean
    (folder / "tokenizer.json").write_text(json.dumps(definition, indent=1))
    assert tokenizer_sha256(folder) == own

    more = tools.write_model(tmp_path / "more", special_tokens=["<|tool|>"])
    assert tokenizer_sha256(more) == read_model(more).tokens_sha256 != own
    vocab = definition["model"]["vocab"]
    vocab["he"], vocab["ll"] = vocab["ll"], vocab["he"]  # as many tokens, two of them exchanged
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    assert tokenizer_sha256(folder) not in ("", own)

    file, padded = tmp_path / "m.gguf", tmp_path / "padded.gguf"
    metadata = gguf_of(tools.make_tokenizer(), "gpt-2")
    file.write_bytes(gguf_bytes(metadata))
    assert tokenizer_sha256(file) == read_model(file).tokens_sha256
    assert tokenizer_sha256(file).startswith("gguf:")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "[PAD]"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 5]
    padded.write_bytes(gguf_bytes(metadata))
    assert tokenizer_sha256(padded) == tokenizer_sha256(file)
    assert tokenizer_sha256(tmp_path / "missing") == ""


# Releases


@pytest.mark.parametrize("revision", REVISIONS)
def test_each_release_speaks_with_the_one_before_and_the_one_after(revision: int) -> None:
    spoken = choose_revision(revision, revision)
    assert spoken == (revision if revision in (PROTOCOL_REVISION, OLDEST_REVISION) else 0)
    assert choose_revision(PROTOCOL_REVISION + 1, PROTOCOL_REVISION) == PROTOCOL_REVISION
    assert choose_revision(PROTOCOL_REVISION, 0) == PROTOCOL_REVISION
    assert choose_revision(PROTOCOL_REVISION + 1, 0) == 0
    assert choose_revision(OLDEST_REVISION - 1, OLDEST_REVISION - 2) == 0


async def test_a_gateway_works_with_a_scheduler_of_the_release_before(tmp_path: Path, tools: Any) -> None:
    async with schedulers(tools, tmp_path, 1) as (old,):
        old.speaks = (OLDEST_REVISION,)
        async with pool_of([old], min_usable_share=1.0) as pool:
            await tools.until(lambda: pool.ready)
            assert [hello.protocol_revision for hello in old.hellos] == [PROTOCOL_REVISION, OLDEST_REVISION]
            stream = pool.submit(submit(resume_window_ms=5000), None)
            taken = await old.next_admitted()
            old.tokens(taken.handle, [7])
            await tools.until(lambda: stream.num_output_tokens == 1)

            stream.close(keep=True)  # it does not know Detach: without Cancel the request would go on for nobody

            assert (await old.next("cancel")).handle == taken.handle


async def test_a_scheduler_that_was_upgraded_is_spoken_to_in_the_newest_revision(tmp_path: Path, tools: Any) -> None:
    async with schedulers(tools, tmp_path, 1) as (old,):
        old.speaks = (OLDEST_REVISION,)
        async with pool_of([old]) as pool:
            await tools.until(lambda: pool.connected)
            await old.stop()
            old.speaks = (OLDEST_REVISION, PROTOCOL_REVISION)
            await old.start()
            await tools.until(lambda: pool.connected)
            assert pool.peers[0].welcome.protocol_revision == PROTOCOL_REVISION


async def test_a_gateway_is_not_ready_before_it_can_use_its_share_of_those_that_answer(
    tmp_path: Path, tools: Any
) -> None:
    async with schedulers(tools, tmp_path, 4) as fakes:
        gone = fakes.pop()
        await gone.stop()  # unreachable to any gateway: it does not count
        for fake in fakes[1:]:
            fake.protocol_revision = 99
        async with pool_of([*fakes, gone], min_usable_share=0.5) as pool:
            await tools.until(lambda: pool.healthy and pool.num_unfit == 2)
            await tools.until(lambda: all(len(fake.hellos) > 2 for fake in fakes[1:]))
            assert not pool.ready, "one of three"

            fakes[1].protocol_revision = PROTOCOL_REVISION
            await tools.until(lambda: pool.ready)

            fakes[1].protocol_revision = 99
            await fakes[1].stop()
            await fakes[1].start()
            await tools.until(lambda: pool.num_unfit == 2)
            assert pool.ready, "who was ready once is not taken out of service by a roll-out that goes on"


async def test_a_fresh_install_is_ready_with_its_first_engine(tmp_path: Path, tools: Any) -> None:
    async with schedulers(tools, tmp_path, 3) as fakes:
        for fake in fakes[1:]:
            fake.load.workers_ready = 0  # they load their model
        async with pool_of(fakes, min_usable_share=0.5) as pool:
            await tools.until(lambda: pool.ready)


# Lives of a gateway


async def test_a_gateway_that_starts_again_under_its_id_is_another_one_to_schedulers(scheduler: Any) -> None:
    for _ in range(2):
        async with pool_of([scheduler]):
            await asyncio.wait_for(scheduler.attached.wait(), 10)
            scheduler.attached.clear()
    first, second = (hello.gateway_id for hello in scheduler.hellos[:2])
    assert first.startswith("gw-")
    assert first != second


async def test_a_call_that_another_one_took_over_ends_and_is_not_computed_again(harness: Any, tools: Any) -> None:
    call = harness.stream(scheduling={"resume_window_ms": 60_000})
    taken = await harness.scheduler.next_admitted()
    harness.scheduler.tokens(taken.handle, harness.ids("ab"))
    await tools.until(lambda: harness.gateway.schedulers.streams[0].num_output_tokens == 2)
    failed = scheduler_pb2.Failed(
        handle=taken.handle, code=grpc.StatusCode.ABORTED.value[0], reason="TAKEN_OVER", message="another call has it"
    )
    harness.scheduler.send(failed=failed)

    failure = await tools.rejection(call)
    await tools.until(lambda: not harness.gateway.schedulers.streams)
    await harness.scheduler.stop()
    await harness.scheduler.start()
    await harness.connected()

    assert (failure.code, failure.reason) == (grpc.StatusCode.ABORTED, "TAKEN_OVER")
    assert "resume_token" not in failure.details["ErrorInfo"].metadata
    assert await harness.scheduler_is_silent()
