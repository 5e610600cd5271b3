"""The forecast predicts when a request would end, from measured step times and from what runs and waits before it.

A sequence that waits gets its turn when one that runs has ended, so the times at which those end say when. Between
tenants the places are divided by weight among those that have, or would like to have, something in the queue.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.admission.concurrency import LOST_PACE, Concurrency, most_step_tokens, step_tokens
from octavo.services.scheduler.admission.estimators import Asked, Bias, Demand, Margin, MeanLengths, Stalls, UsualPace
from octavo.services.scheduler.config import BLOCK_SIZE, SchedulerConfig
from octavo.services.scheduler.groups.step_cost import StepCost, UsualCost
from octavo.services.scheduler.groups.step_times import context_size
from octavo.services.scheduler.groups.worker_group import WorkerGroup
from octavo.services.scheduler.queueing.fair_share import FairShare
from octavo.services.scheduler.queueing.waiting_queue import TokenCounts, WaitingQueue
from octavo.services.scheduler.requests.sequence import Request, Sequence, SequenceState

EXCESS = 1.15  # what may try, of what the machine can do: some of it is not in time
SPARE_PART = 0.25  # of the places: where this part is free, nobody is turned away for others' sake
TURNOVER_STEPS = 2  # until a place that is free is used: as many steps as are in flight
MAX_LEARNED = 256  # groups whose step times are remembered after they are gone
RESTART_S = 3.0  # until a worker that was lost is back, before one has been
MAX_RESTART_S = 15.0  # one that was away for longer was taken down, and did not just start again
STALE_S = 1.0  # without a step: what is known of steps may be wrong by now
MIN_PROMISES = 64  # kept, before those of sequences that do not wait any more are looked for
LONGEST_S = 1e6
UNTRIED_MARGIN = 0.3  # while nobody is refused yet: refusals take the machine's time too, and make steps longer
REFUSING_S = 5.0  # until steps show that, and until it is forgotten


@dataclass
class _Places:
    """What runs: for each tenant the seconds until each of its sequences ends, in order; and how many more may run."""

    num_free: float = 0.0
    are_paced: bool = False  # what runs leaves slots free, for the deadlines' sake
    ends_s: list[float] = field(default_factory=list)
    by_tenant: dict[str, list[float]] = field(default_factory=dict)
    token_s: float = 0.0  # what a prompt's token takes: all groups together
    output_s: float = 0.0  # and an output's, with all places taken
    turn_s: float = 0.0  # from one end to the next, with all places taken


class Forecast:
    """Owner of what was learned of step times, lengths and errors; predicts from that."""

    def __init__(
        self, config: SchedulerConfig, groups: Mapping[str, WorkerGroup], waiting: WaitingQueue, fair_share: FairShare
    ) -> None:
        self._max_prefill_tokens = config.max_prefill_tokens
        self._groups = groups
        self._waiting = waiting
        self._fair_share = fair_share
        self._margin = Margin()
        self._learned: dict[str, StepCost] = {}  # of groups that are gone, the latest last
        self._lost_at: float | None = None  # the last worker, if none has come since
        self._restart_s = RESTART_S
        self._num_slots = math.inf  # of the last one
        self._mean = MeanLengths()
        self._bias = Bias()
        self._usual_pace = UsualPace()
        self._demand = Demand()
        self._stalls = Stalls()
        self._promised: list[tuple[float, int, Sequence]] = []  # heap of (pace, arrival, sequence)
        self._most_promises = MIN_PROMISES
        self._trial: scheduler_pb2.Submit | None = None  # was admitted though it was predicted to be late
        self._places: _Places | None = None
        self._places_of: tuple[int, int] = (0, 0)
        self._refusing_since = self._refused_at = -math.inf

    # -- what is learned -------------------------------------------------------------------------

    def joined(self, group: WorkerGroup, now: float) -> None:
        """Let a new group begin with what is known of the one that it takes the place of."""
        known = self._learned.pop(group.group_id, None) or next(reversed(self._learned.values()), None)
        if known is not None:
            group.times.cost = known.copy()
        if self._lost_at is not None:
            self._restart_s = min(now - self._lost_at, MAX_RESTART_S)
            self._lost_at = None
        self._places = None

    def lost(self, group: WorkerGroup, now: float) -> None:
        """Remember what is known of a group that is gone."""
        self._learned.pop(group.group_id, None)
        if group.times.cost.is_known and not group.times.is_guess:
            self._learned[group.group_id] = group.times.cost
        if len(self._learned) > MAX_LEARNED:
            del self._learned[next(iter(self._learned))]
        self._lost_at = now
        self._num_slots = group.num_running + len(group.free_slots)
        self._places = None

    def opened(self, seq: Sequence, now: float) -> None:
        """Learn the lengths of a sequence that begins to run, and how long it waited."""
        if seq.predicted_wait_s:
            self._bias.add(seq.predicted_wait_s, now - seq.admitted_at)
            seq.expect_wait(0.0)
        self._stalls.opened(seq.request.submit.tenant)
        self._mean.add(seq.num_uncomputed_tokens, seq.num_expected_left, len(seq.token_ids))

    def ended(self, request: Request, was_late: bool, now: float) -> None:
        """Learn whether a request that was admitted met its deadline."""
        if request.needs_time and request.submit is not self._trial:
            self._margin.ended(was_late, now)

    def came(self, left_s: float, num_output_tokens: int) -> None:
        """Learn that a request came that has `left_s` for its tokens; infinity: any time."""
        pace_s = left_s / num_output_tokens
        known = (
            (self._cost(group), group.times.row_tokens) for group in self._groups.values() if group.times.cost.is_known
        )
        if any(pace_s >= cost.seconds(1) / row_tokens for cost, row_tokens in known):
            self._usual_pace.came(pace_s)  # else it could not be served on an idle machine either

    def retry_s(self, tenant: str, is_its_share: bool, now: float) -> float:
        """Return when to come again who found no room in the queue, or in the tenant's share of it; learns that."""
        self._fair_share.turned_away(tenant, now)
        return max(self.queue_s(now) / 2, self._stalls.refused(tenant if is_its_share else None, now))

    def refused(self, tenant: str, now: float) -> None:
        """Learn that a tenant's request is refused for its deadline, which takes time of the machine."""
        self._fair_share.turned_away(tenant, now)
        if now - self._refused_at > REFUSING_S:
            self._refusing_since = now
        self._refused_at = now

    def promise(self, request: Request, now: float) -> None:
        """Remember what a request that is admitted needs: a pace, once it runs. To be called before it waits."""
        if not request.needs_time:
            return
        submit, first, last = request.submit, request.sequences[0], request.sequences[-1]
        wait_s = self.wait_s(submit.tenant, submit.priority, 1, now)
        first.expect_wait((wait_s - self._absent_s(now)) / self._bias.value)
        if first is not last:
            wait_s = self.wait_s(submit.tenant, submit.priority, len(request.sequences), now)
        left_s = (request.deadline - now) / self.margin(now) - wait_s
        heapq.heappush(self._promised, (left_s / last.num_expected_left, request.arrival, last))
        if len(self._promised) > self._most_promises:
            self._promised = [entry for entry in self._promised if entry[-1].state is SequenceState.WAITING]
            heapq.heapify(self._promised)
            self._most_promises = MIN_PROMISES + 2 * len(self._promised)
        self._places = None

    def may_try(self, submit: scheduler_pb2.Submit, now: float) -> bool:
        """Return whether a request may be tried that is predicted to be late.

        Where nothing runs, no step shows that what was learned is wrong. So one is admitted now and then.
        """
        if len(self._waiting) or any(group.num_running for group in self._groups.values()):
            return False
        if now - max((group.last_result_at for group in self._groups.values()), default=now) < STALE_S:
            return False
        self._trial = submit
        return True

    # -- what is predicted: 0 if nothing is known yet --------------------------------------------

    def margin(self, now: float) -> float:
        """Return what predicted times are multiplied with before they are compared with a deadline."""
        return self._margin.value(now) + UNTRIED_MARGIN * self._untried(now)

    @property
    def token_share(self) -> float:
        """Return the tokens that a step has for each sequence that runs: one, and its part of others' prompts."""
        return 1.0 + self._mean.prompt / self._mean.output

    def concurrency(self, group: WorkerGroup, now: float) -> Concurrency:
        """Return who can run beside those that run on a group."""
        return Concurrency(
            group,
            self._cost(group),
            self.token_share,
            self._usual_pace.seconds,
            lambda tenant: self.share(tenant, now),
            now,
        )

    def queue_s(self, now: float) -> float:
        """Return how long it takes until all that waits has been served."""
        waiting, places = self._waiting.work(), self._look(now)
        outputs_s = waiting.sequences * places.turn_s
        return min(waiting.prompt * places.token_s + outputs_s + self._absent_s(now), LONGEST_S)

    def share(self, tenant: str, now: float) -> float:
        """Return the part of the queue that is a tenant's among those that wait or would like to."""
        return self._fair_share.share(tenant, now)

    def wait_s(self, tenant: str, priority: int, num_sequences: int, now: float) -> float:
        """Return after how long all sequences of a new request run; 0 if at once."""
        places = self._look(now)
        ahead = self._waiting.work()
        if ahead.sequences:
            own = self._waiting.work(tenant, priority)
            by_share = own.sequences / self.share(tenant, now) + 1
            if by_share < ahead.sequences:
                ahead = TokenCounts(int(ahead.prompt * by_share / ahead.sequences), 0, int(by_share))
        prompts_s = ahead.prompt * places.token_s
        wait_s = _until_free_s(places.ends_s, places.num_free, ahead.sequences + num_sequences, places.turn_s)
        share = self.share(tenant, now)
        if share < 1.0:  # others wait for their part of the places
            own_ends = places.by_tenant.get(tenant, [])
            own_places = share * (len(places.ends_s) + places.num_free)
            num_own = self._waiting.work(tenant, priority).sequences + num_sequences
            turn_s = places.turn_s / share
            wait_s = max(wait_s, _until_free_s(own_ends, own_places - len(own_ends), num_own, turn_s))
        return (prompts_s + wait_s) * self._bias.value + self._absent_s(now)

    def has_its_turn(self, tenant: str, each: TokenCounts, num_sequences: int, now: float) -> bool:
        """Return whether a request is one of the part of its tenant's that there is room for; learns what it asks.

        each  the work of each of its sequences
        """
        places = self._look(now)
        prompt, output = num_sequences * each.prompt, num_sequences * (each.output + TURNOVER_STEPS)
        self._demand.came(tenant, Asked(prompt, output, prompt * places.token_s + output * places.output_s), now)
        num_places = len(places.ends_s) + places.num_free
        share = self.share(tenant, now)
        if not self._groups or (places.num_free > SPARE_PART * num_places and share >= 1.0):
            return True
        wanted = self._demand.per_s(tenant, places.token_s, places.output_s, now)
        return wanted <= EXCESS * share or self._demand.take_turn(tenant, EXCESS * share / wanted)

    def num_beside(self, num_others: int, now: float) -> float:
        """Return how many of `num_others` that wait will run beside a sequence."""
        return min(num_others, max(self._look(now).num_free, 0.0))

    def run_s(self, work: TokenCounts, num_others: float) -> float:
        """Return how long a sequence takes from its slot to its end, beside `num_others` more than run now."""
        if not self._groups and self._learned:
            latest = next(reversed(self._learned.values()))
            return self._steps_s(latest.usual(self._usual_context), work, num_others)
        others = num_others / max(len(self._groups), 1)
        return min((self._run_on_s(group, work, others) for group in self._groups.values()), default=0.0)

    def run_alone_s(self, work: TokenCounts) -> float:
        """Return how long a sequence would take if nothing else ran."""
        groups = self._groups.values()
        return min(
            (self._steps_s(self._cost(group), work, 0.0, group.times.row_tokens) for group in groups), default=0.0
        )

    def least_run_s(self, seq: Sequence) -> float:
        """Return how long a sequence takes at least until its end, as far as that is certain.

        While others wait, the places of those that end are taken again: steps do not get much shorter.
        """
        times_s = []
        for group in self._groups.values():
            if group.times.cost.is_known:
                cost = self._cost(group)
                step_s = cost.seconds(1)
                if len(self._waiting) and not group.model.makes_vectors:
                    lately_s = self._step_s(cost, group.times.mean_running, group.times.row_tokens)
                    step_s = max(step_s, LOST_PACE * group.times.row_tokens * lately_s)
                left = 1 if seq.stop_ids and seq.state is SequenceState.RUNNING else seq.num_expected_left
                times_s.append(
                    cost.token_s * max(seq.num_uncomputed_tokens - 1, 0) + left * step_s / group.times.row_tokens
                )
        return min(times_s, default=0.0)

    # -- helpers ---------------------------------------------------------------------------------

    def _untried(self, now: float) -> float:
        """Return how near refusals are that no step was measured beside: 0 to 1."""
        places = self._look(now)
        if not places.are_paced:
            return 0.0
        known = 0.0
        if now - self._refused_at <= REFUSING_S:
            known = 1 - math.exp((self._refusing_since - now) / REFUSING_S)
        num_running = len(places.ends_s)
        return (1 - known) * num_running / (num_running + max(places.num_free, 0.0))

    @property
    def _usual_context(self) -> float:
        """What each token attends to while sequences run, in tokens that might take as long to compute."""
        return context_size(self._mean.context)

    def _cost(self, group: WorkerGroup) -> UsualCost:
        """Return what steps of a group take, with the context that is usual."""
        return group.times.cost.usual(self._usual_context)

    def _step_s(self, cost: UsualCost, num_running: float, row_tokens: float) -> float:
        """Return what a token of each of `num_running` sequences takes; the part of prompts in a step is limited."""
        most = most_step_tokens(cost, self._usual_pace.seconds * row_tokens)
        num_tokens = step_tokens(num_running, self.token_share, min(most, num_running + self._max_prefill_tokens))
        return cost.seconds(num_tokens) / row_tokens

    def _absent_s(self, now: float) -> float:
        """Return how long it takes until there is a worker again."""
        if self._groups or self._lost_at is None:
            return 0.0
        return max(self._lost_at + self._restart_s - now, 0.0)

    def _run_on_s(self, group: WorkerGroup, work: TokenCounts, num_others: float) -> float:
        """Return how long a sequence takes on a group, from its slot to its end."""
        cost = self._cost(group)
        if not group.model.makes_vectors:
            return self._steps_s(cost, work, group.num_running + num_others, group.times.row_tokens)
        # All there is to compute is tokens of prompts, which fill steps.
        in_flight_s = sum(cost.seconds(step.num_tokens) for step in group.in_flight)
        return in_flight_s + _filled_s(
            cost, group.num_uncomputed_tokens() + work.prompt, group.limits.max_num_batched_tokens
        )

    def _steps_s(self, cost: UsualCost, work: TokenCounts, num_others: float, row_tokens: float = 1.0) -> float:
        """Return how long a sequence takes beside `num_others`."""
        step_s = self._step_s(cost, num_others + 1, row_tokens)
        return _filled_s(cost, work.prompt, self._max_prefill_tokens) + (work.output + TURNOVER_STEPS) * step_s

    def _least_promised(self) -> tuple[float, str]:
        """Return the least pace that was promised to one that waits, and its tenant; infinity if there is none."""
        promised = self._promised
        while promised and promised[0][-1].state is not SequenceState.WAITING:
            heapq.heappop(promised)
        return (promised[0][0], promised[0][-1].request.submit.tenant) if promised else (math.inf, "")

    def _look(self, now: float) -> _Places:
        """Return what runs, as of the last step."""
        looked_at = (
            sum(group.num_steps for group in self._groups.values()),
            sum(group.num_running for group in self._groups.values()),
        )
        if self._places is None or looked_at != self._places_of:
            self._places, self._places_of = self._measure(now), looked_at
        return self._places

    def _measure(self, now: float) -> _Places:
        places, promised = _Places(), self._least_promised()
        prompts_per_s = outputs_per_s = ends_per_s = 0.0
        for group in self._groups.values():
            cost, num_running = self._cost(group), max(group.num_running, 1)
            step_s = self._step_s(cost, num_running, group.times.row_tokens)
            for seq in group.running():
                ends_s = (seq.num_expected_left + TURNOVER_STEPS) * step_s
                places.ends_s.append(ends_s)
                places.by_tenant.setdefault(seq.request.submit.tenant, []).append(ends_s)
            if group.model.makes_vectors:  # whose sequences take nothing of each other but their turn
                places.num_free = math.inf
                full_s = cost.seconds(group.limits.max_num_batched_tokens)
                prompts_per_s += group.limits.max_num_batched_tokens / full_s if full_s else 0.0
                continue
            concurrency = self.concurrency(group, now)
            most = min(concurrency.most_sequences(), concurrency.most_at(*promised))
            allowed = most - group.num_running
            places.are_paced |= group.num_running > 0 and allowed < len(group.free_slots)
            blocks = group.allocator.num_blocks((self._mean.prompt + self._mean.output) / BLOCK_SIZE + 1)
            allowed = min(allowed, group.pool.num_free / blocks)
            num_free = min(allowed, len(group.free_slots))
            places.num_free += num_free
            num_full = max(group.num_running + num_free, 1.0)  # once all places are taken
            if full_s := cost.seconds(num_full):
                turn_s = self._step_s(cost, num_full, group.times.row_tokens) * (self._mean.output + TURNOVER_STEPS)
                ends_per_s += num_full / turn_s
                outputs_per_s += num_full * group.times.row_tokens / full_s
                prompts_per_s += 1 / cost.token_s if cost.token_s else 0.0
        places.token_s = 1 / prompts_per_s if prompts_per_s else 0.0
        places.output_s = 1 / outputs_per_s if outputs_per_s else 0.0
        places.turn_s = 1 / ends_per_s if ends_per_s else 0.0
        places.ends_s.sort()
        for ends in places.by_tenant.values():
            ends.sort()
        if not self._groups:  # they will all be free
            places.num_free = self._num_slots
        return places


def _until_free_s(ends_s: list[float], num_free: float, wanted: int, turn_s: float) -> float:
    """Return after how long `wanted` places are free, where those taken become free at `ends_s`."""
    if wanted <= num_free:
        return 0.0
    missing = math.ceil(wanted - num_free)
    if missing <= len(ends_s):
        return ends_s[missing - 1]
    return (ends_s[-1] if ends_s else 0.0) + (missing - len(ends_s)) * turn_s


def _filled_s(cost: UsualCost, num_tokens: int, max_tokens: int) -> float:
    """Return how long steps of `max_tokens` take, and a smaller last one, that have `num_tokens` together."""
    whole, rest = divmod(num_tokens, max_tokens)
    return whole * cost.seconds(max_tokens) + (cost.seconds(rest) if rest else 0.0)
