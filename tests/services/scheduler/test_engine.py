"""The scheduler process over real sockets: gRPC gateways on one side, a ZeroMQ worker on the other."""

from __future__ import annotations

import asyncio
import json
import os
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import zmq
import zmq.asyncio
from grpc import aio

from octavo.admin.v1 import admin_pb2
from octavo.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from octavo.services.common.interceptor import ErrorInterceptor
from octavo.services.common.protocol import PROTOCOL_REVISION
from octavo.services.scheduler.admin import REQUESTS_AT_ONCE, AdminServicer
from octavo.services.scheduler.config import SchedulerConfig
from octavo.services.scheduler.engine import Engine
from octavo.services.scheduler.server import SchedulerServicer
from octavo.worker.v1 import worker_pb2

from .simulation import FakeWorker, World, expected_output
from .test_cache_events import names

PROMPT = list(range(100, 140))


class WorkerClient:
    """A worker on a real socket, with the fake model."""

    def __init__(self, endpoint: str, name: str = "w1") -> None:
        self.context = zmq.asyncio.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.setsockopt(zmq.ROUTING_ID, name.encode())
        self.socket.connect(endpoint)
        self.name = name
        self.epoch = 0
        self.revision = PROTOCOL_REVISION
        self.model = FakeWorker(64)
        self.task: asyncio.Task[None] | None = None

    async def send(self, **fields: Any) -> None:
        frame = worker_pb2.WorkerFrame(**{"protocol_revision": self.revision, "epoch": self.epoch, **fields})
        await self.socket.send(frame.SerializeToString())

    async def hello(self, **fields: Any) -> None:
        hello = worker_pb2.WorkerHello(**{"worker_id": self.name, "world_size": 1, "device": "fake", **fields})
        await self.send(epoch=0, worker_hello=hello)

    async def receive(self, kind: str) -> worker_pb2.WorkerFrame:
        while True:
            frame = worker_pb2.WorkerFrame.FromString(await self.socket.recv())
            assert frame.protocol_revision == self.revision
            if frame.WhichOneof("kind") == kind:
                return frame

    async def join(self, **ready: Any) -> worker_pb2.WorkerConfig:
        await self.hello()
        frame = await self.receive("worker_config")
        self.epoch = frame.epoch
        self.model = FakeWorker(64)
        await self.send(worker_ready=worker_pb2.WorkerReady(kv_blocks=64, max_model_len=512, **ready))
        return frame.worker_config

    def work(self) -> None:
        """Answer plans until closed."""
        self.task = asyncio.create_task(self._work())

    async def _work(self) -> None:
        while True:
            frame = await self.receive("step_plan")
            await self.send(step_result=self.model.execute(frame.step_plan))

    def close(self) -> None:
        if self.task is not None:
            self.task.cancel()
        self.socket.close()
        self.context.term()


class Gateway:
    """One Attach stream."""

    def __init__(self, stub: scheduler_pb2_grpc.SchedulerServiceStub, name: str = "g1") -> None:
        self.stub = stub
        self.call = stub.Attach()
        self.name = name
        self.tokens: dict[int, list[int]] = {}

    async def send(self, **kind: Any) -> None:
        await self.call.write(scheduler_pb2.AttachRequest(**kind))

    async def hello(self, revision: int = PROTOCOL_REVISION, oldest: int = 0) -> scheduler_pb2.Welcome:
        hello = scheduler_pb2.Hello(gateway_id=self.name, protocol_revision=revision, oldest_protocol_revision=oldest)
        await self.send(hello=hello)
        return (await self.receive("welcome")).welcome

    async def receive(self, kind: str) -> scheduler_pb2.AttachResponse:
        """Return the next message of a kind, and keep the tokens of all that come before."""
        while True:
            message = await self.call.read()
            assert message is not aio.EOF, "the stream ended"
            if message.HasField("step_outputs"):
                outputs, tokens = message.step_outputs, iter(message.step_outputs.token_ids)
                counts = outputs.token_counts or [1] * len(outputs.handles)
                for handle, count in zip(outputs.handles, counts, strict=True):
                    self.tokens.setdefault(handle, []).extend(islice(tokens, count))
            if message.WhichOneof("kind") == kind:
                return message

    async def submit(self, handle: int, max_new_tokens: int = 8, **fields: Any) -> None:
        submit = scheduler_pb2.Submit(
            handle=handle,
            request_id=f"request-{handle}",
            prompt_token_ids=PROMPT,
            stop={"max_new_tokens": max_new_tokens},  # type: ignore[arg-type]
            **fields,
        )
        await self.send(submit=submit)

    async def finish(self, handle: int) -> list[int]:
        """Read until a request has ended; return its tokens."""
        while True:
            message = await self.receive("step_outputs")
            if any(finished.handle == handle for finished in message.step_outputs.finished):
                return self.tokens[handle]


