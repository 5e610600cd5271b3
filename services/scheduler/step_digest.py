"""Digests what a step sampled: tokens are appended, endings decided."""

from __future__ import annotations

import math
from array import array

from google.rpc import code_pb2

from octavo.services.scheduler.capacity import Capacity
from octavo.services.scheduler.config import BLOCK_SIZE
from octavo.services.scheduler.endings import Endings
from octavo.services.scheduler.outputs import (
    LogprobReader,
    WorkerMisbehavedError,
    length_reason,
    read_column,
    stop_reason,
)
from octavo.services.scheduler.pooling import vectors_of
from octavo.services.scheduler.sequence import Sequence, SequenceState
from octavo.services.scheduler.sequence_states import SequenceStates
from octavo.services.scheduler.suspects import Suspects
from octavo.services.scheduler.tally import Tally
from octavo.services.scheduler.worker_group import StepInFlight, WorkerGroup
from octavo.worker.v1 import worker_pb2

# A worker's answers for rows without a token: see StepResult.token_ids.
NOT_FINITE, NOT_READY, NOTHING_ALLOWED, TOO_COMPLEX = 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD, 0xFFFFFFFC


class StepDigest:
    """Takes a worker's answers, in the order of its plans."""

    def __init__(
        self, states: SequenceStates, suspects: Suspects, endings: Endings, capacity: Capacity, tally: Tally
    ) -> None:
        self._capacity = capacity
        self._tally = tally
        self._states = states
        self._suspects = suspects
        self._endings = endings

    def digest(self, group: WorkerGroup, result: worker_pb2.StepResult, now: float) -> bool:
        """Digest an answer; False if it is of a step that was answered before.

        This loop runs for every token: it is kept flat. Raises WorkerMisbehavedError.
        """
        if result.step_id <= group.num_steps - len(group.in_flight):
            return False
        if not group.in_flight or group.in_flight[0].step_id != result.step_id:
            raise WorkerMisbehavedError(f"step {result.step_id} was answered out of order")
        step = group.in_flight[0]
        if group.model.makes_vectors:
            self._digest_vectors(group, step, result, now)
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
        group.in_flight.popleft()
        gap_s = now - group.last_result_at
        num_first = self._tally.answered(step, result, group.measure(step, now), now)
        if step.scored:
            self._digest_prompts(step, logprobs)
        if counts is not None:
            self._advance(step, counts)
        num_unwanted = num_accepted = 0
        before: Sequence | None = None
        for seq, token in zip(sampled, token_ids, strict=True):
            seq.num_pending -= 1
            is_wanted = seq.state is not SequenceState.FINISHED and token < TOO_COMPLEX
            row = logprobs.read(seq.num_logprobs) if seq.num_logprobs >= 0 else None
            if not is_wanted:
                num_unwanted += 1
                if seq.state is not SequenceState.FINISHED:  # else it ended while this step was running
                    self._no_token(seq, token)
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
            if seq is before:
                seq.num_accepted += 1
                num_accepted += 1
            before = seq
            if not seq.first_token_at:
                seq.first_token_at = now
            seq.last_token_at = now
            if token in seq.stop_ids and len(tokens) > seq.min_stop_tokens:
                self._endings.finish(seq, stop_reason(seq, token), now, stop_token_id=token)
            elif len(tokens) >= seq.max_tokens:
                self._at_full_length(seq, now)
            elif seq.num_pending == 0 and seq.state is SequenceState.WAITING:
                self._states.settle(seq)
        self._tally.digested(len(token_ids) - num_unwanted, num_first, num_accepted, gap_s)
        group.made(len(token_ids), len(step.sampled))
        if self._suspects:
            self._suspects.survived(step.sampled)
        return True

    def _at_full_length(self, seq: Sequence, now: float) -> None:
        """End a sequence, or let it go on where there is more room for it than here."""
        if len(seq.tokens) >= seq.max_len or self._capacity.is_exhausted(seq):
            self._endings.finish(seq, length_reason(seq), now)
        else:
            self._states.preempt(seq)

    def _check_counts(self, group: WorkerGroup, step: StepInFlight, counts: array[int]) -> None:
        """Raise WorkerMisbehavedError if rows cannot have so many tokens."""
        if len(counts) != len(step.sampled):
            raise WorkerMisbehavedError(
                f"step {step.step_id} samples {len(step.sampled)} rows, `token_counts` has {len(counts)}"
            )
        least, most = (1, 1) if group.max_row_tokens == 1 else (0, group.max_row_tokens)
        for seq, count in zip(step.sampled, counts, strict=True):
            # Tokens that its blocks hold, and one that is drawn after them.
            room = len(seq.blocks) * BLOCK_SIZE + 1 if seq.state is SequenceState.RUNNING else math.inf
            if not least <= count <= most or (count > 1 and len(seq.tokens) + count > room):
                raise WorkerMisbehavedError(f"step {step.step_id} cannot have made {count} tokens of {seq}")

    def _advance(self, step: StepInFlight, counts: array[int]) -> None:
        """Correct what was thought when the plan was made, that each row makes one token."""
        for seq, count in zip(step.sampled, counts, strict=True):
            if count == 1:
                continue
            seq.num_pending += count - 1
            if seq.state is SequenceState.RUNNING:
                seq.num_computed += count - 1
            elif seq.state is SequenceState.WAITING and seq.num_pending == 0:
                self._states.settle(seq)

    def _digest_prompts(self, step: StepInFlight, logprobs: LogprobReader) -> None:
        """Take the log probabilities of prompt tokens. What was computed again is known already."""
        for row in step.scored:
            seq = row.seq
            entries = [logprobs.read(seq.request.submit.prompt_logprobs) for _ in range(row.start, row.end)]
            known = max(seq.num_scored - row.start, 0)
            if seq.state is not SequenceState.FINISHED and known < len(entries):
                assert seq.num_scored >= row.start, seq
                seq.outbox.add_prompt_logprobs(seq, seq.num_scored, entries[known:])
                seq.num_scored = row.end

    def _digest_vectors(
        self, group: WorkerGroup, step: StepInFlight, result: worker_pb2.StepResult, now: float
    ) -> None:
        """Digest an answer that has vectors: each ends its sequence."""
        vectors = vectors_of(result, len(step.sampled))
        group.in_flight.popleft()
        self._tally.answered(step, result, group.measure(step, now), now)
        for seq, vector in zip(step.sampled, vectors, strict=True):
            seq.num_pending -= 1
            if seq.state is SequenceState.FINISHED:
                continue
            if not vector:
                self._endings.spoil(seq)
                continue
            seq.outbox.add_vector(seq, vector)
            self._endings.stop(seq)

    def _no_token(self, seq: Sequence, answer: int) -> None:
        """Decide what becomes of a sequence that got no token."""
        if answer == NOT_READY:
            self._states.compute_again(seq)
        elif answer == NOT_FINITE:
            self._endings.spoil(seq)
        else:
            message = "the constraint takes too much time or memory: make it simpler"
            if answer == NOTHING_ALLOWED:
                message = "the constraint leaves no token that the other settings and the model's vocabulary allow"
            self._endings.fail(seq.request, code_pb2.INVALID_ARGUMENT, "INVALID_CONSTRAINT", message)
