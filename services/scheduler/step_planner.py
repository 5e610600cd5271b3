"""Plans steps: who computes which tokens next, in which slots and blocks."""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass

from octavo.services.scheduler.concurrency import Concurrency
from octavo.services.scheduler.config import BLOCK_SIZE, SchedulerConfig
from octavo.services.scheduler.fair_share import FairShare
from octavo.services.scheduler.forecast import Forecast
from octavo.services.scheduler.free_blocks import Block
from octavo.services.scheduler.plan_builder import LAST_SAMPLED, SAMPLE, PlanBuilder
from octavo.services.scheduler.policy import Rank, choose_group, choose_victim
from octavo.services.scheduler.sequence import Sequence
from octavo.services.scheduler.sequence_states import SequenceStates
from octavo.services.scheduler.step_clock import StepSize
from octavo.services.scheduler.suspects import Suspects
from octavo.services.scheduler.tally import Tally
from octavo.services.scheduler.worker_group import MAX_STEPS_IN_FLIGHT, StepInFlight, WorkerGroup
from octavo.worker.v1 import worker_pb2

MAX_SCORED_TOKENS = 128  # in a step: each makes a row of logits, and is ranked among the vocabulary
MAX_PASSED_OVER = 64  # sequences in a step that may run soon, here or elsewhere: the search ends there
MAX_SEARCHES = 8  # of the queue in a step


@dataclass
class _Budget:
    """What is left of a step for prompts."""

    tokens: int
    scored_tokens: int = MAX_SCORED_TOKENS