class Process:
    """A scheduler with its servers, in this process."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.config = SchedulerConfig(worker_endpoint=f"ipc://{folder}/worker.sock", **settings)
        self.engine = Engine(self.config)
        self.server = aio.server(interceptors=[ErrorInterceptor()])
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(SchedulerServicer(self.engine), self.server)
        self.address = f"unix:{folder}/scheduler.sock"
        self.server.add_insecure_port(self.address)

    def gateway(self, name: str = "g1") -> Gateway:
        return Gateway(scheduler_pb2_grpc.SchedulerServiceStub(aio.insecure_channel(self.address)), name)

    def worker(self, name: str = "w1") -> WorkerClient:
        return WorkerClient(self.config.worker_endpoint, name)

    async def connect(self) -> tuple[WorkerClient, Gateway]:
        """A worker that has joined, and a gateway that was welcomed."""
        worker, gateway = self.worker(), self.gateway()
        await worker.join()
        await gateway.hello()
        await until(lambda: self.engine.load().workers_ready)
        return worker, gateway


@asynccontextmanager
async def running(folder: Path, **settings: Any) -> AsyncIterator[Process]:
    process = Process(folder, **{"grace_s": 0.0, **settings})
    process.engine.start()
    await process.server.start()
    try:
        yield process
    finally:
        await process.engine.stop()
        await process.server.stop(0)


async def until(condition: Any) -> None:
    """Let the loop run until something holds; the test's own time limit bounds it."""
    while not condition():  # noqa: ASYNC110 - conditions of another object's state, which has no event
        await asyncio.sleep(0.005)


async def test_a_gateway_gets_the_tokens_of_a_worker(tmp_path: Path) -> None:
    async with running(tmp_path) as process:
        worker, gateway = process.worker(), process.gateway()
        config = await worker.join()
        assert config.max_running == 256
        worker.work()
        welcome = await gateway.hello()
        assert welcome.protocol_revision == PROTOCOL_REVISION
        await until(lambda: process.engine.load().workers_ready)
        await gateway.submit(1)
        assert (await gateway.receive("admitted")).admitted.handle == 1
        assert await gateway.finish(1) == expected_output(PROMPT, 8)
        load = process.engine.load()
        assert load.kv_blocks_free == load.kv_blocks_total == 63
        worker.close()


@pytest.mark.parametrize(
    "entry", ["on_frame", "on_gateway_message", "tick", "pump", "probe", "welcome", "gateway_lost"]
)
async def test_an_exception_in_the_core_ends_the_process_wherever_the_loop_entered_it(
    entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashes: list[BaseException] = []
    monkeypatch.setattr(Engine, "_crash", lambda _engine, error: crashes.append(error))

    def broken(*_arguments: Any) -> None:
        raise KeyError("a bug")

    async with running(tmp_path) as process:
        worker, gateway = await process.connect()
        worker.work()
        monkeypatch.setattr(process.engine.node, entry, broken)
        await gateway.submit(1)
        second = process.gateway("g2")
        await second.send(hello=scheduler_pb2.Hello(gateway_id="g2", protocol_revision=PROTOCOL_REVISION))
        if entry == "gateway_lost":
            gateway.call.cancel()
        if entry == "probe":
            process.engine._on_disconnect()
        await until(lambda: crashes)
        assert isinstance(crashes[0], KeyError)
        worker.close()


async def test_a_dead_worker_is_noticed_and_another_one_goes_on(tmp_path: Path) -> None:
    async with running(tmp_path) as process:
        worker, gateway = await process.connect()
        await gateway.submit(1, max_new_tokens=20)
        for _ in range(3):
            plan = (await worker.receive("step_plan")).step_plan
            await worker.send(step_result=worker.model.execute(plan))
        await until(lambda: process.engine.load().running == 1)
        worker.close()
        await until(lambda: not process.engine.load().workers_ready)
        second = process.worker("w2")
        await second.join()
        second.work()
        assert await gateway.finish(1) == expected_output(PROMPT, 20)
        second.close()


async def test_results_of_an_ended_epoch_are_dropped(tmp_path: Path) -> None:
    async with running(tmp_path) as process:
        worker, gateway = await process.connect()
        await gateway.submit(1)
        plan = (await worker.receive("step_plan")).step_plan
        old_epoch, late = worker.epoch, worker.model.execute(plan)
        await worker.join()  # it starts over: the scheduler must give it a new epoch and replay
        assert worker.epoch > old_epoch
        await worker.send(epoch=old_epoch, step_result=late)
        worker.work()
        assert await gateway.finish(1) == expected_output(PROMPT, 8)
        worker.close()


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "answer",
    [
        {"step_id": 77, "token_ids": array("I", [1]).tobytes()},
        {"step_id": 1, "token_ids": b"\1\2\3"},
        {"step_id": 1, "token_ids": array("I", [1]).tobytes(), "ranks": b"\1\2\3\4\5"},
    ],
    ids=["of another step", "half a token", "half a rank"],
)
async def test_a_worker_that_answers_nonsense_is_given_up(tmp_path: Path, answer: dict[str, Any]) -> None:
    async with running(tmp_path, step_timeout_s=3600.0) as process:
        worker, gateway = await process.connect()
        await gateway.submit(1)
        await worker.receive("step_plan")
        await worker.send(step_result=worker_pb2.StepResult(**answer))
        await until(lambda: not process.engine.load().workers_ready)
        await worker.join()
        worker.work()
        assert await gateway.finish(1) == expected_output(PROMPT, 8)
        worker.close()


