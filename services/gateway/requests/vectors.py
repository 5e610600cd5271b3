"""Vectors of inputs from the schedulers: submitted in pieces that run side by side, collected in order."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.common.errors import Reason, ServingError
from octavo.services.gateway.requests.prepare import cache_salt_of
from octavo.services.gateway.schedulers.pool import SchedulerPool
from octavo.services.gateway.schedulers.request_stream import RequestStream
from octavo.services.gateway.tokenization.input_encoder import EncodedInput

# A piece is what a scheduler admits, and loses, as one. A few at a time keep workers busy, and leave room
# in the queue for other calls.
_INPUTS_PER_PIECE = 128
_TOKENS_PER_PIECE = 4096
_PIECES_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class VectorCall:
    """What a call's pieces have in common. `deadline` is a time of the event loop, or None."""

    request_id: str
    tenant: str
    priority: int
    deadline: float | None
    traceparent: str = ""
    dimensions: int = 0
    normalize: bool | None = None


async def make_vectors(
    schedulers: SchedulerPool, call: VectorCall, inputs: Sequence[EncodedInput]
) -> tuple[list[bytes], str]:
    """Return a float32 vector for each input, and the version of the weights that made them. Raises ServingError.

    However this ends, the schedulers are told of what is not wanted any more.
    """
    room = asyncio.Semaphore(_PIECES_AT_ONCE)

    async def run(piece: Sequence[EncodedInput]) -> tuple[list[bytes], str]:
        async with room:
            return await _make_piece(schedulers, call, piece)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = []
            for piece in _pieces(inputs):
                tasks.append(group.create_task(run(piece)))
                await asyncio.sleep(0)  # other calls come between
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    versions = {version for _, version in (task.result() for task in tasks)}
    if len(versions) > 1:  # their vectors are not comparable
        raise _lost("the model was replaced meanwhile")
    return [vector for task in tasks for vector in task.result()[0]], versions.pop()


async def _make_piece(
    schedulers: SchedulerPool, call: VectorCall, piece: Sequence[EncodedInput]
) -> tuple[list[bytes], str]:
    remaining_s = None if call.deadline is None else call.deadline - asyncio.get_running_loop().time()
    stream = schedulers.submit(_submit(call, piece), remaining_s)
    try:
        while not stream.ended:
            await stream.wait()
        if stream.error is not None:
            raise _lost("the scheduler was lost") if _is_interrupted(stream) else stream.error
        return [candidate.vector for candidate in stream.candidates], stream.model_version
    finally:
        stream.close()


def _submit(call: VectorCall, piece: Sequence[EncodedInput]) -> scheduler_pb2.Submit:
    pooling = scheduler_pb2.Pooling(
        input_lengths=[len(each.token_ids) for each in piece],
        dimensions=call.dimensions,
        normalize=call.normalize,
    )
    if any(each.second_segment_start for each in piece):
        pooling.second_segment_starts.extend(each.second_segment_start for each in piece)
    submit = scheduler_pb2.Submit(
        request_id=call.request_id,
        candidate_count=len(piece),
        priority=call.priority,
        tenant=call.tenant,
        traceparent=call.traceparent,
        bypass_prefix_cache=True,  # for the routing; the scheduler knows what the model can do
        cache_salt=cache_salt_of(call.tenant, ""),
        pooling=pooling,
    )
    for each in piece:
        submit.prompt_token_ids.extend(each.token_ids)
    return submit


def _pieces(inputs: Sequence[EncodedInput]) -> Iterator[Sequence[EncodedInput]]:
    start = num_tokens = 0
    for index, each in enumerate(inputs):
        if index > start and (
            index - start == _INPUTS_PER_PIECE or num_tokens + len(each.token_ids) > _TOKENS_PER_PIECE
        ):
            yield inputs[start:index]
            start, num_tokens = index, 0
        num_tokens += len(each.token_ids)
    yield inputs[start:]


def _is_interrupted(stream: RequestStream) -> bool:
    return stream.error is not None and stream.error.reason == Reason.STREAM_INTERRUPTED


def _lost(why: str) -> ServingError:
    """Return the error of a call of which nothing has been answered: it may be sent again as it is."""
    return ServingError(Reason.SCHEDULER_UNREACHABLE, f"{why}; send the request again", retry_after_ms=500)
