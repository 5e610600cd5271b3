"""How tenants share a machine, whatever they had of it before."""

from __future__ import annotations

from collections import Counter

import pytest

from octavo.services.scheduler.queueing.fair_share import MIN_KEPT, FairShare

from .simulation import Stream, World


def make_world(**settings: object) -> World:
    limits = {"max_waiting": 10_000, "max_waiting_tokens": 1 << 30, **settings}
    return World(
        num_blocks=1000, max_num_seqs=16, max_num_batched_tokens=256, max_prefill_tokens=256, check=False, **limits
    )


def flood(world: World, tenant: str, count: int = 200) -> list[Stream]:
    """Submit more than one second has room for."""
    first = 1000 * (len(tenant) + len(world.streams))
    return [world.submit([first + n] * 16, max_new_tokens=16, tenant=tenant) for n in range(count)]


def tokens_of(streams: list[Stream]) -> int:
    """Return what has been computed of them: an output that has begun has its prompt computed."""
    return sum(len(stream.submit.prompt_token_ids) + len(stream.tokens[0]) for stream in streams if stream.tokens[0])


def serve_one_second(world: World) -> None:
    begun = world.now
    while world.now < begun + 1.0:
        assert world.step()


def use_idle_machine(world: World, tenant: str, idle_s: float = 86_400) -> None:
    """Let a tenant use the machine while nobody else wants it, and never wait; then nobody does for a day."""
    for n in range(60):
        for k in range(3):
            world.submit([100 + n, k] * 32, max_new_tokens=64, tenant=tenant)
        world.run()
    world.now += idle_s


@pytest.mark.parametrize("newcomer_is_first", [True, False])
def test_what_a_tenant_used_while_nobody_waited_costs_it_nothing_later(newcomer_is_first: bool) -> None:
    world = make_world()
    use_idle_machine(world, "old")
    streams = {name: flood(world, name) for name in (("new", "old") if newcomer_is_first else ("old", "new"))}

    serve_one_second(world)

    old, new = tokens_of(streams["old"]), tokens_of(streams["new"])
    assert abs(old - new) <= 0.1 * (old + new) / 2, (old, new)


def test_a_tenant_whose_streams_ran_for_long_is_served_beside_one_that_comes() -> None:
    world = make_world()
    for n in range(4):
        world.submit([50 + n] * 16, max_new_tokens=2500, tenant="old")
    for _ in range(2000):  # its counter grows, and nothing of it passes the queue
        world.step()
    streams = {name: flood(world, name) for name in ("new", "old")}

    serve_one_second(world)

    old = tokens_of(streams["old"]) + 4 * 100  # and what its four streams go on to produce
    new = tokens_of(streams["new"])
    assert abs(old - new) <= 0.1 * (old + new) / 2, (old, new)


def test_streams_that_lost_their_worker_go_on_within_the_share_of_their_tenant() -> None:
    world = make_world()
    use_idle_machine(world, "old")
    running = [world.submit([50 + n] * 16, max_new_tokens=40, tenant="old") for n in range(4)]
    for _ in range(5):
        world.step()
    flood(world, "new")
    world.lose("group-0")
    world.join("group-0")

    serve_one_second(world)

    assert all(stream.ended for stream in running)


def test_a_tenant_that_waits_for_a_worker_it_needs_holds_nobody_back() -> None:
    world = make_world(worker_grace_s=3600.0)
    world.lose("group-0")
    stuck = world.submit([5] * 16, tenant="stuck", constraint={"grammar": "no worker takes it"})
    world.join("group-0")
    use_idle_machine(world, "old", idle_s=0)
    streams = {name: flood(world, name) for name in ("old", "new")}
    assert not stuck.ended

    serve_one_second(world)

    old, new = tokens_of(streams["old"]), tokens_of(streams["new"])
    assert abs(old - new) <= 0.1 * (old + new) / 2, (old, new)


def test_tenants_that_keep_coming_do_not_keep_out_one_that_was_there_before() -> None:
    share = FairShare({})
    share.join("old")
    share.charge("old", 1000)
    served: Counter[str] = Counter()
    for n in range(10_000):  # with each request served another tenant comes, so that ten always wait
        while len(share._joined) < 11:
            share.join(f"new {n} {len(share._joined)}")
        turn = share.next_turn()
        assert turn is not None
        share.opened(turn[2], 100)
        share.charge(turn[2], 100)
        served["old" if turn[2] == "old" else "new"] += 1
        if turn[2] != "old":
            share.leave(turn[2])
    assert served["old"] >= 0.5 * 10_000 / 11


def test_a_tenant_that_comes_back_has_saved_up_nothing() -> None:
    share = FairShare({"heavy": 2.0})
    share.join("heavy")
    share.charge("heavy", 1000)
    share.opened("heavy", 0)
    share.join("light")
    assert share.counter("light") == share.counter("heavy") == 500
    share.leave("light")
    share.leave("heavy")
    share.charge("heavy", 1000)
    share.join("light")
    assert share.counter("light") == share.counter("heavy") == 1000


def test_what_is_remembered_of_tenants_is_bounded_and_forgetting_costs_nobody_anything() -> None:
    share = FairShare({})
    share.join("busy")
    for n in range(10 * MIN_KEPT):
        name = f"tenant {n}"
        share.join(name)
        assert share.counter(name) == share.virtual_time
        share.opened(name, 10)
        share.charge(name, 10)
        share.leave(name)
        share.charge("busy", 10)
        share.opened("busy", 10)
    assert len(share._counters) <= 4 * MIN_KEPT
    assert len(share._turns) <= 4 * MIN_KEPT
    share.check_invariants({"busy"})