class _PromptsAhead:
    """Those open prompts that come first in a step, as many as fill it."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._num_tokens = 0
        self._prompts: list[tuple[Rank, int]] = []  # sorted; without the last one the budget is not full

    def add(self, rank: Rank, num_tokens: int) -> None:
        """Count a prompt with so many tokens to compute."""
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

    `num_computed` catches up with the tokens a sequence has, under a token budget. Sequences that
    produce tokens come first.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        groups: Mapping[str, WorkerGroup],
        states: SequenceStates,
        suspects: Suspects,
        fair_share: FairShare,
        forecast: Forecast,
        tally: Tally,
    ) -> None:
        self._tally = tally
        self._config = config
        self._groups = groups
        self._states = states
        self._waiting = states.waiting
        self._suspects = suspects
        self._fair_share = fair_share
        self._forecast = forecast

    def plan(self, group: WorkerGroup, now: float) -> worker_pb2.StepPlan | None:
        """Return the next step of a group, which is in flight from now on; None if there is nothing to compute."""
        plan = PlanBuilder()
        self._make_room_for_decodes(group)
        self._plan_decodes(group, plan)
        num_decodes = plan.num_tokens
        first_tokens = self._plan_prefills(group, plan, now)
        if not plan.slots:
            return None
        group.num_steps += 1
        self._tally.prompt_tokens += plan.num_tokens - num_decodes
        step = StepInFlight(
            group.num_steps,
            plan.sampled,
            plan.unsampled,
            first_tokens,
            StepSize(plan.num_tokens, *plan.attention()),
            now,
            plan.scored,
        )
        group.in_flight.append(step)
        message = plan.build(group.num_steps, group.freed_slots)
        group.freed_slots = []
        return message

    def _make_room_for_decodes(self, group: WorkerGroup) -> None:
        """Preempt until every decoding sequence that starts a new block can have one."""
        while group.pool.num_free < len(group.decoding):  # else each could have one
            needed = sum(
                seq.num_computed >= len(seq.blocks) * BLOCK_SIZE and seq.num_computed + 1 < seq.max_tokens
                for seq in group.decoding
            )
            if group.pool.num_free >= needed:
                return
            victim = choose_victim(group)
            assert victim is not None, "one sequence alone does not fit: the worker reported a wrong max_model_len"
            self._states.preempt(victim)

    def _plan_decodes(self, group: WorkerGroup, plan: PlanBuilder) -> None:
        """Add one token of every decoding sequence. This loop runs for every token: it is kept flat."""
        slots, context_lengths, row_flags = plan.slots, plan.context_lengths, plan.row_flags
        token_ids, sampled = plan.token_ids, plan.sampled
        lookahead = self._lookahead(group)
        for seq in group.decoding:
            position = seq.num_computed
            if position + 1 >= seq.max_tokens:
                continue  # the steps in flight make its last token
            num_held = len(seq.blocks) * BLOCK_SIZE
            if position + lookahead >= num_held and num_held + 1 < seq.max_tokens:
                plan.add_blocks(seq.slot, [group.allocator.grow(seq)])
                # Output is charged a block at a time: here, and not for every token.
                self._fair_share.charge(seq.request.submit.tenant, BLOCK_SIZE)
            slots.append(seq.slot)
            context_lengths.append(position)
            tokens = seq.tokens
            if position < len(tokens):
                token_ids.append(tokens[position])
                row_flags.append(SAMPLE)
            else:  # sampled by a step in flight: only the worker knows it
                row_flags.append(SAMPLE | LAST_SAMPLED)
            seq.num_computed = position + 1
            seq.num_pending += 1
            sampled.append(seq)
        plan.num_tokens = len(slots)
        plan.query_lengths.extend([1] * len(slots))

    @staticmethod
    def _lookahead(group: WorkerGroup) -> int:
        """Return how far beyond the next token a sequence should have blocks.

        Where steps make several tokens of it, as far as this one and the one in flight may get, if there are plenty.
        """
        if group.pool.num_free < 2 * len(group.decoding):
            return 0
        return min(MAX_STEPS_IN_FLIGHT * (group.max_row_tokens - 1), BLOCK_SIZE)

    def _plan_prefills(self, group: WorkerGroup, plan: PlanBuilder, now: float) -> list[Sequence]:
        """Share what is left of the step among prompts: shortest remaining first, with ageing.

        Return those whose prompt is through: their first token is in this plan.
        """
        through: list[Sequence] = []
        if not group.prefilling and not len(self._waiting):
            return through
        concurrency = self._forecast.concurrency(group, now)
        budget = _Budget(max(group.max_batch_tokens - plan.num_tokens, 0))
        if plan.num_tokens:
            most = min(budget.tokens, self._config.max_prefill_tokens)
            budget.tokens = concurrency.prompt_tokens(plan.num_tokens, most)
        for _ in range(MAX_SEARCHES):
            # Opening takes the waiting ones in the queue's order; then all prompts compete for tokens.
            were_passed_over = self._open_waiting(group, concurrency, plan, budget.tokens, now)
            num_planned = self._plan_prompts(group, plan, budget, now)
            opened = [seq for seq in group.prefilling if seq.num_pending]
            through += opened
            group.decoding += opened  # at once: the next search looks at who runs
            group.prefilling = [seq for seq in group.prefilling if not seq.num_pending]
            if not were_passed_over or not num_planned or not budget.tokens:
                break  # else some may find their blocks now
        return through

    def _plan_prompts(self, group: WorkerGroup, plan: PlanBuilder, budget: _Budget, now: float) -> int:
        """Add tokens of open prompts, as far as the budget reaches; return how many."""
        num_before = plan.num_tokens
        for seq in sorted(group.prefilling, key=self._waiting.policy.prompt_rank):
            count = min(seq.num_behind, budget.tokens)
            if seq.slot_scores and count:
                if not budget.scored_tokens:
                    continue
                count = min(count, budget.scored_tokens)
                budget.scored_tokens -= count
            if count == 0:
                break
            if count < seq.num_behind and group.model.whole_sequences:
                continue  # a shorter one may fit into what is left; ageing lets this one be the first of a step
            plan.add_tokens(seq, count)
            budget.tokens -= count
            group.allocator.commit(seq)
            self._fair_share.charge(seq.request.submit.tenant, count)
            seq.first_scheduled_at = seq.first_scheduled_at or now
        return plan.num_tokens - num_before

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
        prompt_rank = self._waiting.policy.prompt_rank
        ahead = _PromptsAhead(budget)
        for seq in group.prefilling:
            ahead.add(prompt_rank(seq), seq.num_behind)
        num_behind: dict[WorkerGroup, int] = {}  # only asked for where there is a choice
        if len(self._groups) > 1:
            num_behind = {other: other.num_behind() for other in self._groups.values()}
        were_passed_over = False
        num_passed_over = 0
        held: set[str] = set()  # tenants whose next one would make others late
        with closing(self._waiting.in_order(group.can_run)) as waiting:
            for seq in waiting:
                if not group.free_slots or num_passed_over == MAX_PASSED_OVER or ahead.fill_before(prompt_rank(seq)):
                    break
                tenant = seq.request.submit.tenant
                if tenant in held:
                    num_passed_over += 1
                    continue
                if self._suspects and not self._suspects.may_run(seq, group.running(), group.can_run):
                    continue
                is_bound = self._suspects.is_blamed(seq)  # to the group that is empty, wherever its prefix is
                able = [other for other in self._groups.values() if other.can_run(seq)]
                if len(able) > 1 and not is_bound and choose_group(seq, able, num_behind) is not group:
                    num_passed_over += 1
                    continue
                hits = group.allocator.cached_blocks(seq)
                if group.allocator.is_being_computed(seq, len(hits)):
                    were_passed_over = True
                    num_passed_over += 1
                    continue
                if not group.has_room(seq, hits):
                    break
                if not concurrency.has_room_for(seq):
                    held.add(tenant)
                    num_passed_over += 1
                    if concurrency.is_full or len(held) == len(self._waiting.tenants()):
                        break
                    continue
                self._open(group, seq, hits, plan, now)
                concurrency.add(seq)
                ahead.add(prompt_rank(seq), seq.num_behind)
                if num_behind:
                    num_behind[group] += seq.num_behind
        return were_passed_over

    def _open(self, group: WorkerGroup, seq: Sequence, hits: list[Block], plan: PlanBuilder, now: float) -> None:
        """Give a waiting sequence a slot of a group, and blocks, which it has room for."""
        if not group.model.whole_sequences:
            group.allocator.open(seq, hits)
        self._states.run(seq, group)
        self._tally.opened(seq, len(hits), now)
        self._forecast.opened(seq, now)
        if not seq.first_scheduled_at:
            seq.num_cached_tokens = min(seq.num_computed, seq.num_prompt)
        plan.open_slot(seq)
        plan.add_blocks(seq.slot, seq.blocks)
