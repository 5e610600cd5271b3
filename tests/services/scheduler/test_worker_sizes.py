"""Workers of different size: what fits only some of them goes there, and nothing else is held up or cut short."""

from __future__ import annotations

import os
import random

import pytest

from octavo.common.v1 import common_pb2
from octavo.services.scheduler.groups.worker_group import WorkerGroup
from octavo.services.scheduler.requests.sequence import Sequence

from .simulation import Stream, World, expected_output, random_prompt

NUM_HISTORIES = int(os.environ.get("NUM_HISTORIES", "200"))
SMALL, LARGE = 144, 3000  # tokens that a sequence can have there


def join_small(world: World, group_id: str = "small") -> None:
    world.join(group_id, num_blocks=SMALL // 16 + 1)


def join_large(world: World, group_id: str = "large") -> None:
    world.join(group_id, num_blocks=LARGE // 16 + 4, max_model_len=LARGE)


def test_a_small_worker_beside_a_large_one_lowers_nobodys_limit() -> None:
    world = World(groups=0)
    join_large(world)
    join_small(world)
    assert world.core.load(world.now).max_model_len == LARGE
    long = world.submit([1] * 200, 20)
    world.run()
    assert long.tokens[0] == expected_output([1] * 200, 20)


def test_a_sequence_that_outgrows_its_worker_goes_on_at_a_larger_one() -> None:
    world = World(groups=0)
    join_small(world)
    join_large(world)
    streams = [world.submit([index + 1] * 100, 80) for index in range(4)]
    world.run()
    assert world.workers["small"].steps
    for index, stream in enumerate(streams):
        assert stream.tokens[0] == expected_output([index + 1] * 100, 80)
        assert stream.finished[0].reason == common_pb2.FINISH_REASON_MAX_TOKENS


def test_what_a_restarted_scheduler_is_given_again_waits_for_the_large_worker() -> None:
    world = World(groups=0)
    join_small(world)
    again = world.submit([1] * 200, 20, is_failover=True)
    assert again.admitted
    join_large(world)
    world.run()
    assert again.tokens[0] == expected_output([1] * 200, 20)


def test_what_outgrows_the_small_worker_after_a_restart_waits_for_the_large_one() -> None:
    world = World(groups=0)
    join_small(world)
    again = world.submit([1] * 100, 80, is_failover=True)
    world.run()
    assert again.tokens[0] == expected_output([1] * 100, SMALL - 100)
    join_large(world)
    world.run()
    assert again.tokens[0] == expected_output([1] * 100, 80)


def test_what_outgrows_the_only_worker_after_a_restart_ends_when_no_larger_one_came() -> None:
    world = World(groups=0)
    join_small(world)
    again = world.submit([1] * 100, 80, is_failover=True)
    world.run()
    for _ in range(2):
        world.now += world.config.worker_grace_s
        world.core.tick(world.now)
        world.settle()
    assert again.tokens[0] == expected_output([1] * 100, SMALL - 100)
    assert again.finished[0].reason == common_pb2.FINISH_REASON_CONTEXT_LIMIT


def test_who_names_no_number_of_tokens_ends_with_the_only_worker_unless_an_earlier_scheduler_had_it() -> None:
    world = World(groups=0)
    new = world.submit([1] * 100, 0)
    again = world.submit([2] * 100, 0, is_failover=True)
    join_small(world)
    world.run()
    assert new.finished[0].reason == common_pb2.FINISH_REASON_CONTEXT_LIMIT
    assert not again.ended
    world.join("large", num_blocks=SMALL // 8 + 4, max_model_len=2 * SMALL)
    world.run()
    assert new.tokens[0] == expected_output([1] * 100, SMALL - 100)
    assert again.tokens[0] == expected_output([2] * 100, 2 * SMALL - 100)


def test_who_comes_when_only_the_small_worker_has_joined_waits_for_the_large_one() -> None:
    world = World(groups=0, worker_grace_s=5.0)
    join_small(world)
    long = world.submit([1] * 200, 20)
    in_vain = world.submit([1] * (LARGE + 1), 20)
    short = world.submit([2] * 20, 20)
    world.run()
    assert short.tokens[0] == expected_output([2] * 20, 20), "nobody is held up"
    assert not long.ended
    join_large(world)
    world.run()
    assert long.tokens[0] == expected_output([1] * 200, 20)
    for _ in range(7):
        world.now += 1.0
        world.settle()
    assert in_vain.failed is not None
    assert in_vain.failed.reason == "KV_CAPACITY_EXCEEDED"
    too_long = world.submit([1] * (LARGE + 1)).rejected
    assert too_long is not None, "by now all workers have had their time to join"
    assert too_long.reason == "KV_CAPACITY_EXCEEDED"


@pytest.mark.parametrize("num_prompt_tokens", [40, 200])
def test_what_no_worker_can_run_waits_for_one_and_holds_nobody_up(num_prompt_tokens: int) -> None:
    world = World(groups=0, max_num_seqs=1)
    join_large(world)
    join_small(world)
    long = world.submit([1] * num_prompt_tokens, 300)
    for _ in range(20):
        world.step("large")
        world.step("small")
    world.lose("large")
    others = [world.submit([index] * 20, 5) for index in range(5, 10)]
    world.run()
    assert all(other.finished for other in others)
    assert not long.ended

    join_large(world)
    world.run()
    assert long.tokens[0] == expected_output([1] * num_prompt_tokens, 300)


def test_what_no_worker_can_run_for_long_ends_so_that_another_scheduler_can_go_on() -> None:
    world = World(groups=0, worker_grace_s=5.0)
    join_large(world)
    join_small(world)
    world.now += 60.0  # long after the start
    long = world.submit([1] * 200, 300)
    for _ in range(20):
        world.step("large")
    world.lose("large")
    assert world.submit([1] * 200).admitted, "the large worker may be back soon"
    for second in range(7):
        assert not long.ended or second > 4
        world.now += 1.0
        world.settle()
    assert long.failed is not None
    assert (long.failed.reason, long.failed.resumable) == ("NO_WORKERS", True)
    rejected = world.submit([1] * 200).rejected
    assert rejected is not None
    assert rejected.metadata["limit"] == str(SMALL)
    assert world.core.load(world.now).max_model_len == SMALL


def test_who_comes_after_its_worker_went_is_given_up_as_well() -> None:
    world = World(groups=0, worker_grace_s=5.0)
    join_large(world)
    join_small(world)
    world.now += 60.0  # long after the start
    world.lose("large")
    world.now += 2.0
    world.settle()
    late = world.submit([1] * 200)
    assert late.admitted
    for second in range(7):
        assert not late.ended or second > 4
        world.now += 1.0
        world.settle()
    assert late.failed is not None
    assert late.failed.reason == "NO_WORKERS"


def test_while_no_worker_comes_or_goes_those_that_wait_are_not_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(max_num_seqs=1, max_waiting=1000, check=False)
    for n in range(500):
        world.submit([n, 1, 2])
    world.core.tick(world.now + 2.0)
    looked_at: list[Sequence] = []
    monkeypatch.setattr(WorkerGroup, "can_run", lambda _, seq: looked_at.append(seq) or True)  # type: ignore[func-returns-value]
    world.core.tick(world.now + 4.0)
    assert not looked_at


def test_the_largest_worker_there_ever_was_ends_an_output_at_its_limit() -> None:
    """Even one that came when no worker was there to say how long it can get."""
    world = World(groups=0)
    early = world.submit([1] * 40, 4000)
    join_small(world)
    late = world.submit([2] * 40, 4000)
    world.run()
    for _ in range(int(world.config.worker_grace_s) + 2):  # in which a larger one might have come
        world.now += 1.0
        world.settle()
    for stream in (early, late):
        assert len(stream.tokens[0]) == SMALL - 40
        assert stream.finished[0].reason == common_pb2.FINISH_REASON_CONTEXT_LIMIT


def run_history(seed: int) -> World:
    """A small and a large worker that die and come back at random; returns when both are there and all has ended."""
    rng = random.Random(seed)
    max_num_seqs = rng.choice([1, 2, 8])
    world = World(
        groups=0,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=rng.choice([64, 512]),
        max_recoveries=1000,
        worker_grace_s=rng.choice([0.3, 3.0, 1000.0]),
        max_row_tokens=rng.choice([1, 1, 4]),
        check=seed % 8 == 0,  # the books are balanced after each event in some, which costs most of the time
    )
    joins = {"small": join_small, "large": join_large}
    groups = list(joins)
    limits: dict[int, int] = {}  # by handle
    for group in rng.sample(groups, 2):
        joins[group](world)
    for _ in range(rng.choice([20, 60])):
        action = rng.random()
        if action < 0.15:
            prompt = random_prompt(rng, rng.choice([10, 60, 130, 150, 400]))
            fits = [size for group, size in (("small", SMALL), ("large", LARGE)) if group in world.workers]
            stream = world.submit(
                prompt,
                rng.choice([3, 30, 60]),
                tenant=rng.choice("xy"),
                candidate_count=rng.choice([1, 1, 2]),
                remaining_ms=rng.choice([0, 0, 0, 2000]),
            )
            limits[stream.submit.handle] = world.core.load(world.now).max_model_len or LARGE
            refused = stream.rejected is not None and stream.rejected.reason == "KV_CAPACITY_EXCEEDED"
            assert not refused or len(prompt) >= max(fits, default=0), "refused, and a worker could run it"
        elif action < 0.25:
            group = rng.choice(groups)
            if group in world.workers:
                world.lose(group, crashed=rng.random() < 0.1)
            else:
                joins[group](world)
        elif action < 0.3:
            world.now += rng.choice([0.1, 1.0])
            world.settle()
        else:
            world.step(rng.choice(groups))
    if rng.random() < 0.5:  # the large one never comes back
        groups = ["small"]
        if "large" in world.workers:
            world.lose("large")
    for group in groups:
        if group not in world.workers:
            joins[group](world)
    world.run()
    for _ in range(5 if world.config.worker_grace_s < 10 else 0):
        world.now += 1.0
        world.settle()
    world.run()
    for (_, handle), stream in world.streams.items():
        check(world, stream, limits[handle])
    return world


def check(world: World, stream: Stream, limit: int) -> None:
    """A request has all its tokens, or ended for a reason that holds; `limit` was in force when it came."""
    submit = stream.submit
    for candidate, tokens in stream.tokens.items():
        expected = expected_output(list(submit.prompt_token_ids), submit.stop.max_new_tokens, 0, candidate)
        assert tokens == expected[: len(tokens)]
        at_limit = len(submit.prompt_token_ids) + len(tokens) == limit
        assert candidate not in stream.finished or len(tokens) == len(expected) or at_limit
    if not stream.ended:  # it waits for the large one, as it may
        assert "large" not in world.workers
        assert world.config.worker_grace_s > 10
        longest = max((len(tokens) for tokens in stream.tokens.values()), default=0)
        assert len(submit.prompt_token_ids) + max(longest, 1) >= SMALL or submit.candidate_count > 1
    if stream.failed is not None and stream.failed.reason == "NO_WORKERS":
        longest = max((len(tokens) for tokens in stream.tokens.values()), default=0)
        assert len(submit.prompt_token_ids) + longest >= SMALL
        assert stream.failed.resumable


def test_every_request_ends_and_none_is_refused_that_a_living_worker_could_run() -> None:
    """With NUM_HISTORIES=10000 in the environment it takes some minutes."""
    moved = given_up = 0
    for seed in range(NUM_HISTORIES):
        try:
            world = run_history(seed)
        except AssertionError as error:
            raise AssertionError(f"history {seed}: {error}") from error
        moved += world.core.load(world.now).preemptions
        given_up += any(stream.failed for stream in world.streams.values())
    assert moved > NUM_HISTORIES / 20
    assert given_up > NUM_HISTORIES / 20
