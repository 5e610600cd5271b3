"""The rules of the scheduler, each on the real core with a fake worker."""

from __future__ import annotations

from array import array

import pytest
from google.rpc import code_pb2

from octavo.common.v1 import common_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.core.metrics import SchedulerMetrics
from octavo.services.scheduler.core.output_processor import WorkerMisbehavedError
from octavo.services.scheduler.core.step_planner import MAX_SCORED_TOKENS, MAX_SEARCHES
from octavo.services.scheduler.kv_cache.free_blocks import STALE_TURNS
from octavo.services.telemetry import catalog
from octavo.services.telemetry.store import Store
from octavo.worker.v1 import worker_pb2

from .simulation import World, expected_output

PROMPT = list(range(100, 140))


def test_a_request_gets_the_tokens_the_model_makes_and_one_ending() -> None:
    world = World()
    stream = world.submit(PROMPT, max_new_tokens=20, sampling={"seed": 5})
    world.run()
    assert stream.tokens[0] == expected_output(PROMPT, 20, seed=5)
    assert stream.finished[0].reason == common_pb2.FINISH_REASON_MAX_TOKENS
    assert stream.finished[0].usage.output_tokens == 20
    assert world.core.num_requests == 0


def test_a_step_is_planned_while_the_one_before_runs() -> None:
    world = World()
    world.submit(PROMPT, max_new_tokens=5)
    assert len(world.queues["group-0"]) == 2  # the prompt, and the first token's successor
    assert world.plans[1].row_flags == bytes([3])  # sampled, and fed from the worker's last token
    assert world.plans[1].token_ids == b""


def test_no_step_is_planned_past_the_last_token() -> None:
    world = World()
    world.submit(PROMPT, max_new_tokens=2)
    world.run()
    assert world.workers["group-0"].steps == 2


def test_the_end_of_sequence_token_ends_a_sequence_and_is_delivered() -> None:
    output = expected_output(PROMPT, 10)
    world = World()
    stream = world.submit(PROMPT, max_new_tokens=10, end_of_sequence_ids=[output[3]])
    world.run()
    assert stream.tokens[0] == output[:4]
    assert stream.finished[0].reason == common_pb2.FINISH_REASON_END_OF_SEQUENCE
    assert stream.finished[0].stop_token_id == output[3]


def test_a_stop_token_does_not_count_before_min_new_tokens() -> None:
    output = expected_output(PROMPT, 10)
    stop = {"stop_token_ids": [output[1], output[5]], "min_new_tokens": 3}
    world = World()
    stream = world.submit(PROMPT, max_new_tokens=10, stop=stop)
    world.run()
    assert stream.tokens[0] == output[:6]
    assert stream.finished[0].reason == common_pb2.FINISH_REASON_STOP_TOKEN


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_a_long_prompt_is_computed_in_chunks_of_the_budget(chunk: int) -> None:
    prompt = list(range(1000, 1150))
    world = World(max_num_batched_tokens=chunk, max_num_seqs=1, max_prefill_tokens=chunk)
    stream = world.submit(prompt, max_new_tokens=4)
    world.run()
    assert stream.tokens[0] == expected_output(prompt, 4)
    assert world.workers["group-0"].largest_step <= chunk


def test_prompts_share_what_decoding_leaves_of_a_step() -> None:
    world = World(num_blocks=300, max_prefill_tokens=32, max_num_batched_tokens=512)
    decoding = world.submit(PROMPT, max_new_tokens=100)
    world.step()
    world.step()
    world.submit(list(range(2000, 2100)), max_new_tokens=2)
    before = len(decoding.tokens[0])
    world.step()
    world.step()
    world.step()
    assert len(decoding.tokens[0]) == before + 3  # a token in every step, beside the long prompt
    assert max(plan.num_tokens for plan in world.plans[2:]) <= 33


def test_a_short_prompt_overtakes_a_long_one_that_is_being_computed() -> None:
    world = World(num_blocks=400, max_num_batched_tokens=64, max_num_seqs=8)
    long = world.submit(list(range(1000, 3000)), max_new_tokens=2)
    short = world.submit(list(range(50)), max_new_tokens=2)
    for _ in range(5):
        world.step()
    assert short.finished
    assert not long.tokens
    world.run()
    assert long.tokens[0] == expected_output(list(range(1000, 3000)), 2)


def test_an_aged_long_prompt_is_not_starved_by_short_ones() -> None:
    world = World(num_blocks=1000, max_num_batched_tokens=64, max_num_seqs=8, ageing_tokens_per_s=10_000.0)
    long = world.submit(list(range(1000, 3000)), max_new_tokens=1)
    for round_number in range(200):
        if long.ended:
            break
        world.submit([round_number + 10_000] * 60, max_new_tokens=1)
        world.step()
    assert long.ended


def test_no_more_prompts_are_opened_than_fill_a_step() -> None:
    world = World(max_num_seqs=8, max_num_batched_tokens=64, num_blocks=200)
    world.lose("group-0")
    for n in range(8):
        world.submit([10 + n] * 40, max_new_tokens=2)
    world.join("group-0")
    assert [len(plan.sampling_updates) for plan in world.plans] == [2, 2]  # and what the first left of the second


