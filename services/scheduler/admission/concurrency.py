"""The limit of concurrency says how many sequences run at once, so that each of them ends by its deadline.

Each sequence more makes every step longer, and so everybody later. A sequence with `left` tokens to make and `s`
seconds until its deadline needs steps of at most `s / left` seconds: its pace. A group runs as many sequences as
its steps allow at the least pace among them; the others wait in the queue, where they make nobody late.
But a tenant's hurry costs others no more than its share: enough run at once that theirs is made all the same.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

from octavo.services.scheduler.groups.step_cost import UsualCost
from octavo.services.scheduler.groups.worker_group import WorkerGroup
from octavo.services.scheduler.requests.sequence import Sequence

NUM_TIGHTEST = 8  # sequences whose paces are looked at: those with the least time for each token
LOST_PACE = 0.7  # of what steps take lately: who needs a smaller one will be late, and holds nobody back
MIN_PROMPT_TOKENS = 32  # in a step, so that prompts get on beside whatever runs
EFFICIENCY = 0.8  # of the highest rate: fewer do not run because of what most of those that come need
MARGIN = 1.03  # on what the tokens left take

_Need = tuple[float, int, str]


def most_step_tokens(cost: UsualCost, step_s: float) -> float:
    """Return how many tokens a step should have that usually has so long: what fits, or what efficiency asks for."""
    return max(cost.most_tokens(step_s), cost.efficient_tokens(EFFICIENCY))


def step_tokens(num_running: float, token_share: float, most: float) -> float:
    """Return how many tokens a step has in which `num_running` sequences run, prompts of others included."""
    return max(num_running, min(num_running * token_share, most))


class Concurrency:
    """Decides whether a group can run one more sequence. Made for one plan; `token_share` is Forecast's."""

    def __init__(
        self,
        group: WorkerGroup,
        cost: UsualCost,
        token_share: float,
        usual_pace_s: float,
        share: Callable[[str], float],
        now: float,
    ) -> None:
        """Look at what runs on `group`.

        cost          what its steps take
        token_share   tokens that a step has for each sequence that runs, prompts included
        usual_pace_s  what most of those that come need; infinity if they have time
        share         tells the part of the machine that is a tenant's, while others would like theirs
        """
        self._cost = cost
        self._makes_vectors = group.model.makes_vectors  # in one step: there is no pace
        self._token_share = token_share
        self._row_tokens = group.times.row_tokens
        self._share = share
        self._now = now
        self._most_step_tokens = most_step_tokens(cost, usual_pace_s * group.times.row_tokens)
        self._lost_s = LOST_PACE * self._step_s(group.times.mean_running)
        self.num_running = group.num_running
        self._num_slots = group.num_running + len(group.free_slots)
        most = self._cost.most_tokens(usual_pace_s * group.times.row_tokens) / token_share
        self._most_usual = max(most, self._least_for(1.0))
        self._num_behind = sum(seq.num_uncomputed_tokens for seq in group.prefilling)
        self._tightest = heapq.nsmallest(NUM_TIGHTEST, self._needs(group.running()), key=_pace)

    def has_room_for(self, seq: Sequence) -> bool:
        """Return whether nobody who runs is made late if `seq` runs too.

        What `seq` itself needs is no matter: its time runs out as fast as places become free.
        """
        if not self._cost.is_known or self._makes_vectors:
            return True
        if self.is_full:
            return False
        prompts_s = self._cost.token_s * (self._num_behind + len(seq.token_ids))
        step_s = self._step_s(self.num_running + 1)
        for left_s, num_left, tenant in self._tightest:
            pace_s = (left_s - prompts_s) / num_left
            if self._lost_s <= pace_s < step_s and (
                tenant == seq.request.submit.tenant or self.num_running >= self._least_for(1 - self._share(tenant))
            ):
                return False
        return True

    def prompt_tokens(self, num_tokens: int, most: int) -> int:
        """Return how many tokens of prompts, at most `most`, a step can have beside `num_tokens` of outputs."""
        left = self._most_step_tokens - num_tokens
        return most if left >= most else max(int(left), min(MIN_PROMPT_TOKENS, most))

    @property
    def is_full(self) -> bool:
        """Whether as many run as most of those that come have time for."""
        return self.num_running >= self._most_usual

    def add(self, seq: Sequence) -> None:
        """Count a sequence that runs from now on."""
        self.num_running += 1
        self._num_behind += seq.num_uncomputed_tokens
        self._tightest = heapq.nsmallest(NUM_TIGHTEST, [*self._tightest, *self._needs((seq,))], key=_pace)

    def most_sequences(self) -> float:
        """Return how many could run at once at the least pace of those that run; infinity if all have time."""
        prompts_s = self._cost.token_s * self._num_behind
        paces = [((left_s - prompts_s) / left, tenant) for left_s, left, tenant in self._tightest]
        most = (self.most_at(pace_s, tenant) for pace_s, tenant in paces if pace_s >= self._lost_s)
        return min(most, default=self._most_usual)

    def most_at(self, pace_s: float, tenant: str) -> float:
        """Return how many could run at once at a pace that one of a tenant needs."""
        most = self._cost.most_tokens(pace_s * self._row_tokens) / self._token_share
        return min(max(most, self._least_for(1 - self._share(tenant))), self._most_usual)

    def _least_for(self, part: float) -> float:
        """Return how many have to run at once for most of a part of the rate that all slots together would have."""
        fixed_s, all_s = self._step_s(0), self._step_s(self._num_slots)
        # rate(n) = n / (fixed + n * each); solved for rate(n) = EFFICIENCY * part * rate(num_slots).
        each_s = (all_s - fixed_s) / self._num_slots
        rate = EFFICIENCY * part * self._num_slots / all_s if all_s else 0.0
        return fixed_s * rate / (1 - each_s * rate)

    def _step_s(self, num_running: float) -> float:
        """Return what a token of each of `num_running` sequences takes."""
        num_tokens = step_tokens(num_running, self._token_share, self._most_step_tokens)
        return self._cost.seconds(num_tokens) / self._row_tokens

    def _needs(self, sequences: Iterable[Sequence]) -> list[_Need]:
        """Return the seconds that each has, the tokens to make in them, and its tenant. Those that have time: none."""
        now = self._now
        return [
            ((seq.request.deadline - now) / MARGIN, seq.num_expected_left, seq.request.submit.tenant)
            for seq in sequences
            if seq.request.needs_time
        ]


def _pace(need: _Need) -> float:
    return need[0] / need[1]
