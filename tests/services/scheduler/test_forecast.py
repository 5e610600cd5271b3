"""What is predicted of requests: what nobody's requests, and no bad moment, may do to it."""

from __future__ import annotations

import pytest

from octavo.services.scheduler.admission.deadlines import MIN_KEPT
from octavo.services.scheduler.groups.step_cost import StepCost

from .overload import Overload
from .simulation import Stream, World

IN_TIME = {"max_new_tokens": 20, "remaining_ms": 5000}  # on a machine that does little else


def until_idle(world: Overload) -> None:
    while world.core.num_requests or world.queues["group-0"]:
        world.advance()


# -- who runs beside others ---------------------------------------------------------------------------


def test_a_sequence_waits_while_it_would_make_one_that_runs_late() -> None:
    world = Overload(max_num_seqs=4, fixed_s=0.02, token_s=0.01)
    for _ in range(2):
        for n in range(3):  # of steps of one to three tokens
            world.submit([n + 5] * 10, max_new_tokens=30)
        until_idle(world)
    hurried = world.submit([20] * 10, max_new_tokens=60, remaining_ms=2500)  # steps of 30 ms, of 40 beside another
    for _ in range(3):
        world.advance()
    others = [world.submit([30 + n] * 10, max_new_tokens=60) for n in range(3)]
    while not hurried.ended:
        world.advance()
    assert hurried.finished, hurried
    until_idle(world)
    assert all(other.finished for other in others)


# -- what was learned does not stick ---------------------------------------------------------------


def test_a_first_step_that_took_long_refuses_nobody_later() -> None:
    world = Overload(max_num_seqs=4)
    world.submit([5] * 10, max_new_tokens=1)
    world.now += 20.0  # the first step compiles
    world.answer("group-0")
    world.now += 2.0
    refused = [call_in_turn(world).rejected is not None for _ in range(10)]
    assert not any(refused[1:]), refused


def test_a_step_that_took_long_refuses_nobody_later() -> None:
    world = Overload(max_num_seqs=4)
    for _ in range(5):
        world.submit([5] * 10, max_new_tokens=20)
        until_idle(world)
    world.submit([5] * 10, max_new_tokens=1)
    world.now += 30.0  # the machine was suspended
    world.answer("group-0")
    assert not [call for call in (call_in_turn(world) for _ in range(10)) if not call.finished]


def test_what_was_asked_of_a_slow_worker_turns_nobody_away_from_a_fast_one() -> None:
    world = Overload(max_num_seqs=4)
    world.submit([5] * 10, max_new_tokens=1)
    world.now += 20.0  # the first step compiles
    world.answer("group-0")
    for _ in range(3):
        world.submit([5] * 10, tenant="a", **IN_TIME)  # a step is thought to take 20 s
    world.submit([5] * 10, max_new_tokens=9)
    until_idle(world)
    for _ in range(5):  # one of them waits
        world.submit([5] * 10, max_new_tokens=20)
    calls = [world.submit([5] * 10, tenant="a", **IN_TIME) for _ in range(2)]
    until_idle(world)
    assert all(call.finished for call in calls), [call.rejected for call in calls]


def test_requests_that_run_survive_a_moment_in_which_nothing_went_on() -> None:
    world = Overload(max_num_seqs=4)
    world.submit([5] * 10, max_new_tokens=100)
    until_idle(world)
    call = world.submit([6] * 10, max_new_tokens=100, remaining_ms=4600)  # takes about two seconds
    for _ in range(20):
        world.advance()
    world.step_began_at += 2.0
    until_idle(world)
    assert call.finished, call


def call_in_turn(world: Overload) -> Stream:
    """Make a call of a second, and let it end."""
    call = world.submit([5] * 10, **IN_TIME)
    until_idle(world)
    world.now += 2.0
    return call


def test_who_is_let_try_says_nothing_of_predictions() -> None:
    world = Overload(max_num_seqs=4)
    world.submit([5] * 10, max_new_tokens=20)
    until_idle(world)
    before = world.core._forecast.margin(world.now)
    for _ in range(5):
        world.now += 2.0
        call = world.submit([5] * 10, max_new_tokens=1000, remaining_ms=300)
        assert call.admitted
        assert world.submit([5] * 10, max_new_tokens=1000, remaining_ms=300).rejected, "one at a time"
        until_idle(world)
        assert call.failed
        assert world.submit([5] * 10, max_new_tokens=1000, remaining_ms=300).rejected, "it was just seen"
    assert world.core._forecast.margin(world.now) <= before


def test_one_step_that_takes_long_is_not_the_speed_of_the_machine() -> None:
    cost = StepCost()
    for _ in range(100):
        cost.record(8, 0.01)
    cost.record(8, 5.0)
    assert cost.usual(0.0).seconds(8) < 0.02
    for _ in range(100):
        cost.record(8, 0.1)  # another process came, and stays
    assert cost.usual(0.0).seconds(8) == pytest.approx(0.1, rel=0.05)


def test_a_worker_that_was_away_for_long_is_not_expected_to_be_again() -> None:
    world = World(worker_grace_s=15.0)
    world.submit([5] * 10)
    world.run()
    world.lose("group-0")
    world.now += 3600.0  # taken down for maintenance
    world.join("group-0")
    world.submit([5] * 10)
    world.run()
    world.lose("group-0")
    assert world.submit([5] * 10, remaining_ms=60_000).admitted


# -- what is kept -----------------------------------------------------------------------------------