def test_a_shared_prefix_is_computed_once() -> None:
    world = World(num_blocks=200)
    first = world.submit(PROMPT, max_new_tokens=4)
    world.run()
    again = world.submit([*PROMPT, 1, 2, 3], max_new_tokens=4)
    world.run()
    assert first.finished[0].usage.cached_prompt_tokens == 0
    assert again.finished[0].usage.cached_prompt_tokens == 32
    assert again.tokens[0] == expected_output([*PROMPT, 1, 2, 3], 4)


def test_behind_a_step_that_takes_long_the_next_is_planned_late() -> None:
    world = World(num_blocks=400, max_num_batched_tokens=512)
    world.submit(list(range(1000, 1300)), max_new_tokens=5)
    world.now += 1.0  # what 300 tokens take
    world.answer("group-0")
    world.run()  # and others 10 ms
    num_plans = len(world.plans)

    world.submit(list(range(2000, 2300)), max_new_tokens=5)
    world.now += 0.4
    world.submit(list(range(3000, 3020)), max_new_tokens=5)

    assert [plan.num_tokens for plan in world.plans[num_plans:]] == [300]
    world.now += 0.56
    world.settle()
    assert [plan.num_tokens for plan in world.plans[num_plans:]] == [300, 1 + 20]
    world.run()
    assert [plan.num_tokens for plan in world.plans[num_plans + 2 :]] == [2, 2, 2, 1]


def test_prompts_that_begin_alike_need_not_wait_for_another_step() -> None:
    prefix = list(range(5000, 5064))
    world = World(num_blocks=400, max_num_batched_tokens=256, max_num_seqs=40)
    world.submit(PROMPT, max_new_tokens=9)  # keeps the worker busy, while the others come
    streams = [world.submit([*prefix, n], max_new_tokens=3) for n in range(20)]
    streams.append(world.submit([*prefix[:32], 7, 8], max_new_tokens=3))
    num_plans = len(world.plans)

    world.step()

    assert world.plans[num_plans].num_tokens == 1 + 64 + 20 + 2
    world.run()
    assert streams[-2].tokens[0] == expected_output([*prefix, 19], 3)
    assert streams[-1].tokens[0] == expected_output([*prefix[:32], 7, 8], 3)


def test_those_that_were_passed_over_add_nothing_to_prompts_that_have_their_share_of_a_step() -> None:
    prefix = list(range(5000, 5064))
    world = World(num_blocks=400, max_num_batched_tokens=512, max_num_seqs=8)
    world.submit(PROMPT, max_new_tokens=9)  # keeps the worker busy, while the others come
    scored = world.submit(list(range(1000, 1300)), max_new_tokens=3, prompt_logprobs=1)
    streams = [world.submit([*prefix, n], max_new_tokens=3) for n in range(2)]
    num_plans = len(world.plans)

    world.step()

    assert world.plans[num_plans].num_tokens == 1 + MAX_SCORED_TOKENS + 64 + 2
    world.run()
    assert scored.prompt_logprobs == [-float(token) for token in range(1001, 1300)]
    assert [stream.tokens[0] for stream in streams] == [expected_output([*prefix, n], 3) for n in range(2)]


def test_a_burst_of_requests_with_one_prefix_computes_it_once() -> None:
    prefix = list(range(5000, 5128))
    world = World(num_blocks=400, max_num_batched_tokens=64, max_num_seqs=40)
    streams = [world.submit([*prefix, n], max_new_tokens=3) for n in range(32)]
    world.run()
    assert sum(plan.num_tokens for plan in world.plans) < 128 + 32 * 8
    for n, stream in enumerate(streams):
        assert stream.tokens[0] == expected_output([*prefix, n], 3)


def test_salts_keep_prefixes_apart_and_bypass_neither_reads_nor_fills() -> None:
    world = World(num_blocks=200)
    world.submit(PROMPT, cache_salt="a")
    world.run()
    other = world.submit(PROMPT, cache_salt="b")
    world.run()
    bypass = world.submit(PROMPT, cache_salt="a", bypass_prefix_cache=True)
    world.run()
    same = world.submit(PROMPT, cache_salt="a")
    world.run()
    cached = [stream.finished[0].usage.cached_prompt_tokens for stream in (other, bypass, same)]
    assert cached == [0, 0, 32]


def test_a_cached_prompt_still_computes_its_last_token() -> None:
    prompt = list(range(64))  # exactly four blocks
    world = World(num_blocks=200)
    world.submit(prompt)
    world.run()
    again = world.submit(prompt)
    world.run()
    assert again.finished[0].usage.cached_prompt_tokens == 48
    assert again.tokens[0] == expected_output(prompt, 8)


def test_a_full_pool_preempts_and_everybody_still_gets_the_right_tokens() -> None:
    world = World(num_blocks=12, max_model_len=160, max_num_seqs=8)
    prompts = [[n * 50 + k for k in range(20)] for n in range(6)]
    streams = [world.submit(prompt, max_new_tokens=60, sampling={"seed": n}) for n, prompt in enumerate(prompts)]
    world.run()
    for n, (prompt, stream) in enumerate(zip(prompts, streams, strict=True)):
        assert stream.tokens[0] == expected_output(prompt, 60, seed=n)
    assert sum(stream.finished[0].timing.preemptions for stream in streams) > 0
    assert streams[0].finished[0].timing.preemptions == 0  # the oldest always advances


