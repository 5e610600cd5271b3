"""What admission promises is kept, however much is asked for: on a virtual clock, with tenants of weights 1 and 3."""

from __future__ import annotations

import functools
import random

import pytest

from octavo.common.v1 import common_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.admission import admission
from octavo.services.scheduler.admission.admission import OutputLengths
from octavo.services.scheduler.groups.step_cost import StepCost

from .overload import Asking, Outcome, Overload

SETTINGS = {"max_num_seqs": 8, "tenant_weights": ("one=1", "three=3")}
SECONDS = 60.0
PEAK_CALLS_PER_S = 10.0  # of 32 tokens: what eight slots can do


# A machine that makes 1,640 tokens/s with 64 callers, and up to 2,500 with all 256 slots.
MACHINE = {"num_blocks": 8000, "fixed_s": 0.01, "token_s": 0.00034}
LENGTHS = {"prompt": (10, 35, 200, 1000), "output": (16, 64, 128, 256)}


@functools.cache
def closed_loop(mixed: bool) -> tuple[float, float]:
    """Return what 64 callers get: tokens a second, and seconds a call."""
    rng = random.Random(5)
    lengths = [(lambda kind=kind: rng.choice(LENGTHS[kind])) for kind in LENGTHS]
    return Overload(**MACHINE).run_closed_loop(64, 30.0, *(lengths if mixed else (lambda: 35, lambda: 128)))


@pytest.mark.parametrize("mixed", [False, True], ids=["one_length", "mixed"])
@pytest.mark.parametrize("factor", [1.2, 4.0, 10.0])
@pytest.mark.parametrize("deadline", [1.25, 2.0, 8.0])
def test_goodput_stays_near_the_peak_however_much_is_asked_for(deadline: float, factor: float, mixed: bool) -> None:
    tokens_per_s, call_s = closed_loop(mixed)
    mean = 116 if mixed else 128
    lengths = {kind: (lambda rng, kind=kind: rng.choice(LENGTHS[kind])) for kind in LENGTHS} if mixed else {}
    asked = Asking("one", factor * tokens_per_s / mean, deadline_s=deadline * call_s, **{
        "prompt": lambda _: 35, "output": lambda _: 128, **lengths,
    })  # fmt: skip
    outcome = Overload(**MACHINE).run_calls([asked], 40.0)
    assert outcome.output_tokens / 40.0 >= (0.8 if deadline == 1.25 else 0.9) * tokens_per_s
    assert outcome.part_late <= 0.02


def test_where_more_is_asked_for_than_there_is_long_requests_get_their_part_too() -> None:
    tokens_per_s, call_s = closed_loop(mixed=True)
    prompt, output = ((lambda rng, kind=kind: rng.choice(LENGTHS[kind])) for kind in ("prompt", "output"))
    outcome = Overload(**MACHINE).run_calls(
        [Asking("one", 4 * tokens_per_s / 116, prompt, output, deadline_s=2 * call_s)], 40.0
    )
    parts = [outcome.in_time_by_length[length] / outcome.calls_by_length[length] for length in LENGTHS["output"]]
    assert max(parts) < 0.7
    assert min(parts) > 0.15, parts


def test_a_tenant_with_tight_deadlines_gets_its_part_beside_one_that_has_time() -> None:
    tokens_per_s, call_s = closed_loop(mixed=False)
    asked = [
        Asking(tenant, 2 * tokens_per_s / 128, lambda _: 35, lambda _: 128, deadline * call_s)
        for tenant, deadline in (("one", 1.5), ("two", 8.0))
    ]
    outcome = Overload(**MACHINE).run_calls(asked, 40.0)
    assert outcome.in_time["one"] > 0.6 * outcome.in_time["two"]
    assert outcome.part_late <= 0.02


def test_a_machine_that_loses_half_its_speed_serves_what_it_still_can() -> None:
    tokens_per_s, call_s = closed_loop(mixed=False)
    world = Overload(**MACHINE, slowness=lambda s: 2.0 if 20 < s < 60 else 1.0)
    asked = Asking("one", 4 * tokens_per_s / 128, lambda _: 35, lambda _: 128, deadline_s=4 * call_s)
    outcome = world.run_calls([asked], 80.0)
    assert outcome.output_tokens / 80.0 >= 0.7 * tokens_per_s
    assert outcome.part_late <= 0.05, "those who were there when it became slow"


# And one on which a token's context costs as much as itself after 180 tokens.
MACHINE_WITH_CONTEXT = {"num_blocks": 8000, "fixed_s": 0.012, "token_s": 0.00022, "context_s": 0.0000012}


