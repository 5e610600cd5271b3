"""The scheduler: a pure state machine. Events come in as method calls, effects go out as a list.

There is no clock, socket, thread or random number in here: `now` is an argument, in seconds on any
monotonic clock. The same events give the same effects, always. A request's way through: `submit`
queues it, `_plan` gives it tokens to compute, `step_done` digests what the worker sampled, `_finish`
ends it. `engine.py` is the shell that connects this to gRPC and ZeroMQ.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from google.rpc import code_pb2

from octavo.common.v1 import common_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.admission import Admission, reject
from octavo.services.scheduler.cache_feed import CacheFeed
from octavo.services.scheduler.config import BLOCK_SIZE, SchedulerConfig
from octavo.services.scheduler.outputs import (
    LogprobReader,
    Outbox,
    WorkerMisbehavedError,
    length_reason,
    stop_reason,
    timing,
    usage,
)
from octavo.services.scheduler.plan_builder import LAST_SAMPLED, SAMPLE, PlanBuilder
from octavo.services.scheduler.policy import FairShare, WaitingQueue, choose_group, choose_victim
from octavo.services.scheduler.progress import ProgressReports
from octavo.services.scheduler.quotas import Quotas
from octavo.services.scheduler.resume import ResumableRequests, has_logprobs_from, num_output, replay
from octavo.services.scheduler.sequence import Request, Sequence, SequenceState
from octavo.services.scheduler.step_clock import StepClock
from octavo.services.scheduler.suspects import Suspects
from octavo.services.scheduler.worker_group import MAX_STEPS_IN_FLIGHT, StepInFlight, WorkerGroup
from octavo.worker.v1 import worker_pb2

NOT_FINITE = 0xFFFFFFFF  # a worker's answer for a row whose logits were not finite
NEVER = math.inf
MAX_TOKENS = 1 << 30  # longer than any context
NOBODY = ""  # the gateway of requests whose stream broke: nothing is sent to it


@dataclass(frozen=True)
class SendPlan:
    """Effect: send a plan to the workers of a group."""

    group_id: str
    epoch: int
    plan: worker_pb2.StepPlan


@dataclass(frozen=True)
class SendToGateway:
    """Effect: send a message to a gateway."""

    gateway_id: str
    message: scheduler_pb2.AttachResponse


Effect = SendPlan | SendToGateway


class Scheduler:
    """Owner of token history, block tables, the prefix cache, sampling positions and budgets."""

    def __init__(self, config: SchedulerConfig, now: float, epoch: int = 0) -> None:
        """`epoch` names this life of the scheduler: requests of another one cannot be taken over."""
        self._config = config
        self._epoch = epoch
        self._effects: list[Effect] = []
        self._requests: dict[tuple[str, int], Request] = {}  # by gateway and handle
        self._groups: dict[str, WorkerGroup] = {}
        self._fair_share = FairShare(config.weights())
        self._waiting = WaitingQueue(self._fair_share, config.ageing_tokens_per_s)
        # Lost their blocks while a step was in flight; they queue again when its tokens are known.
        self._settling: dict[Sequence, None] = {}
        self._outboxes: dict[str, Outbox] = {}  # by gateway
        self._admission = Admission(config)
        self._deadlines: list[tuple[float, str, int]] = []  # heap of (time, gateway, handle)
        self._progress = ProgressReports()
        self._resumable = ResumableRequests()
        self._suspects = Suspects()
        self._quotas = Quotas(config.default_quota(), config.quotas())
        self.cache_feed = CacheFeed(epoch)
        self._num_arrivals = 0
        self._max_model_len = 0  # of the workers there are, or were last; 0: not known yet
        self._last_worker_at = now  # a scheduler that just started waits for its workers to come back
        self._draining = False

    # -- what the shell asks ---------------------------------------------------------------------

    def take_effects(self) -> list[Effect]:
        """Return the effects since the last call, in order."""
        effects, self._effects = self._effects, []
        return effects

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    @property
    def is_idle(self) -> bool:
        """Nothing is running, waiting or in flight."""
        return not self._requests and not any(group.in_flight for group in self._groups.values())

    def requests(self) -> Iterable[Request]:
        """Return the requests that have not ended, oldest first."""
        return self._requests.values()

    def load(self, now: float) -> scheduler_pb2.Load:
        """Describe the state of the scheduler."""
        groups = self._groups.values()
        oldest = min((step.sent_at for group in groups for step in group.in_flight), default=now)
        return scheduler_pb2.Load(
            running=sum(group.num_running for group in groups),
            waiting=len(self._waiting) + len(self._settling),
            waiting_uncached_tokens=self._waiting.num_tokens,
            kv_blocks_free=sum(group.pool.num_free for group in groups),
            kv_blocks_total=sum(group.pool.num_blocks - 1 for group in groups),
            estimated_queue_ms=self._admission.estimate_ms(self._waiting.num_tokens, groups),
            draining=self._draining,
            workers_ready=len(groups),
            step_age_ms=int(1000 * (now - oldest)),
            max_model_len=self._max_model_len,
        )

    def busy_groups(self) -> set[str]:
        """Return the groups that owe a step: their workers compute and cannot show life."""
        return {name for name, group in self._groups.items() if group.in_flight}

    def overdue_groups(self, now: float) -> dict[str, float]:
        """Return the groups whose oldest step takes so long that they must hang, with its age in seconds."""
        return {name: age_s for name, group in self._groups.items() if (age_s := group.overdue_s(now))}

    # -- events from gateways --------------------------------------------------------------------

    def submit(self, gateway_id: str, submit: scheduler_pb2.Submit, now: float) -> None:
        """Queue a request, or refuse it."""
        rejected = self._refuse(gateway_id, submit, now)
        if rejected is not None:
            self._send(gateway_id, scheduler_pb2.AttachResponse(rejected=rejected))
            return
        self._num_arrivals += 1
        remaining_ms = submit.remaining_ms or self._config.max_request_ms
        soft_ms = submit.stop.soft_time_limit_ms
        request = Request(
            submit=submit,
            gateway_id=gateway_id,
            handle=submit.handle,
            arrival=self._num_arrivals,
            admitted_at=now,
            deadline=now + min(remaining_ms, self._config.max_request_ms) / 1000,
            soft_deadline=now + soft_ms / 1000 if soft_ms else NEVER,
        )
        old = self._resumable.replaced_by(request)
        if old is not None:  # its gateway starts over, with the output it has
            self._drop(old)
        self._resumable.add(request)
        self._quotas.let_in(submit, now)
        outbox = self._outboxes.setdefault(gateway_id, Outbox(gateway_id))
        max_tokens = len(submit.prompt_token_ids) + (submit.stop.max_new_tokens or MAX_TOKENS)
        max_tokens = min(max_tokens, self._max_model_len or MAX_TOKENS)
        for index in range(max(submit.candidate_count, 1)):
            request.sequences.append(Sequence(request, submit.first_candidate_index + index, max_tokens, outbox))
        request.num_unfinished = len(request.sequences)
        self._requests[request.key] = request
        self._set_deadline(request)
        self._progress.add(request.key, request, now)
        self._send(gateway_id, scheduler_pb2.AttachResponse(admitted=self._admitted(request)))
        for seq in request.sequences:
            if len(seq.tokens) >= seq.max_tokens:  # nothing left to do of an output that is continued
                self._finish(seq, length_reason(seq), now)
            else:
                self._waiting.add(seq)
        self._flush_outboxes(step_id=0)

    def cancel(self, gateway_id: str, cancel: scheduler_pb2.Cancel, now: float) -> None:
        """End a request of this gateway, or by its id one of any gateway. Unknown ones are ignored."""
        if cancel.request_id:
            self._cancel_by_id(gateway_id, cancel.request_id, now)
            return
        request = self._requests.get((gateway_id, cancel.handle))
        if request is None:
            return
        for seq in request.sequences:
            if not cancel.HasField("candidate_index") or seq.candidate_index == cancel.candidate_index:
                self._stop(seq)
        if request.num_unfinished == 0:  # nobody wants to take it over
            self._resumable.forget(request)

    def reattach(self, gateway_id: str, reattach: scheduler_pb2.Reattach, now: float) -> None:
        """Give a request to a gateway, with what that one has not seen of it, or tell it that nothing is kept."""
        request = self._resumable.get(reattach.request_id) if reattach.epoch == self._epoch else None
        offsets = list(reattach.next_token_offsets)
        if (
            request is None
            or not has_logprobs_from(request, offsets)
            or (gateway_id, reattach.handle) in self._requests
        ):
            failed = scheduler_pb2.Failed(
                handle=reattach.handle,
                code=code_pb2.DATA_LOSS,
                reason="RESUME_STATE_LOST",
                message="nothing is kept of the request; submit it again with the output so far",
            )
            self._send(gateway_id, scheduler_pb2.AttachResponse(failed=failed))
            return
        self._hand_over(request, gateway_id, reattach.handle, now)
        reattached = scheduler_pb2.Reattached(
            handle=request.handle,
            gateway_state=request.submit.gateway_state,
            seed=request.submit.sampling.seed,
            prompt_tokens=request.sequences[0].num_prompt,
            candidate_count=len(request.sequences),
            first_candidate_index=request.submit.first_candidate_index,
        )
        self._send(gateway_id, scheduler_pb2.AttachResponse(reattached=reattached))
        for outputs in replay(request, offsets):
            self._send(gateway_id, scheduler_pb2.AttachResponse(step_outputs=outputs))

    def detach(self, gateway_id: str, handle: int, now: float) -> None:
        """Let a request of a gateway go on without it for the resume window, or end it if it has none."""
        request = self._requests.get((gateway_id, handle))
        if request is None:
            return
        if not self._resumable.holds(request):
            self._drop(request)
            return
        self._hand_over(request, NOBODY, request.arrival, now)
        window_ms = min(request.submit.resume_window_ms, self._config.max_resume_window_ms)
        request.resume_until = now + window_ms / 1000
        self._resumable.detached[request] = num_output(request)

    def gateway_lost(self, gateway_id: str, now: float) -> None:
        """Let go of every request of a gateway that is gone."""
        for request in [r for r in self._requests.values() if r.gateway_id == gateway_id]:
            self.detach(gateway_id, request.handle, now)
        self._outboxes.pop(gateway_id, None)

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._draining = True

    def flush_prefix_cache(self) -> int:
        """Forget every cached block that no sequence holds; return how many there were."""
        return sum(group.pool.forget_free() for group in self._groups.values())

    # -- events from workers ---------------------------------------------------------------------

    def worker_joined(
        self, group_id: str, epoch: int, num_blocks: int, max_model_len: int, now: float, max_batch_tokens: int = 0
    ) -> None:
        """Take a worker group into service. Its cache is empty, its slots are free.

        max_batch_tokens  most tokens in a step that its memory has room for; 0 if it is the configured number
        """
        assert group_id not in self._groups, f"group {group_id} joined twice"
        config, clock = self._config, StepClock(self._config.step_timeout_s)
        group = WorkerGroup(group_id, epoch, num_blocks, config.max_running, max_model_len, self.cache_feed, clock)
        group.max_batch_tokens = min(max_batch_tokens or config.max_batch_tokens, config.max_batch_tokens)
        self._groups[group_id] = group
        self._max_model_len = min(other.max_model_len for other in self._groups.values())
        self._last_worker_at = now
        for seq in [*self._waiting, *self._settling]:  # they may have come when the limit was not known
            seq.max_tokens = min(seq.max_tokens, self._max_model_len)
            if len(seq.tokens) >= seq.max_tokens and seq.state is not SequenceState.FINISHED:
                message = f"the workers hold at most {self._max_model_len} tokens of a sequence"
                self._fail(seq.request, code_pb2.INVALID_ARGUMENT, "KV_CAPACITY_EXCEEDED", message)

    def worker_lost(self, group_id: str, now: float, crashed: bool = False) -> None:
        """Take a worker group out of service: its sequences go on elsewhere, or when it is back.

        What steps in flight had sampled is lost, and will be sampled again, identically. `crashed`:
        the worker died or hung, and what it was computing may be why.
        """
        group = self._groups.pop(group_id)
        group.pool.close()
        self._last_worker_at = now
        in_flight = [seq for step in group.in_flight for seq in (*step.sampled, *step.unsampled)]
        lost = list(group.running()) + [seq for seq in self._settling if seq.group is group]
        for seq in lost:
            seq.num_pending = 0
            if seq.state is SequenceState.RUNNING:
                self._requeue(seq)
            else:
                self._settle(seq)
            seq.num_recoveries += 1
        for seq in lost:
            if seq.num_recoveries > self._config.max_recoveries and seq.state is not SequenceState.FINISHED:
                self._fail(seq.request, code_pb2.UNAVAILABLE, "NO_WORKERS", "lost its worker too often", resumable=True)
        culprit = self._suspects.crashed(in_flight, now) if crashed else None
        if culprit is not None:
            message = "workers died of this request, and of no other: it is refused for a while"
            self._fail(culprit, code_pb2.INTERNAL, "QUARANTINED", message)

    def step_done(self, group_id: str, result: worker_pb2.StepResult, now: float) -> None:
        """Digest what a step sampled. A step that was answered before is ignored."""
        group = self._groups[group_id]
        if result.step_id <= group.num_steps - len(group.in_flight):
            return
        if not group.in_flight or group.in_flight[0].step_id != result.step_id:
            raise WorkerMisbehavedError(f"step {result.step_id} was answered out of order")
        step = group.in_flight[0]
        token_ids = array("I", result.token_ids)
        if len(token_ids) != len(step.sampled):
            raise WorkerMisbehavedError(
                f"step {step.step_id} samples {len(step.sampled)} rows, answered were {len(token_ids)}"
            )
        logprobs = LogprobReader(result)
        group.in_flight.popleft()
        group.measure(step, now)
        self._last_worker_at = now
        for seq, token in zip(step.sampled, token_ids, strict=True):
            seq.num_pending -= 1
            is_wanted = seq.state is not SequenceState.FINISHED and token != NOT_FINITE
            row = logprobs.read(seq.num_logprobs) if seq.num_logprobs >= 0 else None
            if not is_wanted:
                if seq.state is not SequenceState.FINISHED:  # else it ended while this step was running
                    self._spoil(seq)
                continue
            if row is not None:
                seq.outbox.add_logprobs(row)
                if seq.request.submit.resume_window_ms:
                    seq.kept_logprobs.append(row)
            tokens = seq.tokens
            tokens.append(token)
            outbox = seq.outbox
            outbox.handles.append(seq.handle)
            outbox.candidate_indexes.append(seq.candidate_index)
            outbox.token_ids.append(token)
            if not seq.first_token_at:
                seq.first_token_at = now
            seq.last_token_at = now
            if token in seq.stop_ids and len(tokens) > seq.min_stop_tokens:
                self._finish(seq, stop_reason(seq, token), now, stop_token_id=token)
            elif len(tokens) >= seq.max_tokens:
                self._finish(seq, length_reason(seq), now)
            elif seq.num_pending == 0 and seq.state is SequenceState.WAITING:
                self._settle(seq)
        if self._suspects:
            self._suspects.survived(step.sampled)
        self._flush_outboxes(result.step_id)

    # -- time ------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Act on deadlines, measure the queue and report progress."""
        self._admission.observe(self._waiting.num_tokens, now)
        for unwanted in list(self._resumable.expired(now)):
            self._drop(unwanted)
        while self._deadlines and self._deadlines[0][0] <= now:
            _, gateway_id, handle = heapq.heappop(self._deadlines)
            request = self._requests.get((gateway_id, handle))
            if request is not None:
                self._expire(request, now)
        if len(self._deadlines) > 64 + 4 * len(self._requests):  # mostly of requests that have ended
            self._deadlines = []
            for request in self._requests.values():
                self._set_deadline(request)
        self._flush_outboxes(step_id=0)
        for gateway_id, progress in self._progress.take(self._requests, self._waiting, now).items():
            self._send(gateway_id, scheduler_pb2.AttachResponse(progress=progress))

    def schedule(self, now: float) -> None:
        """Plan steps for every group that can take one more."""
        for group in self._groups.values():
            while len(group.in_flight) < MAX_STEPS_IN_FLIGHT and self._plan(group, now):
                pass

    # -- one step --------------------------------------------------------------------------------

    def _plan(self, group: WorkerGroup, now: float) -> bool:
        """Plan one step of a group and send it; False if there is nothing to compute.

        There is no prefill phase and no decode phase: `num_computed` catches up with the tokens a
        sequence has, under a token budget. Sequences that produce tokens come first.
        """
        plan = PlanBuilder()
        self._make_room_for_decodes(group)
        self._plan_decodes(group, plan)
        self._plan_prefills(group, plan, now)
        if not plan.slots:
            return False
        group.num_steps += 1
        group.in_flight.append(StepInFlight(group.num_steps, plan.sampled, plan.unsampled, plan.num_tokens, now))
        message = plan.build(group.num_steps, group.freed_slots)
        group.freed_slots = []
        self._effects.append(SendPlan(group.group_id, group.epoch, message))
        return True

    def _make_room_for_decodes(self, group: WorkerGroup) -> None:
        """Preempt until every decoding sequence that starts a new block can have one."""
        while group.pool.num_free < len(group.decoding):  # else each could have one
            needed = sum(
                seq.num_computed == len(seq.blocks) * BLOCK_SIZE and seq.num_computed + 1 < seq.max_tokens
                for seq in group.decoding
            )
            if group.pool.num_free >= needed:
                return
            victim = choose_victim(group)
            assert victim is not None, "one sequence alone does not fit: the worker reported a wrong max_model_len"
            self._preempt(victim)

    def _plan_decodes(self, group: WorkerGroup, plan: PlanBuilder) -> None:
        """Add one token of every decoding sequence. This loop runs for every token: it is kept flat."""
        slots, context_lengths, row_flags = plan.slots, plan.context_lengths, plan.row_flags
        token_ids, sampled = plan.token_ids, plan.sampled
        for seq in group.decoding:
            position = seq.num_computed
            if position + 1 >= seq.max_tokens:
                continue  # the steps in flight make its last token
            if position == len(seq.blocks) * BLOCK_SIZE:
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

    def _plan_prefills(self, group: WorkerGroup, plan: PlanBuilder, now: float) -> None:
        """Share what is left of the step among prompts: shortest remaining first, with ageing."""
        budget = max(group.max_batch_tokens - plan.num_tokens, 0)
        if plan.num_tokens:
            budget = min(budget, self._config.max_prefill_tokens)
        if not group.prefilling and not len(self._waiting):
            return
        # Opening takes the waiting ones in the queue's order; then all prompts compete for tokens.
        self._open_waiting(group, plan, budget, now)
        for seq in sorted(group.prefilling, key=lambda seq: self._waiting.rank(seq, now)[2:]):
            count = min(seq.num_behind, budget)
            if count == 0:
                break
            plan.add_tokens(seq, count)
            budget -= count
            group.allocator.commit(seq)
            self._fair_share.charge(seq.request.submit.tenant, count)
            seq.first_scheduled_at = seq.first_scheduled_at or now
        through = [seq for seq in group.prefilling if seq.num_pending]  # their first token is in this plan
        if through:
            group.decoding.extend(through)
            group.prefilling = [seq for seq in group.prefilling if not seq.num_pending]

    def _open_waiting(self, group: WorkerGroup, plan: PlanBuilder, budget: int, now: float) -> None:
        """Give slots and blocks to waiting sequences, until their prompts fill the budget.

        A sequence whose next block another one is computing right now is passed over: it will find
        that block in the cache. One that does not fit ends the search, so that it is not starved.
        """
        # Of those that decode, one in sixteen starts a block in the next step: leave room for it.
        reserve = len(group.decoding) // BLOCK_SIZE + 1 if group.num_running else 0
        for seq in self._waiting.in_order(now, limit=len(group.free_slots)):
            rank = self._waiting.rank(seq, now)[2:]
            ahead = sum(p.num_behind for p in group.prefilling if self._waiting.rank(p, now)[2:] < rank)
            if ahead >= budget or not group.free_slots:
                return
            if self._suspects and not self._suspects.may_run(seq, group.running()):
                continue
            is_bound = self._suspects.is_blamed(seq)  # to the group that is empty, wherever its prefix is
            if len(self._groups) > 1 and not is_bound and choose_group(seq, self._groups.values()) is not group:
                continue
            hits = group.allocator.cached_blocks(seq)
            if group.allocator.is_being_computed(seq, len(hits)):
                continue
            if not group.allocator.open(seq, hits, reserve):
                return
            self._waiting.remove(seq)
            self._admission.opened(len(seq.tokens))
            seq.group, seq.slot, seq.state = group, group.free_slots.pop(), SequenceState.RUNNING
            if not seq.first_scheduled_at:
                seq.num_cached_tokens = min(seq.num_computed, seq.num_prompt)
            group.prefilling.append(seq)
            plan.open_slot(seq)
            plan.add_blocks(seq.slot, seq.blocks)

    # -- endings ---------------------------------------------------------------------------------

    def _preempt(self, seq: Sequence) -> None:
        """Take everything back from a running sequence and queue it again, to be computed anew."""
        seq.num_preemptions += 1
        self._requeue(seq)

    def _requeue(self, seq: Sequence) -> None:
        """Move a running sequence back to the queue, or to those that wait for a step in flight."""
        self._release(seq)
        seq.state = SequenceState.WAITING
        self._settling[seq] = None
        if seq.num_pending == 0:
            self._settle(seq)

    def _settle(self, seq: Sequence) -> None:
        """Queue a sequence of which everything sampled is now known."""
        del self._settling[seq]
        self._waiting.add(seq)

    def _release(self, seq: Sequence) -> None:
        """Take slot and blocks of a running sequence back: the only place that frees blocks."""
        group = seq.group
        assert group is not None
        group.remove(seq)
        group.allocator.free(seq)
        group.free_slots.append(seq.slot)
        group.freed_slots.append(seq.slot)
        seq.slot = -1

    def _stop(self, seq: Sequence) -> None:
        """End a sequence, whatever its state, without a word to the gateway."""
        if seq.state is SequenceState.FINISHED:
            return
        if seq.state is SequenceState.RUNNING:
            self._release(seq)
        elif seq in self._settling:
            del self._settling[seq]
        elif seq in self._waiting:
            self._waiting.remove(seq)
        seq.state = SequenceState.FINISHED
        self._suspects.forget(seq)
        request = seq.request
        request.num_unfinished -= 1
        if request.num_unfinished == 0:
            del self._requests[request.key]
            self._progress.remove(request.key)
            self._quotas.ended(request.submit, num_output(request))
            self._fair_share.forget_idle({other.submit.tenant for other in self._requests.values()})

    def _finish(self, seq: Sequence, reason: common_pb2.FinishReason, now: float, stop_token_id: int = 0) -> None:
        """End a sequence with a reason."""
        seq.last_token_at = seq.last_token_at or now
        self._stop(seq)
        seq.ending = scheduler_pb2.Finished(
            handle=seq.handle,
            candidate_index=seq.candidate_index,
            reason=reason,
            stop_token_id=stop_token_id,
            usage=usage(seq),
            timing=timing(seq, now),
        )
        seq.outbox.finished.append(seq.ending)
        if seq.request.num_unfinished == 0:
            self._resumable.ended(seq.request, now)

    def _spoil(self, seq: Sequence) -> None:
        """End a request whose output is not finite, and let nobody use what it computed."""
        request = seq.request
        request.is_spoiled = True
        for other in request.sequences:
            if other.group is not None and other.group is self._groups.get(other.group.group_id):
                other.group.allocator.spoil(other)
        self._fail(request, code_pb2.INTERNAL, "WORKER_FAULT", "the model's output is not finite")

    def _hand_over(self, request: Request, gateway_id: str, handle: int, now: float) -> None:
        """Make a request another gateway's, or nobody's."""
        is_live = self._requests.pop(request.key, None) is not None
        self._progress.remove(request.key)
        self._resumable.detached.pop(request, None)
        request.gateway_id, request.handle, request.resume_until = gateway_id, handle, NEVER
        outbox = self._outboxes.setdefault(gateway_id, Outbox(gateway_id))
        for seq in request.sequences:
            seq.handle, seq.outbox = handle, outbox
        if is_live:
            self._requests[request.key] = request
            self._set_deadline(request)
            if gateway_id != NOBODY:
                self._progress.add(request.key, request, now)

    def _drop(self, request: Request) -> None:
        """End a request without a word."""
        self._resumable.forget(request)
        for seq in request.sequences:
            self._stop(seq)

    def _fail(self, request: Request, code: int, reason: str, message: str, resumable: bool = False) -> None:
        """End a request with an error."""
        self._drop(request)
        failed = scheduler_pb2.Failed(
            handle=request.handle, code=code, reason=reason, message=message, resumable=resumable
        )
        self._send(request.gateway_id, scheduler_pb2.AttachResponse(failed=failed))

    def _expire(self, request: Request, now: float) -> None:
        """End a request whose hard or soft deadline has passed."""
        if request.deadline <= now:
            started = any(seq.first_scheduled_at for seq in request.sequences)
            reason = "GENERATION_TIMEOUT" if started else "QUEUE_TIMEOUT"
            where = "while the output was being made" if started else "in the queue"
            self._fail(request, code_pb2.DEADLINE_EXCEEDED, reason, f"the deadline passed {where}")
        elif request.soft_deadline <= now:
            for seq in request.sequences:
                if seq.state is not SequenceState.FINISHED:
                    self._finish(seq, common_pb2.FINISH_REASON_TIME_LIMIT, now)

    def _cancel_by_id(self, gateway_id: str, request_id: str, now: float) -> None:
        """End the requests with this id, whoever owns them; answer the gateway that asked."""
        total = common_pb2.Usage()
        found = [request for request in self._requests.values() if request.submit.request_id == request_id]
        for request in found:
            for seq in request.sequences:
                total.prompt_tokens = seq.num_prompt
                total.cached_prompt_tokens = max(total.cached_prompt_tokens, seq.num_cached_tokens)
                total.output_tokens += seq.num_output
                if seq.state is not SequenceState.FINISHED:
                    self._finish(seq, common_pb2.FINISH_REASON_CANCELLED, now)
        self._flush_outboxes(step_id=0)
        cancelled = scheduler_pb2.Cancelled(request_id=request_id, was_running=bool(found), usage=total)
        self._send(gateway_id, scheduler_pb2.AttachResponse(cancelled=cancelled))

    # -- helpers ---------------------------------------------------------------------------------

    def _refuse(self, gateway_id: str, submit: scheduler_pb2.Submit, now: float) -> scheduler_pb2.Rejected | None:
        """Return why a request cannot be queued, or None."""
        if self._draining:
            message = "the scheduler is shutting down; another one can take the request"
            return reject(submit, code_pb2.UNAVAILABLE, "DRAINING", message, retry_ms=1000)
        if (gateway_id, submit.handle) in self._requests:
            message = f"handle {submit.handle} is in use"
            return reject(submit, code_pb2.ALREADY_EXISTS, "IDEMPOTENCY_CONFLICT", message)
        quarantined_s = self._suspects.quarantined_s(submit, now)
        if quarantined_s:
            message = f"workers died of this request before; it is refused for another {quarantined_s:.0f} s"
            return reject(submit, code_pb2.INTERNAL, "QUARANTINED", message)
        # What is continued was let in once: its tenant pays for it, and must not lose it.
        shortage, retry_ms = ("", 0) if submit.continue_token_ids else self._quotas.shortage(submit.tenant, now)
        if shortage:
            message = f"the quota of the tenant is used up: {shortage}"
            return reject(submit, code_pb2.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED", message, retry_ms=retry_ms)
        has_workers = self._groups or now - self._last_worker_at < self._config.worker_grace_s
        return self._admission.refuse(
            submit,
            self._groups.values(),
            num_waiting=len(self._waiting) + len(self._settling),
            waiting_tokens=self._waiting.num_tokens,
            max_model_len=(self._max_model_len or MAX_TOKENS) if has_workers else 0,
        )

    def _admitted(self, request: Request) -> scheduler_pb2.Admitted:
        """Return the answer to a request that entered the queue."""
        seq = request.sequences[0]
        cached = max((len(group.allocator.cached_blocks(seq)) for group in self._groups.values()), default=0)
        return scheduler_pb2.Admitted(
            handle=request.handle,
            cached_prompt_tokens=min(cached * BLOCK_SIZE, seq.num_prompt),
            seed=request.submit.sampling.seed,
        )

    def _set_deadline(self, request: Request) -> None:
        """File the times at which a request must be looked at."""
        for time in (request.deadline, request.soft_deadline):
            if time is not NEVER:
                heapq.heappush(self._deadlines, (time, request.gateway_id, request.handle))

    def _flush_outboxes(self, step_id: int) -> None:
        """Send each gateway what it is owed."""
        for gateway_id, outbox in self._outboxes.items():
            outputs = outbox.take(step_id)
            if outputs is not None and gateway_id != NOBODY:
                outputs.running = sum(group.num_running for group in self._groups.values())
                outputs.waiting = len(self._waiting) + len(self._settling)
                outputs.kv_blocks_free = sum(group.pool.num_free for group in self._groups.values())
                self._send(gateway_id, scheduler_pb2.AttachResponse(step_outputs=outputs))

    def _send(self, gateway_id: str, message: scheduler_pb2.AttachResponse) -> None:
        """Send a message to a gateway, if there is one."""
        if gateway_id != NOBODY:
            self._effects.append(SendToGateway(gateway_id, message))

    def check_invariants(self) -> None:
        """Assert that all books balance. For tests, simulation and idle moments."""
        running = [seq for group in self._groups.values() for seq in group.running()]
        everywhere = running + list(self._waiting) + list(self._settling)
        assert len(set(everywhere)) == len(everywhere), "a sequence is in two places"
        unfinished = {
            seq for r in self._requests.values() for seq in r.sequences if seq.state is not SequenceState.FINISHED
        }
        assert unfinished == set(everywhere), unfinished ^ set(everywhere)
        for request in self._requests.values():
            alive = sum(seq.state is not SequenceState.FINISHED for seq in request.sequences)
            assert alive == request.num_unfinished > 0, request
        assert self._waiting.num_tokens == sum(len(seq.tokens) for seq in self._waiting)
        for seq in [*self._waiting, *self._settling]:
            assert seq.state is SequenceState.WAITING, seq
            assert not seq.blocks, seq
            assert seq.slot == -1, seq
        assert all(seq.num_pending for seq in self._settling)
        for key, request in self._requests.items():
            assert request.key == key, request
        self._progress.check_invariants(self._requests)
        self._resumable.check_invariants(set(self._requests.values()))
        self._suspects.check_invariants(unfinished)
        for group in self._groups.values():
            group.check_invariants()
