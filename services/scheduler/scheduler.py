"""The scheduler: a pure state machine. Events come in as method calls, effects go out as a list.

There is no clock, socket, thread or random number in here: `now` is an argument, in seconds on any
monotonic clock. The same events give the same effects, always. A request's way through: `submit`
queues it, `schedule` gives it tokens to compute (`step_planner.py`), `step_done` digests what the worker
sampled (`step_digest.py`), and it ends (`endings.py`). `engine.py` is the shell that connects this to gRPC and ZeroMQ.
"""

from __future__ import annotations

from collections.abc import Iterable

from google.rpc import code_pb2

from octavo.common.v1 import common_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler import pooling, token_ids
from octavo.services.scheduler.admission import Admission, reject
from octavo.services.scheduler.cache_feed import CacheFeed
from octavo.services.scheduler.capacity import Capacity
from octavo.services.scheduler.config import BLOCK_SIZE, SchedulerConfig
from octavo.services.scheduler.early_ends import EarlyEnds
from octavo.services.scheduler.effects import Effect, Effects
from octavo.services.scheduler.endings import Endings
from octavo.services.scheduler.fair_share import FairShare
from octavo.services.scheduler.forecast import Forecast
from octavo.services.scheduler.live_requests import NEVER, LiveRequests
from octavo.services.scheduler.model_facts import GENERATOR, ModelFacts
from octavo.services.scheduler.outputs import length_reason
from octavo.services.scheduler.policy import ShortestFirst
from octavo.services.scheduler.quotas import Quotas
from octavo.services.scheduler.sequence import Request, Sequence, SequenceState
from octavo.services.scheduler.sequence_states import SequenceStates
from octavo.services.scheduler.step_clock import StepClock
from octavo.services.scheduler.step_digest import StepDigest
from octavo.services.scheduler.step_planner import StepPlanner
from octavo.services.scheduler.suspects import Suspects
from octavo.services.scheduler.takeover import Takeover
from octavo.services.scheduler.tally import Tally
from octavo.services.scheduler.waiting_queue import WaitingQueue
from octavo.services.scheduler.worker_group import MAX_STEPS_IN_FLIGHT, WorkerGroup
from octavo.worker.v1 import worker_pb2

# Before its deadline, and of its time: a client that cancels then has given up waiting.
LAST_MOMENT_S, LAST_PART = 0.1, 0.1
MAX_TOKENS = 1 << 30  # longer than any context
MAX_CANDIDATES = 1 << 16  # of a request, those before the first one included
GIVE_UP_S = 1.0  # how often it is looked for requests that no worker can run