@pytest.mark.parametrize(("deadline", "refusal_s"), [(2.0, 0.0), (1.25, 0.002)], ids=["context", "refusals"])
def test_a_flood_that_begins_at_once_is_let_in_by_what_steps_will_take(deadline: float, refusal_s: float) -> None:
    world = Overload(**MACHINE_WITH_CONTEXT, refusal_s=refusal_s)
    tokens_per_s, call_s = world.run_closed_loop(64, 30.0, lambda: 35, lambda: 128)
    while world.queues["group-0"]:
        world.advance()
    world.started_at = world.step_began_at = world.now
    asked = Asking("one", 10 * tokens_per_s / 128, lambda _: 35, lambda _: 128, deadline_s=deadline * call_s)
    outcome = world.run_calls([asked], 20.0)
    assert outcome.part_late <= 0.02
    assert outcome.output_tokens / 20.0 >= 0.8 * tokens_per_s


def between(least: int, most: int) -> object:
    return lambda rng: rng.randint(least, most)


def memoryless(rng: random.Random) -> int:
    return max(1, min(400, int(rng.expovariate(1 / 40))))


def share(outcome: Outcome) -> float:
    return outcome.tokens["three"] / outcome.tokens["one"]


@pytest.mark.parametrize("deadline_s", [2.0, 5.0, 30.0])
def test_at_ten_times_the_peak_who_is_admitted_is_through_in_time(deadline_s: float) -> None:
    peak = Overload(**SETTINGS)
    peak_tokens = peak.run_calls([Asking("one", 2 * PEAK_CALLS_PER_S, deadline_s=600.0)], 20.0).tokens.total()
    peak_per_s = peak_tokens / (peak.now - peak.started_at)

    world = Overload(max_waiting=64, **SETTINGS)
    asked = [Asking(tenant, 5 * PEAK_CALLS_PER_S, deadline_s=deadline_s) for tenant in ("one", "three")]
    outcome = world.run_calls(asked, SECONDS)

    assert outcome.calls.total() > 9 * PEAK_CALLS_PER_S * SECONDS
    assert outcome.part_late <= 0.02
    assert share(outcome) == pytest.approx(3.0, rel=0.1)
    assert outcome.tokens.total() / (world.now - world.started_at) >= 0.9 * peak_per_s
    assert outcome.longest_queue <= 64


def test_requests_of_different_lengths_keep_their_deadlines() -> None:
    world = Overload(**SETTINGS)
    asked = [Asking(tenant, 50.0, between(5, 200), between(8, 64)) for tenant in ("one", "three")]
    outcome = world.run_calls(asked, SECONDS)
    assert outcome.part_late <= 0.01
    assert share(outcome) == pytest.approx(3.0, rel=0.1)


def test_outputs_that_end_of_themselves_are_expected_to_be_as_long_as_those_before() -> None:
    world = Overload(**SETTINGS)
    asked = [Asking(tenant, 50.0, output=memoryless, limit=400, deadline_s=8.0) for tenant in ("one", "three")]
    outcome = world.run_calls(asked, SECONDS, measured_from_s=15.0)  # when some have ended
    assert outcome.part_late <= 0.06  # whose own outputs are longer than anyone could expect
    assert outcome.in_time.total() > 300


def test_a_tenant_below_its_share_is_served_and_costs_the_others_no_deadline() -> None:
    world = Overload(**SETTINGS)
    outcome = world.run_calls([Asking("one", 50.0, deadline_s=30.0), Asking("three", 1.0, deadline_s=3.0)], SECONDS)
    assert outcome.in_time["three"] == outcome.calls["three"]
    assert not outcome.late


def test_a_tenant_that_comes_to_a_full_queue_gets_its_part_of_it() -> None:
    world = Overload(max_waiting=40, **SETTINGS)
    asked = [Asking("one", 50.0, deadline_s=600.0), Asking("three", 50.0, deadline_s=600.0, begins_s=20.0)]
    outcome = world.run_calls(asked, 3 * SECONDS, measured_from_s=30.0)
    assert share(outcome) == pytest.approx(3.0, rel=0.1)


def test_a_request_is_judged_by_what_is_served_before_it() -> None:
    world = Overload(max_num_seqs=1)
    for _ in range(20):
        world.submit([5] * 10, max_new_tokens=30, priority=-1)
    while world.core.load(world.now).waiting == 19:
        world.advance()
    hurried = {"max_new_tokens": 30, "remaining_ms": 4000}
    assert not world.submit([6] * 10, priority=-1, **hurried).admitted
    assert world.submit([7] * 10, priority=-1, tenant="other", **hurried).admitted
    assert world.submit([8] * 10, **hurried).admitted