async def test_garbage_and_other_revisions_on_the_worker_socket_change_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as process:
        stranger = process.worker("stranger")
        for garbage in (b"", b"\x80\x04pickle", b"\xff" * 100):
            await stranger.socket.send(garbage)
        await stranger.send(protocol_revision=99, worker_hello=worker_pb2.WorkerHello(worker_id="x", world_size=1))
        await stranger.hello(rank=5)
        await stranger.send(epoch=123, step_result=worker_pb2.StepResult(step_id=1))
        worker = process.worker()
        await worker.join()
        await until(lambda: process.engine.load().workers_ready)
        stranger.close()
        worker.close()


async def test_a_step_that_is_never_answered_costs_the_worker_its_place(tmp_path: Path) -> None:
    async with running(tmp_path, step_timeout_s=0.2) as process:
        worker, gateway = await process.connect()
        await gateway.submit(1)
        await worker.receive("step_plan")
        await until(lambda: not process.engine.load().workers_ready)
        worker.close()


async def test_a_gateway_that_leaves_takes_its_requests_along(tmp_path: Path) -> None:
    async with running(tmp_path) as process:
        worker, gateway = await process.connect()
        worker.work()
        await gateway.submit(1, max_new_tokens=400)
        await gateway.receive("step_outputs")
        gateway.call.cancel()
        await until(lambda: process.engine.core.is_idle)
        load = process.engine.load()
        assert load.kv_blocks_free == load.kv_blocks_total
        worker.close()


async def test_detach_ends_a_request_without_a_window_and_reattach_is_answered(tmp_path: Path) -> None:
    async with running(tmp_path) as process:
        worker, gateway = await process.connect()
        worker.work()
        await gateway.submit(1, max_new_tokens=400)
        await gateway.receive("step_outputs")
        await gateway.send(detach=scheduler_pb2.Detach(handle=1))
        await until(lambda: process.engine.core.is_idle)
        await gateway.send(reattach=scheduler_pb2.Reattach(handle=2, request_id="request-1", tenant=""))
        failed = (await gateway.receive("failed")).failed
        assert (failed.handle, failed.reason) == (2, "RESUME_STATE_LOST")
        worker.close()


async def test_a_request_goes_on_without_its_gateway_and_with_another_one(tmp_path: Path) -> None:
    async with running(tmp_path) as process:
        worker, gateway = await process.connect()
        worker.work()
        await gateway.submit(1, max_new_tokens=300, resume_window_ms=60_000, gateway_state=b"state")
        await gateway.receive("step_outputs")
        gateway.call.cancel()
        second = process.gateway("g2")
        welcome = await second.hello()
        await until(lambda: process.engine.core.num_requests == 0)  # it ended without a reader
        reattach = scheduler_pb2.Reattach(
            handle=5, request_id="request-1", epoch=welcome.epoch, next_token_offsets=[7], tenant=""
        )
        await second.send(reattach=reattach)
        assert (await second.receive("reattached")).reattached.gateway_state == b"state"
        outputs = (await second.receive("step_outputs")).step_outputs
        assert list(outputs.token_counts) == [293]
        assert list(outputs.token_ids) == expected_output(PROMPT, 300)[7:]
        assert outputs.finished[0].handle == 5
        worker.close()


