"""Requests outlive their gateway's stream for their window, and go on with another gateway."""

from __future__ import annotations

import pytest

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.resume import MAX_STATE_BYTES, MAX_UNREAD_TOKENS

from .simulation import Stream, World, expected_output

PROMPT = list(range(100, 140))


def started(world: World, count: int = 30, **fields: object) -> Stream:
    """A resumable request of gateway "a" that has made some tokens."""
    stream = world.submit(
        PROMPT, max_new_tokens=count, gateway="a", resume_window_ms=1000, gateway_state=b"state", **fields
    )
    for _ in range(6):
        world.step()
    assert stream.tokens[0]
    return stream


@pytest.mark.parametrize("lost", [0, 3])
def test_another_gateway_takes_a_request_over_without_a_gap(lost: int) -> None:
    world = World()
    stream = started(world)
    world.core.gateway_lost("a", world.now)
    world.step()
    seen = len(stream.tokens[0]) - lost  # tokens on their way to the lost gateway may never have arrived
    taken = world.reattach(stream, "b", [seen])
    world.run()
    assert stream.tokens[0][:seen] + taken.tokens[0] == expected_output(PROMPT, 30)
    assert taken.finished[0].handle == world.handles
    assert taken.finished[0].usage.output_tokens == 30
    (reattached,) = [message.reattached for message in world.others if message.HasField("reattached")]
    assert reattached.gateway_state == b"state"
    assert reattached.prompt_tokens == len(PROMPT)


def test_a_request_that_ended_unread_is_kept_for_its_window() -> None:
    world = World()
    stream = started(world)
    world.core.gateway_lost("a", world.now)
    world.run()
    assert world.core.is_idle
    taken = world.reattach(stream, "b", [])
    assert taken.tokens[0] == expected_output(PROMPT, 30)
    assert taken.finished[0].usage.output_tokens == 30
    world.now += 2
    world.settle()
    assert world.reattach(stream, "b", []).failed is not None


def test_a_request_that_nobody_takes_over_ends_with_its_window() -> None:
    world = World(num_blocks=400)
    stream = started(world, count=4000)
    world.core.gateway_lost("a", world.now)
    world.now += 1.01
    world.settle()
    assert world.core.num_requests == 0
    failed = world.reattach(stream, "b", [0]).failed
    assert failed is not None
    assert failed.reason == "RESUME_STATE_LOST"


def test_a_request_that_nobody_reads_stops_after_so_many_tokens() -> None:
    world = World(num_blocks=1200, max_model_len=20_000)
    stream = started(world, count=18_000)
    world.core.gateway_lost("a", world.now)
    for _ in range(MAX_UNREAD_TOKENS + 100):
        world.now -= 0.01  # the window does not pass
        world.step()
    assert world.core.num_requests == 0
    assert len(stream.tokens[0]) < 100


def test_a_request_is_taken_from_a_gateway_whose_stream_is_still_open() -> None:
    world = World()
    stream = started(world)
    seen = len(stream.tokens[0])
    taken = world.reattach(stream, "b", [seen])
    world.run()
    assert len(stream.tokens[0]) == seen
    assert stream.tokens[0] + taken.tokens[0] == expected_output(PROMPT, 30)


def test_a_request_of_another_epoch_or_without_a_window_is_not_taken_over() -> None:
    world = World()
    stream = started(world)
    plain = world.submit([5] * 20, gateway="a")
    assert world.reattach(stream, "b", [0], epoch=7).failed is not None
    assert world.reattach(plain, "b", [0]).failed is not None
    world.core.gateway_lost("a", world.now)
    assert world.core.num_requests == 1


def test_log_probabilities_are_replayed_with_their_tokens() -> None:
    world = World()
    stream = started(world, logprobs=2, chosen_logprob=True)
    taken = world.reattach(stream, "b", [2])
    (outputs,) = [message.step_outputs for message in world.messages if len(message.step_outputs.token_counts)]
    assert list(outputs.token_ids) == taken.tokens[0]
    assert [-float(token % 7) for token in outputs.token_ids] == list(outputs.logprobs)
    assert len(outputs.candidate_token_ids) == 2 * len(outputs.token_ids) == 2 * len(outputs.ranks)


def test_a_request_that_is_submitted_again_replaces_the_one_without_a_stream() -> None:
    world = World()
    stream = started(world)
    world.core.gateway_lost("a", world.now)
    seen = list(stream.tokens[0])
    again = world.submit(
        PROMPT, 30, "b", request_id=stream.submit.request_id, continue_token_ids=seen, resume_window_ms=1000
    )
    assert world.core.num_requests == 1
    world.run()
    assert seen + again.tokens[0] == expected_output(PROMPT, 30)


def test_more_state_than_the_limit_is_refused() -> None:
    world = World()
    assert world.submit(PROMPT, gateway_state=b"x" * MAX_STATE_BYTES).admitted
    rejected = world.submit(PROMPT, gateway_state=b"x" * (MAX_STATE_BYTES + 1)).rejected
    assert rejected is not None
    assert rejected.reason == "INVALID_FIELD"


def test_a_tenant_cannot_take_over_or_push_out_or_cancel_what_another_one_runs() -> None:
    world = World()
    stream = started(world, tenant="victim")
    world.core.gateway_lost("a", world.now)
    name = stream.submit.request_id

    other = world.submit([7] * 20, 2, "b", request_id=name, resume_window_ms=1000, tenant="thief")
    stolen = scheduler_pb2.Reattach(handle=77, request_id=name, tenant="nobody")
    world.streams["b", 77] = refused = Stream(stream.submit)
    world.core.reattach("b", stolen, world.now)
    world.core.cancel("b", scheduler_pb2.Cancel(request_id=name, tenant="nobody"), world.now)
    world.settle()
    taken = world.reattach(stream, "c", [0], tenant="victim")
    world.run()

    assert refused.failed is not None
    assert refused.failed.reason == "RESUME_STATE_LOST"
    assert [message.cancelled.was_running for message in world.others if message.HasField("cancelled")] == [False]
    assert taken.tokens[0] == expected_output(PROMPT, 30)
    assert other.tokens[0] == expected_output([7] * 20, 2)


def test_who_names_no_tenant_finds_nothing() -> None:
    world = World()
    stream = started(world, tenant="victim")
    name = stream.submit.request_id

    world.streams["b", 77] = refused = Stream(stream.submit)
    world.core.reattach("b", scheduler_pb2.Reattach(handle=77, request_id=name), world.now)
    world.core.cancel("b", scheduler_pb2.Cancel(request_id=name), world.now)
    world.run()

    assert refused.failed is not None
    assert refused.failed.reason == "RESUME_STATE_LOST"
    assert [message.cancelled.was_running for message in world.others if message.HasField("cancelled")] == [False]
    assert stream.tokens[0] == expected_output(PROMPT, 30)