def test_the_victim_has_the_lowest_priority() -> None:
    world = World(num_blocks=7, max_model_len=96, max_num_seqs=3)
    old = world.submit([1] * 20, max_new_tokens=40)
    low = world.submit([2] * 20, max_new_tokens=40, priority=-5)
    world.submit([3] * 15, max_new_tokens=2, priority=5)
    world.run()
    assert old.finished[0].timing.preemptions == 0
    assert low.finished[0].timing.preemptions > 0


def test_cancelling_frees_the_blocks_before_the_next_plan() -> None:
    world = World(num_blocks=20, max_model_len=256)
    stream = world.submit(PROMPT, max_new_tokens=100)
    world.step()
    world.cancel(stream)
    assert world.core.load(world.now).kv_blocks_free == 19
    assert world.core.load(world.now).running == 0
    world.run()
    assert world.core.is_idle


@pytest.mark.parametrize("num_steps", range(8, 32))
def test_cancelling_leaves_nothing_whatever_the_moment(num_steps: int) -> None:
    """Also between a preemption and the last results of the sequence that lost its blocks."""
    world = World(num_blocks=12, max_model_len=160, max_num_seqs=8)
    streams = [world.submit([n * 50 + k for k in range(20)], max_new_tokens=60) for n in range(6)]
    for _ in range(num_steps):
        world.step()
    for stream in streams:
        if not stream.ended:
            world.cancel(stream)
    world.run()
    assert world.core.is_idle
    assert world.core.load(world.now).kv_blocks_free == 11


def test_one_candidate_can_be_cancelled_alone() -> None:
    world = World(num_blocks=100)
    stream = world.submit(PROMPT, max_new_tokens=30, candidate_count=3, sampling={"seed": 1})
    world.step()
    world.core.cancel("g", scheduler_pb2.Cancel(handle=stream.submit.handle, candidate_index=1), world.now)
    world.settle()
    before = len(stream.tokens[1])
    world.run()
    assert len(stream.tokens[1]) == before
    assert stream.tokens[0] == expected_output(PROMPT, 30, seed=1, candidate=0)
    assert stream.tokens[2] == expected_output(PROMPT, 30, seed=1, candidate=2)


def test_cancel_by_id_ends_a_request_of_another_gateway_with_a_reason() -> None:
    world = World()
    stream = world.submit(PROMPT, max_new_tokens=30)
    world.step()
    world.core.cancel(
        "other", scheduler_pb2.Cancel(request_id=stream.submit.request_id, tenant=stream.submit.tenant), world.now
    )
    world.settle()
    assert stream.finished[0].reason == common_pb2.FINISH_REASON_CANCELLED
    assert world.others[-1].cancelled.was_running
    assert world.others[-1].cancelled.usage.output_tokens == len(stream.tokens[0])
    world.core.cancel("other", scheduler_pb2.Cancel(request_id="nobody", tenant=""), world.now)
    world.settle()
    assert not world.others[-1].cancelled.was_running


def test_candidates_share_the_prompt_and_differ_by_index() -> None:
    world = World(num_blocks=100)
    stream = world.submit(PROMPT, max_new_tokens=5, candidate_count=4, sampling={"seed": 3})
    world.run()
    for index in range(4):
        assert stream.tokens[index] == expected_output(PROMPT, 5, seed=3, candidate=index)
    assert sum(plan.num_tokens for plan in world.plans) < 2 * len(PROMPT) + 4 * 8


def test_continued_output_goes_on_where_it_stopped() -> None:
    output = expected_output(PROMPT, 12, seed=9)
    world = World()
    stream = world.submit(PROMPT, max_new_tokens=12, continue_token_ids=output[:5], sampling={"seed": 9})
    world.run()
    assert stream.tokens[0] == output[5:]
    assert stream.finished[0].usage.output_tokens == 12


def test_continued_output_that_is_complete_ends_at_once() -> None:
    world = World()
    stream = world.submit(PROMPT, max_new_tokens=3, continue_token_ids=[1, 2, 3])
    assert stream.finished[0].reason == common_pb2.FINISH_REASON_MAX_TOKENS


def test_the_context_limit_ends_a_sequence() -> None:
    world = World(num_blocks=64, max_model_len=48)
    world.now += world.config.worker_grace_s  # no larger worker has joined by now
    stream = world.submit(PROMPT, max_new_tokens=100)
    world.run()
    assert len(stream.tokens[0]) == 8
    assert stream.finished[0].reason == common_pb2.FINISH_REASON_CONTEXT_LIMIT


def test_a_prompt_that_cannot_fit_is_refused() -> None:
    world = World(num_blocks=3)
    world.now += world.config.worker_grace_s  # no larger worker has joined by now
    stream = world.submit(list(range(32)))
    assert stream.rejected is not None
    assert stream.rejected.code == code_pb2.INVALID_ARGUMENT
    assert stream.rejected.reason == "KV_CAPACITY_EXCEEDED"


def test_a_full_queue_refuses_with_a_retry_delay_and_keeps_its_promises() -> None:
    world = World(max_num_seqs=1, max_num_batched_tokens=64, max_waiting=2)
    streams = [world.submit(PROMPT, max_new_tokens=4) for _ in range(5)]
    refused = [stream for stream in streams if stream.rejected]
    assert [stream.rejected.reason for stream in refused if stream.rejected] == ["QUEUE_FULL"] * 2
    assert all(stream.rejected.retry_after_ms >= 1 for stream in refused if stream.rejected)
    world.run()
    assert all(stream.finished for stream in streams if not stream.rejected)


