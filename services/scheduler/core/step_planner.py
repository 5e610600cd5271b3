"""The planner decides which sequences compute how many tokens in the next step, in which slots and blocks."""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field

from octavo.services.scheduler.admission.concurrency import Concurrency
from octavo.services.scheduler.admission.forecast import Forecast
from octavo.services.scheduler.config import BLOCK_SIZE, SchedulerConfig
from octavo.services.scheduler.core.lifecycle import Lifecycle
from octavo.services.scheduler.core.metrics import SchedulerMetrics
from octavo.services.scheduler.core.plan_builder import LAST_SAMPLED, SAMPLE, PlanBuilder
from octavo.services.scheduler.core.quarantine import Quarantine
from octavo.services.scheduler.groups.step_times import StepSize
from octavo.services.scheduler.groups.worker_group import MAX_STEPS_IN_FLIGHT, StepInFlight, WorkerGroup
from octavo.services.scheduler.queueing.fair_share import FairShare
from octavo.services.scheduler.queueing.policy import Policy, Rank
from octavo.services.scheduler.queueing.waiting_queue import WaitingQueue
from octavo.services.scheduler.requests.sequence import Sequence, schedule_decodes
from octavo.worker.v1 import worker_pb2

MAX_SCORED_TOKENS = 128  # in a step: each makes a row of logits, and is ranked among the vocabulary
MAX_PASSED_OVER = 64  # sequences in a step that may run soon, here or elsewhere: the search ends there
MAX_SEARCHES = 8  # of the queue in a step


@dataclass
class _Budget:
    """What is left of a step for prompts."""

    tokens: int
    scored_tokens: int = MAX_SCORED_TOKENS


@dataclass
class _PassedOver:
    """Sequences that a search of the queue passed over: how many, and why."""

    count: int = 0
    for_blocks: bool = False  # that another sequence is going to compute
    tenants: set[str] = field(default_factory=set)  # whose next one would make others late