class Scheduler:
    """Takes the events and owns the worker groups; what follows is decided by the parts it is made of."""

    def __init__(self, config: SchedulerConfig, now: float, epoch: int = 0, tally: Tally | None = None) -> None:
        """`epoch` names this life of the scheduler: requests of another one cannot be taken over."""
        self._config = config
        self._tally = tally = tally or Tally()
        self.cache_feed = CacheFeed(epoch)
        self._groups: dict[str, WorkerGroup] = {}
        self._suspects = Suspects()
        self._quotas = Quotas(config.default_quota(), config.quotas())
        fair_share = FairShare(config.weights())
        self._waiting = WaitingQueue(fair_share, ShortestFirst(config.ageing_tokens_per_s))
        self._states = SequenceStates(self._waiting, tally)
        self._forecast = Forecast(config, self._groups, self._waiting, fair_share)
        self._admission = Admission(config, self._states, self._forecast)
        self._early_ends = EarlyEnds(self._forecast)
        self._requests = LiveRequests(config)
        self._effects = Effects(self._groups, self._states)
        self._endings = Endings(
            self._states, self._requests, self._suspects, self._quotas, self._admission.outputs, self._effects,
            self._forecast, tally,
        )  # fmt: skip
        self._takeover = Takeover(epoch, self._requests, self._endings, self._effects)
        self._planner = StepPlanner(
            config, self._groups, self._states, self._suspects, fair_share, self._forecast, tally
        )
        self._capacity = Capacity(self._groups, config.worker_grace_s)
        self._digest = StepDigest(self._states, self._suspects, self._endings, self._capacity, tally)
        self._num_arrivals = 0
        self._next_give_up = now
        self._model: ModelFacts | None = None  # of the workers there are, or were last
        self._started_at = now
        self._last_worker_at = now  # a scheduler that just started waits for its workers to come back
        self._draining = False

    # -- what the shell asks ---------------------------------------------------------------------

    def take_effects(self) -> list[Effect]:
        """Return the effects since the last call, in order."""
        return self._effects.take()

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
        return self._requests

    def load(self, now: float) -> scheduler_pb2.Load:
        """Describe the state of the scheduler."""
        groups = self._groups.values()
        oldest = min((step.sent_at for group in groups for step in group.in_flight), default=now)
        return scheduler_pb2.Load(
            running=sum(group.num_running for group in groups),
            waiting=self._states.num_waiting,
            waiting_uncached_tokens=self._waiting.num_tokens,
            kv_blocks_free=sum(group.pool.num_free for group in groups),
            kv_blocks_total=sum(group.pool.num_blocks - 1 for group in groups),
            estimated_queue_ms=int(1000 * self._forecast.queue_s(now)),
            draining=self._draining,
            workers_ready=len(groups),
            step_age_ms=int(1000 * (now - oldest)),
            max_model_len=self._capacity.max_model_len(now),
            prompt_tokens=self._tally.prompt_tokens,
            output_tokens=self._tally.output_tokens,
            looked_up_tokens=self._tally.looked_up_tokens,
            cached_tokens=self._tally.cached_tokens,
            preemptions=self._tally.preemptions,
            workers=[group.load() for group in groups],
            task=self._model.task if self._model else common_pb2.MODEL_TASK_UNSPECIFIED,
            vector_size=self._model.vector_size if self._model else 0,
            vocab_size=self._model.vocab_size if self._model else 0,
            prompt_logprobs=any(group.scores_prompts for group in groups),
        )

    def busy_groups(self) -> set[str]:
        """Return the groups that owe a step."""
        return {name for name, group in self._groups.items() if group.in_flight}

    def overdue_groups(self, now: float) -> dict[str, float]:
        """Return the groups whose oldest step takes so long that they must hang, with its age in seconds."""
        return {name: age_s for name, group in self._groups.items() if (age_s := group.overdue_s(now))}

    # -- events from gateways --------------------------------------------------------------------

    def submit(self, gateway_id: str, submit: scheduler_pb2.Submit, now: float) -> None:
        """Queue a request, or refuse it."""
        rejected = self._refuse(gateway_id, submit, now)
        if rejected is not None:
            self._tally.refused(rejected.reason)
            self._effects.send(gateway_id, scheduler_pb2.AttachResponse(rejected=rejected))
            return
        self._tally.admitted()
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
        old = self._requests.resumable.replaced_by(request)
        if old is not None:  # its gateway starts over, with the output it has
            self._endings.drop(old)
        self._requests.resumable.add(request)
        self._quotas.let_in(submit, now)
        outbox = self._effects.outbox(gateway_id)
        max_len = len(submit.prompt_token_ids) + (submit.stop.max_new_tokens or MAX_TOKENS)
        max_len = min(max_len, self._max_model_len(submit, now))
        is_pooling = submit.HasField("pooling")
        if is_pooling or submit.prompt_logprobs:
            submit.bypass_prefix_cache = True  # all hidden states are needed
        for index, tokens in enumerate(pooling.prompts_of(submit), submit.first_candidate_index):
            limit = len(tokens) + 1 if is_pooling else max_len  # a vector takes the place of one token
            expected = limit if is_pooling else self._admission.expected_tokens(submit, limit)
            request.sequences.append(Sequence(request, index, tokens, limit, expected, outbox))
        request.num_unfinished = len(request.sequences)
        self._requests.add(request, now)
        self._early_ends.add(request, now)
        self._effects.send(gateway_id, scheduler_pb2.AttachResponse(admitted=self._admitted(request)))
        self._forecast.promise(request, now)
        for seq in request.sequences:
            if len(seq.tokens) >= seq.max_len:  # nothing left to do of an output that is continued
                self._endings.finish(seq, length_reason(seq), now)
            else:
                self._waiting.add(seq)
        self._effects.flush()

    def cancel(self, gateway_id: str, cancel: scheduler_pb2.Cancel, now: float) -> None:
        """End a request of this gateway, or by its id one of a tenant at any gateway. Unknown ones are ignored."""
        if cancel.request_id:
            self._cancel_by_id(gateway_id, cancel, now)
            return
        request = self._requests.get(gateway_id, cancel.handle)
        if request is None:
            return
        for seq in request.sequences:
            if not cancel.HasField("candidate_index") or seq.candidate_index == cancel.candidate_index:
                self._endings.stop(seq)
        if request.num_unfinished == 0:  # nobody wants to take it over
            last_s = min(LAST_MOMENT_S, LAST_PART * (request.deadline - request.admitted_at))
            if request.deadline - now < last_s:  # its client's clock ended it
                self._forecast.ended(request, True, now)
            self._requests.resumable.forget(request)

    def reattach(self, gateway_id: str, reattach: scheduler_pb2.Reattach, now: float) -> None:
        """Give a request to a gateway, with what that one has not seen of it, or tell it that nothing is kept."""
        self._takeover.reattach(gateway_id, reattach, now)

    def detach(self, gateway_id: str, handle: int, now: float) -> None:
        """Let a request of a gateway go on without it for the resume window, or end it if it has none."""
        self._takeover.detach(gateway_id, handle, now)

    def gateway_lost(self, gateway_id: str, now: float) -> None:
        """Let go of every request of a gateway that is gone."""
        self._takeover.gateway_lost(gateway_id, now)

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._draining = True

    def flush_prefix_cache(self) -> int:
        """Forget every cached block that no sequence holds; return how many there were."""
        return sum(group.pool.forget_free() for group in self._groups.values())

    # -- events from workers ---------------------------------------------------------------------

    def worker_joined(
        self,
        group_id: str,
        epoch: int,
        num_blocks: int,
        max_model_len: int,
        now: float,
        max_batch_tokens: int = 0,
        model: ModelFacts = GENERATOR,
        takes_grammars: bool = False,
        scores_prompts: bool = False,
        max_row_tokens: int = 1,
    ) -> None:
        """Take a worker group into service. Its cache is empty, its slots are free.

        max_batch_tokens  most tokens in a step that its memory has room for; 0 if it is the configured number
        takes_grammars    its workers can keep to a request's constraint
        scores_prompts    they give log probabilities of prompts
        max_row_tokens    most tokens that one of their steps makes of a sequence
        """
        assert group_id not in self._groups, f"group {group_id} joined twice"
        config, clock = self._config, StepClock(self._config.step_timeout_s)
        limits = num_blocks, config.max_running, max_model_len
        group = WorkerGroup(group_id, epoch, *limits, self.cache_feed, clock, config.weights(), model)
        group.max_batch_tokens = min(max_batch_tokens or config.max_batch_tokens, config.max_batch_tokens)
        if model.whole_sequences:
            group.max_model_len = min(group.max_model_len, group.max_batch_tokens)
        self._model = model
        group.takes_grammars = takes_grammars
        group.scores_prompts = scores_prompts
        group.max_row_tokens = max_row_tokens
        self._forecast.joined(group, now)
        self._groups[group_id] = group
        self._capacity.joined()
        self._last_worker_at = now
        for seq in list(self._states.without_slot()):  # they may have come when the model was not known
            if seq.state is SequenceState.FINISHED:  # with its request, in this loop
                continue
            if problem := pooling.mismatch(seq.request.submit, model):
                self._endings.fail(seq.request, code_pb2.FAILED_PRECONDITION, "FEATURE_DISABLED", problem)
                continue
            if problem := token_ids.mismatch(seq.request.submit, model.vocab_size):
                self._endings.fail(seq.request, code_pb2.INVALID_ARGUMENT, "INVALID_FIELD", problem)

    def worker_lost(self, group_id: str, now: float, crashed: bool = False) -> None:
        """Take a worker group out of service: its sequences go on elsewhere, or when it is back.

        What steps in flight had sampled is lost, and will be sampled again, identically. `crashed`:
        the worker died or hung, and what it was computing may be why.
        """
        group = self._groups.pop(group_id)
        group.pool.close()
        group.is_lost = True
        self._forecast.lost(group, now)
        self._capacity.lost(group, now)
        self._last_worker_at = now
        in_flight = [seq for step in group.in_flight for seq in (*step.sampled, *step.unsampled)]
        lost = list(group.running()) + [seq for seq in self._states.settling() if seq.group is group]
        for seq in lost:
            seq.num_pending = 0
            if seq.state is SequenceState.RUNNING:
                self._states.requeue(seq)
            else:
                self._states.settle(seq)
            seq.num_recoveries += 1
        self._tally.worker_lost(crashed, lost, now)
        for seq in lost:
            if seq.num_recoveries > self._config.max_recoveries and seq.state is not SequenceState.FINISHED:
                self._endings.fail(
                    seq.request, code_pb2.UNAVAILABLE, "NO_WORKERS", "lost its worker too often", resumable=True
                )
        culprit = self._suspects.crashed(in_flight, now) if crashed else None
        for request in dict.fromkeys(seq.request for seq in lost):
            self._states.file_again(request)
        if culprit is not None:
            message = "workers died of this request, and of no other: it is refused for a while"
            self._endings.fail(culprit, code_pb2.INTERNAL, "QUARANTINED", message)

    def step_done(self, group_id: str, result: worker_pb2.StepResult, now: float) -> None:
        """Digest what a step sampled. A step that was answered before is ignored. Raises WorkerMisbehavedError."""
        if self._digest.digest(self._groups[group_id], result, now):
            self._last_worker_at = now
            self._effects.flush(result.step_id)

    def cannot_compute(self, group_id: str, step_id: int, slot: int, problem: str) -> None:
        """End the request of which a worker cannot compute what a step says; the step's other rows are computed."""
        group = self._groups[group_id]
        for step in group.in_flight:
            for seq in (*step.sampled, *step.unsampled) if step.step_id == step_id else ():
                if seq.slot == slot and seq.group is group and seq.state is SequenceState.RUNNING:
                    message = f"a worker cannot compute this request, and others are not affected: {problem}"
                    self._endings.spoil(seq, message)
                    return

    # -- time ------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Act on deadlines, measure the queue and report progress."""
        for unwanted in list(self._requests.resumable.expired(now)):
            self._endings.drop(unwanted)
        for request in self._requests.take_overdue(now):
            self._endings.expire(request, now)
        for request in self._early_ends.take(now):
            self._endings.expire_early(request, now)
        if now >= self._next_give_up:
            self._next_give_up = now + GIVE_UP_S
            self._give_up_stranded(now)
        self._effects.flush()
        for gateway_id, progress in self._requests.take_progress(self._waiting, now).items():
            self._effects.send(gateway_id, scheduler_pb2.AttachResponse(progress=progress))

    def was_away(self, now: float) -> None:
        """Let the steps in flight count from now on: nobody looked at the time meanwhile."""
        for group in self._groups.values():
            group.was_away(now)

    def schedule(self, now: float) -> None:
        """Plan steps for every group that can take one more, and not before it has to."""
        for group in self._groups.values():
            while len(group.in_flight) < MAX_STEPS_IN_FLIGHT and not group.can_wait(now):
                plan = self._planner.plan(group, now)
                if plan is None:
                    break
                self._effects.send_plan(group, plan)

    def _give_up_stranded(self, now: float) -> None:
        """End requests that no worker can run, after those that could had time to come back."""
        for seq in self._capacity.give_up(self._waiting, now):
            if seq.state is SequenceState.FINISHED:  # with its request, in this loop
                continue
            num_tokens, limit = len(seq.tokens), self._capacity.max_model_len(now)
            is_exhausted = self._capacity.is_exhausted(seq)  # so it came when no limit was known
            if is_exhausted and seq.first_scheduled_at:
                self._endings.finish(seq, length_reason(seq), now)
            elif is_exhausted and not seq.num_output:
                message = f"the prompt has {num_tokens} tokens; the workers hold at most {limit} of a sequence"
                self._endings.fail(seq.request, code_pb2.INVALID_ARGUMENT, "KV_CAPACITY_EXCEEDED", message)
            else:
                message = f"the worker that could go on with {num_tokens} tokens, or with what is asked for, is gone"
                self._endings.fail(seq.request, code_pb2.UNAVAILABLE, "NO_WORKERS", message, resumable=True)

    # -- helpers ---------------------------------------------------------------------------------

    def _refuse(self, gateway_id: str, submit: scheduler_pb2.Submit, now: float) -> scheduler_pb2.Rejected | None:
        """Return why a request cannot be queued, or None."""
        if self._draining:
            message = "the scheduler is shutting down; another one can take the request"
            return reject(submit, code_pb2.UNAVAILABLE, "DRAINING", message, retry_ms=1000)
        if self._requests.get(gateway_id, submit.handle) is not None:
            message = f"handle {submit.handle} is in use"
            return reject(submit, code_pb2.ALREADY_EXISTS, "IDEMPOTENCY_CONFLICT", message)
        if submit.first_candidate_index + submit.candidate_count > MAX_CANDIDATES:
            message = f"a request has at most {MAX_CANDIDATES} candidates"
            return reject(submit, code_pb2.INVALID_ARGUMENT, "INVALID_FIELD", message)
        quarantined_s = self._suspects.quarantined_s(submit, now)
        if quarantined_s:
            message = f"workers died of this request before; it is refused for another {quarantined_s:.0f} s"
            return reject(submit, code_pb2.INTERNAL, "QUARANTINED", message)
        # What a gateway lost with its scheduler was let in once: its tenant pays for it, and must not lose it.
        shortage, retry_ms = ("", 0) if submit.is_failover else self._quotas.shortage(submit.tenant, now)
        if shortage:
            message = f"the quota of the tenant is used up: {shortage}"
            return reject(submit, code_pb2.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED", message, retry_ms=retry_ms)
        if (refused := pooling.refuse(submit, self._model)) is not None:
            return refused
        if (refused := token_ids.refuse(submit, self._model.vocab_size if self._model else 0)) is not None:
            return refused
        if submit.HasField("constraint") and submit.constraint.WhichOneof("kind") != "grammar":
            message = "a constraint must be a grammar here: gateways translate the other kinds"
            return reject(submit, code_pb2.INVALID_ARGUMENT, "INVALID_CONSTRAINT", message)
        has_workers = self._groups or now - self._last_worker_at < self._config.worker_grace_s
        max_model_len = self._max_model_len(submit, now) if has_workers else 0
        return self._admission.refuse(submit, self._groups.values(), max_model_len, now)

    def _max_model_len(self, submit: scheduler_pb2.Submit, now: float) -> int:
        """Return how long a request can get; MAX_TOKENS if that is not known.

        It is not for one that an earlier scheduler had: the worker that can go on with it may be on its way here.
        """
        if submit.is_failover and now - self._started_at < self._config.worker_grace_s:
            return MAX_TOKENS
        return self._capacity.max_model_len(now) or MAX_TOKENS

    def _admitted(self, request: Request) -> scheduler_pb2.Admitted:
        """Return the answer to a request that entered the queue."""
        seq = request.sequences[0]
        cached = max((len(group.allocator.cached_blocks(seq)) for group in self._groups.values()), default=0)
        return scheduler_pb2.Admitted(
            handle=request.handle,
            cached_prompt_tokens=min(cached * BLOCK_SIZE, seq.num_prompt),
            seed=request.submit.sampling.seed,
        )

    def _cancel_by_id(self, gateway_id: str, cancel: scheduler_pb2.Cancel, now: float) -> None:
        """End the tenant's requests with this id, whichever gateway has them; answer the one that asked."""
        total, request_id = common_pb2.Usage(), cancel.request_id
        found = [
            request
            for request in self._requests.with_id(request_id)
            if cancel.HasField("tenant") and request.submit.tenant == cancel.tenant  # without, it is nobody's
        ]
        for request in found:
            for seq in request.sequences:
                total.prompt_tokens = seq.num_prompt
                total.cached_prompt_tokens = max(total.cached_prompt_tokens, seq.num_cached_tokens)
                total.output_tokens += seq.num_output
                if seq.state is not SequenceState.FINISHED:
                    self._endings.finish(seq, common_pb2.FINISH_REASON_CANCELLED, now)
        self._effects.flush()
        cancelled = scheduler_pb2.Cancelled(request_id=request_id, was_running=bool(found), usage=total)
        self._effects.send(gateway_id, scheduler_pb2.AttachResponse(cancelled=cancelled))

    def check_invariants(self) -> None:
        """Assert that all books balance. For tests, simulation and idle moments."""
        running = [seq for group in self._groups.values() for seq in group.running()]
        everywhere = running + list(self._states.without_slot())
        assert len(set(everywhere)) == len(everywhere), "a sequence is in two places"
        unfinished = {seq for r in self._requests for seq in r.sequences if seq.state is not SequenceState.FINISHED}
        assert unfinished == set(everywhere), unfinished ^ set(everywhere)
        self._states.check_invariants()
        self._requests.check_invariants()
        self._suspects.check_invariants(unfinished)
        for group in self._groups.values():
            group.check_invariants()