@pytest.mark.parametrize("limits", [{"max_waiting": 2}, {"max_waiting_tokens": 100}])
def test_whoever_is_refused_again_before_anything_ran_has_to_wait_twice_as_long(limits: dict[str, int]) -> None:
    """Nothing is known of step times, and the first step takes half an hour."""
    world = World(max_num_seqs=1, max_num_batched_tokens=64, **limits)
    for _ in range(3):
        world.submit(PROMPT, max_new_tokens=4)
    begun, tries = world.now, 0
    while world.now < begun + 1800.0:
        rejected = world.submit(PROMPT).rejected
        assert rejected is not None
        assert rejected.retry_after_ms <= 60_000
        world.now += rejected.retry_after_ms / 1000
        tries += 1
    assert tries < 60
    world.run()
    for _ in range(3):
        world.submit(PROMPT, max_new_tokens=4)
    rejected = world.submit(PROMPT).rejected
    assert rejected is not None
    assert rejected.retry_after_ms < 30_000, "the queue has moved since"


def test_a_deadline_that_the_queue_cannot_meet_is_refused() -> None:
    world = World(max_num_seqs=1, max_num_batched_tokens=16)
    world.submit(list(range(200)), max_new_tokens=50)
    world.step()  # the rate is known now: 16 tokens in 10 ms
    world.submit(list(range(300, 900)))
    hurried = world.submit(PROMPT, remaining_ms=100)
    assert hurried.rejected is not None
    assert hurried.rejected.reason == "DEADLINE_UNREACHABLE"


def test_a_refusal_says_after_how_long_a_request_of_the_tenant_would_begin() -> None:
    """So that a gateway refuses by itself what is refused here as well, and nothing else."""
    world = World(max_num_seqs=1, max_num_batched_tokens=16)
    world.submit(list(range(200)), max_new_tokens=50)
    world.step()
    world.submit(list(range(300, 900)))
    several = world.submit(PROMPT, remaining_ms=100, candidate_count=2)
    refused = world.submit(PROMPT, remaining_ms=100)
    assert several.rejected is not None
    assert refused.rejected is not None
    assert "queue_ms" not in several.rejected.metadata  # for one alone it is shorter

    queue_ms = int(refused.rejected.metadata["queue_ms"])

    assert 100 < queue_ms < 100 + refused.rejected.retry_after_ms
    assert world.submit([1], remaining_ms=queue_ms - 1, max_new_tokens=1).rejected
    assert not world.submit([1], remaining_ms=queue_ms + 200, max_new_tokens=1).rejected


def test_what_expires_in_the_queue_is_never_run() -> None:
    world = World(max_num_seqs=1, max_num_batched_tokens=16)
    world.submit(PROMPT, max_new_tokens=60)
    late = world.submit(list(range(500, 520)), remaining_ms=1)
    world.now += 0.5
    world.run()
    assert late.failed is not None
    assert (late.failed.code, late.failed.reason) == (code_pb2.DEADLINE_EXCEEDED, "QUEUE_TIMEOUT")
    assert not late.tokens


def test_what_expires_while_running_stops_within_one_step() -> None:
    world = World()
    stream = world.submit(PROMPT, max_new_tokens=1000, remaining_ms=50)
    world.run()
    assert stream.failed is not None
    assert stream.failed.reason == "GENERATION_TIMEOUT"
    assert 3 <= len(stream.tokens[0]) <= 6


def test_a_soft_time_limit_ends_with_what_there_is() -> None:
    world = World()
    stream = world.submit(PROMPT, max_new_tokens=1000, stop={"soft_time_limit_ms": 50})
    world.run()
    assert stream.finished[0].reason == common_pb2.FINISH_REASON_TIME_LIMIT
    assert stream.tokens[0] == expected_output(PROMPT, len(stream.tokens[0]))


def test_a_lost_worker_loses_no_token() -> None:
    world = World()
    stream = world.submit(PROMPT, max_new_tokens=20, sampling={"seed": 4})
    for _ in range(5):
        world.step()
    world.lose("group-0")
    assert not stream.ended
    world.join("group-0")
    world.run()
    assert stream.tokens[0] == expected_output(PROMPT, 20, seed=4)


def test_a_request_that_loses_every_worker_is_given_up() -> None:
    world = World(max_recoveries=2)
    stream = world.submit(PROMPT, max_new_tokens=20)
    for _ in range(3):
        world.step()
        world.lose("group-0")
        world.join("group-0")
    assert stream.failed is not None
    assert stream.failed.code == code_pb2.UNAVAILABLE
    assert stream.failed.resumable


def test_without_workers_requests_are_queued_for_a_while_and_then_refused() -> None:
    world = World(worker_grace_s=5.0)
    world.lose("group-0")
    queued = world.submit(PROMPT)
    world.now += 10
    refused = world.submit(PROMPT)
    world.join("group-0")
    world.run()
    assert queued.finished
    assert refused.rejected is not None
    assert refused.rejected.reason == "NO_WORKERS"


def test_what_is_asked_for_is_not_cut_short_by_a_small_worker_that_comes_first() -> None:
    world = World(groups=0, worker_grace_s=5.0, max_model_len=100)
    call = world.submit(list(range(1, 58)), max_new_tokens=9)
    world.join("group-0", max_model_len=60)
    world.run()
    assert not call.finished
    world.join("group-1")
    world.run()
    assert len(call.tokens[0]) == 9
    assert call.finished[0].reason == common_pb2.FINISH_REASON_MAX_TOKENS


