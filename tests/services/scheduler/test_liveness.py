"""Which signs of life tell a worker that hangs from one that is slow because the machine is busy."""

from __future__ import annotations

import pytest

from octavo.services.scheduler.workers.liveness import MAX_PATIENCE_S, NUM_WARM_UP_STEPS, Liveness

TICK_S = 0.025
BEAT_S = 0.1


class Watched:
    """A worker with a step to compute, watched by a scheduler, on a clock of its own. Times are seconds."""

    def __init__(self, num_steps: int = NUM_WARM_UP_STEPS) -> None:
        self.now = 0.0
        self.pulse = Liveness(0.0)
        self.progress = 1
        self.processor_s = 1.0
        for _ in range(num_steps):
            self.pulse.answered()
        self.beat(0.0, 1)

    def beat(self, processor_s: float, progress: int) -> None:
        self.processor_s += processor_s
        self.progress += progress
        self.pulse.heard(self.now)
        self.pulse.beat(self.progress, round(self.processor_s * 1e6), self.now)

    def until_given_up(
        self,
        longest_s: float,
        *,
        share: float = 1.0,
        progress: int = 0,
        every_s: float = BEAT_S,
        speaks: bool = True,
    ) -> float | None:
        """Return after how long it is given up, or None; `share` of a processor is what it gets."""
        start, next_beat = self.now, self.now + every_s
        while self.now - start < longest_s:
            self.now += TICK_S
            if speaks and self.now >= next_beat:
                next_beat += every_s
                self.beat(share * every_s, progress)
            self.pulse.tick(self.now, owes_step=True)
            if self.pulse.problem(is_ready=True, owes_step=True):
                return self.now - start
        return None


def test_a_frozen_worker_is_found_within_a_second_and_a_half() -> None:
    watched = Watched()
    assert watched.until_given_up(20, progress=1) is None
    found_s = watched.until_given_up(20, speaks=False)
    assert found_s is not None
    assert 0.9 <= found_s <= 1.5


def test_a_worker_that_computes_for_ever_is_found_within_a_second_and_a_half() -> None:
    watched = Watched()
    assert watched.until_given_up(20, progress=1) is None
    found_s = watched.until_given_up(20, share=2.0)  # on two processors
    assert found_s is not None
    assert 0.9 <= found_s <= 1.5


def test_a_step_that_gets_on_may_take_any_time() -> None:
    assert Watched().until_given_up(3600, share=0.02, progress=1) is None


@pytest.mark.parametrize("share", [0.5, 0.25, 0.1])
def test_a_worker_without_progress_has_patience_as_the_machine_gives_it_time(share: float) -> None:
    found_s = Watched().until_given_up(60, share=share)
    assert found_s is not None
    assert 1.0 / share <= found_s <= 1.0 / share + 0.5


@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("every_s", [0.1, 0.5, 0.9])
def test_no_worker_without_progress_is_kept_for_long(share: float, every_s: float) -> None:
    found_s = Watched().until_given_up(60, share=share, every_s=every_s)
    assert found_s is not None
    assert found_s <= MAX_PATIENCE_S + 1.0


@pytest.mark.parametrize("every_s", [0.3, 0.6, 0.9])
def test_a_worker_that_was_late_may_be_late_again(every_s: float) -> None:
    watched = Watched()
    assert watched.until_given_up(5, progress=1, every_s=every_s) is None
    assert watched.until_given_up(3 * every_s, speaks=False) is None
    watched.beat(0.1, 1)
    found_s = watched.until_given_up(60, speaks=False)
    assert found_s is not None
    assert found_s <= MAX_PATIENCE_S + TICK_S


def test_lateness_is_forgotten() -> None:
    watched = Watched()
    assert watched.until_given_up(0.9, speaks=False) is None
    watched.beat(0.1, 1)
    assert watched.until_given_up(60, progress=1) is None
    found_s = watched.until_given_up(60, speaks=False)
    assert found_s is not None
    assert found_s <= 1.5


def test_pieces_of_work_that_take_long_are_learned() -> None:
    watched = Watched()
    for _ in range(5):
        assert watched.until_given_up(0.9) is None  # a piece takes 0.9 s
        watched.beat(0.1, 1)
    assert watched.until_given_up(3.0) is None


def test_the_first_steps_have_the_most_time() -> None:
    found_s = Watched(num_steps=0).until_given_up(60)
    assert found_s is not None
    assert MAX_PATIENCE_S <= found_s <= MAX_PATIENCE_S + 0.5


def test_time_in_which_the_scheduler_itself_did_not_run_is_nobodys_silence() -> None:
    watched = Watched()
    watched.now += 3600.0  # the machine slept
    watched.pulse.tick(watched.now, owes_step=True)
    assert not watched.pulse.problem(is_ready=True, owes_step=True)
    found_s = watched.until_given_up(60, speaks=False)
    assert found_s is not None
    assert found_s <= 1.0


@pytest.mark.parametrize("away_s", [20.0, 7200.0])
@pytest.mark.parametrize("is_heard_first", [False, True])
def test_time_in_which_the_scheduler_itself_did_not_run_is_no_lack_of_progress(
    away_s: float, is_heard_first: bool
) -> None:
    watched = Watched()
    assert watched.until_given_up(5, progress=1) is None
    watched.now += away_s  # the machine slept
    if not is_heard_first:
        watched.pulse.tick(watched.now, owes_step=True)
    watched.beat(0.05, 0)
    assert not watched.pulse.problem(is_ready=True, owes_step=True)
    assert watched.until_given_up(0.5) is None
    found_s = watched.until_given_up(60)  # it computes for ever
    assert found_s is not None
    assert found_s <= 1.0


def test_nobody_is_waited_for_longer_because_the_scheduler_itself_did_not_run() -> None:
    watched = Watched()
    watched.now += 3600.0
    watched.beat(0.1, 1)  # late, but by no fault of the worker
    found_s = watched.until_given_up(60, speaks=False)
    assert found_s is not None
    assert found_s <= 2.0


def test_what_happened_before_a_step_does_not_count_against_it() -> None:
    watched = Watched()
    for _ in range(1000):  # it owes nothing, and so makes no progress
        watched.now += BEAT_S
        watched.beat(0.0, 0)
        watched.pulse.tick(watched.now, owes_step=False)
    assert watched.until_given_up(0.9) is None


def test_a_worker_of_an_older_version_is_silent_while_it_computes() -> None:
    pulse = Liveness(0.0)
    pulse.heard(0.1)
    pulse.beat(0, 0, 0.1)
    for tick in range(4000):
        pulse.tick(0.1 + tick * TICK_S, owes_step=True)
    assert not pulse.problem(is_ready=True, owes_step=True)
    assert pulse.problem(is_ready=True, owes_step=False)
