"""Who is paused, goes on and is cut off, from what its client has read."""

from __future__ import annotations

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.gateway.schedulers.recovery import MAX_UNREAD, PATIENCE_S, SlowReaders
from octavo.services.gateway.schedulers.request_stream import RequestStream


def stream_behind(num_unread: int) -> RequestStream:
    stream = RequestStream(scheduler_pb2.Submit(handle=1, candidate_count=1), None, lambda _stream, _index, _keep: None)
    stream.is_reading = False  # its handler waits for the connection
    stream.candidates[0].token_ids += [5] * num_unread
    return stream


async def test_more_than_so_many_unread_tokens_pause_a_stream_once() -> None:
    readers, stream = SlowReaders(), stream_behind(MAX_UNREAD)
    assert readers.check([stream], 0.0).pause == []
    stream.candidates[0].token_ids.append(5)

    assert readers.check([stream], 0.1).pause == [stream]
    assert readers.check([stream], 0.2).pause == []


async def test_a_client_that_reads_nothing_is_cut_off_when_patience_ends_and_no_sooner() -> None:
    readers, stream = SlowReaders(), stream_behind(MAX_UNREAD + 1)
    readers.check([stream], 100.0)

    assert readers.check([stream], 100.0 + PATIENCE_S - 0.1).cut_off == []
    assert readers.check([stream], 100.0 + PATIENCE_S).cut_off == [stream]


async def test_a_client_that_reads_slowly_is_not_cut_off_however_long_it_takes() -> None:
    readers, stream = SlowReaders(), stream_behind(MAX_UNREAD + 1)
    readers.check([stream], 100.0)
    for number in range(1, 10):
        stream.num_rounds += 1  # its handler has written something more

        assert readers.check([stream], 100.0 + number * (PATIENCE_S - 0.1)).cut_off == []