def test_a_scheduler_that_just_started_queues_requests_until_its_workers_are_back() -> None:
    world = World(groups=0, worker_grace_s=5.0, max_model_len=100)
    fits = world.submit(PROMPT, max_new_tokens=1000)
    too_long = world.submit(list(range(100)))
    assert fits.admitted
    assert too_long.admitted
    world.join("group-0")
    world.run()
    assert len(fits.tokens[0]) == 60
    assert not fits.finished, "a larger worker may be on its way"
    assert too_long.failed is None
    assert world.core.load(world.now).may_grow
    for _ in range(6):
        world.now += 1.0
        world.settle()
    assert fits.finished[0].reason == common_pb2.FINISH_REASON_CONTEXT_LIMIT
    assert too_long.failed is not None
    assert too_long.failed.reason == "KV_CAPACITY_EXCEEDED"
    assert not world.core.load(world.now).may_grow


def test_several_groups_share_the_work_and_prefer_a_cached_prefix() -> None:
    world = World(groups=2, num_blocks=100, max_num_seqs=4)
    world.submit(PROMPT)
    world.run()
    used = next(group for group, worker in world.workers.items() if worker.steps)
    again = world.submit(PROMPT)
    world.run()
    assert again.finished[0].usage.cached_prompt_tokens == 32
    assert world.workers[used].steps > 1
    streams = [world.submit([n] * 40, max_new_tokens=30) for n in range(6)]
    world.run()
    assert all(stream.tokens[0] == expected_output([n] * 40, 30) for n, stream in enumerate(streams))
    assert all(worker.steps > 1 for worker in world.workers.values())


def test_a_sequence_is_placed_where_there_are_blocks_for_it() -> None:
    world = World(num_blocks=129, max_num_seqs=64)
    for first in (1, 2):  # their caches fill the first group
        world.submit([first] * 930, max_new_tokens=60)
    for _ in range(3):
        world.step()
    world.join("group-1")
    for n in range(12):  # and these make the second one the busier
        world.submit([50 + n] * 8, max_new_tokens=200)
    for _ in range(2):
        for group_id in world.workers:
            world.step(group_id)
    streams = [world.submit([100 + n] * 200, max_new_tokens=4) for n in range(5)]

    for _ in range(10):
        for group_id in world.workers:
            world.step(group_id)

    assert all(stream.ended for stream in streams)


def test_a_worker_that_does_not_answer_gets_nothing_that_another_one_could_begin() -> None:
    world = World(groups=2)
    world.cancel(world.submit([1] * 40))  # both steps that may be in flight are, on the first one
    assert len(world.queues["group-0"]) == 2

    stream = world.submit([2] * 40)

    while world.step("group-1"):
        pass
    assert stream.ended


def test_a_cached_prompt_does_not_wait_for_a_worker_whose_step_is_late() -> None:
    world = World(groups=2)
    world.submit(prompt := list(range(200)), max_new_tokens=20)
    world.run()
    world.cancel(world.submit([1] * 40))
    assert len(world.queues["group-0"]) == 2
    world.now += 5.0  # a step takes 0.01 s

    stream = world.submit(prompt)

    while world.step("group-1"):
        pass
    assert stream.ended


def test_a_prompt_that_has_blocks_nowhere_is_not_overtaken_for_ever() -> None:
    world = World(num_blocks=33, groups=2, max_num_seqs=8)
    for n in range(4):
        world.submit([n + 1] * 200, max_new_tokens=30)
    for group_id in world.workers:
        world.step(group_id)
    large = world.submit([9] * 400, max_new_tokens=4)
    for n in range(300):
        world.submit([100 + n] * 60, max_new_tokens=8)
        for group_id in world.workers:
            world.step(group_id)
        if large.ended:
            return
    raise AssertionError("it still waits")


def test_prompts_that_each_begin_like_the_one_before_do_not_hold_a_plan_up() -> None:
    world = World(num_blocks=2000, max_num_seqs=128, max_num_batched_tokens=2048)
    world.lose("group-0")
    tokens = list(range(1000, 3000))
    for n in range(1, 60):
        world.submit([*tokens[: 16 * n], 5], max_new_tokens=1)
    searches: list[int] = []
    planner = world.core._planner
    search = planner._open_waiting
    planner._open_waiting = lambda *args: searches.append(1) or search(*args)  # type: ignore[method-assign,func-returns-value]
    world.join("group-0")
    while world.queues["group-0"]:
        assert len(searches) <= 2 * MAX_SEARCHES, "of a step, and of the one that is planned behind it"
        searches.clear()
        world.step()
    assert all(stream.ended for stream in world.streams.values())


def test_tenants_share_by_weight() -> None:
    world = World(num_blocks=400, max_num_seqs=4, max_num_batched_tokens=64, tenant_weights=("gold=3", "plain=1"))
    for n in range(60):
        for tenant in ("gold", "plain"):
            world.submit([n * 7 + len(tenant)] * 40, max_new_tokens=8, tenant=tenant)
    for _ in range(150):
        world.step()
    tokens = {"gold": 0, "plain": 0}
    for stream in world.streams.values():
        tokens[stream.submit.tenant] += len(stream.finished)
    assert 2.2 < tokens["gold"] / tokens["plain"] < 4.0


