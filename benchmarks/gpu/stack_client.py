"""A gateway's end of the stream to a scheduler: submits a batch, prints the times between its steps as JSON.

python stack_client.py ADDRESS VOCAB_SIZE BATCH CONTEXT NUM_NEW
"""

from __future__ import annotations

import json
import queue
import sys
import time
from collections.abc import Iterator

import grpc
from loop import requests_of

from octavo.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc
from octavo.services.common.protocol import PROTOCOL_REVISION

_WAIT_S = 50.0


def main() -> int:
    address, *sizes = sys.argv[1:]
    vocab_size, batch, context, num_new = map(int, sizes)
    outgoing: queue.Queue[scheduler_pb2.AttachRequest] = queue.Queue()
    hello = scheduler_pb2.Hello(gateway_id="gateway", protocol_revision=PROTOCOL_REVISION)
    outgoing.put(scheduler_pb2.AttachRequest(hello=hello))
    for submit in requests_of(vocab_size, batch, context, num_new):
        outgoing.put(scheduler_pb2.AttachRequest(submit=submit))
    with grpc.insecure_channel(address) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        stream = stub.Attach(iter(outgoing.get, None), wait_for_ready=True, timeout=_WAIT_S)
        print(json.dumps(_times(stream, batch)))
        stream.cancel()
    return 0


def _times(stream: Iterator[scheduler_pb2.AttachResponse], batch: int) -> list[float]:
    """Return the microseconds between steps that both have a token of every request."""
    times, before, ended = [], 0.0, 0
    for message in stream:
        kind = message.WhichOneof("kind")
        assert kind not in ("rejected", "failed"), message
        if kind != "step_outputs":
            continue
        now = time.perf_counter()
        is_full = len(message.step_outputs.handles) == batch
        if is_full and before:
            times.append(1e6 * (now - before))
        before = now if is_full else 0.0
        ended += len(message.step_outputs.finished)
        if ended == batch:
            break
    return times


if __name__ == "__main__":
    sys.exit(main())
