"""A request that kills workers is found, refused for a while, and costs the others nothing but time."""

from __future__ import annotations

import pytest
from google.rpc import code_pb2

from octavo.services.scheduler.core.quarantine import QUARANTINE_S

from .simulation import Stream, World, expected_output

GROUP = "group-0"


def run_with_poison(world: World, poison: Stream, position: int) -> int:
    """Run; the worker dies whenever it would compute `position` of the poisoned request. Return the crashes."""
    token = (list(poison.submit.prompt_token_ids) + expected_output(list(poison.submit.prompt_token_ids), 50))[position]
    crashes = 0
    while world.queues.get(GROUP):
        if world.would_feed(GROUP, token):
            crashes += 1
            world.lose(GROUP, crashed=True)
            world.join(GROUP)
        else:
            world.step()
    return crashes


@pytest.mark.parametrize("position", [5, 42])  # in the prompt, in the output
@pytest.mark.parametrize("others", [0, 1, 15])
def test_the_culprit_is_found_by_bisection_and_the_others_finish(position: int, others: int) -> None:
    world = World(num_blocks=300)
    innocent = [world.submit([n] * 30 + [n + 1], max_new_tokens=20) for n in range(10_000, 10_000 + others)]
    poison = world.submit(list(range(40_000, 40_040)), max_new_tokens=20)
    crashes = run_with_poison(world, poison, position)
    assert poison.failed is not None
    assert (poison.failed.code, poison.failed.reason) == (code_pb2.INTERNAL, "QUARANTINED")
    assert crashes <= 2 + (others + 1).bit_length()
    for stream in innocent:
        assert stream.tokens[0] == expected_output(list(stream.submit.prompt_token_ids), 20)


def test_suspects_run_apart_also_where_the_queue_is_searched_twice() -> None:
    world = World()
    suspects = [world.submit([9] * 40), world.submit([5] * 40)]
    world.step()  # both are in flight
    world.lose(GROUP, crashed=True)
    world.submit([5] * 41)  # is passed over until its prefix is computed, for which the queue is searched again
    num_plans = len(world.plans)
    world.join(GROUP)
    assert [plan.num_sequences for plan in world.plans[num_plans:]] == [2, 2]  # a suspect, and what is none
    world.run()
    assert all(stream.finished for stream in suspects)


def test_a_request_that_was_blamed_is_refused_for_a_while() -> None:
    world = World()
    poison = world.submit([9] * 20, max_new_tokens=5, sampling={"seed": 3})
    for _ in range(2):
        world.lose(GROUP, crashed=True)
        world.join(GROUP)
    assert poison.failed is not None
    again = world.submit([9] * 20, max_new_tokens=5, sampling={"seed": 3}, continue_token_ids=[1])
    assert again.rejected is not None
    assert again.rejected.reason == "QUARANTINED"
    assert world.submit([9] * 20, max_new_tokens=5, sampling={"temperature": 0.5}).admitted
    assert world.submit([9] * 20, max_new_tokens=5, sampling={"seed": 3}, tenant="other").admitted
    world.now += QUARANTINE_S + 1
    assert world.submit([9] * 20, max_new_tokens=5, sampling={"seed": 3}).admitted


def test_a_poisonous_request_without_a_seed_costs_two_workers_however_often_it_is_sent() -> None:
    world = World(num_blocks=200)
    crashes = 0
    for attempt in range(5):
        # As gateways fill it in: each draws a seed where the client gave none.
        poison = world.submit([666] * 40, max_new_tokens=50, sampling={"temperature": 1.0, "seed": 1000 + attempt})
        while not poison.ended:
            crashes += 1
            world.lose(GROUP, crashed=True)
            world.join(GROUP)
    assert crashes == 2


def test_a_request_is_not_blamed_for_what_ran_along() -> None:
    world = World(num_blocks=300)
    innocent = world.submit([5] * 30, max_new_tokens=30)
    world.lose(GROUP, crashed=True)  # by chance
    world.join(GROUP)
    poison = world.submit(list(range(40_000, 40_040)), max_new_tokens=20, candidate_count=3)
    run_with_poison(world, poison, 5)
    assert poison.failed is not None
    assert poison.failed.reason == "QUARANTINED"
    assert innocent.tokens[0] == expected_output([5] * 30, 30)


def test_two_crashes_with_progress_between_them_blame_nobody() -> None:
    world = World()
    stream = world.submit([9] * 20, max_new_tokens=40)
    for _ in range(5):
        for _ in range(6):
            world.step()
        world.lose(GROUP, crashed=True)
        world.join(GROUP)
    world.run()
    assert stream.tokens[0] == expected_output([9] * 20, 40)


def test_a_worker_that_leaves_without_a_crash_makes_no_suspects() -> None:
    world = World()
    stream = world.submit([9] * 20, max_new_tokens=5)
    for _ in range(5):
        world.lose(GROUP)
        world.join(GROUP)
    world.run()
    assert stream.finished


def test_what_a_request_without_finite_output_computed_is_not_shared() -> None:
    prompt = list(range(500, 540))
    world = World()
    world.submit(prompt, max_new_tokens=4)
    world.run()
    world.not_finite_after = prompt[-1] + 1
    spoiled = world.submit([*prompt, prompt[-1] + 1], max_new_tokens=4)
    other = world.submit([7] * 20, max_new_tokens=10)
    world.run()
    assert spoiled.failed is not None
    assert (spoiled.failed.code, spoiled.failed.reason) == (code_pb2.INTERNAL, "WORKER_FAULT")
    assert other.tokens[0] == expected_output([7] * 20, 10)
    again = world.submit(prompt, max_new_tokens=4)
    world.run()
    assert again.finished[0].usage.cached_prompt_tokens == 0  # what it had found may have been the cause
    assert again.tokens[0] == expected_output(prompt, 4)
