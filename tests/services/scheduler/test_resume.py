"""Requests outlive their gateway's stream for their window, and go on with another gateway."""

from __future__ import annotations

import pytest
from google.rpc import code_pb2

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.core.scheduler import Scheduler
from octavo.services.scheduler.requests.resume import MAX_STATE_BYTES, MAX_UNREAD_TOKENS
from octavo.services.scheduler.requests.sequence import Request

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


def test_the_call_that_a_request_is_taken_from_ends() -> None:
    world = World()
    stream = started(world)
    world.reattach(stream, "b", [0])
    assert stream.failed is not None
    assert (stream.failed.code, stream.failed.reason) == (code_pb2.ABORTED, "TAKEN_OVER")
    assert not stream.failed.resumable


def test_a_call_that_is_gone_or_has_heard_its_end_is_told_nothing_of_a_takeover() -> None:
    world = World()
    gone, done = started(world), started(world, count=2)
    world.core.gateway_lost("a", world.now)
    first = world.reattach(gone, "b", [0])
    again = world.reattach(done, "b", [0])
    world.run()
    assert gone.failed is None
    assert done.failed is None
    assert len(first.finished) == len(again.finished) == 1


def test_a_gateway_that_starts_again_under_its_name_keeps_its_requests_from_those_before() -> None:
    """Its handles begin anew, and meet those of requests that its former life left behind."""
    world = World()
    old = world.submit(PROMPT, 3, "a", resume_window_ms=60_000, tenant="x")
    world.run()
    world.core.gateway_lost("a", world.now)
    world.handles -= 1
    new = world.submit([2] * 40, 30, "a", tenant="y", progress_interval_ms=20)
    assert new.submit.handle == old.submit.handle
    world.step()
    world.handles = 100

    taken = world.reattach(old, "b", [0], tenant="x")
    world.run()

    assert taken.tokens[0] == expected_output(PROMPT, 3)
    assert new.tokens[0] == expected_output([2] * 40, 30)
    assert new.finished
    assert any(message.HasField("progress") for message in world.others)


def test_a_gateway_that_starts_again_hears_nothing_that_was_meant_for_its_former_life() -> None:
    world = World()
    submit = scheduler_pb2.Submit(handle=1, request_id="r", prompt_token_ids=PROMPT, stop={"max_new_tokens": 2})
    world.core.submit("a", submit, world.now)
    world.core.gateway_lost("a", world.now)
    assert world.core.take_effects() == []


@pytest.mark.parametrize("ended", [False, True])
def test_a_request_is_kept_no_longer_than_the_scheduler_allows(ended: bool) -> None:
    world = World(num_blocks=400, max_resume_window_ms=1000)
    stream = world.submit(PROMPT, 2 if ended else 4000, "a", resume_window_ms=600_000)
    for _ in range(10):
        world.step()
    world.core.gateway_lost("a", world.now)
    assert bool(stream.finished) == ended
    world.now += 1.1
    world.settle()
    assert world.reattach(stream, "b", [0]).failed is not None


def test_what_ended_is_kept_in_a_bounded_part_of_memory() -> None:
    world = World(num_blocks=300, max_model_len=4096, max_resume_bytes=1 << 20)
    kept = world.core._requests.resumable._ended
    streams = []
    for _ in range(40):  # of about 50 kB each, as their prompts are long
        streams.append(world.submit(list(range(10, 2010)), 1, resume_window_ms=600_000))
        world.run()
        assert kept.num_bytes <= 1 << 20
    assert len(kept) > 10
    assert world.reattach(streams[-1], "b", [0]).tokens[0]
    assert world.reattach(streams[0], "b", [0]).failed is not None


def test_a_tenant_pushes_out_its_own_ended_requests_and_not_those_of_others() -> None:
    world = World(max_resume_bytes=1 << 20)
    first = world.submit(PROMPT, 2, resume_window_ms=600_000, tenant="quiet")
    world.run()
    loud = []
    for _ in range(200):
        loud.append(world.submit(PROMPT, 1, resume_window_ms=600_000, tenant="loud"))
        world.run()
    assert world.reattach(first, "b", [0], tenant="quiet").tokens[0] == expected_output(PROMPT, 2)
    assert world.reattach(loud[0], "b", [0], tenant="loud").failed is not None
    assert world.reattach(loud[-1], "b", [0], tenant="loud").tokens[0]


