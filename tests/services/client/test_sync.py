"""The client for programs with threads: closing it, items that wait, and forks."""

# ruff: noqa: N802

from __future__ import annotations

import concurrent.futures
import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from octavo.inference.v1 import generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc
from octavo.services.client import BatchItem, Client, ClientClosedError, SyncClient

WAIT_S = 30


class SilentGateway(generation_pb2_grpc.GenerationServiceServicer, model_pb2_grpc.ModelServiceServicer):
    """Takes generations and answers nothing until it is told to stop; answers what models there are, and batches."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.stop = threading.Event()
        self.answers_batches = True
        self.ends_batches = False  # after the first answer
        self.address = ""

    def Generate(self, request: Any, context: Any) -> Any:
        self.arrived.set()
        self.stop.wait()
        return generation_pb2.GenerateResponse()

    def GenerateStream(self, request: Any, context: Any) -> Iterator[Any]:
        self.arrived.set()
        self.stop.wait()
        yield from ()

    def BatchGenerate(self, requests: Any, context: Any) -> Iterator[Any]:
        for request in requests:
            self.arrived.set()
            if not self.answers_batches:
                self.stop.wait()
                return
            response = generation_pb2.BatchGenerateResponse(item_id=request.item_id)
            response.response.candidates.add(text=request.generation.text)
            yield response
            if self.ends_batches:
                return

    def ListModels(self, request: Any, context: Any) -> Any:
        return model_pb2.ListModelsResponse(models=[model_pb2.Model(name="fake")])


@pytest.fixture
def silent() -> Iterator[SilentGateway]:
    gateway = SilentGateway()
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(8))
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(gateway, server)  # type: ignore[no-untyped-call]
    model_pb2_grpc.add_ModelServiceServicer_to_server(gateway, server)  # type: ignore[no-untyped-call]
    gateway.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield gateway
    finally:
        gateway.stop.set()
        server.stop(0)


def in_thread(work: Callable[[], Any]) -> concurrent.futures.Future[Any]:
    """Run work in a thread that keeps no program from ending."""
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


CALLS: dict[str, Callable[[SyncClient], Any]] = {
    "generate": lambda client: client.generate("Hi"),
    "stream": lambda client: list(client.stream("Hi")),
    "batch": lambda client: list(client.batch([{"prompt": "Hi"}])),
}


@pytest.mark.parametrize("call", CALLS)
def test_closing_ends_the_calls_of_other_threads(silent: Any, call: str) -> None:
    silent.answers_batches = False
    client = SyncClient(silent.address)
    waiting = in_thread(lambda: CALLS[call](client))
    assert silent.arrived.wait(WAIT_S)

    client.close()

    with pytest.raises(ClientClosedError, match="this client is closed"):
        waiting.result(WAIT_S)


def test_closing_ends_what_waits_for_a_server_to_come_back() -> None:
    client = SyncClient("127.0.0.1:1")
    is_tried_again = threading.Event()
    stream = client.stream("Hi", model="fake")
    stream.stream.on_retry = lambda error: is_tried_again.set()
    waiting = in_thread(lambda: list(stream))
    assert is_tried_again.wait(WAIT_S)

    client.close()

    with pytest.raises(ClientClosedError):
        waiting.result(WAIT_S)


@pytest.mark.parametrize("call_has_ended", [False, True])
def test_closing_ends_a_batch_whose_items_do_not_come(silent: Any, call_has_ended: bool) -> None:
    silent.ends_batches = call_has_ended
    asked, never = threading.Event(), threading.Event()

    def items() -> Iterator[BatchItem]:
        yield {"prompt": "one"}
        asked.set()
        never.wait()

    client = SyncClient(silent.address)
    results = client.batch(items())
    assert next(results).index == 0
    waiting = in_thread(lambda: next(results))
    assert asked.wait(WAIT_S)

    client.close()

    with pytest.raises(ClientClosedError):
        waiting.result(WAIT_S)
    never.set()


def test_what_is_called_after_closing_says_so(silent: Any) -> None:
    client = SyncClient(silent.address)
    client.close()
    client.close()
    for call in (*CALLS.values(), lambda client: client.models()):
        with pytest.raises(ClientClosedError):
            call(client)


async def test_the_asynchronous_client_says_so_too(gateway: Any, fake: Any) -> None:
    gateway.answer, gateway.hang = fake.events(["Half"], finish=False), True
    client = Client(gateway.address)
    stream = client.stream("Hi")
    deltas = aiter(stream)
    await anext(deltas)
    await client.close()
    with pytest.raises(ClientClosedError):
        await anext(deltas)
    with pytest.raises(ClientClosedError):
        await client.generate("Hi")
    with pytest.raises(ClientClosedError):
        await anext(client.batch([{"prompt": "Hi"}]))


def test_items_may_call_the_client_that_reads_them(silent: Any) -> None:
    def items(client: SyncClient) -> Iterator[BatchItem]:
        for model in client.models():
            yield {"prompt": "Hi", "model": model.name}

    with SyncClient(silent.address) as client:
        results = in_thread(lambda: list(client.batch(items(client)))).result(WAIT_S)
        assert [result.result.text for result in results] == ["Hi"]


def test_items_that_wait_stop_no_other_call(silent: Any) -> None:
    """The second item waits until another call and the first result have come through the same client."""
    come = threading.Event()

    def items() -> Iterator[BatchItem]:
        yield {"prompt": "one"}
        assert come.wait(WAIT_S)
        yield {"prompt": "two"}

    with SyncClient(silent.address) as client:
        results = client.batch(items())
        assert in_thread(lambda: next(results)).result(WAIT_S).index == 0
        assert len(in_thread(client.models).result(WAIT_S)) == 1
        come.set()
        assert in_thread(lambda: next(results)).result(WAIT_S).index == 1


@pytest.mark.parametrize("item", [None, "text", ["prompt"]])
def test_an_item_that_is_none_is_an_error_and_not_the_end(silent: Any, item: Any) -> None:
    with SyncClient(silent.address) as client, pytest.raises(TypeError, match="item 1 must be a mapping"):
        list(client.batch([{"prompt": "one"}, item, {"prompt": "two"}]))


def test_items_that_end_with_an_exit_end_only_their_batch(silent: Any) -> None:
    def items() -> Iterator[BatchItem]:
        yield {"prompt": "one"}
        raise SystemExit(3)

    with SyncClient(silent.address) as client:
        with pytest.raises(RuntimeError, match=r"the items ended with SystemExit\(3\)"):
            in_thread(lambda: list(client.batch(items()))).result(WAIT_S)
        assert len(client.models()) == 1


@pytest.mark.parametrize("use", ["octavo.SyncClient(address)", "client.models()", "client.close()"])
def test_a_fork_gets_an_error_instead_of_waiting_for_ever(silent: Any, use: str) -> None:
    code = f"""
import os, sys
import octavo
address = {silent.address!r}
client = octavo.SyncClient(address)
client.models()
sys.stdout.flush()
if not (child := os.fork()):
    try:
        {use}
        print("done", flush=True)
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(len(client.models()), "model in the parent", flush=True)
client.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    first, second = done.stdout.splitlines()
    assert "done" in first if "close" in use else "spawn" in first
    assert second == "1 model in the parent"


def test_a_stream_that_is_left_after_the_client_was_closed_raises_nothing(silent: Any) -> None:
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(SyncClient(silent.address))
        stack.enter_context(client.stream("Hi", model="fake"))
        client.close()
