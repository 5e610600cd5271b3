"""Sequences with adapters: they wait until a worker has theirs, hold nobody up, and share nothing with others."""

from __future__ import annotations

import hashlib
import random

import pytest

from octavo.scheduler.v1 import scheduler_pb2

from .simulation import Stream, World, expected_output, random_prompt


def sha256(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def submit(world: World, prompt: list[int], name: str, path: str = "/adapters", **fields: object) -> Stream:
    """Submit a request with an adapter; its content is that of its name."""
    adapter = f"{name}@{sha256(name)}" if name else ""
    return world.submit(prompt, adapter=adapter, adapter_path=path if name else "", **fields)


def is_right(stream: Stream, name: str, count: int = 8) -> bool:
    prompt = list(stream.submit.prompt_token_ids)
    return stream.tokens[0] == expected_output(prompt, count, adapter=sha256(name) if name else "")


def checked(world: World, name: str, path: str = "/adapters") -> list[str]:
    """Ask for an adapter; return the problems of the answers that came."""
    key = f"{name}@{sha256(name)}"
    world.core.check_adapter("g", scheduler_pb2.CheckAdapter(handle=1, adapter=key, adapter_path=path))
    world.settle()
    world.run()
    return [each.adapter_checked.problem for each in world.others if each.HasField("adapter_checked")]


def test_sequences_of_many_adapters_run_in_one_step_each_with_its_own() -> None:
    world = World(max_adapters=8)
    names = ["", *"abcdefg"]
    streams = [submit(world, [20 + n] * 40, name) for n, name in enumerate(names)]

    world.run()

    assert all(is_right(stream, name) for stream, name in zip(streams, names, strict=True))
    assert max(plan.num_sequences for plan in world.plans) >= 7
    assert world.num_loads == 7


def test_equal_prompts_share_blocks_within_an_adapter_of_one_content_alone() -> None:
    world = World(max_adapters=4, num_blocks=256)
    prompt = list(range(100, 164))
    for name in ("", "a", "b", "a", ""):
        stream = submit(world, prompt, name)
        world.run()
        assert is_right(stream, name)
        cached = stream.finished[0].usage.cached_prompt_tokens
        assert cached == (48 if (name == "a" and world.handles == 4) or world.handles == 5 else 0)
    reloaded = world.submit(prompt, adapter=f"a@{sha256('other content')}", adapter_path="/adapters")
    world.run()
    assert reloaded.finished[0].usage.cached_prompt_tokens == 0


def test_a_cold_adapter_holds_nobody_up() -> None:
    world = World(max_adapters=2)
    running = submit(world, [1] * 20, "", max_new_tokens=40)
    world.step()
    cold = [submit(world, [2 + n] * 20, f"cold {n}") for n in range(70)]
    late = submit(world, [99] * 20, "")

    for _ in range(12):  # no adapter is loaded meanwhile
        world.now += 0.01
        world.answer("group-0")

    assert len(running.tokens[0]) > 10
    assert is_right(late, "")
    world.run()
    assert all(is_right(stream, f"cold {n}") for n, stream in enumerate(cold))


def test_the_adapter_that_was_used_least_recently_goes_and_one_in_use_never() -> None:
    world = World(max_adapters=2)
    long = submit(world, [5] * 20, "a", max_new_tokens=200)
    world.step()
    for name in ("b", "c", "b"):
        stream = submit(world, [6] * 20, name)
        while not stream.ended:
            world.step()
        assert is_right(stream, name)
    world.run()

    assert is_right(long, "a", 200)
    assert world.num_loads == 4  # a stayed; b went for c and came back


def test_adapters_take_no_more_memory_than_there_is() -> None:
    world = World(max_adapters=10, adapter_memory=250)
    streams = {name: submit(world, [7] * 20, name, max_new_tokens=3) for name in "abcdef"}

    world.run()

    assert all(is_right(stream, name, 3) for name, stream in streams.items())
    assert len(world.workers["group-0"].adapters) == 2


def test_of_1000_adapters_workers_never_hold_more_than_they_have_room_for() -> None:
    world = World(max_adapters=64, adapter_memory=100 * 64)
    for first in range(0, 1000, 100):
        names = [f"customer {n}" for n in range(first, first + 100)]
        streams = [submit(world, [9] * 20, name, max_new_tokens=2) for name in names]
        while not all(stream.ended for stream in streams):
            world.step()
            assert len(world.workers["group-0"].adapters) <= 64
        assert all(is_right(stream, name, 2) for stream, name in zip(streams, names, strict=True))
    assert world.num_loads == 1000


def test_a_broken_adapter_ends_what_waits_for_it_and_nothing_else() -> None:
    world = World(max_adapters=2)
    broken = [submit(world, [8] * 20, "bad", path="broken") for _ in range(3)]
    good = submit(world, [9] * 20, "good")

    world.run()

    for stream in broken:
        assert stream.failed is not None
        assert (stream.failed.reason, stream.failed.resumable) == ("ADAPTER_NOT_LOADED", False)
        assert stream.failed.message == "the adapter 'bad' cannot be loaded: it is broken"
    assert is_right(good, "good")


@pytest.mark.parametrize(("name", "message"), [
    ("team/huge", "the model's output with the adapter 'team/huge' is not finite"),
    ("", "the model's output is not finite"),
])  # fmt: skip
def test_an_output_that_overflows_is_said_of_the_adapter_that_it_was_made_with(name: str, message: str) -> None:
    world = World(max_adapters=1)
    world.not_finite_after = 77
    stream = submit(world, [1, 77], name)

    world.run()

    assert stream.failed is not None
    assert stream.failed.message == message


@pytest.mark.parametrize("groups", [1, 3])
def test_a_lost_worker_gets_its_adapters_back_before_its_sequences_go_on(groups: int) -> None:
    world = World(max_adapters=4, groups=groups)
    streams = {name: submit(world, [30] * 20, name, max_new_tokens=30) for name in "abcd"}
    for _ in range(12):
        for group_id in list(world.workers):
            world.step(group_id)

    world.lose("group-0", crashed=False)
    for _ in range(5):
        for group_id in list(world.workers):
            world.step(group_id)
    world.join("group-0")
    world.run()

    assert all(is_right(stream, name, 30) for name, stream in streams.items())


def test_workers_without_adapters_refuse_them_and_one_that_has_them_is_waited_for() -> None:
    refused = submit(World(), [1] * 20, "a")
    assert refused.rejected is not None
    assert refused.rejected.reason == "FEATURE_DISABLED"

    world = World(groups=0, max_adapters=1, worker_grace_s=60.0)
    waiting = submit(world, [1] * 20, "a")
    world.join("group-0")
    world.run()
    assert is_right(waiting, "a")


def test_a_gateway_is_told_whether_an_adapter_can_be_loaded() -> None:
    world = World(max_adapters=2)

    assert checked(world, "a") == [""]
    assert checked(world, "a") == ["", ""]
    assert checked(world, "bad", "broken")[2:] == ["it is broken"]
    assert "no adapters" in checked(World(), "a")[0]
    assert "no worker" in checked(World(groups=0, max_adapters=1), "a")[0]
    assert world.num_loads == 1


def test_an_adapter_without_a_name_goes_when_nothing_runs_with_it() -> None:
    world = World(max_adapters=2)
    stream = submit(world, [1] * 20, "a", max_new_tokens=20)
    world.step()
    world.step()

    world.core.forget_adapter(f"a@{sha256('a')}")
    world.step()
    assert world.workers["group-0"].adapters
    world.run()

    assert is_right(stream, "a", 20)
    world.settle()
    world.run()
    assert not world.workers["group-0"].adapters


def test_one_tenants_cold_adapters_leave_others_their_turn() -> None:
    world = World(max_adapters=2)
    flood = [submit(world, [1] * 20, f"flood {n}", tenant="a", max_new_tokens=4) for n in range(40)]
    other = submit(world, [2] * 20, "other", tenant="b", max_new_tokens=4)

    while not other.ended:
        world.step()

    assert is_right(other, "other", 4)
    assert sum(stream.ended for stream in flood) < 10


def test_an_adapter_that_always_has_sequences_gives_way_to_one_that_waits() -> None:
    world = World(max_adapters=1, max_num_seqs=4)
    popular = [submit(world, [1 + n] * 20, "popular", tenant="a") for n in range(8)]
    other = submit(world, [50] * 20, "other", tenant="b")

    while not other.ended:  # some of the popular one's run and others wait, at any time
        if sum(not stream.ended for stream in popular) < 8:
            popular.append(submit(world, [len(popular) + 1] * 20, "popular", tenant="a"))
        world.step()
        assert len(popular) < 100
    world.run()

    assert is_right(other, "other")
    assert all(is_right(stream, "popular") for stream in popular)


def test_one_that_gave_way_to_nobody_takes_sequences_again() -> None:
    world = World(max_adapters=1)
    first = submit(world, [1] * 20, "popular", max_new_tokens=20)
    world.step()
    world.step()
    other = submit(world, [2] * 20, "other")
    world.cancel(other)

    late = submit(world, [3] * 20, "popular")
    while not late.ended:
        world.step()

    assert not first.ended


@pytest.mark.parametrize("seed", range(8))
def test_random_runs_give_each_sequence_what_its_adapter_makes_of_it(seed: int) -> None:
    rng = random.Random(seed)
    world = World(groups=2, max_adapters=rng.choice([1, 2, 5]), adapter_memory=rng.choice([100, 300, 1000]))
    streams: list[tuple[Stream, str]] = []
    for _ in range(300):
        choice = rng.random()
        if choice < 0.3:
            name = rng.choice(["", *"abcdefgh"])
            prompt = random_prompt(rng, rng.randrange(1, 60))
            streams.append((submit(world, prompt, name, tenant=rng.choice("xy")), name))
        elif choice < 0.34 and streams:
            stream = rng.choice(streams)[0]
            if not stream.ended:
                world.cancel(stream)
        elif choice < 0.37 and len(world.workers) == 2:
            world.lose(rng.choice(sorted(world.workers)))
        elif choice < 0.45 and len(world.workers) < 2:
            world.join(next(name for name in ("group-0", "group-1") if name not in world.workers))
        else:
            world.step(rng.choice(sorted(world.workers)))
    world.run()

    for stream, name in streams:
        assert stream.cancelled or is_right(stream, name), (stream.failed, stream.rejected)