def test_a_gateway_that_is_gone_leaves_nothing_behind() -> None:
    world = World()
    gone = [world.submit(PROMPT, gateway="gone") for _ in range(3)]
    stays = world.submit([5] * 20, gateway="stays")
    world.step()
    world.core.gateway_lost("gone", world.now)
    for stream in gone:
        stream.cancelled = True
    world.settle()
    assert world.core.num_requests == 1
    world.run()
    assert stays.finished


def test_logits_that_are_not_finite_end_that_request_only() -> None:
    world = World()
    bad, good = world.submit(PROMPT), world.submit([5] * 20)
    plan = world.queues["group-0"].pop(0)
    result = world.workers["group-0"].execute(plan)
    tokens = array("I", result.token_ids)
    tokens[0] = 0xFFFFFFFF
    result.token_ids = tokens.tobytes()
    world.core.step_done("group-0", result, world.now)
    world.settle()
    world.run()
    failed = [stream for stream in (bad, good) if stream.failed]
    assert len(failed) == 1
    assert failed[0].failed is not None
    assert failed[0].failed.code == code_pb2.INTERNAL
    assert len([stream for stream in (bad, good) if stream.finished]) == 1


def test_a_worker_that_answers_the_wrong_step_or_too_few_rows_is_found_out() -> None:
    world = World()
    world.submit(PROMPT)
    result = world.workers["group-0"].execute(world.queues["group-0"][0])
    with pytest.raises(WorkerMisbehavedError):
        world.core.step_done("group-0", worker_pb2.StepResult(step_id=9), world.now)
    result.token_ids = b""
    with pytest.raises(WorkerMisbehavedError):
        world.core.step_done("group-0", result, world.now)


@pytest.mark.parametrize(
    ("max_row_tokens", "counts", "problem"),
    [
        (4, [1, 1], "`token_counts` has 2"),
        (4, [5], "cannot have made 5 tokens"),
        (4, [2**32 - 1], "cannot have made"),
        (1, [0], "cannot have made 0 tokens"),
        (64, [30], "cannot have made 30 tokens"),  # it has no blocks for so many
        (4, [2], "samples 2 tokens, answered were 1"),
        (4, [0], "samples 0 tokens, answered were 1"),
    ],
)
def test_a_worker_that_answers_too_many_or_too_few_tokens_is_found_out(
    max_row_tokens: int, counts: list[int], problem: str
) -> None:
    world = World(max_row_tokens=max_row_tokens)
    world.submit(PROMPT)
    result = world.workers["group-0"].execute(world.queues["group-0"][0])
    result.token_ids = array("I", [5] * (counts[0] if counts == [30] else 1)).tobytes()
    result.token_counts = array("I", counts).tobytes()
    with pytest.raises(WorkerMisbehavedError, match=problem):
        world.core.step_done("group-0", result, world.now)


def test_tokens_that_took_no_step_of_their_own_are_counted() -> None:
    world = World(max_row_tokens=4)
    world.workers["group-0"].num_guessed = lambda: 2
    streams = [world.submit(PROMPT, max_new_tokens=10), world.submit([5] * 20, max_new_tokens=6)]
    world.run()

    # One token comes with the prompt; then each step has three, but the last one of the second no more than fit.
    assert [stream.tokens[0] for stream in streams] == [expected_output(PROMPT, 10), expected_output([5] * 20, 6)]
    assert world.workers["group-0"].steps <= 1 + 3 + 2  # with those that were planned when the end was not known
    counts = [stream.finished[0].usage.speculative_accepted_tokens for stream in streams]
    assert counts == [6, 3]
    assert world.core._metrics.accepted_tokens == 9
    assert world.core._metrics.output_tokens == 16


def test_the_load_and_the_metrics_say_alike_what_each_proposer_brought() -> None:
    store = Store(catalog.SCHEDULER)
    world = World(metrics=SchedulerMetrics(store))
    world.submit(PROMPT, max_new_tokens=2)
    for accepted in (2, 9):  # of a worker that claims more than it computed, what it computed
        result = world.workers["group-0"].execute(world.queues["group-0"].pop(0))
        result.guesses.add(proposer="grammar", drafted=3, accepted=accepted, time_us=70)
        world.core.step_done("group-0", result, world.now)
        world.settle()

    world.core._metrics.write_totals()
    (proposer,) = world.core.load(world.now).proposers
    assert proposer == common_pb2.Proposer(name="grammar", drafted_tokens=6, accepted_tokens=5, time_us=140)
    counted = [store.value(catalog.DRAFT_TOKENS, "grammar", is_right).value for is_right in ("true", "false")]
    assert [*counted, store.value(catalog.DRAFT_TIME, "grammar").value] == [5, 1, 140 / 1e6]


def test_what_comes_after_a_stop_token_in_the_same_step_is_dropped() -> None:
    world = World(max_row_tokens=8)
    world.workers["group-0"].num_guessed = lambda: 7
    expected = expected_output(PROMPT, 4)
    stream = world.submit(PROMPT, max_new_tokens=20, end_of_sequence_ids=[expected[-1]])
    world.run()

    assert stream.tokens[0] == expected
    usage = stream.finished[0].usage
    assert (usage.output_tokens, usage.speculative_accepted_tokens) == (4, 2)


