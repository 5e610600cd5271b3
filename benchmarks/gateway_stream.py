"""Tokens a gateway streams per second of its CPU: python benchmarks/gateway_stream.py [--model PATH].

Three processes: a scheduler that makes tokens out of nothing, one for each stream in every step; the
real gateway; a client that reads all streams. With --step-ms 0 steps follow as fast as the hop takes
them, and the gateway puts several tokens into a delta; with a pace each token is a delta of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import uvloop
from grpc import aio
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from octavo.common.v1 import common_pb2
from octavo.inference.v1 import generation_pb2, generation_pb2_grpc
from octavo.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from octavo.services.common.grpc_options import hop_channel_options, server_options
from octavo.services.common.protocol import PROTOCOL_REVISION

TEXT = "The quick brown fox jumps over the lazy dog, and then it rests for a while in the warm sun. "


def make_model(folder: Path) -> Path:
    """Write a small byte-level tokenizer, trained on the text above."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 100_000, "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class EndlessScheduler(scheduler_pb2_grpc.SchedulerServiceServicer):
    """Admits everything at once and makes one token for each request in every step."""

    def __init__(self, token_ids: list[int], num_streams: int, step_s: float) -> None:
        self._token_ids = token_ids
        self._num_streams = num_streams
        self._step_s = step_s

    async def Attach(self, request_iterator: AsyncIterator[scheduler_pb2.AttachRequest], context: Any) -> None:  # noqa: N802
        """Serve one gateway."""
        left: dict[int, int] = {}
        load = scheduler_pb2.Load(workers_ready=1)
        welcome = scheduler_pb2.Welcome(protocol_revision=PROTOCOL_REVISION, load=load)
        await context.write(scheduler_pb2.AttachResponse(welcome=welcome))
        pump: asyncio.Task[None] | None = None
        async for message in request_iterator:
            if message.WhichOneof("kind") == "submit":
                handle = message.submit.handle
                await context.write(scheduler_pb2.AttachResponse(admitted=scheduler_pb2.Admitted(handle=handle)))
                left[handle] = message.submit.stop.max_new_tokens
                if len(left) == self._num_streams:
                    pump = asyncio.create_task(self._pump(context, left.copy()))
                    left.clear()
        if pump is not None:
            pump.cancel()

    async def _pump(self, context: Any, left: dict[int, int]) -> None:
        step_id = 0
        due = time.perf_counter()
        while left:
            token_id = self._token_ids[step_id % len(self._token_ids)]
            step = scheduler_pb2.StepOutputs(step_id=step_id, handles=list(left), token_ids=[token_id] * len(left))
            for handle in list(left):
                left[handle] -= 1
                if left[handle] == 0:
                    del left[handle]
                    step.finished.add(handle=handle, reason=common_pb2.FINISH_REASON_MAX_TOKENS)
            await context.write(scheduler_pb2.AttachResponse(step_outputs=step))
            step_id += 1
            due = max(due + self._step_s, time.perf_counter())
            await asyncio.sleep(due - time.perf_counter())


async def run_scheduler(address: str, model: Path, num_streams: int, step_s: float) -> None:
    """Serve until killed."""
    token_ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(TEXT * 4).ids
    server = aio.server(options=server_options())
    servicer = EndlessScheduler(token_ids, num_streams, step_s)
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


async def read_stream(stub: Any, num_tokens: int, options: argparse.Namespace) -> tuple[int, int]:
    """Read one stream; return its tokens and deltas."""
    stop = common_pb2.StopCriteria(max_new_tokens=num_tokens, stop_sequences=["\n\nUser:"] if options.stop else [])
    output = generation_pb2.OutputOptions(token_ids=options.token_ids, max_coalesce_ms=options.coalesce_ms)
    generation = generation_pb2.Generation(model="bench", text="Hello", stop=stop, output=output)
    tokens = deltas = 0
    async for response in stub.GenerateStream(generation_pb2.GenerateStreamRequest(generation=generation)):
        if response.event.HasField("delta"):
            tokens += response.event.delta.token_count
            deltas += 1
    return tokens, deltas


async def run_client(address: str, gateway: psutil.Process, options: argparse.Namespace) -> None:
    """Read all streams, once to warm up and once measured; print the result."""
    async with aio.insecure_channel(address, options=hop_channel_options()) as channel:
        await asyncio.wait_for(channel.channel_ready(), 30)
        stub = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        for num_tokens in (20, options.tokens):
            await asyncio.sleep(1)  # the gateway connects to the scheduler; its CPU settles
            before, started = gateway.cpu_times(), time.perf_counter()
            results = await asyncio.gather(*(read_stream(stub, num_tokens, options) for _ in range(options.streams)))
            passed, after = time.perf_counter() - started, gateway.cpu_times()
    cpu_s = after.user + after.system - before.user - before.system
    tokens, deltas = (sum(column) for column in zip(*results, strict=True))
    print(
        f"{options.streams} streams, step {options.step_ms:g} ms: {tokens} tokens in {deltas} deltas, {passed:.2f} s; "
        f"gateway CPU {cpu_s:.2f} s = {1e6 * cpu_s / tokens:.1f} us a token, {1e6 * cpu_s / deltas:.1f} us a delta; "
        f"{tokens / cpu_s:.0f} tokens and {deltas / cpu_s:.0f} deltas per CPU second ({tokens / passed:.0f} tokens/s)"
    )


def main() -> None:
    """Run the three processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder with a tokenizer.json; default: a small one made here")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=500, help="of each stream")
    parser.add_argument("--step-ms", type=float, default=20.0, help="time between steps; 0: as fast as possible")
    parser.add_argument("--coalesce-ms", type=int, default=0)
    parser.add_argument("--stop", action="store_true", help="with a stop string that never matches")
    parser.add_argument("--token-ids", action="store_true", help="ask for token ids, too")
    parser.add_argument("--scheduler-at", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.scheduler_at:
        uvloop.run(run_scheduler(options.scheduler_at, options.model, options.streams, options.step_ms / 1000))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or make_model(Path(folder))
        hop, public = f"unix:{folder}/scheduler.sock", f"unix:{folder}/gateway.sock"
        same = ["--streams", str(options.streams), "--step-ms", str(options.step_ms), "--model", str(model)]
        scheduler = subprocess.Popen([sys.executable, __file__, "--scheduler-at", hop, *same])
        addresses = ["--grpc-address", public, "--scheduler-addresses", hop, "--model-name", "bench"]
        command = [sys.executable, "-m", "octavo.services.gateway", str(model), *addresses, "--log-level", "warning"]
        gateway = subprocess.Popen(command)
        try:
            uvloop.run(run_client(public, psutil.Process(gateway.pid), options))
        finally:
            for process in (gateway, scheduler):
                process.kill()
                process.wait()


if __name__ == "__main__":
    main()
