"""The scheduler is a pure state machine: events come in as method calls, effects go out as a list.

There is no clock, socket, thread or random number in here: `now` is an argument, in seconds on any
monotonic clock. The same events give the same effects, always. A request's way through: `submit`
queues it, `schedule` gives it tokens to compute (`step_planner.py`), `step_done` takes what the worker
sampled (`output_processor.py`), and it ends (`lifecycle.py`). `engine.py` is the shell that connects this to gRPC and
ZeroMQ.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from google.rpc import code_pb2

from octavo.common.v1 import common_pb2
from octavo.scheduler.v1 import scheduler_pb2
from octavo.services.scheduler.admission.admission import Admission
from octavo.services.scheduler.admission.deadlines import DeadlineWatch
from octavo.services.scheduler.admission.forecast import Forecast
from octavo.services.scheduler.admission.validation import (
    bypasses_prefix_cache,
    mismatch,
    refuse_for_model,
    refuse_for_workers,
    reject,
    wanted_tokens,
)
from octavo.services.scheduler.config import BLOCK_SIZE, SchedulerConfig
from octavo.services.scheduler.core.adapter_loads import NO_ADAPTERS, AdapterLoads
from octavo.services.scheduler.core.capacity import Capacity
from octavo.services.scheduler.core.effects import Effect, Effects
from octavo.services.scheduler.core.lifecycle import Lifecycle
from octavo.services.scheduler.core.metrics import SchedulerMetrics
from octavo.services.scheduler.core.output_processor import OutputProcessor
from octavo.services.scheduler.core.quarantine import Quarantine
from octavo.services.scheduler.core.step_planner import StepPlanner
from octavo.services.scheduler.groups.worker_group import (
    GENERATOR,
    MAX_STEPS_IN_FLIGHT,
    GroupLimits,
    ModelInfo,
    WorkerGroup,
)
from octavo.services.scheduler.kv_cache.cache_events import CacheEvents
from octavo.services.scheduler.queueing.fair_share import FairShare
from octavo.services.scheduler.queueing.policy import Policy, ShortestFirst
from octavo.services.scheduler.queueing.quotas import Quotas
from octavo.services.scheduler.queueing.tenants import Tenants
from octavo.services.scheduler.queueing.waiting_queue import WaitingQueue
from octavo.services.scheduler.requests.request_table import NEVER, RequestTable
from octavo.services.scheduler.requests.sequence import Request, Sequence, SequenceState, prompts_of
from octavo.worker.v1 import worker_pb2

# Before its deadline, and of its time: a client that cancels then has given up waiting.
LAST_MOMENT_S, LAST_PART = 0.1, 0.1
MAX_TOKENS = 1 << 30  # longer than any context
MAX_CANDIDATES = 1 << 16  # of a request, those before the first one included
GIVE_UP_S = 1.0  # how often it is looked for requests that no worker can run


class Scheduler:
    """Takes the events and owns the worker groups; what follows is decided by the parts it is made of."""

    def __init__(
        self, config: SchedulerConfig, now: float, epoch: int = 0, metrics: SchedulerMetrics | None = None
    ) -> None:
        """`epoch` names this life of the scheduler: nobody can reattach to requests of another one."""
        self._config = config
        self._metrics = metrics = metrics or SchedulerMetrics()
        self.cache_events = CacheEvents(epoch)
        self._groups: dict[str, WorkerGroup] = {}
        self._quarantine = Quarantine()
        self.tenants = Tenants.of(config)
        """The quotas and weights in force."""
        self._quotas = Quotas(self.tenants.default, self.tenants.quotas)
        self._fair_share = fair_share = FairShare(self.tenants.weights)
        policy: Policy = ShortestFirst(config.ageing_tokens_per_s)
        self._waiting = WaitingQueue(fair_share, policy)
        self._forecast = Forecast(config, self._groups, self._waiting, fair_share)
        self._admission = Admission(config, self._waiting, self._forecast)
        self._deadlines = DeadlineWatch(self._forecast)
        self._requests = RequestTable(config)
        self._effects = Effects(self._groups, self._waiting)
        self._lifecycle = Lifecycle(
            epoch, self._groups, self._waiting, self._requests, self._quarantine, self._quotas,
            self._admission.output_lengths, self._effects, self._forecast, metrics,
        )  # fmt: skip
        self._planner = StepPlanner(
            config, self._groups, self._waiting, policy, self._lifecycle, self._quarantine, fair_share,
            self._forecast, metrics,
        )  # fmt: skip
        self._capacity = Capacity(self._groups, config.worker_grace_s, started_at=now)
        self._outputs = OutputProcessor(self._lifecycle, self._quarantine, self._capacity, metrics)
        self._adapters = AdapterLoads(self._groups, self._waiting, self._effects, self._lifecycle, metrics)
        self._num_arrivals = 0
        self._next_give_up = now
        self._model: ModelInfo | None = None  # of the workers there are, or were last
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
            waiting=self._waiting.num_sequences,
            waiting_uncached_tokens=self._waiting.num_tokens,
            kv_blocks_free=sum(group.pool.num_free for group in groups),
            kv_blocks_total=sum(group.pool.num_blocks - 1 for group in groups),
            estimated_queue_ms=int(1000 * self._forecast.queue_s(now)),
            draining=self._draining,
            workers_ready=len(groups),
            step_age_ms=int(1000 * (now - oldest)),
            max_model_len=self._capacity.max_model_len(now),
            may_grow=self._capacity.may_grow(now),
            prompt_tokens=self._metrics.prompt_tokens,
            output_tokens=self._metrics.output_tokens,
            looked_up_tokens=self._metrics.looked_up_tokens,
            accepted_tokens=self._metrics.accepted_tokens,
            proposers=self._metrics.proposers.values(),
            cached_tokens=self._metrics.cached_tokens,
            preemptions=self._metrics.preemptions,
            workers=[group.load() for group in groups],
            task=self._model.task if self._model else common_pb2.MODEL_TASK_UNSPECIFIED,
            vector_size=self._model.vector_size if self._model else 0,
            vocab_size=self._model.vocab_size if self._model else 0,
            prompt_logprobs=any(group.limits.scores_prompts for group in groups),
            max_adapters=max((group.adapters.max_adapters for group in groups), default=0),
            adapters_loaded=sum(len(group.adapters.held) for group in groups),
            adapter_loads=self._metrics.adapter_loads,
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
            self._metrics.refused(rejected.reason)
            self._effects.send(gateway_id, scheduler_pb2.AttachResponse(rejected=rejected))
            return
        self._metrics.admitted()
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
            self._lifecycle.abort(old)
        self._requests.resumable.add(request)
        self._quotas.charge(submit, now)
        outbox = self._effects.outbox(gateway_id)
        max_len = len(submit.prompt_token_ids) + (submit.stop.max_new_tokens or MAX_TOKENS)
        max_len = min(max_len, self._max_model_len(submit, now))
        is_pooling = submit.HasField("pooling")
        submit.bypass_prefix_cache = bypasses_prefix_cache(submit, self._model)
        for index, tokens in enumerate(prompts_of(submit), submit.first_candidate_index):
            limit = len(tokens) + 1 if is_pooling else max_len  # a vector takes the place of one token
            expected = limit if is_pooling else self._admission.expected_tokens(submit, limit)
            request.sequences.append(Sequence(request, index, tokens, limit, expected, outbox))
        request.num_unfinished = len(request.sequences)
        self._requests.add(request, now)
        self._deadlines.add(request, now)
        self._effects.send(gateway_id, scheduler_pb2.AttachResponse(admitted=self._admitted(request)))
        self._forecast.promise(request, now)
        for seq in request.sequences:
            if len(seq.token_ids) >= seq.max_len:  # nothing left to do of an output that is continued
                self._lifecycle.finish(seq, seq.length_reason(), now)
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
                self._lifecycle.stop(seq)
        if request.num_unfinished == 0:  # nobody will reattach to it
            last_s = min(LAST_MOMENT_S, LAST_PART * (request.deadline - request.admitted_at))
            if request.deadline - now < last_s:  # its client's clock ended it
                self._forecast.ended(request, True, now)
            self._requests.resumable.forget(request)

    def reattach(self, gateway_id: str, reattach: scheduler_pb2.Reattach, now: float) -> None:
        """Give a request to a gateway, with what that one has not seen of it, or tell it that nothing is kept."""
        self._lifecycle.reattach(gateway_id, reattach, now)

    def detach(self, gateway_id: str, handle: int, now: float) -> None:
        """Let a request of a gateway go on without it for the resume window, or end it if it has none."""
        self._lifecycle.detach(gateway_id, handle, now)

    def gateway_lost(self, gateway_id: str, now: float) -> None:
        """Detach every request of a gateway that is gone."""
        self._lifecycle.gateway_lost(gateway_id, now)
        self._adapters.gateway_lost(gateway_id)

    def check_adapter(self, gateway_id: str, check: scheduler_pb2.CheckAdapter) -> None:
        """Have an adapter loaded, and tell a gateway when it is, or why it cannot be."""
        self._adapters.check(gateway_id, check)

    def forget_adapter(self, key: str) -> None:
        """Let the workers forget an adapter once nothing runs with it."""
        self._adapters.forget(key)

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._draining = True

    def undrain(self) -> None:
        """Take new requests again."""
        self._draining = False

    def change_tenants(self, tenants: Tenants, now: float) -> None:
        """Let other quotas and weights count from now on; caches of workers that are there keep their shares."""
        self.tenants = tenants
        in_flight = (request.submit.tenant for request in self._requests)
        self._quotas.change(tenants.default, tenants.quotas, in_flight, now)
        self._fair_share.change(tenants.weights)

    @property
    def quarantine(self) -> Quarantine:
        """Which requests are refused because workers died of them."""
        return self._quarantine

    def end_requests(self, request_ids: Iterable[str], tenant: str | None) -> int:
        """End the requests with these ids, of `tenant` if one is named, or all of a tenant; return how many."""
        ids = dict.fromkeys(request_ids)
        found = [each for name in ids for each in self._requests.with_id(name)] if ids else list(self._requests)
        if tenant is not None:
            found = [each for each in found if each.submit.tenant == tenant]
        for request in found:
            self._lifecycle.fail(request, code_pb2.CANCELLED, "ADMIN_CANCELLED", "an operator ended this request")
        self._effects.flush()
        return len(found)

    def flush_prefix_cache(self) -> int:
        """Evict every cached block that no sequence holds; return how many there were."""
        return sum(group.pool.evict_free_blocks() for group in self._groups.values())

    # -- events from workers ---------------------------------------------------------------------

    def worker_joined(
        self, group_id: str, epoch: int, limits: GroupLimits, now: float, model: ModelInfo = GENERATOR
    ) -> None:
        """Take a worker group into service. Its cache is empty, its slots are free.

        `limits` are its own: where they are 0 or more than what is configured, that counts.
        """
        assert group_id not in self._groups, f"group {group_id} joined twice"
        config, weights = self._config, self.tenants.weights
        limits = replace(
            limits,
            max_num_seqs=_least(limits.max_num_seqs, config.max_num_seqs),
            max_num_batched_tokens=_least(limits.max_num_batched_tokens, config.max_num_batched_tokens),
        )
        group = WorkerGroup(group_id, epoch, limits, config.step_timeout_s, self.cache_events, weights, model)
        self._model = model
        self._forecast.joined(group, now)
        self._groups[group_id] = group
        self._capacity.joined()
        self._last_worker_at = now
        for seq in self._waiting.everything():  # they may have come when the model was not known
            if seq.state is SequenceState.FINISHED:  # with its request, in this loop
                continue
            if problem := mismatch(seq.request.submit, model):
                self._lifecycle.fail(seq.request, *problem)
                continue
            seq.request.submit.bypass_prefix_cache = bypasses_prefix_cache(seq.request.submit, model)

    def worker_lost(self, group_id: str, now: float, crashed: bool = False) -> None:
        """Take a worker group out of service: its sequences go on elsewhere, or when it is back.

        What steps in flight had sampled is lost, and will be sampled again, identically. `crashed`:
        the worker died or hung, and what it was computing may be why.
        """
        group = self._groups.pop(group_id)
        group.pool.close()
        self._forecast.lost(group, now)
        self._capacity.lost(group, now)
        self._last_worker_at = now
        in_flight = [seq for step in group.in_flight for seq in (*step.sampled, *step.unsampled)]
        lost = self._lifecycle.recover(group)
        self._metrics.worker_lost(crashed, lost, now)
        for seq in lost:
            if seq.num_recoveries > self._config.max_recoveries and seq.state is not SequenceState.FINISHED:
                message = "lost its worker too often"
                self._lifecycle.fail(seq.request, code_pb2.UNAVAILABLE, "NO_WORKERS", message, resumable=True)
        culprit = self._quarantine.crashed(in_flight, now) if crashed else None
        for request in dict.fromkeys(seq.request for seq in lost):
            self._lifecycle.file_again(request)
        if culprit is not None:
            message = "workers died of this request, and of no other: it is refused for a while"
            self._lifecycle.fail(culprit, code_pb2.INTERNAL, "QUARANTINED", message)

    def step_done(self, group_id: str, result: worker_pb2.StepResult, now: float) -> None:
        """Take what a step sampled. A step that was answered before is ignored. Raises WorkerMisbehavedError."""
        if self._outputs.process(self._groups[group_id], result, now):
            self._last_worker_at = now
            self._effects.flush(result.step_id)

    def cannot_compute(self, group_id: str, step_id: int, slot: int, problem: str) -> None:
        """End the request of which a worker cannot compute what a step says; the step's other rows are computed."""
        group = self._groups[group_id]
        for step in group.in_flight:
            for seq in (*step.sampled, *step.unsampled) if step.step_id == step_id else ():
                if seq.slot == slot and seq.group_id == group_id and seq.state is SequenceState.RUNNING:
                    message = f"a worker cannot compute this request, and others are not affected: {problem}"
                    self._lifecycle.invalidate(seq, message)
                    return

    def adapter_loaded(self, group_id: str, loaded: worker_pb2.AdapterLoaded) -> None:
        """Let rows of a group have an adapter from now on, or end what waits for it."""
        self._adapters.loaded(self._groups[group_id], loaded)

    # -- time ------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Act on deadlines, measure the queue and report progress."""
        running = (seq for group in self._groups.values() for seq in group.running())
        for unwanted in dict.fromkeys(self._requests.resumable.expired(running, now)):
            self._lifecycle.abort(unwanted)
        for request in self._requests.take_overdue(now):
            self._lifecycle.expire(request, now)
        for request in self._deadlines.take(now):
            self._lifecycle.expire_early(request, now)
        if now >= self._next_give_up:
            self._next_give_up = now + GIVE_UP_S
            self._give_up_stranded(now)
        self._effects.flush()
        for gateway_id, progress in self._requests.take_progress(self._waiting.position, now).items():
            self._effects.send(gateway_id, scheduler_pb2.AttachResponse(progress=progress))

    def was_away(self, now: float) -> None:
        """Let the steps in flight count from now on: nobody looked at the time meanwhile."""
        for group in self._groups.values():
            group.was_away(now)

    def schedule(self, now: float) -> None:
        """Plan steps for every group that can take one more, and not before it has to."""
        self._adapters.plan()
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
            num_tokens, limit = len(seq.token_ids), self._capacity.max_model_len(now)
            is_exhausted = self._capacity.is_exhausted(seq)  # so it came when no limit was known
            if is_exhausted and seq.first_scheduled_at:
                self._lifecycle.finish(seq, seq.length_reason(), now)
            elif is_exhausted and not seq.num_output_tokens:
                message = f"the prompt has {num_tokens} tokens; the workers hold at most {limit} of a sequence"
                self._lifecycle.fail(seq.request, code_pb2.INVALID_ARGUMENT, "KV_CAPACITY_EXCEEDED", message)
            else:
                message = f"the worker that could go on with {num_tokens} tokens, or with what is asked for, is gone"
                self._lifecycle.fail(seq.request, code_pb2.UNAVAILABLE, "NO_WORKERS", message, resumable=True)

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
        quarantined_s = self._quarantine.quarantined_s(submit, now)
        if quarantined_s:
            message = f"workers died of this request before; it is refused for another {quarantined_s:.0f} s"
            return reject(submit, code_pb2.INTERNAL, "QUARANTINED", message)
        # What a gateway lost with its scheduler was admitted once: its tenant pays for it, and must not lose it.
        shortage, retry_ms = ("", 0) if submit.is_failover else self._quotas.shortage(submit.tenant, now)
        if shortage:
            message = f"the quota of the tenant is used up: {shortage}"
            return reject(submit, code_pb2.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED", message, retry_ms=retry_ms)
        if (refused := refuse_for_model(submit, self._model)) is not None:
            return refused
        if submit.adapter and not self._adapters.takes_any():
            return reject(submit, code_pb2.FAILED_PRECONDITION, "FEATURE_DISABLED", NO_ADAPTERS)
        has_workers = self._groups or now - self._last_worker_at < self._config.worker_grace_s
        max_model_len = self._max_model_len(submit, now) if has_workers else 0
        refused = refuse_for_workers(submit, self._groups.values(), max_model_len)
        return refused or self._admission.refuse(submit, max_model_len, now)

    def _max_model_len(self, submit: scheduler_pb2.Submit, now: float) -> int:
        """Return how long a request can get; MAX_TOKENS if that is not known.

        Of a scheduler that just started a larger worker may be on its way here. So what an earlier scheduler had, and
        what no worker can hold that is here so far, waits for one.
        """
        limit = self._capacity.max_model_len(now)
        if self._capacity.may_grow(now) and (submit.is_failover or wanted_tokens(submit) > limit):
            return MAX_TOKENS
        return limit or MAX_TOKENS

    def _admitted(self, request: Request) -> scheduler_pb2.Admitted:
        """Return the answer to a request that entered the queue."""
        seq = request.sequences[0]
        cached = max((len(group.allocator.get_computed_blocks(seq)[0]) for group in self._groups.values()), default=0)
        return scheduler_pb2.Admitted(
            handle=request.handle,
            cached_prompt_tokens=min(cached * BLOCK_SIZE, seq.num_prompt_tokens),
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
                total.prompt_tokens = seq.num_prompt_tokens
                total.cached_prompt_tokens = max(total.cached_prompt_tokens, seq.num_cached_tokens)
                total.output_tokens += seq.num_output_tokens
                if seq.state is not SequenceState.FINISHED:
                    self._lifecycle.finish(seq, common_pb2.FINISH_REASON_CANCELLED, now)
        self._effects.flush()
        cancelled = scheduler_pb2.Cancelled(request_id=request_id, was_running=bool(found), usage=total)
        self._effects.send(gateway_id, scheduler_pb2.AttachResponse(cancelled=cancelled))

    def check_invariants(self) -> None:
        """Assert that all books balance. For tests, simulation and idle moments."""
        running = [seq for group in self._groups.values() for seq in group.running()]
        everywhere = running + self._waiting.everything()
        assert len(set(everywhere)) == len(everywhere), "a sequence is in two places"
        unfinished = {seq for r in self._requests for seq in r.sequences if seq.state is not SequenceState.FINISHED}
        assert unfinished == set(everywhere), unfinished ^ set(everywhere)
        self._waiting.check_invariants()
        self._requests.check_invariants()
        self._quarantine.check_invariants(unfinished)
        for group in self._groups.values():
            group.check_invariants()


def _least(own: int, configured: int) -> int:
    """Return the smaller of a worker's own limit, 0 if it has none, and the configured one."""
    return min(own or configured, configured)