@pytest.mark.parametrize(
    ("num_blocks", "max_row_tokens", "max_new_tokens", "expected"),
    [
        (64, 1, 30, 1),
        (64, 9, 30, 2),
        (3, 9, 10, 1),  # they are scarce
        (64, 9, 2, 1),  # it ends before
    ],
)
def test_sequences_have_blocks_for_guesses_where_there_are_plenty(
    num_blocks: int, max_row_tokens: int, max_new_tokens: int, expected: int
) -> None:
    world = World(num_blocks=num_blocks, max_row_tokens=max_row_tokens)
    world.workers["group-0"].num_guessed = lambda: 0
    world.submit([5] * 15, max_new_tokens=max_new_tokens)
    world.step()
    world.step()  # computes the sixteenth token

    (slot,) = world.workers["group-0"].slots.values()
    assert len(slot.block_table) == expected


def test_a_sequence_that_outruns_its_blocks_goes_on() -> None:
    world = World(num_blocks=4, max_row_tokens=16)
    worker = world.workers["group-0"]
    worker.num_guessed = lambda: 15
    stream = world.submit([5] * 10, max_new_tokens=30)
    counts: list[int] = []
    while world.queues["group-0"]:
        result = worker.execute(world.queues["group-0"].pop(0))
        counts += array("I", result.token_counts) or [1]
        world.core.step_done("group-0", result, world.now)
        world.settle()

    assert 0 in counts, "a step had no block for the next token"
    assert stream.tokens[0] == expected_output([5] * 10, 30)


def test_logprobs_reach_the_requests_that_asked_for_them() -> None:
    world = World()
    seen: list[scheduler_pb2.StepOutputs] = []
    deliver = world.deliver
    world.deliver = lambda effect: (seen.append(effect.message.step_outputs), deliver(effect))[1]  # type: ignore[assignment]
    world.submit(PROMPT, max_new_tokens=3)
    world.submit([5] * 20, max_new_tokens=3, logprobs=2, chosen_logprob=True)
    world.run()
    assert sum(len(outputs.token_ids) for outputs in seen) == 6
    assert sum(len(outputs.logprobs) for outputs in seen) == 3
    assert [list(o.candidate_token_ids) for o in seen if o.candidate_token_ids] == [[0, 1]] * 3


