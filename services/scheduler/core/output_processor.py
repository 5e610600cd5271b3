"""The output processor takes what a step sampled: it appends tokens and decides which sequences end."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from typing import Any

from google.rpc import code_pb2

from octavo.services.scheduler.config import BLOCK_SIZE
from octavo.services.scheduler.core.capacity import Capacity
from octavo.services.scheduler.core.lifecycle import Lifecycle
from octavo.services.scheduler.core.metrics import SchedulerMetrics
from octavo.services.scheduler.core.quarantine import Quarantine
from octavo.services.scheduler.groups.worker_group import StepInFlight, WorkerGroup
from octavo.services.scheduler.requests.outbox import LogprobRow, Outbox
from octavo.services.scheduler.requests.sequence import Sequence, SequenceState
from octavo.worker.v1 import worker_pb2

# A worker's answers for rows without a token: see StepResult.token_ids.
NOT_FINITE, NOT_READY, NOTHING_ALLOWED, TOO_COMPLEX = 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD, 0xFFFFFFFC

_ELEMENT_BYTES = 4  # of a vector


class WorkerMisbehavedError(Exception):
    """A worker's answer does not fit what it was asked. The caller gives the worker up."""


def read_column(code: str, data: bytes) -> array[Any]:
    """Return a column of a worker's answer, of 4 byte elements "I" or "f". Raises WorkerMisbehavedError."""
    if len(data) % 4:
        raise WorkerMisbehavedError(f"a column of a step's answer has {len(data)} bytes, and elements of 4")
    return array(code, data)


class LogprobReader:
    """Walks through the log probability columns of a StepResult."""

    def __init__(self, result: worker_pb2.StepResult) -> None:
        self._chosen = read_column("f", result.logprobs)
        self._ranks = read_column("I", result.ranks)
        self._ids = read_column("I", result.candidate_token_ids)
        self._values = read_column("f", result.candidate_logprobs)
        self._row = self._candidate = 0

    def read(self, width: int) -> LogprobRow:
        """Return the next row, with `width` alternatives. Raises WorkerMisbehavedError."""
        row, begin, end = self._row, self._candidate, self._candidate + width
        rows, values = min(len(self._chosen), len(self._ranks)), min(len(self._ids), len(self._values))
        if row >= rows or end > values:
            raise WorkerMisbehavedError("log probabilities are missing from a step's answer")
        self._row, self._candidate = row + 1, end
        return self._chosen[row], self._ranks[row], self._ids[begin:end], self._values[begin:end]


def vectors_of(result: worker_pb2.StepResult, count: int) -> Iterator[bytes]:
    """Yield the `count` vectors of a step's answer; one that was not finite is empty. Raises WorkerMisbehavedError."""
    sizes = read_column("I", result.vector_sizes)
    if len(sizes) != count or _ELEMENT_BYTES * sum(sizes) != len(result.vectors):
        raise WorkerMisbehavedError(
            f"step {result.step_id} makes {count} vectors, answered were {len(sizes)} in {len(result.vectors)} bytes"
        )
    return _slices(result.vectors, sizes)


def _slices(data: bytes, sizes: array[int]) -> Iterator[bytes]:
    start = 0
    for size in sizes:
        end = start + _ELEMENT_BYTES * size
        yield data[start:end]
        start = end


