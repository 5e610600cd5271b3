"""When a step has taken so long that its worker must hang."""

from __future__ import annotations

from octavo.services.scheduler.groups.step_times import NUM_WARM_UP_STEPS, StepSize, StepTimes


def measured(seconds: float, num_tokens: int = 8) -> StepTimes:
    clock = StepTimes(longest_s=60.0)
    for _ in range(NUM_WARM_UP_STEPS + 100):
        clock.record(StepSize(num_tokens), seconds)
    return clock


def test_the_first_steps_have_the_longest_time() -> None:
    clock = StepTimes(longest_s=60.0)
    for _ in range(NUM_WARM_UP_STEPS):
        assert clock.patience_s(StepSize(1)) == 60.0
        clock.record(StepSize(1), 30.0)
    clock.record(StepSize(1), 0.01)
    assert clock.patience_s(StepSize(1)) == 1.0  # what the first ones took does not count


def test_a_worker_with_quick_steps_has_a_second() -> None:
    assert measured(0.01).patience_s(StepSize(8)) == 1.0


def test_a_worker_with_slow_steps_has_ten_times_what_they_take() -> None:
    assert 4.9 < measured(0.5).patience_s(StepSize(8)) < 5.1


def test_a_large_step_has_more_time() -> None:
    assert measured(0.01).patience_s(StepSize(2048)) > 8.0


def test_no_step_has_more_than_the_limit() -> None:
    assert measured(5.0).patience_s(StepSize(100_000)) == 60.0


def test_slow_steps_count_until_they_are_forgotten() -> None:
    clock = measured(0.01)
    for _ in range(3):
        clock.record(StepSize(8), 1.0)
    assert clock.patience_s(StepSize(8)) > 5.0
    for _ in range(300):
        clock.record(StepSize(8), 0.01)
    assert clock.patience_s(StepSize(8)) == 1.0


def test_a_long_context_has_more_time() -> None:
    clock = measured(0.01)
    assert clock.patience_s(StepSize(1, num_context=128_000, num_pairs=128_000)) > 2.0
    # A chunk of a prompt attends to all that is before it.
    assert clock.patience_s(StepSize(2048, num_context=126_000, num_pairs=2048 * 126_000)) == 60.0
