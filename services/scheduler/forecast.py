"""Predicts when a request would end, from measured step times and from what runs and waits before it.

A sequence that waits gets its turn when one that runs has ended, so the times at which those end say when. Between
tenants the places are divided by weight among those that have, or would like to have, something in the queue.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.concurrency import LOST_PACE, Concurrency, most_step_tokens, step_tokens
from octavo.services.scheduler.config import BLOCK_SIZE, SchedulerConfig
from octavo.services.scheduler.fair_share import FairShare
from octavo.services.scheduler.sequence import Request, Sequence, SequenceState
from octavo.services.scheduler.step_cost import StepCost
from octavo.services.scheduler.waiting_queue import WaitingQueue
from octavo.services.scheduler.work import Work
from octavo.services.scheduler.worker_group import WorkerGroup

UNMET_S = 5.0
"""A tenant that was refused for lack of room has more to do for so long than what it has in the queue."""
MAX_UNMET = 10_000  # tenants
UNMET_SUMMED_S = 0.25  # how often the weights of such tenants are added up
MEAN_MEMORY = 64  # sequences, after which one counts for a third in the mean lengths
MIN_MARGIN, FIRST_MARGIN, MAX_MARGIN = 1.05, 1.1, 1.6
LATE_PART = 0.01  # of the admitted requests: the margin is held where so many miss their deadline
MARGIN_STEP = 0.02  # by which a late one raises the margin
MARGIN_MEMORY_S = 20.0  # after which a raised margin is back at a third
DEMAND_WINDOW_S = 3.0
MAX_DEMANDING = 10_000  # tenants in a window: those beyond are not limited by turns
EXCESS = 1.15  # what is let try, of what the machine can do: some of it is not in time
SPARE_PART = 0.25  # of the places: where so many are free, nobody is turned away for others' sake
BIAS_MEMORY = 64  # sequences that waited, after which one counts for a third
MAX_BIAS = 2.0
TURNOVER_STEPS = 2  # until a place that is free is used: as many steps as are in flight
PACE_PART, PACE_STEP = 0.1, 0.1  # the part of requests that may need a smaller pace; how fast that is learned
MAX_LEARNED = 256  # groups whose step times are remembered after they are gone
RESTART_S = 3.0  # until a worker that was lost is back, before one has been
MAX_RESTART_S = 15.0  # one that was away for longer was taken down, and did not just start again
STALE_S = 1.0  # without a step: what is known of steps may be wrong by now
MIN_PROMISES = 64  # kept, before those of sequences that do not wait any more are looked for
LONGEST_S = 1e6


class Margin:
    """Learns what predicted times have to be multiplied with, so that few of the admitted are late."""

    def __init__(self) -> None:
        self._value = FIRST_MARGIN
        self._at = -math.inf

    def value(self, now: float) -> float:
        """Return the factor."""
        if self._value <= FIRST_MARGIN or now <= self._at:
            return self._value
        return FIRST_MARGIN + (self._value - FIRST_MARGIN) * math.exp((self._at - now) / MARGIN_MEMORY_S)

    def ended(self, was_late: bool, now: float) -> None:
        """Learn whether an admitted request met its deadline."""
        change = MARGIN_STEP * (was_late - LATE_PART)
        self._value = min(max(self.value(now) + change, MIN_MARGIN), MAX_MARGIN)
        self._at = now


class MeanLengths:
    """Tokens of a sequence on average, the latest ones counting most: of its prompt, uncached, and of its output."""

    def __init__(self) -> None:
        self._weight = self._prompt = self._output = 0.0

    def add(self, num_prompt: int, num_output: int) -> None:
        """Learn from a sequence that begins to run."""
        kept = 1 - 1 / MEAN_MEMORY
        self._weight = kept * self._weight + 1
        self._prompt = kept * self._prompt + num_prompt
        self._output = kept * self._output + num_output

    @property
    def prompt(self) -> float:
        """Tokens to compute before the first one of the output; 0 if nothing is known."""
        return self._prompt / self._weight if self._weight else 0.0

    @property
    def output(self) -> float:
        """Tokens of the output; 1 if nothing is known."""
        return self._output / self._weight if self._weight else 1.0


class UsualPace:
    """The seconds for each token that nine in ten of the requests that come have at least, refused ones included.

    A group that ran more at once than this allows would be full of requests that have time, and refuse all others.
    """

    def __init__(self) -> None:
        self.seconds = math.inf

    def came(self, seconds: float) -> None:
        """Learn from a request; `seconds` is infinity if it has no deadline."""
        if math.isinf(self.seconds):
            self.seconds = seconds
        elif seconds < self.seconds:  # a stochastic approximation of the quantile
            self.seconds *= (1 - PACE_STEP) ** (1 - PACE_PART)
        else:
            self.seconds /= (1 - PACE_STEP) ** PACE_PART


class Bias:
    """How long sequences wait, in proportion to what was predicted: what the prediction does not know of."""

    def __init__(self) -> None:
        self._predicted = self._actual = float(BIAS_MEMORY)  # as if it had been right

    def add(self, predicted_s: float, actual_s: float) -> None:
        """Learn from a sequence; `predicted_s` was not corrected."""
        kept = 1 - 1 / BIAS_MEMORY
        ratio = min(max(actual_s / predicted_s, 1 / MAX_BIAS), MAX_BIAS)
        self._predicted = kept * self._predicted + 1
        self._actual = kept * self._actual + ratio

    @property
    def value(self) -> float:
        """Return the factor."""
        return max(self._actual / self._predicted, 1.0)


class Demand:
    """The machine time a second that each tenant asks for, refused requests included: of this window and the last.

    Where that is more than there is, a part of the requests is turned away by turns, whatever their lengths: else
    short ones would take every place that becomes free, and long ones none.
    """

    def __init__(self) -> None:
        self._since = 0.0
        self._now: dict[str, float] = {}
        self._before: dict[str, float] = {}
        self._turns: dict[str, float] = {}  # of each tenant, what is left of the part that it may try

    def came(self, tenant: str, seconds: float, now: float) -> None:
        """Learn that a tenant asks for so much machine time."""
        if now - self._since > DEMAND_WINDOW_S:
            is_next = now - self._since < 2 * DEMAND_WINDOW_S
            self._before, self._now, self._since = (self._now if is_next else {}), {}, now
            self._turns = {name: turn for name, turn in self._turns.items() if name in self._before}
        if tenant in self._now or len(self._now) < MAX_DEMANDING:
            self._now[tenant] = self._now.get(tenant, 0.0) + seconds

    def per_s(self, tenant: str, now: float) -> float:
        """Return the seconds a second that a tenant asks for."""
        seconds = self._now.get(tenant, 0.0) + self._before.get(tenant, 0.0)
        return seconds / (DEMAND_WINDOW_S + now - self._since)

    def take_turn(self, tenant: str, part: float) -> bool:
        """Take a tenant's turn, of which there is one for this part of its requests."""
        turn = self._turns.get(tenant, 1.0) + part
        may = turn >= 1.0
        if tenant in self._now:
            self._turns[tenant] = turn - may
        return may


