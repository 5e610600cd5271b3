"""Fuzz targets: each takes bytes as they come from outside, and raises nothing but for a bug."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from octavo.inference.v1 import generation_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.errors import ServingError, status_text, trailers
from octavo.services.common.protocol import PROTOCOL_REVISION
from octavo.services.gateway.http.chat_request import read_chat_call, read_completion_call
from octavo.services.gateway.http.endpoint import parse_object
from octavo.services.gateway.http.errors import in_openai_words
from octavo.services.gateway.http.requests import ApiCall
from octavo.services.gateway.http.responses_request import read_responses_call
from octavo.services.gateway.requests.generation import ask_for_whole_answer
from octavo.services.gateway.requests.model import Models, ServedModel
from octavo.services.gateway.requests.prepare import check_headers, prepare
from octavo.services.gateway.schedulers.resume_token import ResumeToken, ResumeTokens
from octavo.services.gateway.tokenization.tokenizer import ModelTokenizer
from octavo.services.gateway.validation import RequestValidator
from octavo.services.scheduler.config import SchedulerConfig
from octavo.services.scheduler.core.effects import SendToGateway
from octavo.services.scheduler.node import Node
from octavo.worker.v1 import worker_pb2
from tests.services.gateway.conftest import write_model

CONTEXT = 256
MAX_FRAMES = 32
KEY = b"a key that the fuzzer does not know"


@cache
def models() -> Models:
    """The tiny model of the gateway's tests, with tools and reasoning."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = ModelTokenizer.load(write_model(Path(folder) / "m", context=CONTEXT), 1)
    return Models([ServedModel("m", (), tokenizer, CONTEXT, tool_call_format="hermes", reasoning_format="think")])


@cache
def validator() -> RequestValidator:
    return RequestValidator()


@cache
def loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def refusable(work: Callable[[], Awaitable[object] | None]) -> None:
    """Do what may refuse: then there must be a status to answer with."""
    try:
        if (awaitable := work()) is not None:
            loop().run_until_complete(_wait(awaitable))
    except ServingError as error:
        status_text(error).encode()
        trailers(error, "r")


async def _wait(awaitable: Awaitable[object]) -> None:
    await awaitable


def _prepare(generation: generation_pb2.Generation) -> Awaitable[object]:
    check_headers(generation, {})
    return prepare(generation, models(), 0, "r", "tenant")


def generate(data: bytes) -> None:
    """A GenerateStreamRequest as gRPC hands it over."""
    with suppress(DecodeError, ValueError):
        request = generation_pb2.GenerateStreamRequest.FromString(data)

        def answer() -> Awaitable[object]:
            validator().check(request)
            return _prepare(request.generation)

        refusable(answer)


def resume_token(data: bytes) -> None:
    """A resume token that a client sends; one of our own, too, with anything for its tenant."""
    text, tokens = data.decode("latin-1"), ResumeTokens(KEY)
    refusable(lambda: tokens.read(text, "tenant") and None)
    signed = tokens.sign(ResumeToken(text, "s", text, 1, 0, False, 0))
    assert tokens.read(signed, text).request_id == text
    with suppress(DecodeError, ValueError):
        validator().violations(generation_pb2.ResumeStreamRequest.FromString(data))


async def _prepare_all(call: ApiCall) -> None:
    for request in call.requests:
        await _prepare(request.generation)


def _body(read: Callable[[Mapping[str, Any], Mapping[str, str]], ApiCall]) -> Callable[[bytes], None]:
    """Return the target of an HTTP endpoint's body."""

    def target(data: bytes) -> None:
        def answer() -> Awaitable[object]:
            names: Mapping[str, str] = {}
            try:
                call = read(parse_object(data), {})
                names = call.names
                for request in call.requests:
                    validator().check(request)
                    if not call.stream:
                        ask_for_whole_answer(request.generation)
                return _prepare_all(call)
            except ServingError as error:
                raise in_openai_words(error, names) from None

        refusable(answer)

    return target


def worker_frames(data: bytes) -> None:
    """Frames of a worker that has joined and has work: each begins with two bytes, its length and how it is changed."""
    node, sent = _node_with_work()
    now = 1000.0
    for kind, frame in _frames(data):
        epoch = sent[-1].epoch if sent else 0
        if kind & 1:  # else it would hardly ever be of this epoch
            frame.epoch, frame.protocol_revision = epoch, PROTOCOL_REVISION
        now += 0.01 * (kind >> 4)
        node.on_frame(b"w" if kind & 2 else b"stranger", frame, now)
        node.tick(now)
        node.pump(now)
        node.core.check_invariants()


def _frames(data: bytes) -> Iterator[tuple[int, worker_pb2.WorkerFrame]]:
    for _ in range(MAX_FRAMES):
        if len(data) < 2:
            return
        length, kind, rest = data[0], data[1], data[2:]
        with suppress(DecodeError):
            yield kind, worker_pb2.WorkerFrame.FromString(rest[:length])
        data = rest[length:]


def _node_with_work() -> tuple[Node, list[worker_pb2.WorkerFrame]]:
    """Return a scheduler with a worker and two requests, and all that it sends to workers."""
    sent: list[worker_pb2.WorkerFrame] = []

    def send(identity: bytes, frame: worker_pb2.WorkerFrame) -> bool:
        del identity
        copy = worker_pb2.WorkerFrame()
        copy.CopyFrom(frame)
        sent.append(copy)
        return True

    def deliver(effect: SendToGateway) -> None:
        effect.message.SerializeToString()

    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64)
    node = Node(
        config, "s", 1, 1000.0, send=send, deliver=deliver, changed=lambda: None, fenced=lambda *_: None
    )  # fmt: skip
    hello = worker_pb2.WorkerHello(worker_id="w", world_size=1, device="fuzz")
    node.on_frame(b"w", worker_pb2.WorkerFrame(protocol_revision=PROTOCOL_REVISION, worker_hello=hello), 1000.0)
    ready = worker_pb2.WorkerReady(kv_blocks=16, max_model_len=100)
    frame = worker_pb2.WorkerFrame(protocol_revision=PROTOCOL_REVISION, epoch=sent[-1].epoch, worker_ready=ready)
    node.on_frame(b"w", frame, 1000.0)
    for handle in (1, 2):
        submit = scheduler_pb2.Submit(
            handle=handle,
            request_id=f"r{handle}",
            prompt_token_ids=range(10 * handle, 10 * handle + 20),
            stop={"max_new_tokens": 30},  # type: ignore[arg-type]
            logprobs=handle,
            chosen_logprob=handle == 1,
        )
        node.on_gateway_message("g", scheduler_pb2.AttachRequest(submit=submit), 1000.0)
    node.pump(1000.0)
    return node, sent


TARGETS: dict[str, Callable[[bytes], None]] = {
    "generate": generate,
    "resume_token": resume_token,
    "chat_body": _body(read_chat_call),
    "completion_body": _body(read_completion_call),
    "responses_body": _body(read_responses_call),
    "worker_frames": worker_frames,
}
