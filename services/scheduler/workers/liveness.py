"""The liveness of a worker follows from its heartbeats: it says when one must hang. Pure: time is an argument.

A worker sends a heartbeat ten times a second, also while it computes, with a count of the pieces of
work that it has done and the processor time that it has had. So three things can be told apart:

- One that is frozen, or whose network is cut, is silent.
- One that computes for ever has processor time and makes no progress.
- One that is slow, because other processes take the processors, makes little progress but some.

How long either may go on follows what the machines give: there is more patience for the silence of
a worker that has been late, and none is taken for that of this process; a lack of progress is counted
in processor time, but as at least a tenth of the time that passed.
"""

from __future__ import annotations

REPORT_S = 0.15  # a worker sends something at least so often
MIN_PATIENCE_S = 1.0
MAX_PATIENCE_S = 10.0
PATIENCE = 8.0  # times what it was late, or stood still, lately
JOINING_PATIENCE_S = 10.0  # libraries that it loads to prepare its device let no other thread run
NUM_WARM_UP_STEPS = 8  # the first steps allocate memory and convert weights: they have the most patience
LEAST_SHARE = 0.1  # of a processor: who gets less is not waited for longer than that would take
FADES = 0.05  # of the time that passed: what was late a while ago counts less
MAX_TICK_S = 0.25  # what a longer time between two looks has more, this process itself was not there


class Liveness:
    """The signs of life of one worker."""

    def __init__(self, now: float) -> None:
        self._looked_at = now
        self._watched_s = 0.0  # for so long it was watched: an hour in which this process stood still is no time at all
        self._heard_at = self._beat_at = 0.0  # of the time that it was watched
        self._late_s = 0.0  # lately, at most
        self._stalled_s = 0.0  # since the last progress
        self._stood_still_s = 0.0  # lately, at most, before there was progress again
        self._progress = 0
        self._processor_time_us = 0
        self._num_steps = 0

    @property
    def is_steady(self) -> bool:
        """Whether it speaks while it computes."""
        return self._processor_time_us > 0

    @property
    def tells_progress(self) -> bool:
        """Whether it counts what it does within a step."""
        return self._progress > 0

    def heard(self, now: float) -> None:
        """Learn that a frame came."""
        self._look(now)
        passed = self._watched_s - self._heard_at
        self._late_s = max(0.0, passed - REPORT_S, self._late_s - FADES * passed)
        self._heard_at = self._watched_s

    def answered(self) -> None:
        """Learn that it answered a step, which is progress."""
        self._num_steps += 1
        self._stalled_s = 0.0

    def beat(self, progress: int, processor_time_us: int, now: float) -> None:
        """Learn from a heartbeat."""
        self._look(now)
        passed, self._beat_at = self._watched_s - self._beat_at, self._watched_s
        had_s = (processor_time_us - self._processor_time_us) / 1e6
        if progress != self._progress:
            self._stood_still_s = max(self._stalled_s, self._stood_still_s - FADES * passed)
            self._stalled_s = 0.0
        else:
            self._stalled_s += min(passed, max(had_s, LEAST_SHARE * passed))
        self._progress, self._processor_time_us = progress, processor_time_us

    def tick(self, now: float, owes_step: bool) -> None:
        """Let time pass. To be called many times a second."""
        self._look(now)
        if not owes_step:
            self._stalled_s = 0.0

    def problem(self, is_ready: bool, owes_step: bool) -> str:
        """Return why it must be taken for dead, or nothing."""
        patience_s = MIN_PATIENCE_S if is_ready and self.is_steady else JOINING_PATIENCE_S
        may_be_silent = owes_step and not self.is_steady
        silent_s = self._watched_s - self._heard_at
        if not may_be_silent and silent_s > _stretched(patience_s, self._late_s):
            return f"is silent for {silent_s:.1f} s"
        patience_s = MAX_PATIENCE_S if self._num_steps < NUM_WARM_UP_STEPS else MIN_PATIENCE_S
        if owes_step and self.tells_progress and self._stalled_s > _stretched(patience_s, self._stood_still_s):
            return f"hangs: no progress in {self._stalled_s:.1f} s of processor time"
        return ""

    def _look(self, now: float) -> None:
        """Let the time pass in which this process was there to watch."""
        passed, self._looked_at = now - self._looked_at, now
        self._watched_s += min(passed, MAX_TICK_S)


def _stretched(patience_s: float, lately_s: float) -> float:
    return min(patience_s + PATIENCE * lately_s, MAX_PATIENCE_S)