async def test_watchers_learn_what_the_cache_holds(tmp_path: Path) -> None:
    async with running(tmp_path) as process:
        worker, gateway = await process.connect()
        worker.work()
        watch = gateway.stub.WatchCache(scheduler_pb2.WatchCacheRequest())
        first = await watch.read()
        assert first.cleared
        assert first.kv_block_size == 16
        await gateway.submit(1)
        await gateway.finish(1)
        known: set[int] = set()
        while not known >= set(names(PROMPT)):
            known |= set((await watch.read()).stored_block_hashes)
        worker.close()


async def test_a_worker_that_hangs_is_reported_and_finds_itself_fenced(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    async with running(tmp_path, step_timeout_s=0.2, progress_fd=write_end) as process:
        worker, gateway = await process.connect()
        await gateway.submit(1)
        plan = (await worker.receive("step_plan")).step_plan
        await until(lambda: not process.engine.load().workers_ready)
        report = json.loads(os.read(read_end, 1000))
        assert (report["phase"], report["worker_id"]) == ("fenced", "w1")
        await worker.send(step_result=worker.model.execute(plan))  # it goes on, too late
        fenced = await worker.receive("fenced")
        assert fenced.epoch == worker.epoch
        await worker.join()
        worker.work()
        assert await gateway.finish(1) == expected_output(PROMPT, 8)
        worker.close()
    os.close(read_end)
    os.close(write_end)


async def test_a_repeated_result_changes_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as process:
        worker, gateway = await process.connect()
        await gateway.submit(1)
        for _ in range(4):
            result = worker.model.execute((await worker.receive("step_plan")).step_plan)
            await worker.send(step_result=result)
            await worker.send(step_result=result)
        worker.work()
        assert await gateway.finish(1) == expected_output(PROMPT, 8)
        assert process.engine.load().workers_ready == 1
        worker.close()


@pytest.mark.parametrize("revision", [PROTOCOL_REVISION - 1, PROTOCOL_REVISION])
async def test_gateways_and_workers_of_the_revision_before_are_served_in_it(tmp_path: Path, revision: int) -> None:
    async with running(tmp_path) as process:
        worker, gateway = process.worker(), process.gateway()
        worker.revision = revision
        await worker.join()
        worker.work()
        assert (await gateway.hello(revision=revision)).protocol_revision == revision
        await until(lambda: process.engine.load().workers_ready)
        await gateway.submit(1)
        assert await gateway.finish(1) == expected_output(PROMPT, 8)
        worker.close()


async def test_a_gateway_of_the_next_release_is_spoken_to_in_the_newest_revision_of_both(tmp_path: Path) -> None:
    async with running(tmp_path) as process:
        welcome = await process.gateway().hello(revision=PROTOCOL_REVISION + 1, oldest=PROTOCOL_REVISION)
        assert welcome.protocol_revision == PROTOCOL_REVISION


async def test_a_gateway_that_is_back_before_its_old_stream_broke_gets_nothing_of_that_one(tmp_path: Path) -> None:
    async with running(tmp_path) as process:
        worker, old = await process.connect()
        await old.submit(1, max_new_tokens=300, resume_window_ms=60_000)
        await old.submit(2, max_new_tokens=300)
        await old.receive("admitted")
        again = process.gateway()  # under the same id, and its handles start again: a process of an older release
        await again.hello()
        with pytest.raises((AssertionError, aio.AioRpcError)):  # the old stream ends
            await old.receive("failed")
        await again.submit(1, max_new_tokens=8, cache_salt="other")
        worker.work()

        assert await again.finish(1) == expected_output(PROMPT, 8)
        assert set(again.tokens) == {1}
        process.engine.core.check_invariants()
        await until(lambda: process.engine.core.num_requests == 0)
        await again.submit(2)
        assert await again.finish(2) == expected_output(PROMPT, 8)
        worker.close()


async def test_what_is_kept_of_an_earlier_life_of_a_gateway_is_never_taken_for_a_request_of_this_one(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as process:
        worker, old = await process.connect()
        worker.work()
        await old.submit(1, resume_window_ms=60_000)
        await old.finish(1)
        old.call.cancel()
        again, other = process.gateway(), process.gateway("g2")
        await again.hello()
        welcome = await other.hello()
        prompt = PROMPT[:20]
        submit = scheduler_pb2.Submit(handle=1, request_id="new", prompt_token_ids=prompt)
        submit.stop.max_new_tokens = 400
        await again.send(submit=submit)
        await again.receive("admitted")

        reattach = scheduler_pb2.Reattach(handle=5, request_id="request-1", epoch=welcome.epoch, tenant="")
        await other.send(reattach=reattach)
        await other.receive("reattached")
        process.engine.core.check_invariants()

        assert await again.finish(1) == expected_output(prompt, 400)
        process.engine.core.check_invariants()
        worker.close()


@pytest.mark.parametrize("revision", [PROTOCOL_REVISION - 2, PROTOCOL_REVISION + 1])
async def test_another_revision_of_a_gateway_is_refused_with_advice(tmp_path: Path, revision: int) -> None:
    async with running(tmp_path) as process:
        gateway = process.gateway()
        with pytest.raises(aio.AioRpcError) as caught:
            await gateway.hello(revision=revision)
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "same version" in (caught.value.details() or "")


async def test_load_is_reported_without_being_asked_for(tmp_path: Path) -> None:
    async with running(tmp_path) as process:
        gateway = process.gateway()
        await gateway.hello()
        assert (await gateway.receive("load")).load.workers_ready == 0
        worker = process.worker()
        await worker.join()
        await until(lambda: process.engine.load().workers_ready)
        while not (await gateway.receive("load")).load.workers_ready:
            pass
        worker.close()


async def test_a_long_list_of_requests_lets_others_have_their_turns() -> None:
    world = World(check=False, max_waiting=10_000)
    for n in range(6 * REQUESTS_AT_ONCE):
        world.submit([n + 10] * 20, max_new_tokens=100)
    admin = AdminServicer(SimpleNamespace(core=world.core), world.config)  # type: ignore[arg-type]
    request = admin_pb2.ListRequestsRequest(max_requests=5 * REQUESTS_AT_ONCE)
    listing = asyncio.create_task(admin.ListRequests(request, None))
    num_turns = 0
    while not listing.done():
        await asyncio.sleep(0)
        num_turns += 1
        if num_turns == 2:
            world.cancel(world.streams["g", 5 * REQUESTS_AT_ONCE])  # the last of the list
    assert len((await listing).requests) == 5 * REQUESTS_AT_ONCE - 1
    assert num_turns > 5


async def test_draining_tells_gateways_and_waits_for_running_requests(tmp_path: Path) -> None:
    async with running(tmp_path) as process:
        worker, gateway = await process.connect()
        worker.work()
        await gateway.submit(1, max_new_tokens=100)
        await gateway.receive("admitted")
        admin = AdminServicer(process.engine, process.config)
        listed = await admin.ListRequests(admin_pb2.ListRequestsRequest(), None)
        assert [request.request_id for request in listed.requests] == ["request-1"]
        draining = asyncio.create_task(admin.Drain(admin_pb2.DrainRequest(grace_ms=60_000), None))
        await gateway.receive("draining")
        await gateway.submit(2)
        assert (await gateway.receive("rejected")).rejected.reason == "DRAINING"
        await gateway.finish(1)
        assert (await draining).requests_left == 0
        worker.close()


async def test_workers_are_told_when_their_scheduler_has_stopped(tmp_path: Path) -> None:
    async with running(tmp_path) as process:
        worker, _ = await process.connect()
    frame = await worker.receive("fenced")
    assert (frame.epoch, frame.fenced.reason) == (worker.epoch, "the scheduler stops")
    worker.close()


async def test_a_scheduler_that_starts_again_at_once_has_a_later_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else workers and gateways would take what belongs to its former life for its own."""
    epochs = []
    for now in (1000.000, 1000.002, 1001.5):
        monkeypatch.setattr("octavo.services.scheduler.engine.time.time", lambda now=now: now)
        process = Process(tmp_path)
        epochs.append(process.engine.node.welcome(1, 0.0).epoch)
        process.engine.link.close(asyncio.get_running_loop())

    assert epochs == sorted(set(epochs))