class _PromptsAhead:
    """Those open prompts that come first in a step, as many as fill it."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._num_tokens = 0
        self._prompts: list[tuple[Rank, int]] = []  # sorted; without the last one the budget is not full

    def add(self, rank: Rank, num_tokens: int) -> None:
        """Count a prompt with the tokens that it still has to compute."""
        if self.fill_before(rank):
            return
        insort(self._prompts, (rank, num_tokens))
        self._num_tokens += num_tokens
        while self._num_tokens - self._prompts[-1][1] >= self._budget:
            self._num_tokens -= self._prompts.pop()[1]

    def fill_before(self, rank: Rank) -> bool:
        """Return whether the prompts before one of this rank fill the step."""
        return self._num_tokens >= self._budget and self._prompts[-1][0] < rank


class StepPlanner:
    """Gives out tokens, slots and blocks. There is no prefill phase and no decode phase.

    `num_computed_tokens` catches up with the tokens a sequence has, under a token budget. Sequences that
    produce tokens come first.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        groups: Mapping[str, WorkerGroup],
        waiting: WaitingQueue,
        policy: Policy,
        lifecycle: Lifecycle,
        quarantine: Quarantine,
        fair_share: FairShare,
        forecast: Forecast,
        metrics: SchedulerMetrics,
    ) -> None:
        self._config = config
        self._groups = groups
        self._waiting = waiting
        self._policy = policy
        self._lifecycle = lifecycle
        self._quarantine = quarantine
        self._fair_share = fair_share
        self._forecast = forecast
        self._metrics = metrics

    def plan(self, group: WorkerGroup, now: float) -> worker_pb2.StepPlan | None:
        """Return the next step of a group, which is in flight from now on; None if there is nothing to compute."""
        plan = PlanBuilder()
        self._make_room(group)
        self._plan_decodes(group, plan)
        num_decodes = plan.num_tokens
        first_tokens = self._plan_prefills(group, plan, now)
        if not plan.slots:
            return None
        self._metrics.prompt_tokens += plan.num_tokens - num_decodes
        size = StepSize(plan.num_tokens, *plan.attention())
        step_id = group.num_steps + 1
        freed_slots = group.begin_step(
            StepInFlight(step_id, plan.sampled, plan.unsampled, first_tokens, size, now, plan.scored)
        )
        return plan.build(step_id, freed_slots)

    def _make_room(self, group: WorkerGroup) -> None:
        """Preempt until every decoding sequence that starts a new block can have one, and open prompts can go on."""
        allocator = group.allocator
        if allocator.has_windows:
            for seq in (*group.prefilling, *group.late):
                allocator.free_behind(seq)
        while group.pool.num_free < len(group.decoding) * allocator.num_groups + group.num_promised():
            for seq in group.decoding:  # else each could have one
                allocator.free_behind(seq)
            needed = sum(
                seq.num_computed_tokens >= len(seq.block_table) * BLOCK_SIZE
                and seq.num_computed_tokens + 1 < seq.max_len_here
                for seq in group.decoding
            )
            if group.pool.num_free >= needed * allocator.num_groups + group.num_promised():
                return
            victim = self._policy.choose_victim(group)
            assert victim is not None, "one sequence alone does not fit: the worker reported a wrong max_model_len"
            self._lifecycle.preempt(victim)

    def _plan_decodes(self, group: WorkerGroup, plan: PlanBuilder) -> None:
        """Add one token of every decoding sequence. This loop runs for every token: it is kept flat."""
        slots, context_lengths, row_flags = plan.slots, plan.context_lengths, plan.row_flags
        token_ids, sampled = plan.token_ids, plan.sampled
        lookahead = self._lookahead(group)
        for seq in group.decoding:
            position = seq.num_computed_tokens
            if position + 1 >= seq.max_len_here:
                continue  # the steps in flight make its last token
            num_held = len(seq.block_table) * BLOCK_SIZE
            if position + lookahead >= num_held and num_held + 1 < seq.max_len_here:
                plan.grow(seq, group.allocator.grow(seq))
                # Output is charged a block at a time: here, and not for every token.
                self._fair_share.charge(seq.request.submit.tenant, BLOCK_SIZE)
            slots.append(seq.slot)
            context_lengths.append(position)
            if seq.num_output_placeholders:  # sampled by a step in flight: only the worker knows it
                row_flags.append(SAMPLE | LAST_SAMPLED)
            else:
                token_ids.append(seq.token_ids[position])
                row_flags.append(SAMPLE)
            sampled.append(seq)
        schedule_decodes(sampled)
        plan.num_tokens = len(slots)
        plan.query_lengths.extend([1] * len(slots))

    @staticmethod
    def _lookahead(group: WorkerGroup) -> int:
        """Return how far beyond the next token a sequence should have blocks.

        Where steps make several tokens of it, as far as this one and the one in flight may get, if there are plenty.
        """
        if group.pool.num_free < 2 * len(group.decoding) * group.allocator.num_groups + group.num_promised():
            return 0
        return min(MAX_STEPS_IN_FLIGHT * (group.limits.max_row_tokens - 1), BLOCK_SIZE)

    def _plan_prefills(self, group: WorkerGroup, plan: PlanBuilder, now: float) -> list[Sequence]:
        """Share what is left of the step among prompts: shortest remaining first, with ageing.

        Return those whose prompt is through: their first token is in this plan.
        """
        through: list[Sequence] = []
        if not group.prefilling and not len(self._waiting):
            return through
        concurrency = self._forecast.concurrency(group, now)
        budget = _Budget(max(group.limits.max_num_batched_tokens - plan.num_tokens, 0))
        if plan.num_tokens:
            most = min(budget.tokens, self._config.max_prefill_tokens)
            budget.tokens = concurrency.prompt_tokens(plan.num_tokens, most)
        for _ in range(MAX_SEARCHES):
            # Opening takes the waiting ones in the queue's order; then all prompts compete for tokens.
            were_passed_over = self._open_waiting(group, concurrency, plan, budget.tokens, now)
            num_planned = self._plan_prompts(group, plan, budget, now)
            through += group.end_prompts()  # at once: the next search looks at who runs
            if not were_passed_over or not num_planned or not budget.tokens:
                break  # else some may find their blocks now
        return through

    def _plan_prompts(self, group: WorkerGroup, plan: PlanBuilder, budget: _Budget, now: float) -> int:
        """Add tokens of open prompts, as far as the budget reaches; return how many."""
        num_before = plan.num_tokens
        for seq in sorted(group.prefilling, key=self._policy.prompt_rank):
            count = min(seq.num_uncomputed_tokens, budget.tokens)
            if seq.slot_scores and count:
                if not budget.scored_tokens:
                    continue
                count = min(count, budget.scored_tokens)
                budget.scored_tokens -= count
            if count == 0:
                break
            if count < seq.num_uncomputed_tokens and group.model.whole_sequences:
                continue  # a shorter one may fit into what is left; ageing lets this one be the first of a step
            if group.allocator.has_windows:
                most = self._extend(group, seq, count, plan)
                if most < count:  # it would get a second row, and others what it lacks
                    count = budget.tokens = most
                if not count:
                    break
            plan.add_tokens(seq, count, now)
            budget.tokens -= count
            group.allocator.cache_full_blocks(seq)
            self._fair_share.charge(seq.request.submit.tenant, count)
        return plan.num_tokens - num_before

    @staticmethod
    def _extend(group: WorkerGroup, seq: Sequence, count: int, plan: PlanBuilder) -> int:
        """Give an open prompt blocks for its next `count` tokens; return for how many there are.

        It may take what is promised to others: what it has too many is given back before the next step is planned.
        """
        start = seq.num_computed_tokens
        plan.add_blocks(seq, group.allocator.extend(seq, start + count))
        return min(count, min(map(len, seq.block_tables)) * BLOCK_SIZE - start)

    def _open_waiting(
        self, group: WorkerGroup, concurrency: Concurrency, plan: PlanBuilder, budget: int, now: float
    ) -> bool:
        """Give slots and blocks to waiting sequences, until their prompts fill the budget.

        A sequence whose next block another one is going to compute is passed over: it will find that
        block in the cache. One that does not fit ends the search, so that it is not starved; one that would
        make others late ends it for its tenant. Return whether any was passed over for its blocks.
        """
        if not group.free_slots or not budget:
            return False
        prompt_rank = self._policy.prompt_rank
        ahead = _PromptsAhead(budget)
        for seq in group.prefilling:
            ahead.add(prompt_rank(seq), seq.num_uncomputed_tokens)
        tokens_ahead: dict[WorkerGroup, float] = {}  # only asked for where there is a choice
        if len(self._groups) > 1:
            tokens_ahead = {other: other.tokens_ahead(now) for other in self._groups.values()}
        passed = _PassedOver()
        with closing(self._waiting.in_order(group.can_open)) as waiting:
            for seq in waiting:
                if not group.free_slots or passed.count == MAX_PASSED_OVER or ahead.fill_before(prompt_rank(seq)):
                    break
                tenant = seq.request.submit.tenant
                if tenant in passed.tenants:
                    passed.count += 1
                    continue
                if self._quarantine and not self._quarantine.may_run(seq, group.running(), group.can_run):
                    continue
                if not self._is_for(group, seq, tokens_ahead):
                    passed.count += 1
                    continue
                hits = group.allocator.get_computed_blocks(seq)
                if group.allocator.is_being_computed(seq, len(hits[0])):
                    passed.for_blocks = True
                    passed.count += 1
                    continue
                if not group.has_room(seq, hits):
                    break
                if not concurrency.has_room_for(seq):
                    passed.tenants.add(tenant)
                    passed.count += 1
                    if concurrency.is_full or len(passed.tenants) == len(self._waiting.tenants()):
                        break
                    continue
                self._lifecycle.run(seq, group, hits, now)
                plan.open_slot(seq)
                concurrency.add(seq)
                ahead.add(prompt_rank(seq), seq.num_uncomputed_tokens)
                if tokens_ahead:
                    tokens_ahead[group] += seq.num_uncomputed_tokens
        return passed.for_blocks

    def _is_for(self, group: WorkerGroup, seq: Sequence, tokens_ahead: Mapping[WorkerGroup, float]) -> bool:
        """Return whether a sequence that a group can run should run there, and not on another group."""
        able = [other for other in self._groups.values() if other.can_open(seq)]
        if len(able) <= 1 or self._quarantine.is_blamed(seq):  # which is for the group that is empty
            return True
        return self._policy.choose_group(seq, able, tokens_ahead) is group