def test_requests_that_ended_are_not_kept_until_their_deadline() -> None:
    world = World(check=False)
    world.submit([5] * 10)
    world.run()
    for _ in range(3 * MIN_KEPT):
        world.cancel(world.submit([5] * 10, remaining_ms=3_600_000))
    assert len(world.core._deadlines._due) <= 2 * MIN_KEPT
    assert len(world.core._forecast._promised) <= 2 * MIN_KEPT


def test_what_left_the_queue_is_not_kept_behind_one_that_waits() -> None:
    world = World(check=False, max_num_seqs=1)
    world.submit([5] * 10, max_new_tokens=1000)
    world.submit([5] * 10, max_new_tokens=1000, remaining_ms=60_000)  # has the least time of all that wait
    for _ in range(3 * MIN_KEPT):
        world.cancel(world.submit([5] * 10, remaining_ms=3_600_000))
    assert len(world.core._forecast._promised) <= 2 * MIN_KEPT


def test_what_runs_is_looked_at_once_for_a_request_however_many_candidates_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(check=False)
    world.submit([5] * 10, max_new_tokens=100)
    world.step()
    looks: list[float] = []
    measure = world.core._forecast._measure
    monkeypatch.setattr(world.core._forecast, "_measure", lambda now: looks.append(now) or measure(now))
    world.submit([6] * 10, candidate_count=500, remaining_ms=600_000)
    assert len(looks) <= 5


# -- what a request does not need -------------------------------------------------------------------


def test_who_takes_what_there_is_by_a_soft_limit_needs_no_more_time() -> None:
    world = Overload(max_num_seqs=2)
    world.submit([5] * 10, max_new_tokens=30)
    world.advance()
    soft = {"stop": {"soft_time_limit_ms": 1500}, "max_new_tokens": 4000, "remaining_ms": 2000}
    call = world.submit([5] * 10, **soft)
    until_idle(world)
    assert call.finished
    assert len(call.tokens[0]) > 20


def test_long_prompts_and_short_outputs_of_others_make_steps_no_longer_than_they_can_be() -> None:
    world = Overload(max_num_seqs=64, max_prefill_tokens=128)

    def keep_busy() -> None:
        while world.core.load(world.now).running + world.core.load(world.now).waiting < 60:
            world.submit([world.rng.randrange(10, 40_000) for _ in range(90)], max_new_tokens=2)
        world.advance()

    for _ in range(200):
        keep_busy()
    call = world.submit([5] * 10, max_new_tokens=20, remaining_ms=12_000)  # steps take at most 116 ms
    while not call.ended:
        keep_busy()
    assert call.finished, call


# -- what others cannot do to a tenant ---------------------------------------------------------------


def test_who_asks_for_what_cannot_be_takes_no_part_of_the_machine() -> None:
    world = Overload(max_num_seqs=8)
    for _ in range(6):
        world.submit([5] * 10, max_new_tokens=200, tenant="busy", remaining_ms=60_000)
    for _ in range(5):
        world.advance()
    for number in range(100):
        assert world.submit([5] * 10, max_new_tokens=4000, tenant=f"idle {number}", remaining_ms=50).rejected
    for _ in range(20):
        world.advance()
    assert world.core._forecast.share("busy", world.now) == 1.0
    assert world.submit([6] * 10, max_new_tokens=20, tenant="busy", remaining_ms=3000).admitted


def test_a_tenant_that_was_refused_and_now_waits_has_one_part_of_the_queue() -> None:
    world = World(max_num_seqs=1, max_waiting=1)
    world.submit([5] * 10, max_new_tokens=100)
    waits = world.submit([5] * 10)
    assert world.submit([5] * 10, tenant="b").rejected
    assert world.core._forecast.share("", world.now) == 1 / 2, "b would like to wait"
    world.cancel(waits)
    assert world.submit([5] * 10, tenant="b").admitted
    assert world.core._forecast.share("", world.now) == 1 / 2
    assert world.core._forecast.share("b", world.now) == 1.0
    world.now += 60.0
    assert world.core._forecast.share("b", world.now) == 1.0


def test_who_gives_up_at_once_makes_nobody_else_need_more_time() -> None:
    world = Overload(max_num_seqs=8)
    world.submit([5] * 10, max_new_tokens=1000)
    for _ in range(20):
        world.advance()
    before = world.core._forecast.margin(world.now)
    for _ in range(50):
        call = world.submit([5] * 10, max_new_tokens=1, remaining_ms=98)
        assert call.admitted
        world.cancel(call)
    assert world.core._forecast.margin(world.now) <= before


@pytest.mark.parametrize("num_more", [0, 20], ids=["alone", "and more of it waits"])
def test_one_tenants_hurry_does_not_take_the_machine_from_others(num_more: int) -> None:
    world = Overload(max_num_seqs=64)
    world.submit([5] * 10, max_new_tokens=100)
    world.submit([5] * 100, max_new_tokens=30)
    until_idle(world)
    hurried = world.submit([5] * 10, max_new_tokens=1000, tenant="hurried", remaining_ms=int(1150 * 1000 * 0.0206))
    assert hurried.admitted
    for _ in range(10):
        world.advance()
    for _ in range(num_more):
        world.submit([7] * 5, max_new_tokens=100, tenant="hurried")
    for _ in range(100):
        world.submit([6] * 10, max_new_tokens=100, tenant="other")
    for _ in range(20):
        world.advance()
    running = world.core.load(world.now).running
    # Steps of n take 20 + n / 2 ms. All 64 at once make 1,230 tokens a second: most of the other's half is made by 13.
    assert running >= 13, running
