"""Limits how many sequences run at once, so that each of them ends by its deadline.

Each sequence more makes every step longer, and so everybody later. A sequence with `left` tokens to make and `s`
seconds until its deadline needs steps of at most `s / left` seconds: its pace. A group runs as many sequences as
its steps allow at the least pace among them; the others wait in the queue, where they make nobody late.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from octavo.services.scheduler.sequence import Sequence
from octavo.services.scheduler.worker_group import WorkerGroup

NUM_TIGHTEST = 8  # sequences whose paces are looked at: those with the least time for each token
LOST_PACE = 0.7  # of what steps take lately: who needs a smaller one will be late, and holds nobody back
MIN_PROMPT_TOKENS = 32  # in a step, so that prompts get on beside whatever runs
EFFICIENCY = 0.8  # of the highest rate: fewer do not run because of what most of those that come need
MARGIN = 1.03  # on what the tokens left take


def most_step_tokens(group: WorkerGroup, usual_pace_s: float) -> float:
    """Return how many tokens a step should have: as many as the usual pace allows, or as efficiency asks for."""
    cost = group.cost
    return max(cost.most_tokens(usual_pace_s * group.row_tokens), cost.efficient_tokens(EFFICIENCY))


def step_tokens(num_running: float, token_share: float, most: float) -> float:
    """Return how many tokens a step of so many sequences has, prompts of others included."""
    return max(num_running, min(num_running * token_share, most))


class Concurrency:
    """Decides whether a group can run one more sequence. Made for one plan; `token_share` is Forecast's."""

    def __init__(self, group: WorkerGroup, token_share: float, usual_pace_s: float, now: float) -> None:
        """Look at what runs on `group`.

        token_share   tokens that a step has for each sequence that runs, prompts included
        usual_pace_s  what most of those that come need; infinity if they have time
        """
        self._cost = group.cost
        self._token_share = token_share
        self._row_tokens = group.row_tokens
        self._now = now
        self._most_step_tokens = most_step_tokens(group, usual_pace_s)
        self._lost_s = LOST_PACE * self._step_s(group.mean_running)
        self.num_running = group.num_running
        most = self._cost.most_tokens(usual_pace_s * group.row_tokens) / token_share
        self._most_usual = max(most, self._least_efficient(group))
        self._num_behind = sum(seq.num_behind for seq in group.prefilling)
        self._tightest = heapq.nsmallest(NUM_TIGHTEST, self._needs(group.running()), key=_pace)

    def has_room_for(self, seq: Sequence) -> bool:
        """Return whether nobody who runs is made late if `seq` runs too.

        What `seq` itself needs is no matter: its time runs out as fast as places become free.
        """
        if not self._cost.is_known:
            return True
        if self.num_running >= self._most_usual:
            return False
        prompts_s = self._cost.token_s * (self._num_behind + len(seq.tokens))
        step_s = self._step_s(self.num_running + 1)
        for left_s, num_left in self._tightest:
            pace_s = (left_s - prompts_s) / num_left
            if self._lost_s <= pace_s < step_s:
                return False
        return True

    def prompt_tokens(self, num_tokens: int, most: int) -> int:
        """Return how many tokens of prompts, of at most so many, a step can have beside `num_tokens` of outputs."""
        left = self._most_step_tokens - num_tokens
        return most if left >= most else max(int(left), min(MIN_PROMPT_TOKENS, most))

    def add(self, seq: Sequence) -> None:
        """Count a sequence that runs from now on."""
        self.num_running += 1
        self._num_behind += seq.num_behind
        self._tightest = heapq.nsmallest(NUM_TIGHTEST, [*self._tightest, *self._needs((seq,))], key=_pace)

    def most_sequences(self) -> float:
        """Return how many could run at once at the least pace of those that run; infinity if all have time."""
        prompts_s = self._cost.token_s * self._num_behind
        paces = [(left_s - prompts_s) / left for left_s, left in self._tightest]
        least_s = min((pace for pace in paces if pace >= self._lost_s), default=float("inf"))
        most = self._cost.most_tokens(least_s * self._row_tokens) / self._token_share
        return min(most, self._most_usual)

    def _least_efficient(self, group: WorkerGroup) -> float:
        """Return how many have to run at once for most of the rate that all slots together would have."""
        num_slots = group.num_running + len(group.free_slots)
        fixed_s, all_s = self._step_s(0), self._step_s(num_slots)
        # rate(n) = n / (fixed + n * each); solved for rate(n) = EFFICIENCY * rate(num_slots).
        each_s = (all_s - fixed_s) / num_slots
        rate = EFFICIENCY * num_slots / all_s if all_s else 0.0
        return fixed_s * rate / (1 - each_s * rate)

    def _step_s(self, num_running: float) -> float:
        """Return what a token of each of so many sequences takes."""
        num_tokens = step_tokens(num_running, self._token_share, self._most_step_tokens)
        return self._cost.seconds(num_tokens) / self._row_tokens

    def _needs(self, sequences: Iterable[Sequence]) -> list[tuple[float, int]]:
        """Return the seconds that each has, and the tokens it has to make in them. Those without a deadline: none."""
        now = self._now
        return [
            ((seq.request.deadline - now) / MARGIN, seq.num_expected_left)
            for seq in sequences
            if seq.request.submit.remaining_ms
        ]


def _pace(need: tuple[float, int]) -> float:
    return need[0] / need[1]