def test_steps_that_make_several_tokens_of_a_sequence_are_counted_on() -> None:
    world = Overload(max_num_seqs=1, max_row_tokens=4)
    world.workers["group-0"].num_guessed = lambda: 3
    world.submit([5] * 10, max_new_tokens=800)  # makes it known
    while world.core.num_requests:
        world.advance()
    world.submit([6] * 10, max_new_tokens=200)
    calls = [world.submit([7] * 10, max_new_tokens=200, remaining_ms=ms) for ms in (4000, 2000)]
    while world.core.num_requests:
        world.advance()

    assert [call.rejected is None for call in calls] == [True, False], "each takes about a second"
    assert calls[0].finished


def test_what_cannot_be_in_time_on_an_idle_machine_is_refused_and_what_may_end_sooner_is_let_try() -> None:
    world = Overload(max_num_seqs=2)
    world.submit([5] * 10, max_new_tokens=30)
    world.advance()
    assert not world.submit([5] * 10, max_new_tokens=4000, remaining_ms=200).admitted
    assert world.submit([5] * 10, max_new_tokens=4000, remaining_ms=200, end_of_sequence_ids=[7]).admitted


def test_expected_is_the_average_of_the_tenants_outputs_within_the_limit() -> None:
    outputs = OutputLengths()
    submit = scheduler_pb2.Submit(tenant="a", end_of_sequence_ids=[7])
    assert outputs.tokens(submit, 4096) == admission.UNKNOWN_TOKENS
    for length in (90, 110):
        outputs.ended("a", length, is_cut=False)
    assert outputs.tokens(submit, 4096) == pytest.approx(100, abs=1)
    assert outputs.tokens(submit, 50) == 50
    assert outputs.tokens(submit, 4096, averages=3.0) == pytest.approx(300, abs=3)
    ignoring = scheduler_pb2.Submit(tenant="a")
    assert outputs.tokens(ignoring, 4096) == 4096
    least = scheduler_pb2.Submit(tenant="a", end_of_sequence_ids=[7], stop=common_pb2.StopCriteria(min_new_tokens=150))
    assert outputs.tokens(least, 4096) == 150


def test_an_output_that_was_cut_makes_those_to_come_no_shorter() -> None:
    outputs = OutputLengths()
    submit = scheduler_pb2.Submit(tenant="a", end_of_sequence_ids=[7])
    outputs.ended("a", 100, is_cut=False)
    for _ in range(10):
        outputs.ended("a", 20, is_cut=True)
    assert outputs.tokens(submit, 4096) > 100


def test_what_is_remembered_of_tenants_is_bounded() -> None:
    outputs = OutputLengths()
    for number in range(admission.MAX_TENANTS + 10):
        outputs.ended(f"t{number}", 10, is_cut=False)
    submits = [scheduler_pb2.Submit(tenant=f"t{number}", end_of_sequence_ids=[7]) for number in (0, 9, 10)]
    unknown = admission.UNKNOWN_TOKENS
    assert [outputs.tokens(submit, 4096) for submit in submits] == [unknown, unknown, 10]


def test_what_is_predicted_of_a_step_is_for_the_context_that_its_tokens_usually_have() -> None:
    cost = StepCost()
    for number in range(300):
        tokens, context = 20 + number % 37, 100 + 10 * (number % 64)  # which grows from the start of a batch to its end
        cost.record(tokens, 0.016 + 0.0005 * tokens + 0.00003 * context, context)
    usual = cost.usual(context=20.0)  # of each token
    assert usual.token_s == pytest.approx(0.0005, rel=0.05)
    assert cost.seconds_with(20, 100) == pytest.approx(0.029, rel=0.01)
    assert usual.seconds(20) == pytest.approx(0.038, rel=0.01)
    assert usual.most_tokens(0.038) == pytest.approx(20, rel=0.02)


def test_the_cost_of_a_step_is_a_fixed_part_and_one_for_each_token() -> None:
    cost = StepCost()
    assert (cost.usual(0.0).seconds(8), cost.usual(0.0).token_s) == (0.0, 0.0)
    cost.record(8, 0.02)
    assert (cost.usual(0.0).seconds(500), cost.usual(0.0).token_s) == (0.02, 0.0)  # one size tells nothing about others
    for num_tokens in (8, 8, 520, 9, 8, 264):
        cost.record(num_tokens, 0.016 + 0.0005 * num_tokens)
    assert cost.usual(0.0).token_s == pytest.approx(0.0005)
    assert cost.usual(0.0).seconds(100) == pytest.approx(0.066)