def test_a_request_larger_than_all_that_may_be_kept_costs_nobody_else_his() -> None:
    world = World(num_blocks=400, max_resume_bytes=1 << 16)
    small = world.submit(PROMPT, 2, resume_window_ms=600_000, tenant="quiet")
    world.run()
    large = world.submit(list(range(11, 3011)), 1, resume_window_ms=600_000, tenant="loud")
    world.run()
    assert world.reattach(large, "b", [0], tenant="loud").failed is not None
    assert world.reattach(small, "b", [0], tenant="quiet").tokens[0]


def test_a_request_of_another_epoch_or_without_a_window_is_not_taken_over() -> None:
    world = World()
    stream = started(world)
    plain = world.submit([5] * 20, gateway="a")
    assert world.reattach(stream, "b", [0], epoch=7).failed is not None
    assert world.reattach(plain, "b", [0]).failed is not None
    world.core.gateway_lost("a", world.now)
    assert world.core.num_requests == 1


def test_a_request_that_has_not_got_as_far_as_the_gateway_has_seen_is_submitted_again() -> None:
    """Two calls of one request went on, and the one that is kept is behind: nothing is said twice."""
    world = World()
    stream = started(world)
    world.core.gateway_lost("a", world.now)
    ahead = world.reattach(stream, "b", [len(stream.tokens[0]) + 3])
    assert ahead.failed is not None
    assert ahead.failed.reason == "RESUME_STATE_LOST"
    world.run()
    assert ahead.tokens[0] == []


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


def test_log_probabilities_of_what_an_earlier_scheduler_made_are_not_taken_for_those_of_this_one() -> None:
    world = World()
    output = expected_output(PROMPT, 30)
    stream = world.submit(
        PROMPT, 30, "a", continue_token_ids=output[:9], resume_window_ms=1000, logprobs=1, chosen_logprob=True
    )
    for _ in range(6):
        world.step()
    made = len(stream.tokens[0])
    assert made > 3

    taken = world.reattach(stream, "b", [9 + 2])  # of what was made here, two tokens were read

    (outputs,) = [message.step_outputs for message in world.messages if len(message.step_outputs.token_counts)]
    assert list(outputs.token_ids) == taken.tokens[0] == output[11 : 9 + made]
    assert [-float(token % 7) for token in outputs.token_ids] == list(outputs.logprobs)


def test_a_look_at_the_time_costs_nothing_for_those_that_wait_without_a_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(num_blocks=400, max_num_seqs=2, max_waiting=1000, check=False)
    streams = [world.submit([n, 1, 2], 50, "a", resume_window_ms=1000) for n in range(500)]
    world.step()
    world.core.gateway_lost("a", world.now)
    looked_at: list[object] = []
    count = property(lambda request: looked_at.append(request) or 0)  # type: ignore[func-returns-value]
    monkeypatch.setattr(Request, "num_output_tokens", count)

    world.core.tick(world.now + 0.9)

    assert len(looked_at) <= 2, "those that run"
    world.core.tick(world.now + 1.1)
    assert world.core.num_requests == 0
    assert not any(stream.ended for stream in streams), "nobody hears of it"


def test_who_is_taken_over_and_lost_again_has_the_whole_window_again() -> None:
    world = World()
    stream = started(world, 400)
    world.core.gateway_lost("a", world.now)
    world.now += 0.9
    taken = world.reattach(stream, "b", [])
    world.now += 0.2
    world.core.gateway_lost("b", world.now)
    world.now += 0.9
    world.settle()
    assert world.reattach(taken, "c", []).tokens
    world.now += 60.0
    world.settle()
    assert not world.core.is_idle, "the windows of before are closed"


def test_the_window_counts_from_the_moment_in_which_the_stream_broke() -> None:
    world = World(num_blocks=400)
    stream = started(world, count=4000)
    for _ in range(300):  # three seconds: much longer than the window
        world.step()
    world.core.gateway_lost("a", world.now)
    world.now += 0.9
    world.settle()

    assert world.core.num_requests == 1
    assert world.reattach(stream, "b", [0]).failed is None


@pytest.mark.parametrize("epoch", [4, 6])
def test_what_another_life_of_the_scheduler_admitted_is_not_resumed(epoch: int) -> None:
    """The same request may be here all the same: submitted again, it is another one."""
    world = World()
    world.core = Scheduler(world.config, world.now, epoch=5)
    world.join("group-0")
    stream = started(world)

    assert world.reattach(stream, "b", [0], epoch=epoch).failed is not None
    assert world.reattach(stream, "b", [0], epoch=5).failed is None
