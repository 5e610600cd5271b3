"""A gateway in this process, a scheduler that does what the test says, and a tiny model between them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from grpc import aio
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2, generation_pb2_grpc
from octavo.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from octavo.services.common.errors import Reason, ServingError
from octavo.services.common.grpc_options import server_options
from octavo.services.common.interceptor import ErrorInterceptor
from octavo.services.common.protocol import PROTOCOL_REVISION
from octavo.services.gateway.app import Gateway
from octavo.services.gateway.config import GatewayConfig

# No property is about time, and the machine may be busy.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

END = 0  # the token
EOF: Any = aio.EOF  # type: ignore[attr-defined]  # the stubs do not know it
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'critic' %}{{ raise_exception('no critics') }}{% endif %}"
    "<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def make_tokenizer() -> Tokenizer:
    """Return a byte-level BPE tokenizer: two special tokens, 256 bytes, three merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("Ġ", "w")]
    tokens = ["<|end|>", "<|start|>", *alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.add_special_tokens(["<|end|>", "<|start|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_model(
    folder: Path,
    template: str | None = TEMPLATE,
    context: int = 64,
    special_tokens: Sequence[str] = (),
    **generation_config: Any,
) -> Path:
    """Write the files of a model that a gateway reads; `special_tokens` are further ones."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(list(special_tokens))
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"bos_token": "<|start|>", "eos_token": {"content": "<|end|>"}}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 272, "max_position_embeddings": context}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END], **generation_config}))
    return folder


class FakeScheduler(scheduler_pb2_grpc.SchedulerServiceServicer):
    """Admits what it is told to and sends what it is told to; keeps all that gateways sent."""

    def __init__(self, address: str, scheduler_id: str = "sched") -> None:
        self.address = address
        self.scheduler_id = scheduler_id
        self.cache_events: asyncio.Queue[scheduler_pb2.WatchCacheResponse] = asyncio.Queue()
        self.watched_from: list[int] = []
        self.hangs = False
        self.load = scheduler_pb2.Load(workers_ready=1, kv_blocks_total=100, kv_blocks_free=90, model_version="w1")
        self.protocol_revision = PROTOCOL_REVISION
        self.speaks: tuple[int, ...] = ()  # if set: a release that knows these revisions, and no range of them
        self.hellos: list[scheduler_pb2.Hello] = []
        self.received: asyncio.Queue[scheduler_pb2.AttachRequest] = asyncio.Queue()
        self.attached = asyncio.Event()
        self._outgoing: asyncio.Queue[scheduler_pb2.AttachResponse | None] = asyncio.Queue()
        self._server: aio.Server | None = None
        self.epoch = 0
        self.running_ids: set[str] = set()

    async def start(self) -> None:
        self.epoch += 1
        self._server = aio.server(interceptors=[ErrorInterceptor()], options=server_options())
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self._server.add_insecure_port(self.address)
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            self._outgoing.put_nowait(None)
            await self._server.stop(0)
            self._server = None
        self.attached.clear()

    async def Attach(self, request_iterator: AsyncIterator[scheduler_pb2.AttachRequest], context: Any) -> None:  # noqa: N802
        outgoing: asyncio.Queue[scheduler_pb2.AttachResponse | None] = asyncio.Queue()
        self._outgoing = outgoing
        hello = await anext(aiter(request_iterator))
        self.hellos.append(hello.hello)
        if self.speaks and hello.hello.protocol_revision not in self.speaks:
            raise ServingError(Reason.PROTOCOL_REVISION, "run the same version on both")
        welcome = scheduler_pb2.Welcome(
            scheduler_id=self.scheduler_id,
            epoch=self.epoch,
            kv_block_size=16,
            protocol_revision=hello.hello.protocol_revision if self.speaks else self.protocol_revision,
            load=self.load,
        )
        await context.write(scheduler_pb2.AttachResponse(welcome=welcome))

        async def read() -> None:
            async for message in request_iterator:
                self.received.put_nowait(message)
                if message.cancel.request_id:
                    running = message.cancel.request_id in self.running_ids
                    usage = common_pb2.Usage(output_tokens=3) if running else None
                    self.send(
                        cancelled=scheduler_pb2.Cancelled(
                            request_id=message.cancel.request_id, was_running=running, usage=usage
                        )
                    )

        async def report() -> None:
            while True:
                await asyncio.sleep(0.2)
                if not self.hangs:
                    outgoing.put_nowait(scheduler_pb2.AttachResponse(load=self.load))

        tasks = [asyncio.create_task(read()), asyncio.create_task(report())]
        self.attached.set()
        try:
            while (message := await outgoing.get()) is not None:
                await context.write(message)
        finally:
            for task in tasks:
                task.cancel()

    async def WatchCache(  # noqa: N802
        self, request: scheduler_pb2.WatchCacheRequest, context: Any
    ) -> AsyncIterator[scheduler_pb2.WatchCacheResponse]:
        self.watched_from.append(request.after_event_id)
        while True:
            yield await self.cache_events.get()

    def say_load(self, **changes: Any) -> None:
        """Change the state it reports, and report it."""
        self.load.MergeFrom(scheduler_pb2.Load(**changes))
        self.set_load(self.load)

    def set_load(self, load: scheduler_pb2.Load) -> None:
        """Report another state, now and from now on."""
        self.load = load
        self.send(load=load)

    def send(self, **kind: Any) -> None:
        """Send one message to the gateway."""
        self._outgoing.put_nowait(scheduler_pb2.AttachResponse(**kind))

    def admit(self, handle: int, cached: int = 0) -> None:
        self.send(admitted=scheduler_pb2.Admitted(handle=handle, cached_prompt_tokens=cached))

    def tokens(
        self, handle: int, token_ids: Sequence[int], candidate: int = 0, finish: int = 0, **finished: Any
    ) -> None:
        """Send a run of tokens of one candidate, and its end if `finish` is a FinishReason."""
        step = scheduler_pb2.StepOutputs(handles=[handle], token_counts=[len(token_ids)], token_ids=token_ids)
        if candidate:
            step.candidate_indexes.append(candidate)
        if finish:
            step.finished.add(handle=handle, candidate_index=candidate, reason=finish, **finished)
        self.send(step_outputs=step)

    async def next(self, kind: str) -> Any:
        """Return the next message from the gateway, which must be of this kind."""
        message = await asyncio.wait_for(self.received.get(), 10)
        assert message.WhichOneof("kind") == kind, message
        return getattr(message, kind)

    async def next_admitted(self) -> scheduler_pb2.Submit:
        """Take the next Submit and admit it."""
        submit: scheduler_pb2.Submit = await self.next("submit")
        self.admit(submit.handle)
        return submit


class Harness:
    """What a test talks to."""

    def __init__(self, gateway: Gateway, scheduler: FakeScheduler, channel: aio.Channel, tokenizer: Tokenizer) -> None:
        self.gateway = gateway
        self.scheduler = scheduler
        self.channel = channel
        self.tokenizer = tokenizer
        self.stub = self.service(generation_pb2_grpc.GenerationServiceStub)

    def service(self, stub: Any) -> Any:
        """Return a stub of this class for the gateway."""
        return stub(self.channel)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def generation(self, text: str = "hello", **fields: Any) -> generation_pb2.Generation:
        if not {"chat", "token_ids"} & set(fields):
            fields["text"] = text
        return generation_pb2.Generation(model="tiny", **fields)

    def stream(self, text: str = "hello", *, metadata: Any = None, timeout: float | None = None, **fields: Any) -> Any:
        """Start GenerateStream."""
        request = generation_pb2.GenerateStreamRequest(generation=self.generation(text, **fields))
        return self.stub.GenerateStream(request, metadata=metadata, timeout=timeout)

    async def scheduler_is_silent(self) -> bool:
        """Return whether the gateway has told the scheduler nothing that was not read: its next word is the marker."""
        await self.stub.CancelGeneration(generation_pb2.CancelGenerationRequest(request_id="marker"))
        message = await self.scheduler.next("cancel")
        return bool(message.request_id == "marker")

    async def connected(self) -> None:
        """Return once the gateway has a scheduler."""
        await asyncio.wait_for(self.scheduler.attached.wait(), 10)
        await until(lambda: self.gateway.schedulers.connected)


class Rejection(Exception):  # noqa: N818 - what a client got, not a failure of the test
    """A failed call, its details unpacked."""

    def __init__(self, error: aio.AioRpcError) -> None:
        from google.rpc import error_details_pb2, status_pb2

        super().__init__(error.details())
        self.code = error.code()
        self.message = error.details() or ""
        trailing: Any = error.trailing_metadata() or ()
        self.trailers: dict[str, Any] = dict(trailing)
        self.status = status_pb2.Status.FromString(self.trailers["grpc-status-details-bin"])
        self.details: dict[str, Any] = {}
        for packed in self.status.details:
            detail = getattr(error_details_pb2, packed.type_url.rsplit(".", 1)[-1])()
            assert packed.Unpack(detail)
            self.details[type(detail).__name__] = detail
        self.reason = self.details["ErrorInfo"].reason
        self.fields = (
            [v.field for v in self.details["BadRequest"].field_violations] if "BadRequest" in self.details else []
        )


async def until(condition: Callable[[], bool]) -> None:
    """Return once something is so that nothing announces."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.005)


async def rejection(call: Any) -> Rejection:
    """Run a call that must fail; return how."""
    try:
        if hasattr(call, "read"):
            while await call.read() is not EOF:
                pass
        else:
            await call
    except aio.AioRpcError as error:
        return Rejection(error)
    raise AssertionError("the call succeeded")


@pytest.fixture
def context() -> int:
    """The longest context of the model."""
    return 64


@pytest.fixture
def model_path(tmp_path: Path, context: int) -> Path:
    return write_model(tmp_path / "models" / "tiny", context=context)


@pytest.fixture
def tools() -> Any:
    """The helpers of this file: tests are not on the import path."""

    class Tools:
        EOF = EOF
        until = staticmethod(until)
        rejection = staticmethod(rejection)
        write_model = staticmethod(write_model)
        make_tokenizer = staticmethod(make_tokenizer)
        FakeScheduler = FakeScheduler
        Harness = Harness
        Rejection = Rejection

    return Tools


@pytest.fixture
async def scheduler(tmp_path: Path) -> AsyncIterator[FakeScheduler]:
    fake = FakeScheduler(f"unix:{tmp_path}/s.sock")
    await fake.start()
    yield fake
    await fake.stop()


@pytest.fixture
def config(model_path: Path, scheduler: FakeScheduler) -> GatewayConfig:
    return GatewayConfig(
        model=model_path,
        model_aliases=("little",),
        grpc_address="127.0.0.1:0",
        admin_address="127.0.0.1:0",
        scheduler_addresses=(scheduler.address,),
        gateway_id="gw",
        failover_s=10.0,
        constraint_processes=0,  # one more process for each gateway; tests of constraints ask for it
    )


@pytest.fixture
async def harness(config: GatewayConfig, scheduler: FakeScheduler) -> AsyncIterator[Harness]:
    gateway = Gateway(config)
    await gateway.start()
    async with aio.insecure_channel(f"127.0.0.1:{gateway.port}", [("grpc.enable_retries", 0)]) as channel:
        harness = Harness(gateway, scheduler, channel, make_tokenizer())
        await harness.connected()
        yield harness
    await gateway.stop(0)