class OutputProcessor:
    """Takes a worker's answers, in the order of its plans."""

    def __init__(
        self, lifecycle: Lifecycle, quarantine: Quarantine, capacity: Capacity, metrics: SchedulerMetrics
    ) -> None:
        self._lifecycle = lifecycle
        self._quarantine = quarantine
        self._capacity = capacity
        self._metrics = metrics

    def process(self, group: WorkerGroup, result: worker_pb2.StepResult, now: float) -> bool:
        """Take an answer; False if it is of a step that was answered before.

        This loop runs for every token: it is kept flat. Raises WorkerMisbehavedError.
        """
        if result.step_id <= group.num_steps - len(group.in_flight):
            return False
        if not group.in_flight or group.in_flight[0].step_id != result.step_id:
            raise WorkerMisbehavedError(f"step {result.step_id} was answered out of order")
        step = group.in_flight[0]
        if group.model.makes_vectors:
            self._process_vectors(group, step, result, now)
            return True
        token_ids = read_column("I", result.token_ids)
        sampled = step.sampled
        counts = read_column("I", result.token_counts) if result.token_counts else None
        if counts is not None:
            self._check_counts(group, step, counts)
            sampled = [seq for seq, count in zip(sampled, counts, strict=True) for _ in range(count)]
        if len(token_ids) != len(sampled):
            raise WorkerMisbehavedError(
                f"step {step.step_id} samples {len(sampled)} tokens, answered were {len(token_ids)}"
            )
        logprobs = LogprobReader(result)
        gap_s = now - group.last_result_at
        num_first = self._metrics.answered(step, result, group.end_step(now), now)
        if step.scored:
            self._process_prompts(step, logprobs)
        if counts is not None:
            self._correct(step, counts)
        num_unwanted = num_accepted = 0
        before: Sequence | None = None
        outbox: Outbox | None = None
        finished = SequenceState.FINISHED
        for seq, token in zip(sampled, token_ids, strict=True):
            row = logprobs.read(seq.num_logprobs) if seq.num_logprobs >= 0 else None
            if seq.state is finished or token >= TOO_COMPLEX:
                num_unwanted += 1
                seq.lose_token()
                if seq.state is not finished:  # else it ended while this step was running
                    self._no_token(seq, token)
                continue
            if outbox is not seq.outbox:
                outbox = seq.outbox
                handles, candidate_indexes, new_tokens = outbox.handles, outbox.candidate_indexes, outbox.token_ids
            if row is not None:
                outbox.add_logprobs(row)
                if seq.request.submit.resume_window_ms:
                    seq.keep_logprobs(row)
            num_tokens = seq.append_token(token, now)
            handles.append(seq.handle)
            candidate_indexes.append(seq.candidate_index)
            new_tokens.append(token)
            if seq is before:
                seq.accept_token()
                num_accepted += 1
            before = seq
            if token in seq.stop_ids and num_tokens > seq.min_stop_tokens:
                self._lifecycle.finish(seq, seq.stop_reason(token), now, stop_token_id=token)
            elif num_tokens >= seq.max_len_here:
                self._at_full_length(seq, now)
            elif seq.num_output_placeholders == 0 and seq.state is SequenceState.WAITING:
                self._lifecycle.settle(seq)
        self._metrics.processed(len(token_ids) - num_unwanted, num_first, num_accepted, gap_s)
        if group.limits.max_row_tokens > 1:
            group.times.record_rows(len(token_ids), len(step.sampled))
        if self._quarantine:
            self._quarantine.survived(step.sampled)
        return True

    def _at_full_length(self, seq: Sequence, now: float) -> None:
        """End a sequence, or let it go on where there is more room for it than here.

        To a scheduler that just started a larger worker may be on its way: one that an earlier scheduler had may
        have run there, and one that names a number of tokens that fits no worker so far may fit that one.
        """
        submit = seq.request.submit
        waits_for_larger = (submit.is_failover or submit.stop.max_new_tokens > 0) and self._capacity.may_grow(now)
        if len(seq.token_ids) >= seq.max_len or (self._capacity.is_exhausted(seq) and not waits_for_larger):
            self._lifecycle.finish(seq, seq.length_reason(), now)
        else:
            self._lifecycle.preempt(seq)

    def _check_counts(self, group: WorkerGroup, step: StepInFlight, counts: array[int]) -> None:
        """Raise WorkerMisbehavedError if rows cannot have as many tokens as `counts` says."""
        if len(counts) != len(step.sampled):
            raise WorkerMisbehavedError(
                f"step {step.step_id} samples {len(step.sampled)} rows, `token_counts` has {len(counts)}"
            )
        least, most = (1, 1) if group.limits.max_row_tokens == 1 else (0, group.limits.max_row_tokens)
        for seq, count in zip(step.sampled, counts, strict=True):
            # Tokens that its blocks hold, and one that is drawn after them.
            room = len(seq.block_table) * BLOCK_SIZE + 1 if seq.state is SequenceState.RUNNING else math.inf
            if not least <= count <= most or (count > 1 and len(seq.token_ids) + count > room):
                raise WorkerMisbehavedError(f"step {step.step_id} cannot have made {count} tokens of {seq}")

    def _correct(self, step: StepInFlight, counts: array[int]) -> None:
        """Correct what was thought when the plan was made, that each row makes one token."""
        for seq, count in zip(step.sampled, counts, strict=True):
            if count == 1:
                continue
            seq.correct_num_sampled(count)
            if seq.state is SequenceState.WAITING:
                self._lifecycle.settle(seq)

    def _process_prompts(self, step: StepInFlight, logprobs: LogprobReader) -> None:
        """Take the log probabilities of prompt tokens. What was computed again is known already."""
        for row in step.scored:
            seq = row.seq
            entries = [logprobs.read(seq.request.submit.prompt_logprobs) for _ in range(row.start, row.end)]
            known = max(seq.num_scored_tokens - row.start, 0)
            if seq.state is not SequenceState.FINISHED and known < len(entries):
                assert seq.num_scored_tokens >= row.start, seq
                width = seq.request.submit.prompt_logprobs
                seq.outbox.add_prompt_logprobs(seq.handle, width, seq.num_scored_tokens, entries[known:])
                seq.score_prompt(row.end)

    def _process_vectors(
        self, group: WorkerGroup, step: StepInFlight, result: worker_pb2.StepResult, now: float
    ) -> None:
        """Take an answer that has vectors: each ends its sequence."""
        vectors = vectors_of(result, len(step.sampled))
        self._metrics.answered(step, result, group.end_step(now), now)
        for seq, vector in zip(step.sampled, vectors, strict=True):
            seq.lose_token()
            if seq.state is SequenceState.FINISHED:
                continue
            if not vector:
                self._lifecycle.invalidate(seq)
                continue
            seq.outbox.add_vector(seq.handle, seq.candidate_index, vector)
            self._lifecycle.stop(seq)

    def _no_token(self, seq: Sequence, answer: int) -> None:
        """Decide what becomes of a sequence that got no token."""
        if answer == NOT_READY:
            self._lifecycle.compute_again(seq)
        elif answer == NOT_FINITE:
            self._lifecycle.invalidate(seq)
        else:
            message = "the constraint takes too much time or memory: make it simpler"
            if answer == NOTHING_ALLOWED:
                message = "the constraint and the other settings leave no token of the model's vocabulary to produce"
            self._lifecycle.fail(seq.request, code_pb2.INVALID_ARGUMENT, "INVALID_CONSTRAINT", message)
