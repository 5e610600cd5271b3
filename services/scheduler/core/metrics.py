"""The metrics count what the scheduler has done so far, for whoever shows it.

Part of the pure core: plain numbers, and spans as data. Nothing is done for a token: a step is
recorded as a whole, and a sequence when it gets its first token and when it ends.
"""

from __future__ import annotations

from dataclasses import dataclass

from octavo.common.v1 import common_pb2
from octavo.services.scheduler.config import BLOCK_SIZE
from octavo.services.scheduler.groups.worker_group import StepInFlight
from octavo.services.scheduler.requests.sequence import Sequence, SequenceState
from octavo.services.telemetry import catalog
from octavo.services.telemetry.store import BoundedNames, Store
from octavo.services.telemetry.tracing import Attributes, is_sampled
from octavo.worker.v1 import worker_pb2

_MAX_PROPOSERS = 8
_MAX_REASONS = 32
_MAX_SPANS = 10_000  # that nobody took: more are not kept


@dataclass(frozen=True)
class SpanRecord:
    """A part of a traced request's time. Times are the scheduler's own."""

    name: str
    traceparent: str
    start: float
    end: float
    attributes: Attributes


class SchedulerMetrics:
    """Totals since the start.

    prompt_tokens  computed of prompts; cached_tokens of looked_up_tokens were in the cache instead
    output_tokens  known; what a step in flight sampled for a sequence that had ended is none
    accepted_tokens  of these, accepted from speculation
    proposers      by name: what guessed tokens
    spans          of traced requests, for `take_spans`; only if `traces`
    """

    def __init__(self, store: Store | None = None, traces: bool = False) -> None:
        self._store = store = store or Store(catalog.SCHEDULER, enabled=False)
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.looked_up_tokens = 0
        self.cached_tokens = 0
        self.accepted_tokens = 0
        self.preemptions = 0
        self.adapter_loads = 0
        self._traces = traces
        self._reason = BoundedNames(_MAX_REASONS)
        self._proposer = BoundedNames(_MAX_PROPOSERS)
        self.proposers: dict[str, common_pb2.Proposer] = {}
        self._spans: list[SpanRecord] = []
        self._lost_at: dict[Sequence, float] = {}  # of traced sequences that wait after the loss of their worker
        self._steps = store.value(catalog.STEPS)
        self._transport_s = store.histogram(catalog.STEP_TIME, "transport")
        self._forward_s = store.histogram(catalog.STEP_TIME, "forward")
        self._sample_s = store.histogram(catalog.STEP_TIME, "sample")
        self._step_tokens = store.histogram(catalog.STEP_TOKENS)
        self._gaps = store.histogram(catalog.ITL)
        self._queue_s = store.histogram(catalog.QUEUE_TIME)
        self._prefill_s = store.histogram(catalog.PREFILL_TIME)
        self._decode_s = store.histogram(catalog.DECODE_TIME)
        self._admissions = store.value(catalog.ADMISSIONS)
        self._recoveries = store.value(catalog.RECOVERIES)
        self._losses = {crashed: store.value(catalog.WORKER_LOSSES, str(crashed).lower()) for crashed in (False, True)}

    def write_totals(self) -> None:
        """Bring the store's counters of what is counted here up to date: before a scrape."""
        store = self._store
        store.value(catalog.COMPUTED_TOKENS, "prefill").set(self.prompt_tokens)
        store.value(catalog.COMPUTED_TOKENS, "decode").set(self.output_tokens)
        store.value(catalog.CACHE_QUERIES).set(self.looked_up_tokens)
        store.value(catalog.CACHE_HITS).set(self.cached_tokens)
        store.value(catalog.ACCEPTED_TOKENS).set(self.accepted_tokens)
        store.value(catalog.PREEMPTIONS).set(self.preemptions)
        store.value(catalog.ADAPTER_LOADS).set(self.adapter_loads)
        for name, each in self.proposers.items():
            store.value(catalog.DRAFT_TOKENS, name, "true").set(each.accepted_tokens)
            store.value(catalog.DRAFT_TOKENS, name, "false").set(each.drafted_tokens - each.accepted_tokens)
            store.value(catalog.DRAFT_TIME, name).set(each.time_us / 1e6)

    def take_spans(self) -> list[SpanRecord]:
        """Return the spans since the last call."""
        spans, self._spans = self._spans, []
        return spans

    # -- requests --------------------------------------------------------------------------------

    def refused(self, reason: str) -> None:
        """A request was not taken."""
        self._store.value(catalog.REFUSALS, self._reason(reason)).add()

    def admitted(self) -> None:
        """A request entered the queue."""
        self._admissions.add()

    def started(self, seq: Sequence, num_hits: int, now: float) -> None:
        """A sequence left the queue; `num_hits` of its blocks were in the cache."""
        self.looked_up_tokens += len(seq.token_ids)
        self.cached_tokens += num_hits * BLOCK_SIZE
        if self._lost_at and (lost_at := self._lost_at.pop(seq, 0.0)):
            self._span("octavo.recovery", seq, lost_at, now)

    def ended(self, seq: Sequence) -> None:
        """A sequence ended, however."""
        if seq.last_token_at > seq.first_token_at > 0:
            self._decode_s.observe(seq.last_token_at - seq.first_token_at)
        if self._traces and seq.first_scheduled_at and is_sampled(seq.request.submit.traceparent):
            self._lost_at.pop(seq, None)
            self._span("octavo.queue", seq, seq.admitted_at, seq.first_scheduled_at)
            if seq.first_token_at:
                self._span("octavo.prefill", seq, seq.first_scheduled_at, seq.first_token_at)
                self._span("octavo.decode", seq, seq.first_token_at, seq.last_token_at)

    # -- steps and workers -----------------------------------------------------------------------

    def preempted(self) -> None:
        """A sequence lost its blocks to others."""
        self.preemptions += 1

    def worker_lost(self, crashed: bool, lost: list[Sequence], now: float) -> None:
        """A worker is gone, and these sequences were on it."""
        self._losses[crashed].add()
        self._recoveries.add(len(lost))
        if self._traces:
            self._lost_at |= {seq: now for seq in lost if is_sampled(seq.request.submit.traceparent)}

    def answered(self, step: StepInFlight, result: worker_pb2.StepResult, elapsed_s: float, now: float) -> int:
        """A step was answered, and its tokens are not taken yet. Return how many first tokens it brings."""
        self._steps.add()
        forward_s, sample_s = result.forward_us / 1e6, result.sample_us / 1e6
        self._forward_s.observe(forward_s)
        self._sample_s.observe(sample_s)
        self._transport_s.observe(max(0.0, elapsed_s - forward_s - sample_s))
        self._step_tokens.observe(step.num_tokens)
        for guesses in result.guesses:
            name = self._proposer(guesses.proposer)
            proposer = self.proposers.setdefault(name, common_pb2.Proposer(name=name))
            proposer.drafted_tokens += guesses.drafted
            proposer.accepted_tokens += min(guesses.accepted, guesses.drafted)
            proposer.time_us += guesses.time_us
        num_first = 0
        for seq in step.first_tokens:
            if seq.state is SequenceState.FINISHED:
                continue
            num_first += 1
            if seq.last_token_at:  # not its first one: it was computed again
                self._gaps.observe(now - seq.last_token_at)
            else:
                self._queue_s.observe(seq.first_scheduled_at - seq.admitted_at)
                self._prefill_s.observe(now - seq.first_scheduled_at)
        return num_first

    def processed(self, num_tokens: int, num_first: int, num_accepted_tokens: int, gap_s: float) -> None:
        """A step brought tokens.

        Those accepted from speculation come with one before them; all others but the first ones of a sequence
        come `gap_s` after those of the step before.
        """
        self.output_tokens += num_tokens
        self.accepted_tokens += num_accepted_tokens
        if num_accepted_tokens:
            self._gaps.observe(0.0, num_accepted_tokens)
        if num_tokens > num_first + num_accepted_tokens:
            self._gaps.observe(gap_s, num_tokens - num_first - num_accepted_tokens)

    def _span(self, name: str, seq: Sequence, start: float, end: float) -> None:
        if len(self._spans) < _MAX_SPANS:
            about: Attributes = {
                "octavo.request_id": seq.request.submit.request_id,
                "octavo.candidate": seq.candidate_index,
                "octavo.output_tokens": seq.num_output_tokens,
                "octavo.cached_tokens": seq.num_cached_tokens,
                "octavo.preemptions": seq.num_preemptions,
            }
            self._spans.append(SpanRecord(name, seq.request.submit.traceparent, start, end, about))