@dataclass
class _Places:
    """What runs: for each tenant the seconds until each of its sequences ends, in order; and how many more may run."""

    num_free: float = 0.0
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
        self._unmet_until: dict[str, float] = {}  # by tenant, the first to end first
        self._unmet_weight = 0.0  # of those of them that do not wait
        self._unmet_at = -math.inf
        self._promised: list[tuple[float, int, Sequence]] = []  # heap of (pace, arrival, sequence)
        self._most_promises = MIN_PROMISES
        self._trial: scheduler_pb2.Submit | None = None  # was admitted though it was predicted to be late
        self._places: _Places | None = None
        self._places_of: tuple[int, int] = (0, 0)

    # -- what is learned -------------------------------------------------------------------------

    def joined(self, group: WorkerGroup, now: float) -> None:
        """Let a new group begin with what is known of the one that it takes the place of."""
        known = self._learned.pop(group.group_id, None) or next(reversed(self._learned.values()), None)
        if known is not None:
            group.cost = known.copy()
        if self._lost_at is not None:
            self._restart_s = min(now - self._lost_at, MAX_RESTART_S)
            self._lost_at = None
        self._places = None

    def lost(self, group: WorkerGroup, now: float) -> None:
        """Remember what is known of a group that is gone."""
        self._learned.pop(group.group_id, None)
        if group.cost.is_known and not group.cost_is_guess:
            self._learned[group.group_id] = group.cost
        if len(self._learned) > MAX_LEARNED:
            del self._learned[next(iter(self._learned))]
        self._lost_at = now
        self._num_slots = group.num_running + len(group.free_slots)
        self._places = None

    def opened(self, seq: Sequence, now: float) -> None:
        """Learn the lengths of a sequence that begins to run, and how long it waited."""
        if seq.predicted_wait_s:
            self._bias.add(seq.predicted_wait_s, now - seq.admitted_at)
            seq.predicted_wait_s = 0.0
        self._mean.add(seq.num_behind, seq.num_expected_left)

    def ended(self, request: Request, was_late: bool, now: float) -> None:
        """Learn whether a request that was admitted met its deadline."""
        if request.needs_time and request.submit is not self._trial:
            self._margin.ended(was_late, now)

    def came(self, left_s: float, num_output: int) -> None:
        """Learn that a request came that has so many tokens to make in so many seconds; infinity: any time."""
        pace_s = left_s / num_output
        known = (group for group in self._groups.values() if group.cost.is_known)
        if any(pace_s >= group.cost.seconds(1) / group.row_tokens for group in known):
            self._usual_pace.came(pace_s)  # else it could not be served on an idle machine either

    def turned_away(self, tenant: str, now: float) -> None:
        """Learn that a tenant has more to do than there is room for."""
        self._unmet_until.pop(tenant, None)
        if len(self._unmet_until) < MAX_UNMET:
            self._unmet_until[tenant] = now + UNMET_S

    def promise(self, request: Request, now: float) -> None:
        """Remember what a request that is admitted needs: a pace, once it runs. To be called before it waits."""
        if not request.needs_time:
            return
        submit, first, last = request.submit, request.sequences[0], request.sequences[-1]
        wait_s = self.wait_s(submit.tenant, submit.priority, 1, now)
        first.predicted_wait_s = (wait_s - self._absent_s(now)) / self._bias.value
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

        Where nothing runs, no step shows that what was learned is wrong. So one is let in now and then.
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
        return self._margin.value(now)

    @property
    def token_share(self) -> float:
        """Return the tokens that a step has for each sequence that runs: one, and its part of others' prompts."""
        return 1.0 + self._mean.prompt / self._mean.output

    def concurrency(self, group: WorkerGroup, now: float) -> Concurrency:
        """Return who can run beside those that run on a group."""
        return Concurrency(
            group, self.token_share, self._usual_pace.seconds, lambda tenant: self.share(tenant, now), now
        )

    def queue_s(self, now: float) -> float:
        """Return how long it takes until all that waits has been served."""
        waiting, places = self._waiting.work(), self._look(now)
        outputs_s = waiting.sequences * places.turn_s
        return min(waiting.prompt * places.token_s + outputs_s + self._absent_s(now), LONGEST_S)

    def share(self, tenant: str, now: float) -> float:
        """Return the part of the queue that is a tenant's among those that wait or would like to."""
        weight = self._fair_share.weight(tenant)
        return weight / max(self._competing(tenant, now), weight)

    def wait_s(self, tenant: str, priority: int, num_sequences: int, now: float) -> float:
        """Return after how long all sequences of a new request run; 0 if at once."""
        places = self._look(now)
        ahead = self._waiting.work()
        if ahead.sequences:
            own = self._waiting.work(tenant, priority)
            by_share = own.sequences / self.share(tenant, now) + 1
            if by_share < ahead.sequences:
                ahead = Work(int(ahead.prompt * by_share / ahead.sequences), 0, int(by_share))
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

    def has_its_turn(self, tenant: str, each: Work, num_sequences: int, now: float) -> bool:
        """Return whether a request is one of the part of its tenant's that there is room for; learns what it asks.

        each  the work of each of its sequences
        """
        places = self._look(now)
        each_s = each.prompt * places.token_s + (each.output + TURNOVER_STEPS) * places.output_s
        self._demand.came(tenant, num_sequences * each_s, now)
        num_places = len(places.ends_s) + places.num_free
        share = self.share(tenant, now)
        if not self._groups or (places.num_free > SPARE_PART * num_places and share >= 1.0):
            return True
        wanted = self._demand.per_s(tenant, now)
        return wanted <= EXCESS * share or self._demand.take_turn(tenant, EXCESS * share / wanted)

    def num_beside(self, num_others: int, now: float) -> float:
        """Return how many of so many others that wait will run beside a sequence."""
        return min(num_others, max(self._look(now).num_free, 0.0))

    def run_s(self, work: Work, num_others: float) -> float:
        """Return how long a sequence takes from its slot to its end, beside `num_others` more than run now."""
        if not self._groups and self._learned:
            return self._steps_s(next(reversed(self._learned.values())), work, num_others)
        others = num_others / max(len(self._groups), 1)
        return min((self._run_on_s(group, work, others) for group in self._groups.values()), default=0.0)

    def run_alone_s(self, work: Work) -> float:
        """Return how long a sequence would take if nothing else ran."""
        groups = self._groups.values()
        return min((self._steps_s(group.cost, work, 0.0, group.row_tokens) for group in groups), default=0.0)

    def least_run_s(self, seq: Sequence) -> float:
        """Return how long a sequence takes at least until its end, as far as that is certain.

        While others wait, the places of those that end are taken again: steps do not get much shorter.
        """
        times_s = []
        for group in self._groups.values():
            if group.cost.is_known:
                step_s = group.cost.seconds(1)
                if len(self._waiting) and not group.model.makes_vectors:
                    lately_s = self._step_s(group.cost, group.mean_running, group.row_tokens)
                    step_s = max(step_s, LOST_PACE * group.row_tokens * lately_s)
                left = 1 if seq.stop_ids and seq.state is SequenceState.RUNNING else seq.num_expected_left
                times_s.append(group.cost.token_s * max(seq.num_behind - 1, 0) + left * step_s / group.row_tokens)
        return min(times_s, default=0.0)

    # -- helpers ---------------------------------------------------------------------------------

    def _step_s(self, cost: StepCost, num_running: float, row_tokens: float) -> float:
        """Return what a token of each of so many sequences takes: a step has a part of prompts, which is limited."""
        most = most_step_tokens(cost, self._usual_pace.seconds * row_tokens)
        num_tokens = step_tokens(num_running, self.token_share, min(most, num_running + self._max_prefill_tokens))
        return cost.seconds(num_tokens) / row_tokens

    def _absent_s(self, now: float) -> float:
        """Return how long it takes until there is a worker again."""
        if self._groups or self._lost_at is None:
            return 0.0
        return max(self._lost_at + self._restart_s - now, 0.0)

    def _run_on_s(self, group: WorkerGroup, work: Work, num_others: float) -> float:
        """Return how long a sequence takes on a group, from its slot to its end."""
        if not group.model.makes_vectors:
            return self._steps_s(group.cost, work, group.num_running + num_others, group.row_tokens)
        # All there is to compute is tokens of prompts, which fill steps.
        in_flight_s = sum(group.cost.seconds(step.num_tokens) for step in group.in_flight)
        return in_flight_s + _filled_s(group.cost, group.num_behind() + work.prompt, group.max_batch_tokens)

    def _steps_s(self, cost: StepCost, work: Work, num_others: float, row_tokens: float = 1.0) -> float:
        """Return how long a sequence takes beside so many others."""
        step_s = self._step_s(cost, num_others + 1, row_tokens)
        return _filled_s(cost, work.prompt, self._max_prefill_tokens) + (work.output + TURNOVER_STEPS) * step_s

    def _competing(self, tenant: str, now: float) -> float:
        """Return the weights of `tenant` and of all others that wait or were refused lately."""
        if now - self._unmet_at >= UNMET_SUMMED_S:
            while self._unmet_until and next(iter(self._unmet_until.values())) <= now:
                del self._unmet_until[next(iter(self._unmet_until))]
            waiting = self._waiting.tenants()
            unmet = (name for name in self._unmet_until if name not in waiting)
            self._unmet_weight, self._unmet_at = sum(map(self._fair_share.weight, unmet)), now
        counts = self._waiting.num_waiting(tenant) or tenant in self._unmet_until
        own = 0.0 if counts else self._fair_share.weight(tenant)
        return self._fair_share.total_weight + self._unmet_weight + own

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
            num_running = max(group.num_running, 1)
            step_s = self._step_s(group.cost, num_running, group.row_tokens)
            for seq in group.running():
                ends_s = (seq.num_expected_left + TURNOVER_STEPS) * step_s
                places.ends_s.append(ends_s)
                places.by_tenant.setdefault(seq.request.submit.tenant, []).append(ends_s)
            if group.model.makes_vectors:  # whose sequences take nothing of each other but their turn
                places.num_free = math.inf
                full_s = group.cost.seconds(group.max_batch_tokens)
                prompts_per_s += group.max_batch_tokens / full_s if full_s else 0.0
                continue
            concurrency = self.concurrency(group, now)
            most = min(concurrency.most_sequences(), concurrency.most_at(*promised))
            allowed = most - group.num_running
            blocks = (self._mean.prompt + self._mean.output) / BLOCK_SIZE + 1
            allowed = min(allowed, group.pool.num_free / blocks)
            num_free = min(allowed, len(group.free_slots))
            places.num_free += num_free
            num_full = max(group.num_running + num_free, 1.0)  # once all places are taken
            if full_s := group.cost.seconds(num_full):
                turn_s = self._step_s(group.cost, num_full, group.row_tokens) * (self._mean.output + TURNOVER_STEPS)
                ends_per_s += num_full / turn_s
                outputs_per_s += num_full * group.row_tokens / full_s
                prompts_per_s += 1 / group.cost.token_s if group.cost.token_s else 0.0
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


def _filled_s(cost: StepCost, num_tokens: int, max_tokens: int) -> float:
    """Return how long steps of `max_tokens` take, and a smaller last one, that have `num_tokens` together."""
    whole, rest = divmod(num_tokens, max_tokens)
    return whole * cost.seconds(max_tokens) + (cost.seconds(rest) if rest else 0.0)