@pytest.mark.parametrize("chunk", [2, 7, 16, 64, 512])
def test_log_probabilities_of_a_prompt_come_once_and_before_the_first_token(chunk: int) -> None:
    prompt = list(range(1000, 1300))
    world = World(max_num_batched_tokens=chunk, max_num_seqs=2, max_prefill_tokens=chunk)
    first = world.submit(prompt, max_new_tokens=3, prompt_logprobs=1, candidate_count=2)
    world.run()
    again = world.submit(prompt, max_new_tokens=3, prompt_logprobs=2)
    plain = world.submit(prompt, max_new_tokens=3)
    world.run()
    expected = [-float(token) for token in prompt[1:]]
    assert first.prompt_logprobs == again.prompt_logprobs == expected
    assert plain.prompt_logprobs == []
    assert first.tokens[0] == again.tokens[0] == plain.tokens[0] == expected_output(prompt, 3)
    assert max(len(plan.token_ids) // 4 for plan in world.plans) <= max(MAX_SCORED_TOKENS, chunk)


def test_log_probabilities_of_a_prompt_go_on_where_a_worker_was_lost() -> None:
    prompt = list(range(1000, 1300))
    world = World()
    stream = world.submit(prompt, max_new_tokens=3, prompt_logprobs=1)
    world.step()
    assert 0 < len(stream.prompt_logprobs) < 299
    world.lose("group-0")
    world.join("group-0")
    world.run()
    assert stream.prompt_logprobs == [-float(token) for token in prompt[1:]]
    assert stream.tokens[0] == expected_output(prompt, 3)


def test_workers_that_give_no_log_probabilities_of_prompts_are_not_asked_for_them() -> None:
    world = World(scores_prompts=False)
    refused = world.submit(PROMPT, prompt_logprobs=1)
    assert refused.rejected is not None
    assert refused.rejected.reason == "FEATURE_DISABLED"


def test_progress_is_reported_to_those_who_asked() -> None:
    world = World(max_num_seqs=1, max_num_batched_tokens=16)
    world.submit(list(range(100)), max_new_tokens=5)
    world.submit(list(range(200, 300)), max_new_tokens=5, progress_interval_ms=20)
    world.run()
    phases = [phase for message in world.others for phase in message.progress.phases]
    assert set(phases) >= {1, 2}
    assert phases == sorted(phases)


def test_progress_is_reported_twenty_times_a_second_at_most() -> None:
    world = World(max_num_seqs=1)
    world.submit(list(range(100)), max_new_tokens=500)
    world.submit(list(range(200, 300)), max_new_tokens=5, progress_interval_ms=1)
    for _ in range(100):
        world.step()
    assert 15 <= len(world.others) <= 20


def test_progress_says_how_many_are_before_a_request() -> None:
    world = World(max_num_seqs=1)
    world.submit([5] * 40, max_new_tokens=500, tenant="t")
    for n in range(10):
        world.submit([10 + n] * 40, tenant="t", progress_interval_ms=50)
    for _ in range(10):
        world.step()
    positions = [position for message in world.others for position in message.progress.queue_positions]
    assert positions[:10] == list(range(10))


def test_a_draining_scheduler_refuses_new_requests_and_ends_the_running_ones() -> None:
    world = World()
    running = world.submit(PROMPT)
    world.core.drain()
    refused = world.submit(PROMPT)
    world.run()
    assert running.finished
    assert refused.rejected is not None
    assert refused.rejected.reason == "DRAINING"


def test_flushing_the_prefix_cache_forgets_what_nobody_holds() -> None:
    world = World()
    world.submit(PROMPT)
    world.run()
    assert world.core.flush_prefix_cache() > 0
    again = world.submit(PROMPT)
    world.run()
    assert again.finished[0].usage.cached_prompt_tokens == 0


def test_a_group_that_ran_out_of_memory_gets_smaller_steps() -> None:
    world = World(num_blocks=400, max_num_batched_tokens=64, max_prefill_tokens=64, max_num_seqs=8)
    stream = world.submit(list(range(100, 200)), max_new_tokens=3)
    assert max(plan.num_tokens for plan in world.plans) == 64
    world.lose("group-0")
    world.plans.clear()

    world.join("group-0", max_num_batched_tokens=16)
    world.run()

    assert stream.tokens[0] == expected_output(list(range(100, 200)), 3)
    assert max(plan.num_tokens for plan in world.plans) == 16


def cached_tokens(world: World, prompt: list[int], tenant: str) -> int:
    stream = world.submit(prompt, 1, tenant=tenant, cache_salt=tenant)
    world.run()
    return stream.finished[0].usage.cached_prompt_tokens


def flood(world: World, tenant: str, prompts: int, first: int = 1000) -> None:
    for number in range(prompts):
        world.submit([first + number] * 48, 1, tenant=tenant, cache_salt=tenant)
        world.run()


def test_a_tenant_that_floods_the_cache_pushes_out_its_own_prefixes() -> None:
    world = World(num_blocks=33)
    prompt = list(range(200, 265))  # four full blocks, and one token
    assert cached_tokens(world, prompt, "small") == 0

    flood(world, "large", prompts=60)

    assert cached_tokens(world, prompt, "small") == 64


def test_a_tenant_that_was_idle_for_long_gives_up_its_prefixes_first() -> None:
    world = World(num_blocks=33)
    prompt = list(range(200, 265))
    cached_tokens(world, prompt, "gone")

    flood(world, "large", prompts=STALE_TURNS * 40)

    assert cached_tokens(world, prompt, "gone") == 0


def test_what_a_request_made_before_it_failed_is_sent_before_its_failure() -> None:
    """One of two candidates fails within a step. The other one's token, and another tenant's, are in the same step."""
    world = World(num_blocks=200)
    wanted = {"chosen_logprob": True, "logprobs": 1}
    failing = world.submit(PROMPT, 20, candidate_count=2, tenant="x", **wanted)
    other = world.submit(PROMPT[1:], 20, tenant="y", **wanted)
    for _ in range(4):
        world.step()
    (second,) = [seq for seq in world.core._groups["group-0"].running() if seq.candidate_index == 1]
    world.not_finite_after = world.workers["group-0"].slots[second.slot].last_sampled
    del world.messages[:]
    world.run()  # World.deliver asserts that nothing comes after an end

    assert failing.failed is not None
    kinds = [message.WhichOneof("kind") for message in world.messages]
    at = kinds.index("failed")
    (before, after) = world.messages[at - 1].step_outputs, world.messages[at + 1].step_outputs
    assert failing.submit.handle in before.handles
    assert list(after.handles) == [other.submit.handle]
    assert list(after.logprobs) == [-float(token % 7) for token in after.token_ids]
    assert other.tokens[0] == expected_output(PROMPT[1:], 20)


def test_the_blocks_of_a_worker_that_is_gone_are_in_no_cache() -> None:
    world = World(num_blocks=400, max_row_tokens=8)
    for index in range(10):
        world.submit([index + 1] * 47, 200)
    for _ in range(7):
        world.step()
    world.lose("group-0")
    assert not world.core.cache_events._counts


@pytest.mark.parametrize("fields", [{"candidate_count": 2**32 - 1}, {"first_candidate_index": 2**32 - 1}])
def test_candidates_that_no_plan_could_name_are_refused(fields: dict[str, int]) -> None:
    """An exception would end the process, and with it the requests of everybody."""
    world = World()
    rejected = world.submit(PROMPT, **{"candidate_count": 1, **fields}).rejected
    assert rejected is not None
    assert rejected.reason == "INVALID_FIELD"


def test_a_stop_token_may_be_the_first_one_after_min_new_tokens_and_none_before() -> None:
    output = expected_output(PROMPT, 10)
    for place, num_tokens in ((2, 10), (3, 4)):
        world = World()
        stream = world.submit(PROMPT, 10, stop={"stop_token_ids": [output[place]], "min_new_tokens": 3})
        world.run()
        assert len(stream.tokens[0]) == num_tokens


def test_waiting_prefill_and_decode_take_the_time_of_their_own_phase() -> None:
    world = World(max_num_seqs=1, max_num_batched_tokens=16, max_prefill_tokens=16)
    first = world.submit(PROMPT, max_new_tokens=10)
    second = world.submit([5] * 64, max_new_tokens=20)
    world.run()

    timing, before = second.finished[0].timing, first.finished[0].timing
    assert timing.queue_us >= before.prefill_us + before.decode_us
    assert 3 * 10_000 - 10 <= timing.prefill_us <= 5 * 10_000  # four steps, of 10 ms each
    assert 19 * 10_000 - 10 <= timing.decode_us <= 20 * 10_000
    assert before.queue_us == 0
