"""What a gateway is owed of a step becomes one message, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from dataclasses import fields

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.engine import GatewayConnection
from octavo.services.scheduler.requests.outbox import Outbox


def test_columns_have_the_names_of_the_message() -> None:
    assert {column.name for column in fields(Outbox)} <= set(scheduler_pb2.StepOutputs.DESCRIPTOR.fields_by_name)


def test_a_message_has_what_is_filled_and_the_next_one_begins_empty() -> None:
    box = Outbox()
    box.handles += [7, 8]
    box.candidate_indexes += [0, 1]
    box.token_ids += [50, 51]
    box.finished.append(scheduler_pb2.Finished(handle=8, candidate_index=1))
    message = box.take(step_id=3)
    assert message == scheduler_pb2.AttachResponse(
        step_outputs=scheduler_pb2.StepOutputs(
            step_id=3,
            handles=[7, 8],
            candidate_indexes=[0, 1],
            token_ids=[50, 51],
            finished=[scheduler_pb2.Finished(handle=8, candidate_index=1)],
        )
    )
    assert box.take(step_id=4) is None


def test_candidate_indexes_are_left_out_where_all_are_0() -> None:
    box = Outbox()
    box.handles.append(7)
    box.candidate_indexes.append(0)
    box.token_ids.append(50)
    message = box.take(step_id=3)
    assert message is not None
    assert not message.step_outputs.candidate_indexes
    assert not box.candidate_indexes


def test_vectors_follow_each_other() -> None:
    box = Outbox(
        vector_handles=[7, 8], vector_candidate_indexes=[0, 0], vector_sizes=[1, 2], vectors=[b"abcd", b"x" * 8]
    )
    message = box.take(step_id=3)
    assert message is not None
    assert message.step_outputs.vectors == b"abcd" + b"x" * 8
    assert message.step_outputs.vector_sizes == [1, 2]
    assert box.take(step_id=4) is None


def test_nothing_is_sent_after_what_had_no_room() -> None:
    connection = GatewayConnection("g")
    connection.unsent = asyncio.Queue(1)
    messages = [scheduler_pb2.AttachResponse(load=scheduler_pb2.Load(running=number)) for number in range(3)]
    connection.send(messages[0])
    connection.send(messages[1])
    assert connection.closed.is_set()
    assert connection.unsent.get_nowait() == messages[0]
    connection.send(messages[2])
    assert connection.unsent.empty()
